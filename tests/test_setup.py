"""setup.sh's decisions, with stand-ins for the commands it calls; the real installation is what CI does."""

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
FAKE_PYTHON = """#!/bin/bash
echo "python $*" >>"$RECORD"
case "$*" in
  *version_info*) exit "${TOO_OLD:-0}" ;;
  "-m venv .venv") mkdir -p .venv/bin; cp "$0" .venv/bin/python ;;
  "-W ignore -")
    if [ -n "${REAL_CHECK:-}" ]; then exec "$REAL_PYTHON" -W ignore -; fi
    cat >/dev/null; echo "setup: device stand-in" ;;
  "- http"*) exit "${INDEX_DOWN:-0}" ;;
  *git+https*) exit "${GIT_INSTALL_FAILS:-0}" ;;
esac
"""


@pytest.fixture
def fresh(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A copy of the set-up files, and stand-ins first on the path; RECORD gets every call of Python."""
    for name in ("setup.sh", "requirements.txt", "requirements-dev.txt"):
        shutil.copy(ROOT / name, tmp_path / name)
    commands = {
        "python3": FAKE_PYTHON,
        "git": '#!/bin/bash\nexit "${GIT_DOWN:-0}"\n',
        "nvidia-smi": '#!/bin/bash\nexit "${NO_GPU:-1}"\n',
    }
    (tmp_path / "bin").mkdir()
    for name, text in commands.items():
        (tmp_path / "bin" / name).write_text(text)
        (tmp_path / "bin" / name).chmod(0o755)
    monkeypatch.setenv("PATH", f"{tmp_path / 'bin'}:{os.environ['PATH']}")
    monkeypatch.setenv("RECORD", str(tmp_path / "record"))
    monkeypatch.setenv("REAL_PYTHON", sys.executable)
    for name in ("TORCH_INDEX", "CLIP_SOURCE", "PYTHON"):
        monkeypatch.delenv(name, raising=False)
    return tmp_path


def run(folder: Path, *options: str, **environment: str) -> tuple[int, str, str]:
    """Run setup.sh; return its exit code, what it said, and the pip calls it made."""
    (folder / "record").write_text("")
    done = subprocess.run(
        ["bash", str(folder / "setup.sh"), *options],
        capture_output=True, text=True, check=False, env={**os.environ, **environment}, cwd="/",
    )  # fmt: skip
    calls = [line for line in (folder / "record").read_text().splitlines() if " -m pip " in line]
    return done.returncode, done.stdout + done.stderr, "\n".join(calls)


def test_bash_can_read_the_scripts() -> None:
    for name in ("setup.sh", ".ci/run"):
        subprocess.run(["bash", "-n", str(ROOT / name)], check=True)
        assert os.access(ROOT / name, os.X_OK)


def test_help_and_unknown_options(fresh: Path) -> None:
    code, output, calls = run(fresh, "--help")
    assert (code, calls) == (0, "")
    assert "--dev" in output
    code, output, calls = run(fresh, "--devel")
    assert (code, calls) == (2, "")
    assert "unknown option --devel" in output


def test_a_second_run_installs_nothing(fresh: Path) -> None:
    code, output, calls = run(fresh)
    assert code == 0, output
    assert "torch>=2.6 torchvision" in calls  # both in one command
    assert "device" in output
    code, output, calls = run(fresh)
    assert (code, calls) == (0, "")
    assert "installed already" in output
    _, _, calls = run(fresh, "--dev")
    assert calls.count("\n") == 0
    assert "requirements-dev.txt" in calls
    with (fresh / "requirements.txt").open("a") as file:
        file.write("# changed\n")
    assert "requirements.txt" in run(fresh)[2]


@pytest.mark.parametrize(
    ("environment", "expected"),
    [
        ({"INDEX_DOWN": "0"}, "--index-url https://download.pytorch.org/whl/cpu"),
        ({"INDEX_DOWN": "1"}, None),
        ({"NO_GPU": "0"}, None),
        ({"TORCH_INDEX": "https://mirror.example/cpu"}, "--index-url https://mirror.example/cpu"),
    ],
)
def test_where_torch_comes_from(environment: dict[str, str], expected: str | None, fresh: Path) -> None:
    code, output, calls = run(fresh, **environment)
    assert code == 0, output
    line = next(line for line in calls.splitlines() if "torchvision" in line)
    assert (expected in line) if expected else ("--index-url" not in line)
    assert ("does not answer" in output) == (environment.get("INDEX_DOWN") == "1")


def test_where_clip_comes_from(fresh: Path) -> None:
    calls = run(fresh, GIT_DOWN="0")[2]
    assert calls.index("install --quiet wheel setuptools<81") < calls.index("git+https://github.com/openai/CLIP.git")
    (fresh / ".venv" / ".setup-stamp").unlink()
    calls = run(fresh, GIT_DOWN="1")[2]
    assert "--no-deps clip-anytorch" in calls
    assert "github" not in calls
    assert "setuptools" not in calls
    assert "pypi" in (fresh / ".venv" / ".setup-stamp").read_text()


def test_clip_comes_from_pypi_where_its_repository_cannot_be_installed(fresh: Path) -> None:
    code, output, calls = run(fresh, GIT_INSTALL_FAILS="1")
    assert code == 0, output
    assert calls.index("git+https") < calls.index("install --quiet --no-deps clip-anytorch")


def test_an_override_is_followed_later_and_kept(fresh: Path) -> None:
    run(fresh)
    calls = run(fresh, TORCH_INDEX="https://mirror.example/cpu", CLIP_SOURCE="pypi")[2]
    assert "uninstall --quiet --yes torch torchvision" in calls
    assert "--index-url https://mirror.example/cpu" in calls
    assert "--no-deps clip-anytorch" in calls
    assert run(fresh)[2] == ""
    code, output, calls = run(fresh, CLIP_SOURCE="cvs")
    assert (code, calls) == (2, "")
    assert "CLIP_SOURCE is git or pypi" in output


def test_torch_and_torchvision_that_do_not_fit_are_caught(fresh: Path, tmp_path: Path) -> None:
    broken = tmp_path / "broken"
    broken.mkdir()
    (broken / "torch.py").write_text("def zeros(*shape): pass\n")
    # as the real one does: it imports, and fails where an operator is called
    (broken / "torchvision.py").write_text(
        "class ops:\n    def nms(*a): raise RuntimeError('operator torchvision::nms does not exist')\n"
    )
    code, output, _ = run(fresh, PYTHONPATH=str(broken), REAL_CHECK="1")
    assert code == 1
    assert "torchvision::nms does not exist" in output
    assert "rm -rf .venv && ./setup.sh" in output
    assert not (fresh / ".venv" / ".setup-stamp").exists()


def test_an_old_python_is_refused(fresh: Path) -> None:
    code, output, calls = run(fresh, TOO_OLD="1")
    assert (code, calls) == (1, "")
    assert "older than Python 3.10" in output
    assert "there is no python-of-nobody" in run(fresh, PYTHON="python-of-nobody")[1]
