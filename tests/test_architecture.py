"""The house rules of docs/ARCHITECTURE.md, held against the code."""

import ast
import os
import subprocess
import sys
from pathlib import Path

import pytest

from cliptune import settings
from cliptune.model import architectures

ROOT = Path(__file__).parent.parent
STAGES = ("train", "evaluation", "data_loader", "visualization", "search", "export")
MODULES = {
    ".".join(path.relative_to(ROOT).with_suffix("").parts).removesuffix(".__init__"): path
    for path in sorted([*ROOT.glob("*.py"), *ROOT.glob("cliptune/**/*.py")])
}


def test_the_contracts_of_the_rooms_hold() -> None:
    """Those of pyproject.toml: arrows between rooms go one way, rooms see no stage and no settings."""
    pytest.importorskip("importlinter")
    command = [str(Path(sys.executable).with_name("lint-imports")), "--no-cache", "--no-logo"]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout


def imports_of(path: Path) -> set[str]:
    found: set[str] = set()
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.module:
            found.add(node.module)
    return found


def test_only_the_stages_are_top_level_modules() -> None:
    assert {path.stem for path in ROOT.glob("*.py")} == {*STAGES, "clip_model"}


@pytest.mark.parametrize("name", ["clip_model", "data_loader"])
def test_what_notebooks_import_imports_no_stage(name: str) -> None:
    """So a user's own `train.py` or `evaluation.py` beside a notebook does no harm."""
    assert not imports_of(ROOT / f"{name}.py") & {*STAGES, "clip_model"}


@pytest.mark.slow
def test_nobody_imports_train() -> None:
    assert not [path for path in MODULES.values() if "train" in imports_of(path)]


@pytest.mark.slow
@pytest.mark.parametrize(
    "name",
    [
        "cliptune.cli",
        "cliptune.commands",
        "cliptune.data.formats",
        "cliptune.data.sample_data",
        "cliptune.model.architectures",
        "cliptune.model.published",
        "cliptune.results",
        "cliptune.settings",
        "cliptune.stage_settings",
        "visualization",
    ],
)
def test_light_modules_stay_light(name: str) -> None:
    code = f"import {name}, sys; sys.exit(bool({{'torch', 'clip', 'matplotlib.figure'}} & sys.modules.keys()))"
    assert subprocess.run([sys.executable, "-c", code], cwd=ROOT, check=False).returncode == 0


SLOW_PACKAGES = ("torch", "torchvision", "numpy", "PIL", "matplotlib", "tensorboard", "clip", "tqdm")


def run_without_slow_packages(stubs: Path, *argv: str) -> subprocess.CompletedProcess[str]:
    """Run a script of this toolkit where importing any slow package fails."""
    for name in SLOW_PACKAGES:
        (stubs / f"{name}.py").write_text(f"raise AssertionError('{name} was imported')\n")
    environment = {**os.environ, "PYTHONPATH": str(stubs)}
    command = [sys.executable, str(ROOT / argv[0]), *argv[1:]]
    return subprocess.run(command, cwd=stubs, env=environment, capture_output=True, text=True, check=False)


@pytest.mark.slow
@pytest.mark.parametrize("stage", STAGES)
def test_help_comes_before_slow_imports(stage: str, tmp_path: Path) -> None:
    done = run_without_slow_packages(tmp_path, f"{stage}.py", "--help")
    assert (done.returncode, done.stderr) == (0, "")
    assert f"usage: {stage}.py" in done.stdout
    assert "default:" in done.stdout


@pytest.mark.slow
@pytest.mark.parametrize("stage", STAGES)
def test_a_wrong_flag_is_told_before_slow_imports(stage: str, tmp_path: Path) -> None:
    done = run_without_slow_packages(tmp_path, f"{stage}.py", "--no_such_flag", "1")
    assert (done.returncode, done.stdout) == (2, "")
    assert done.stderr.startswith(f"{stage}.py: error: unknown flag --no_such_flag")
    assert len(done.stderr.splitlines()) == 1


