"""The docs are true: flags are the parser's, commands and code run, both READMEs agree, what is named exists."""

import json
import re
import shlex
import shutil
from collections.abc import Iterator
from pathlib import Path

import pytest

import data_loader
import evaluation
import export
import search
import train
import visualization
from cliptune.cli import flags_of, is_positional, load_config, parse_settings
from cliptune.data.sample_data import create_sample_dataset
from cliptune.export.card import USE
from cliptune.settings import Config, Settings
from cliptune.stage_settings import (
    EvaluationSettings,
    ExportSettings,
    InspectSettings,
    SearchSettings,
    VisualizationSettings,
)

ROOT = Path(__file__).parent.parent
ENGLISH, CHINESE = ROOT / "README.md", ROOT / "README.zh-CN.md"
DOCS = [ENGLISH, CHINESE, *sorted((ROOT / "docs").glob("*.md"))]
STAGES = {
    "train": train,
    "data_loader": data_loader,
    "evaluation": evaluation,
    "visualization": visualization,
    "export": export,
    "search": search,
}
SETTINGS: dict[str, type[Settings]] = {
    "train": Config,
    "data_loader": InspectSettings,
    "evaluation": EvaluationSettings,
    "visualization": VisualizationSettings,
    "export": ExportSettings,
    "search": SearchSettings,
}
COMMANDS = {
    "cliptune-train": "train",
    "cliptune-data": "data_loader",
    "cliptune-evaluate": "evaluation",
    "cliptune-visualize": "visualization",
    "cliptune-export": "export",
    "cliptune-search": "search",
}
"""The installed commands, and the stages that they run."""
FLAGS_OF_THE_SPEC = {
    "data_dir", "model_name", "batch_size", "num_epochs", "learning_rate", "freeze_backbone", "device",
}  # fmt: skip
FLAG_ROW = re.compile(r"^\| `--(\w+)` \| `([^|]+)` \|", re.MULTILINE)


def read(path: Path) -> str:
    return path.read_text(encoding="utf-8")


def blocks(text: str) -> list[tuple[str, str]]:
    """Language and content of each fenced block."""
    return re.findall(r"^```(\w*)\n(.*?)^```$", text, re.MULTILINE | re.DOTALL)


def without_comments(language: str, block: str) -> str:
    """What no translation changes: code without its comments, a tree's names without what they are said to hold.

    `train.py --resume   # go on` -> `train.py --resume`; `├── data/   index formats` -> `├── data/`.
    """
    is_tree = language == "text" and "├──" in block
    if language in {"python", "bash"}:
        return re.sub(r"(^|[ \t]+)#.*$", "", block, flags=re.MULTILINE)
    return re.sub(r" {2,}\S.*$", "", block, flags=re.MULTILINE) if is_tree else block


def code_cells(text: str) -> list[list[str]]:
    """The parts of every table row that are code, which no translation changes."""
    return [re.findall(r"`[^`]+`", line)[:2] for line in text.splitlines() if line.startswith("| `")]


def commands(path: Path) -> Iterator[tuple[str, tuple[str, ...]]]:
    """Stage and arguments of every command in a document's shell blocks, whatever starts it."""
    for language, block in blocks(read(path)):
        for line in block.replace("\\\n", " ").splitlines() if language == "bash" else ():
            words = shlex.split(line, comments=True)
            for position, word in enumerate(words):
                stage = COMMANDS.get(word, word.removesuffix(".py") if word.endswith(".py") else "")
                if stage in STAGES:
                    yield stage, tuple(words[position + 1 :])


def rows_of(settings: type[Settings]) -> list[tuple[str, str]]:
    named = (flag for flag in flags_of(settings) if not is_positional(flag.field))
    return sorted((flag.name, json.dumps(flag.field.default)) for flag in named)


def test_both_readmes_have_the_same_sections_code_and_tables() -> None:
    english, chinese = read(ENGLISH), read(CHINESE)
    assert len(re.findall("^##+ ", english, re.MULTILINE)) == len(re.findall("^##+ ", chinese, re.MULTILINE))
    for ours, theirs in zip(blocks(english), blocks(chinese), strict=True):
        assert (ours[0], without_comments(*ours)) == (theirs[0], without_comments(*theirs))
    for row, translated in zip(code_cells(english), code_cells(chinese), strict=True):
        assert row[0] == translated[0]
        assert len(row) == len(translated)


def test_what_may_differ_between_the_readmes_is_told_apart() -> None:
    assert without_comments("bash", "a --b 1   # why\n# all\nc\n") == "a --b 1\n\nc\n"
    assert without_comments("text", "train.py   stage\n├── a.py, b/   two\n") == "train.py\n├── a.py, b/\n"
    assert without_comments("text", "L     = (x) / 2\n") == "L     = (x) / 2\n"
    assert without_comments("json", '{"a":  "#1"}\n') == '{"a":  "#1"}\n'


