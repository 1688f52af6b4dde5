"""Runs of several real processes, over gloo on the CPU."""

import json
import os
import re
import signal
import subprocess
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import psutil
import pytest
import torch

import evaluation
from cliptune.model.checkpoint_file import load_checkpoint
from cliptune.runtime import distributed
from tests.helpers import launch
from tests.helpers.launch import environment, run_alone, run_ranks, torchrun, torchrun_command
from tests.helpers.models import SMALL_VIT
from tests.helpers.runs import small_runs
from train import main

pytestmark = pytest.mark.usefixtures("one_thread")

FLAGS = [
    "--batch_size", "25", "--learning_rate", "1e-3", "--precision", "fp32", "--num_epochs", "2", "--augment", "crop",
    "--num_workers", "0",
]  # fmt: skip
SMALL_TRAIN = "tests/helpers/small_train.py"


def run_flags(data: Path, output: Path, *more: str) -> list[str]:
    return ["--data_dir", str(data), "--output_dir", str(output), "--model_name", SMALL_VIT.name, *FLAGS, *more]


def history(output: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (output / "logs" / "history.jsonl").read_text().splitlines()]


def assert_same_history(found: list[dict[str, Any]], wanted: list[dict[str, Any]]) -> None:
    assert len(found) == len(wanted)
    for got, want in zip(found, wanted, strict=True):
        assert got.keys() == want.keys()
        for key, value in want.items():
            assert got[key] == (value if value is None else pytest.approx(value, rel=1e-4, abs=1e-4)), key


