"""The toolkit installed: from any folder, beside any file of the user's; and one list of dependencies."""

import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
COMMANDS = {
    "train": "train",
    "evaluate": "evaluation",
    "visualize": "visualization",
    "data": "data_loader",
    "export": "export",
}
USER_FILES = ("config", "rows", "memory", "runtime", "parallel", "train", "evaluation")


def run(*command: str, folder: Path, path: str) -> subprocess.CompletedProcess[str]:
    environment = {**os.environ, "PYTHONPATH": path}
    return subprocess.run(command, cwd=folder, env=environment, capture_output=True, text=True, check=False)


@pytest.fixture
def notebook_dir(tmp_path: Path) -> Path:
    """A user's folder, with modules of his own that have common names."""
    folder = tmp_path / "notebooks"
    folder.mkdir()
    for name in USER_FILES:
        (folder / f"{name}.py").write_text("x = 1\n")
    return folder


@pytest.fixture(scope="module")
def site(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Where the wheel, built from a copy of the checkout, is installed; without any network."""
    base = tmp_path_factory.mktemp("wheel")
    source = base / "source"
    shutil.copytree(ROOT / "cliptune", source / "cliptune", ignore=shutil.ignore_patterns("__pycache__"))
    for path in [*ROOT.glob("*.py"), *(ROOT / name for name in ("pyproject.toml", "README.md", "LICENSE"))]:
        shutil.copy(path, source)
    pip = [sys.executable, "-m", "pip", "--quiet", "--disable-pip-version-check"]
    no_network = ["--no-deps", "--no-index"]
    for command in (
        [*pip, "wheel", *no_network, "--no-build-isolation", "--wheel-dir", str(base), str(source)],
        [*pip, "install", *no_network, "--find-links", str(base), "--target", str(base / "site"),
         "clip-finetuning-toolkit"],
    ):  # fmt: skip
        done = subprocess.run(command, capture_output=True, text=True, check=False, cwd=base)
        assert done.returncode == 0, done.stderr
    return base / "site"


def files_below(folder: Path) -> set[Path]:
    """The files of the package, without what Python and numba compile beside them."""
    found = (path.relative_to(folder) for path in folder.glob("cliptune/**/*") if path.is_file())
    return {path for path in found if "__pycache__" not in path.parts}


@pytest.mark.slow
def test_the_wheel_holds_the_stages_and_the_package_and_nothing_else(site: Path) -> None:
    top = {path.name for path in site.iterdir() if path.name not in {"bin", "__pycache__"}}
    stages = {path.name for path in ROOT.glob("*.py")}
    assert {name for name in top if not name.endswith(".dist-info")} == {*stages, "cliptune"}
    assert files_below(site) == files_below(ROOT)


@pytest.mark.slow
def test_installed_it_runs_beside_any_file(
    site: Path, notebook_dir: Path, documented_dir: Path, sample_dir: Path, tmp_path: Path
) -> None:
    """Every Python snippet of the README, from another folder."""
    (notebook_dir / "data").symlink_to(sample_dir)
    (notebook_dir / "model-checkpoint").symlink_to(documented_dir / "model-checkpoint")
    readme = (ROOT / "README.md").read_text(encoding="utf-8")
    snippets = re.findall(r"^```python\n(.*?)^```$", readme, re.MULTILINE | re.DOTALL)
    assert len(snippets) >= 3
    where = "import clip_model, data_loader; print(clip_model.__file__, data_loader.__file__)"
    code = "\n".join(["from clip_model import CLIPModel", where, *snippets])
    done = run(sys.executable, "-c", code, folder=notebook_dir, path=str(site))
    assert done.returncode == 0, done.stderr
    assert done.stdout.splitlines()[0].split() == [str(site / "clip_model.py"), str(site / "data_loader.py")]


@pytest.mark.slow
@pytest.mark.parametrize("command", COMMANDS)
def test_the_commands_answer_before_slow_imports(command: str, site: Path, notebook_dir: Path, tmp_path: Path) -> None:
    (tmp_path / "torch.py").write_text("raise AssertionError('torch was imported')\n")
    program, path = str(site / "bin" / f"cliptune-{command}"), f"{tmp_path}{os.pathsep}{site}"
    done = run(program, "--help", folder=notebook_dir, path=path)
    assert (done.returncode, done.stderr) == (0, "")
    assert f"usage: {COMMANDS[command]}.py" in done.stdout
    done = run(program, "--no_such_flag", folder=notebook_dir, path=path)
    assert (done.returncode, len(done.stderr.splitlines())) == (2, 1)


@pytest.mark.slow
def test_a_command_does_what_its_stage_does(site: Path, notebook_dir: Path) -> None:
    done = run(
        str(site / "bin" / "cliptune-data"), "--data_dir", "data", "--num_samples", "6", folder=notebook_dir,
        path=str(site),
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert (notebook_dir / "data" / "data.json").is_file()


@pytest.mark.slow
@pytest.mark.parametrize("module", ["clip_model", "data_loader"])
def test_a_checkout_on_the_path_is_not_shadowed(module: str, notebook_dir: Path) -> None:
    done = run(sys.executable, "-c", f"import {module}", folder=notebook_dir, path=str(ROOT))
    assert done.returncode == 0, done.stderr


@pytest.mark.slow
@pytest.mark.parametrize("has_pkg_resources", [True, False])
def test_clip_needs_no_pkg_resources_and_leaves_none(has_pkg_resources: bool, tmp_path: Path) -> None:
    """With setuptools 81 or later there is none; where there is one, it is not touched."""
    text = "x = 1\n" if has_pkg_resources else "raise ModuleNotFoundError('No module named pkg_resources')\n"
    (tmp_path / "pkg_resources.py").write_text(text)
    code = (
        "import sys, cliptune.runtime.openai_clip as o\n"
        "assert o.import_clip().tokenize(['a dog']).shape == (1, 77)\n"
        "assert 'pkg_resources' not in sys.modules\n"
        "try:\n    import pkg_resources\nexcept ModuleNotFoundError: print('none')\nelse: print(pkg_resources.x)\n"
    )
    done = run(sys.executable, "-c", code, folder=tmp_path, path=f"{tmp_path}{os.pathsep}{ROOT}")
    assert (done.returncode, done.stdout.strip()) == (0, "1" if has_pkg_resources else "none"), done.stderr


def listed(path: Path) -> list[str]:
    lines = path.read_text().splitlines()
    return [line for line in lines if line and not line.startswith(("#", "-r "))]


def test_dependencies_are_the_same_in_pyproject_and_requirements() -> None:
    """By text, since Python 3.10 has no reader of TOML."""
    text = (ROOT / "pyproject.toml").read_text()

    def array(name: str) -> list[str]:
        match = re.search(rf"^{name} = \[(.*?)\]( #.*)?$", text, re.MULTILINE | re.DOTALL)
        assert match, name
        return re.findall(r'"([^"]+)"', re.sub(r"#.*", "", match[1].replace("[bench,export,search]", "")))

    dependencies = array("dependencies")
    assert listed(ROOT / "requirements.txt") == [line for line in dependencies if not line.startswith("clip-anytorch")]
    extras = {line for name in ("bench", "dev", "export", "search") for line in array(name)} - {
        "clip-finetuning-toolkit"
    }
    assert listed(ROOT / "requirements-dev.txt") == sorted(extras, key=str.lower)
    assert all(">=" in line for line in [*dependencies, *extras])