@pytest.mark.parametrize("path", [ENGLISH, CHINESE], ids=lambda path: path.name)
def test_the_daily_flags_are_the_parsers(path: Path) -> None:
    rows = FLAG_ROW.findall(read(path))
    assert {name for name, _ in rows} >= FLAGS_OF_THE_SPEC
    assert set(rows) <= set(rows_of(Config))


@pytest.mark.parametrize(
    ("document", "stages"),
    [
        ("TRAINING.md", ["train"]),
        ("DATA.md", ["data_loader"]),
        ("EVALUATION.md", ["evaluation", "visualization"]),
        ("EXPORT.md", ["export"]),
        ("SEARCH.md", ["search"]),
    ],
)
def test_the_complete_flag_tables_are_the_parsers(document: str, stages: list[str]) -> None:
    expected = [row for stage in stages for row in rows_of(SETTINGS[stage])]
    assert sorted(FLAG_ROW.findall(read(ROOT / "docs" / document))) == sorted(expected)


def test_every_command_is_accepted() -> None:
    found = [command for path in DOCS for command in commands(path)]
    assert {stage for stage, _ in found} == set(STAGES)
    assert len(found) >= 40
    for stage, arguments in found:
        if stage == "train":
            load_config(list(arguments), description="")
        else:
            parse_settings(SETTINGS[stage], list(arguments), description="")


@pytest.mark.slow
def test_the_code_and_the_light_stages_run(
    documented_dir: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Every Python snippet and command but training, in a folder with data and a trained model.

    Exports, and the code that loads them, have a test of their own: each takes its library a process and some seconds.
    """
    monkeypatch.chdir(tmp_path)
    create_sample_dataset("data", 30)
    (tmp_path / "model-checkpoint").symlink_to(documented_dir / "model-checkpoint")
    shutil.copytree(documented_dir / "results", "results")
    snippets = [block for path in DOCS for block in blocks(read(path)) if block[0] == "python"]
    snippets = [block for block in snippets if block[1] not in USE.values()]
    for code in dict.fromkeys(without_comments(*snippet) for snippet in snippets):  # both READMEs have the same ones
        exec(code, {})
    assert "tensor" in capsys.readouterr().out
    for stage, arguments in dict.fromkeys(command for path in DOCS for command in commands(path)):
        if stage not in {"train", "export"} and "--serve" not in arguments:
            assert STAGES[stage].main(list(arguments)) == 0, (stage, arguments)


@pytest.mark.parametrize("stage", STAGES)
def test_help_of_every_stage(stage: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as done:
        STAGES[stage].main(["--help"])
    assert done.value.code == 0
    assert "--" in capsys.readouterr().out


@pytest.mark.parametrize("path", DOCS, ids=lambda path: path.name)
def test_links_lead_somewhere(path: Path) -> None:
    for link in re.findall(r"\]\(([^)]+)\)", read(path)):
        assert (path.parent / link).exists(), link


def test_the_structure_is_the_one_on_the_disk() -> None:
    tree = next(block for language, block in blocks(read(ENGLISH)) if language == "text" and "cliptune/" in block)
    parent = ""
    for line in without_comments("text", tree).splitlines():
        indented = line.startswith(("├", "└"))
        names = [name.strip() for name in line.lstrip("├└─ ").split(",")]
        parent = parent if indented else names[0]
        for name in names:
            assert name == "cache/" or (ROOT / (parent if indented else "") / name).exists(), name


def test_the_files_and_tests_that_docs_name_exist() -> None:
    sources = "\n".join(read(path) for path in sorted((ROOT / "tests").rglob("*.py")))
    defined = set(re.findall(r"^def (test_\w+)\(", sources, re.MULTILINE))
    for path in DOCS:
        text = read(path)
        named = re.findall(r"`((?:cliptune|tests|docs|benchmarks)/[\w/.]+)`", text)
        assert not [name for name in named if not (ROOT / name).exists()], path.name
        assert not set(re.findall(r"`(test_\w+)`", text)) - defined, path.name


def test_the_screenshots_of_the_readmes_are_there_and_small() -> None:
    """They are the toolkit's own: `benchmarks/screenshots.py` makes them."""
    named = [re.findall(r"!\[[^\]]+\]\(([^)]+)\)", read(path)) for path in (ENGLISH, CHINESE)]
    assert named[0] == named[1]
    assert sorted(named[0]) == sorted(str(path.relative_to(ROOT)) for path in (ROOT / "docs" / "images").iterdir())
    for name in named[0]:
        assert 10_000 < (ROOT / name).stat().st_size < 300_000, name
        assert (ROOT / name).read_bytes().startswith(b"\x89PNG")
