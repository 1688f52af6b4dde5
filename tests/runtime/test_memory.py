"""A memory that is full is told in one line, during the imports and later."""

import errno
import os
import subprocess
import sys
from pathlib import Path

import pytest

import evaluation
from cliptune.cli import run_stage
from cliptune.runtime.memory import explain_out_of_memory

ROOT = Path(__file__).parent.parent.parent
ERRORS = [
    MemoryError(),
    MemoryError("out of memory: try less"),
    OSError(errno.ENOMEM, "Cannot allocate memory"),
    RuntimeError("[enforce fail at alloc_cpu.cpp:121] DefaultCPUAllocator: can't allocate memory: you tried ..."),
    RuntimeError("can't start new thread"),
    RuntimeError("std::bad_alloc"),
    ImportError("libtorch_cpu.so: failed to map segment from shared object"),
]


@pytest.mark.parametrize("error", ERRORS, ids=repr)
def test_it_is_one_line_and_code_1(error: Exception, capsys: pytest.CaptureFixture[str]) -> None:
    def stage() -> int:
        raise error

    assert run_stage(stage, name="train.py") == 1
    explain_out_of_memory(type(error), error, None)
    for line in capsys.readouterr().err.splitlines():
        assert "error: " in line
        assert "memory" in line


def test_other_errors_are_left_alone(capsys: pytest.CaptureFixture[str]) -> None:
    def stage() -> int:
        raise RuntimeError("another")

    with pytest.raises(RuntimeError, match="another"):
        run_stage(stage, name="train.py")
    explain_out_of_memory(RuntimeError, RuntimeError("another"), None)
    assert "RuntimeError: another" in capsys.readouterr().err


@pytest.mark.slow
@pytest.mark.parametrize("stage", ["train", "evaluation", "data_loader"])
@pytest.mark.parametrize("kilobytes", [1_000_000, 1_500_000, 3_000_000])
def test_a_stage_that_may_take_little_memory(stage: str, kilobytes: int, tmp_path: Path) -> None:
    resource = pytest.importorskip("resource")

    def limit() -> None:
        resource.setrlimit(resource.RLIMIT_AS, (kilobytes * 1024, kilobytes * 1024))

    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    done = subprocess.run(
        [sys.executable, str(ROOT / f"{stage}.py")], cwd=tmp_path, env=environment, capture_output=True, text=True,
        check=False, preexec_fn=limit,
    )  # fmt: skip
    # a PyTorch without CUDA may fit; then the stage has nothing to read, or makes sample data
    if done.returncode == 1:
        assert done.stderr.startswith(f"{stage}.py: error: ")
        assert "not enough memory" in done.stderr
        assert done.stderr.count("\n") == 1
    else:
        assert "Traceback" not in done.stderr


@pytest.mark.slow
@pytest.mark.parametrize("value", ["abc", "0", "-1", "1.5", "", "9" * 5000])
def test_a_variable_of_torchrun_that_is_no_number_is_named(
    value: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], trained_dir: Path
) -> None:
    checkpoint = str(trained_dir / "model-checkpoint" / "best_model.pth")
    ranks = {"RANK": "0", "WORLD_SIZE": "1", "LOCAL_WORLD_SIZE": "1", "MASTER_ADDR": "localhost", "MASTER_PORT": "1"}
    wrong = [
        name for name in ("LOCAL_WORLD_SIZE", "WORLD_SIZE", "RANK", "MASTER_PORT") if (name, value) != ("RANK", "0")
    ]
    for name in wrong[: None if value != "0" else 2]:
        with monkeypatch.context() as patch:
            for variable, number in {**ranks, name: value}.items():
                patch.setenv(variable, number)
            assert evaluation.main(["--checkpoint", checkpoint]) == 2
        *_, error = capsys.readouterr().err.splitlines()
        assert f"the environment variable {name} is " in error
        assert len(error) < 300