@pytest.fixture(scope="module")
def one_process(sample_dir: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    output = tmp_path_factory.mktemp("one")
    with small_runs():
        assert main(run_flags(sample_dir, output)) == 0
    return output


@pytest.mark.slow
def test_processes_exchange_what_they_have(tmp_path: Path) -> None:
    done = run_ranks(3, "tests/helpers/worker.py", "exchange", str(tmp_path))
    assert done.returncode == 0, done.stderr[-3000:]


@pytest.mark.slow
def test_merged_ranks_of_several_processes_are_those_of_the_definition(tmp_path: Path) -> None:
    done = run_ranks(3, "tests/helpers/worker.py", "merge", str(tmp_path))
    assert done.returncode == 0, done.stderr[-3000:]


@pytest.mark.slow
def test_full_memory_in_one_process_is_so_in_all(tmp_path: Path) -> None:
    done = run_ranks(2, "tests/helpers/worker.py", "memory", str(tmp_path))
    assert done.returncode == 0, done.stderr[-3000:]
    assert "out of memory with micro-batches of 4 pairs: going on with 2" in done.stderr


@pytest.mark.slow
@pytest.mark.usefixtures("small")
def test_a_run_of_two_processes_is_that_of_one(one_process: Path, sample_dir: Path, tmp_path: Path) -> None:
    done = torchrun(2, SMALL_TRAIN, *run_flags(sample_dir, tmp_path, "--micro_batch_size", "5"))
    assert done.returncode == 0, done.stderr[-3000:]
    assert_same_history(history(tmp_path), history(one_process))
    assert done.stdout.count("best model: ") == 1
    assert done.stderr.count("2 ranks (ddp), each with its part of a batch") == 1
    ours, theirs = (
        sorted(str(path.relative_to(folder)) for path in folder.rglob("*") if "events." not in path.name)
        for folder in (tmp_path, one_process)
    )
    assert ours == theirs
    two, one = (load_checkpoint(folder / "model-checkpoint" / "last_model.pth") for folder in (tmp_path, one_process))
    assert two.keys() == one.keys()
    assert two["model_state_dict"].keys() == one["model_state_dict"].keys()
    # and one process goes on from what two have left
    assert main(["--output_dir", str(tmp_path), "--resume", "--num_epochs", "3"]) == 0
    assert [entry["epoch"] for entry in history(tmp_path)] == [0, 1, 2, 3]


@pytest.mark.slow
@pytest.mark.usefixtures("small")
def test_a_sharded_run_is_that_of_one_and_resumes_it(sample_dir: Path, tmp_path: Path) -> None:
    flags = run_flags(sample_dir, tmp_path, "--parallel", "fsdp", "--gradient_checkpointing")
    flags[flags.index("--num_epochs") + 1] = "1"
    done = run_ranks(3, SMALL_TRAIN, *flags, "--warmup_fraction", "0")
    assert done.returncode == 0, done.stderr[-3000:]
    single = tmp_path / "single"
    flags = run_flags(sample_dir, single, "--warmup_fraction", "0")
    flags[flags.index("--num_epochs") + 1] = "1"
    assert main(flags) == 0
    assert_same_history(history(tmp_path), history(single))
    done = run_ranks(2, SMALL_TRAIN, "--output_dir", str(single), "--resume", "--num_epochs", "2", "--parallel", "fsdp")
    assert done.returncode == 0, done.stderr[-3000:]
    assert "resuming at epoch 1, step 3 from" in done.stderr
    assert [entry["epoch"] for entry in history(single)] == [0, 1, 2]


@pytest.mark.slow
@pytest.mark.usefixtures("small")
def test_frozen_features_are_shared_out(sample_dir: Path, tmp_path: Path) -> None:
    frozen = ("--freeze_backbone", "--feature_views", "2")
    single = tmp_path / "single"
    assert main(run_flags(sample_dir, single, *frozen)) == 0
    done = run_ranks(2, SMALL_TRAIN, *run_flags(sample_dir, tmp_path, *frozen))
    assert done.returncode == 0, done.stderr[-3000:]
    assert_same_history(history(tmp_path), history(single))

    def cached(folder: Path) -> dict[str, int]:
        files = (folder / "cache" / "features").glob("*.keys")
        return {file.name: len(file.read_bytes()) for file in files}

    assert len(cached(tmp_path)) == 2  # a file for each tower
    assert cached(tmp_path) == cached(single)  # nothing is computed twice


@pytest.mark.slow
def test_ranks_share_the_work_of_frozen_towers(tmp_path: Path) -> None:
    done = run_ranks(2, "tests/helpers/worker.py", "features", str(tmp_path))
    assert done.returncode == 0, done.stderr[-3000:]


@pytest.mark.slow
def test_a_shared_evaluation_gives_the_same_numbers(one_process: Path, tmp_path: Path) -> None:
    flags = ["--checkpoint", str(one_process / "model-checkpoint" / "best_model.pth"), "--encode_batch_size", "2"]
    assert evaluation.main([*flags, "--output_dir", str(tmp_path / "one")]) == 0
    done = run_ranks(3, "evaluation.py", *flags, "--output_dir", str(tmp_path / "three"))
    assert done.returncode == 0, done.stderr[-3000:]
    assert done.stdout.count("RSum") == 1
    one, three = (
        json.loads((tmp_path / name / "results" / "evaluation_results.json").read_text()) for name in ("one", "three")
    )
    for key in ("metrics", "chance", "histograms", "num_images", "num_texts"):
        assert one[key] == (pytest.approx(three[key], rel=1e-6) if key == "metrics" else three[key]), key


@pytest.mark.slow
def test_a_process_that_fails_ends_all_with_its_error(tmp_path: Path) -> None:
    start = time.monotonic()
    done = run_ranks(2, "tests/helpers/worker.py", "fail", str(tmp_path))
    assert done.returncode != 0
    assert "worker.py (rank 1): error: process one has no data" in done.stderr
    assert time.monotonic() - start < 60


@pytest.mark.slow
def test_when_a_process_is_killed_the_rest_end_soon(sample_dir: Path, tmp_path: Path) -> None:
    command = torchrun_command(2, SMALL_TRAIN, *run_flags(sample_dir, tmp_path, "--num_epochs", "10000"))
    with subprocess.Popen(command, env=environment(), stderr=subprocess.PIPE, text=True) as launcher:
        assert launcher.stderr is not None
        said: list[str] = []
        for line in launcher.stderr:
            said.append(line)
            if line.startswith("epoch 1:"):
                break
        else:
            pytest.fail("".join(said))
        workers = psutil.Process(launcher.pid).children()
        assert len(workers) == 2
        start = time.monotonic()
        os.kill(workers[1].pid, signal.SIGKILL)
        rest = launcher.stderr.read()
        assert launcher.wait(timeout=60) != 0
    assert time.monotonic() - start < 30
    assert re.search(r"Signal 9 \(SIGKILL\)|exitcode\s*: -9", rest)
    assert not any(worker.is_running() for worker in workers)


@pytest.fixture
def launched(monkeypatch: pytest.MonkeyPatch) -> Iterator[pytest.MonkeyPatch]:
    """A process that torchrun started, whose peers will never answer."""
    for name, value in {"RANK": "0", "WORLD_SIZE": "2", "LOCAL_RANK": "0", "LOCAL_WORLD_SIZE": "2"}.items():
        monkeypatch.setenv(name, value)
    monkeypatch.setenv("MASTER_ADDR", "127.0.0.1")
    monkeypatch.setenv("MASTER_PORT", "9")
    yield monkeypatch


@pytest.mark.parametrize(
    ("flags", "message"),
    [(["--batch_sz", "3"], "did you mean --batch_size?"), (["--precision", "fp16", "--device", "cpu"], "needs a CUDA")],
)
def test_settings_are_checked_before_processes_meet(
    launched: pytest.MonkeyPatch, flags: list[str], message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(flags) == 2
    assert message in capsys.readouterr().err


def test_each_process_takes_its_own_gpu(launched: pytest.MonkeyPatch) -> None:
    launched.setattr(torch.cuda, "device_count", lambda: 2)
    launched.setenv("LOCAL_RANK", "1")
    assert distributed.rank_device("cuda") == torch.device("cuda", 1)
    assert distributed.rank_device("cpu") == torch.device("cpu")
    with pytest.raises(ValueError, match="cannot share one device"):
        distributed.rank_device("cuda:1")
    launched.setenv("LOCAL_WORLD_SIZE", "3")
    with pytest.raises(ValueError, match=r"3 ranks on this machine, but 2 GPUs"):
        distributed.rank_device("cuda")


def test_one_process_initialises_nothing_and_gets_back_what_it_gave() -> None:
    values = torch.arange(3.0)
    with distributed.process_group(torch.device("cpu")):
        assert not torch.distributed.is_initialized()
        assert distributed.all_sum(values) is values
        assert torch.equal(distributed.gather_rows(values), values)
        assert distributed.gather_sizes(3) == [3]
        assert distributed.rank_slice(3) == slice(0, 3)
        assert distributed.any_rank(True)
        assert not distributed.any_rank(False)
        assert (distributed.rank(), distributed.world_size(), distributed.is_main()) == (0, 1, True)


@pytest.mark.parametrize(("device", "backend"), [("cuda:1", "cpu:gloo,cuda:nccl"), ("cpu", "gloo")])
def test_gpus_meet_over_nccl(device: str, backend: str, monkeypatch: pytest.MonkeyPatch) -> None:
    for name, value in {"RANK": "1", "WORLD_SIZE": "2", "MASTER_PORT": "1234"}.items():
        monkeypatch.setenv(name, value)
    calls: list[Any] = []
    monkeypatch.setattr(torch.cuda, "set_device", calls.append)
    monkeypatch.setattr(torch.distributed, "init_process_group", lambda name, timeout: calls.append(name))
    monkeypatch.setattr(torch.distributed, "barrier", lambda: calls.append("barrier"))
    monkeypatch.setattr(torch.distributed, "destroy_process_group", lambda: calls.append("end"))
    with distributed.process_group(torch.device(device)):
        calls.append("run")
    chosen = [torch.device(device)] if device != "cpu" else []  # before NCCL asks for it
    assert calls == [*chosen, backend, "run", "barrier", "end"]
    # a single process has none to meet, and its threads go by the current GPU all the same
    monkeypatch.delenv("RANK")
    calls.clear()
    with distributed.process_group(torch.device(device)):
        assert calls == chosen


STUCK = """
import os, subprocess, sys, time
child = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(600)"]) if "CHILD" in os.environ else None
print("told", os.getpid(), child.pid if child else "", flush=True)
time.sleep(600)
"""


@pytest.mark.slow
@pytest.mark.parametrize("is_alone", [True, False])
def test_what_does_not_end_is_ended_and_named(is_alone: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """By the helpers of these tests, which would wait for ever."""
    monkeypatch.setattr(launch, "LIMIT_SECONDS", 5)
    path = tmp_path / "stuck.py"
    path.write_text(STUCK)
    with pytest.raises(TimeoutError, match=r"not done after 5 s: \S+stuck.py how") as late:
        run_alone(str(path), "how", variables={"CHILD": "1"}) if is_alone else run_ranks(2, str(path), "how")
    pids = [int(pid) for line in re.findall(r"told ([\d ]+)", str(late.value)) for pid in line.split()]
    assert len(pids) == 2
    deadline = time.monotonic() + 60
    while any(psutil.pid_exists(pid) and psutil.Process(pid).status() != "zombie" for pid in pids):
        assert time.monotonic() < deadline
        time.sleep(0.05)
    path.write_text("raise SystemExit(7)")  # the next one has its own time
    assert run_alone(str(path), variables={}).returncode == 7