@pytest.mark.slow
@pytest.mark.parametrize(
    ("argv", "message"),
    [
        (("train.py", "--batch_size", "0"), "--batch_size: expected greater than 0"),
        (("train.py",), "training.batch_size: expected a valid integer"),
        (("evaluation.py", "--split", "tset"), "--split: expected 'train'"),
        (("data_loader.py", "--val_split", "nan"), "--val_split: expected"),
    ],
)
def test_a_wrong_value_is_told_before_slow_imports(argv: tuple[str, ...], message: str, tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text('{"training": {"batch_size": "many"}}')
    done = run_without_slow_packages(tmp_path, *argv)
    assert (done.returncode, done.stdout) == (2, "")
    assert message in done.stderr


@pytest.mark.slow
def test_right_settings_go_on_to_the_slow_imports(tmp_path: Path) -> None:
    """The counter-proof: the stubs are found, so the tests above would fail if anything imported them."""
    for stage in STAGES:
        done = run_without_slow_packages(tmp_path, f"{stage}.py", *["a query"] * (stage == "search"))
        assert "was imported" in done.stderr, stage


@pytest.mark.slow
def test_importing_everything_prints_and_writes_nothing(tmp_path: Path) -> None:
    code = f"import sys; sys.path.insert(0, {str(ROOT)!r}); import {', '.join(MODULES)}"
    done = subprocess.run([sys.executable, "-c", code], cwd=tmp_path, capture_output=True, text=True, check=False)
    assert (done.returncode, done.stdout, done.stderr) == (0, "", "")
    assert list(tmp_path.iterdir()) == []


WATCH_IMPORTS = """
import logging, random
import numba, numpy, onnxruntime, PIL.Image, pyarrow, pydantic, simplejpeg, starlette, torch, torch.utils.tensorboard
import torchvision, tqdm, uvicorn
pydantic.create_model("First")  # pydantic looks for plugins once, in the files of all packages

watching = True

def watch(event, arguments):
    if not watching:
        return
    is_code = event == "open" and str(arguments[0]).endswith((".py", ".pyc", ".so"))
    if event.startswith("socket.") or event in {"open", "os.mkdir", "subprocess.Popen"} and not is_code:
        raise SystemExit(f"{event} {arguments}")

def state():
    generators = random.getstate(), str(numpy.random.get_state()), torch.get_rng_state().tolist()
    return generators, logging.root.handlers[:], logging.root.level, torch.cuda.is_initialized()

before = state()
sys.addaudithook(watch)
import MODULES
assert state() == before
watching = False  # what libraries do at the end of the process is not asked
"""


@pytest.mark.slow
def test_importing_touches_no_file_network_generator_log_or_device(tmp_path: Path) -> None:
    # all but the one that is built on OpenAI's classes, whose package reads its vocabulary: building a model imports it
    names = ", ".join(name for name in MODULES if name != "cliptune.model.modules")
    code = f"import sys; sys.path.insert(0, {str(ROOT)!r})" + WATCH_IMPORTS.replace("MODULES", names)
    done = subprocess.run([sys.executable, "-c", code], cwd=tmp_path, capture_output=True, text=True, check=False)
    assert (done.returncode, done.stderr) == (0, "")


def test_the_default_model_is_one() -> None:
    assert settings.DEFAULT_MODEL_NAME == architectures.DEFAULT_MODEL_NAME


def test_an_image_is_called_an_image() -> None:
    """In what is said of the code, which has one word for one thing."""
    sources = [*(ROOT / "cliptune").rglob("*.py"), *(ROOT / "benchmarks").glob("*.py"), *ROOT.glob("*.py")]
    said = [
        (source.name, node.lineno)
        for source in sources
        for node in ast.walk(ast.parse(source.read_text(encoding="utf-8")))
        if isinstance(node, ast.Expr) and isinstance(node.value, ast.Constant) and "picture" in str(node.value.value)
    ]
    assert not said
