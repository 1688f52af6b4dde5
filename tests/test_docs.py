"""The README is true: its flags are the parser's, both languages agree, its code runs."""

import json
import re
from pathlib import Path

import pytest

import data_loader
import evaluation
import train
import visualization
from cliptune.cli import flags_of, load_config
from cliptune.data.sample_data import create_sample_dataset
from cliptune.settings import Config

ROOT = Path(__file__).parent.parent
ENGLISH = (ROOT / "README.md").read_text(encoding="utf-8")
CHINESE = (ROOT / "README.zh-CN.md").read_text(encoding="utf-8")
STAGES = {"train": train, "data_loader": data_loader, "evaluation": evaluation, "visualization": visualization}


def blocks(text: str, language: str = r"\w*") -> list[str]:
    return re.findall(rf"^```{language}\n(.*?)^```$", text, re.MULTILINE | re.DOTALL)


def code_cells(text: str) -> list[list[str]]:
    """The parts of every table row that are code, which no translation changes."""
    return [re.findall(r"`[^`]+`", line) for line in text.splitlines() if line.startswith("| `")]


def test_both_languages_have_the_same_code_tables_and_sections() -> None:
    assert blocks(ENGLISH) == blocks(CHINESE)
    first = [cells[:2] for cells in code_cells(ENGLISH)]
    assert [cells[0] for cells in first] == [cells[0] for cells in code_cells(CHINESE)]
    assert len(re.findall("^## ", ENGLISH, re.MULTILINE)) == len(re.findall("^## ", CHINESE, re.MULTILINE))


@pytest.mark.parametrize("text", [ENGLISH, CHINESE])
def test_the_flag_table_is_the_parsers(text: str) -> None:
    rows = re.findall(r"^\| `--(\w+)` \| `([^|]+)` \|", text, re.MULTILINE)
    assert rows == [(flag.name, json.dumps(flag.field.default)) for flag in flags_of(Config)]


def test_every_training_command_of_the_readme_is_accepted() -> None:
    commands = [line for block in blocks(ENGLISH, "bash") for line in block.splitlines() if "train.py" in line]
    assert len(commands) >= 6
    for line in commands:
        load_config(line.split("train.py", 1)[1].split(), description="")


def test_the_readmes_code_and_stages_run(
    trained_dir: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    create_sample_dataset("data", 30)
    for name in ("model-checkpoint", "results"):
        (tmp_path / name).symlink_to(trained_dir / name)
    for code in blocks(ENGLISH, "python"):
        exec(code, {})
    assert "tensor" in capsys.readouterr().out
    for block in blocks(ENGLISH, "bash"):
        for line in block.splitlines():
            match = re.fullmatch(r"\.venv/bin/python (data_loader|evaluation|visualization)\.py (.*)", line)
            if match:
                assert STAGES[match[1]].main(match[2].split()) == 0, line


@pytest.mark.parametrize("stage", STAGES)
def test_help_of_every_stage(stage: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as done:
        STAGES[stage].main(["--help"])
    assert done.value.code == 0
    assert "--" in capsys.readouterr().out


def test_links_lead_somewhere() -> None:
    for text in (ENGLISH, CHINESE):
        for link in re.findall(r"\]\(([^)]+)\)", text):
            assert (ROOT / link).exists(), link
