"""Runs that are killed or stopped as processes, and what is left of them.

`CLIP_TOOLKIT_LONG_TESTS=1` kills fifty times.
"""

import os
import random
import re
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from cliptune.model.architectures import ARCHITECTURES
from cliptune.model.checkpoint_file import load_checkpoint
from cliptune.training.checkpoint import RunFiles, load_newest_state
from tests.helpers.launch import ROOT, environment, run_alone, torchrun_command
from tests.helpers.models import SMALL_VIT
from tests.helpers.runs import assert_same_runs
from train import main

pytestmark = [pytest.mark.usefixtures("one_thread"), pytest.mark.slow]

SCRIPT = "tests/helpers/fault_run.py"
IS_LONG = bool(os.environ.get("CLIP_TOOLKIT_LONG_TESTS"))
NUM_KILLS = 50 if IS_LONG else 2
FLAGS = ["--model_name", SMALL_VIT.name, "--batch_size", "10", "--augment", "crop", "--num_workers", "2"]
FLAGS += ["--precision", "fp32", "--checkpoint_every", "1", "--keep_checkpoints", "2", "--learning_rate", "1e-3"]


@pytest.fixture(autouse=True)
def small(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(ARCHITECTURES, SMALL_VIT.name, SMALL_VIT)
    monkeypatch.setattr("train.draw_figures", lambda *_, **__: [])


def flags_for(data_dir: Path, output_dir: Path, num_epochs: int) -> list[str]:
    return [*FLAGS, "--data_dir", str(data_dir), "--output_dir", str(output_dir), "--num_epochs", str(num_epochs)]


def variables_of(fault: str, how: str = "in place") -> dict[str, str]:
    fault_of = {"FAULT": fault} if fault else {}
    return fault_of | ({"BACKGROUND": "1"} if how == "background" else {})


def run(flags: list[str], fault: str, world_size: int = 1, how: str = "in place") -> subprocess.CompletedProcess[str]:
    if world_size == 1:
        return run_alone(SCRIPT, *flags, variables=variables_of(fault, how))
    return subprocess.run(
        torchrun_command(world_size, SCRIPT, *flags),
        env=environment() | variables_of(fault, how),
        capture_output=True,
        text=True,
        check=False,
        timeout=300,
        start_new_session=True,
    )


@pytest.fixture(scope="module")
def whole(sample_dir: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The output of an unbroken run of two epochs."""
    folder = tmp_path_factory.mktemp("whole")
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(ARCHITECTURES, SMALL_VIT.name, SMALL_VIT)
        assert main(flags_for(sample_dir, folder, 2)) == 0
    return folder


@pytest.mark.parametrize(("name", "code"), [("SIGTERM", 143), ("SIGINT", 130), ("SIGHUP", 129)])
def test_a_signal_to_all_processes_of_a_run_saves_its_step(
    name: str, code: int, whole: Path, sample_dir: Path, tmp_path: Path
) -> None:
    done = run(flags_for(sample_dir, tmp_path, 2), f"signal:0:4:{name}")
    assert done.returncode == code, done.stderr
    assert f"stopped by {name} at epoch 1, step 4" in done.stderr
    assert "Traceback" not in done.stderr
    assert load_checkpoint(RunFiles(tmp_path).last)["global_step"] == 4
    assert main(["--output_dir", str(tmp_path), "--resume"]) == 0
    assert_same_runs(tmp_path, whole)


@pytest.mark.parametrize(
    ("fault", "step", "how"),
    [("stuck:4", 3, "in place"), ("slow:1", 0, "background")],
)
def test_a_signal_is_answered_while_a_step_is_compiled_or_a_file_written(
    fault: str, step: int, how: str, whole: Path, sample_dir: Path, tmp_path: Path
) -> None:
    command = [sys.executable, str(ROOT / SCRIPT), *flags_for(sample_dir, tmp_path, 2)]
    with subprocess.Popen(
        command, env=environment() | variables_of(fault, how), stderr=subprocess.PIPE, text=True
    ) as process:
        assert process.stderr is not None
        next(line for line in process.stderr if line == "begun\n")
        start = time.monotonic()
        process.terminate()
        errors = process.stderr.read()
        assert process.wait() == 143, errors
    assert time.monotonic() - start < 60, errors  # of 120; 4 of them are waited for, the rest is the machine's load
    found = re.search(r"stopped by SIGTERM at epoch 1, step (\d), which are saved", errors)
    assert found is not None, errors
    assert int(found[1]) == (step or int(found[1]))
    assert load_checkpoint(RunFiles(tmp_path).last)["global_step"] == int(found[1])
    assert main(["--output_dir", str(tmp_path), "--resume"]) == 0
    assert_same_runs(tmp_path, whole)


@pytest.mark.parametrize(("moment", "step"), [("4", 4), ("validation", 6)])
def test_a_worker_that_is_killed_ends_a_run_whose_last_step_is_saved(
    moment: str, step: int, whole: Path, sample_dir: Path, tmp_path: Path
) -> None:
    """As a system does that is out of memory."""
    done = run(flags_for(sample_dir, tmp_path, 2), f"worker:{moment}")
    assert done.returncode == 1, done.stderr
    *_, saved, error = done.stderr.splitlines()
    assert error.startswith("train.py: error: a loader worker was killed")
    assert "Traceback" not in done.stderr
    found = load_checkpoint(RunFiles(tmp_path).last)["global_step"]
    # it is noticed up to five seconds later, when the epoch's last steps may be done
    assert re.match(rf"stopped at epoch [12], step {found}, which are saved", saved)
    assert found >= step
    assert main(["--output_dir", str(tmp_path), "--resume"]) == 0
    assert_same_runs(tmp_path, whole)


# in step 4; the files of three checkpoints before got a second name each, and that of epoch 0 two
@pytest.mark.parametrize("how", ["in place", "background"])
@pytest.mark.parametrize(("place", "index"), [("writing", 6), ("naming", 11)])
def test_a_run_that_is_killed_while_it_writes_goes_on_from_the_state_before(
    place: str, index: int, how: str, whole: Path, sample_dir: Path, tmp_path: Path
) -> None:
    files = RunFiles(tmp_path)
    done = run(flags_for(sample_dir, tmp_path, 2), f"kill:{index}:{place}", how=how)
    assert done.returncode == -signal.SIGKILL, done.stderr
    partial = [path.stat().st_size for path in files.last.parent.glob(".*.tmp")]
    assert len(partial) == 1
    assert (partial[0] < files.last.stat().st_size) == (place == "writing")
    assert [load_checkpoint(path)["global_step"] for path in files.states()] == [3, 3, 2]
    assert main(["--output_dir", str(tmp_path), "--resume"]) == 0
    assert not list(files.last.parent.glob(".*.tmp"))
    assert_same_runs(tmp_path, whole)


@pytest.mark.parametrize("how", ["in place", "background"])
def test_a_run_that_is_killed_at_any_moment_is_the_unbroken_one_in_the_end(
    how: str, sample_dir: Path, tmp_path: Path
) -> None:
    moments = random.Random(how == "background")
    num_epochs = 2 * NUM_KILLS
    broken = RunFiles(tmp_path / "broken")
    more = ["--num_workers", str(2 * IS_LONG)]
    flags = [*flags_for(sample_dir, broken.root, num_epochs), *more]
    steps = [0]
    for _ in range(NUM_KILLS):
        command = [sys.executable, str(ROOT / SCRIPT), *flags, "--resume"]
        with subprocess.Popen(
            command, env=environment() | variables_of("", how), stderr=subprocess.PIPE, text=True
        ) as process:
            assert process.stderr is not None
            next(line for line in process.stderr if line.startswith("peak rates"))
            time.sleep(moments.uniform(0.0, 1.0))
            process.kill()
        found = load_newest_state(broken)
        steps.append(steps[-1] if found is None else found[1]["global_step"])
    assert steps == sorted(steps)
    assert main([*flags, "--resume"]) == 0
    assert main([*flags_for(sample_dir, tmp_path / "whole", num_epochs), *more]) == 0
    assert_same_runs(broken.root, tmp_path / "whole")


@pytest.mark.parametrize("how", ["in place", "background"])
def test_processes_stop_after_the_same_step(how: str, sample_dir: Path, tmp_path: Path) -> None:
    """Only one of them gets the signal."""
    broken, unbroken = tmp_path / "broken", tmp_path / "unbroken"
    more = ["--num_workers", "0", "--micro_batch_size", "2"]
    stopped = run([*flags_for(sample_dir, broken, 1), *more], "signal:1:4:SIGTERM", 2, how)
    assert "exitcode  : 143" in stopped.stderr, stopped.stderr  # torchrun may end the other while Python shuts down
    assert "stopped by SIGTERM at epoch 1, step 4" in stopped.stderr
    assert load_checkpoint(RunFiles(broken).last)["global_step"] == 4
    if not IS_LONG:
        return
    resumed = run(["--output_dir", str(broken), "--resume"], "", world_size=2)
    assert "resuming at epoch 1, step 4 from" in resumed.stderr
    done = run([*flags_for(sample_dir, unbroken, 1), *more], "", world_size=2)
    assert (resumed.returncode, done.returncode) == (0, 0), done.stderr
    assert_same_runs(broken, unbroken)
