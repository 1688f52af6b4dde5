import platform
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from cliptune.runtime.device import default_num_workers, peak_memory, resolve_device, resolve_precision, tf32

ROOT = Path(__file__).parent.parent.parent
CPU = torch.device("cpu")


def test_devices_and_precisions_that_are_not_there_are_said() -> None:
    assert resolve_device("cpu") == CPU
    with pytest.raises(ValueError, match="no such device: tpu9"):
        resolve_device("tpu9")
    with pytest.raises(ValueError, match=r"PyTorch sees .* CUDA device"):
        resolve_device("cuda:77")
    with pytest.raises(ValueError, match="fp16 needs a CUDA device"):
        resolve_precision("fp16", CPU)
    assert resolve_precision("auto", CPU).name in {"bf16", "fp32"}
    assert not resolve_precision("bf16", CPU).scaled


def test_workers_leave_the_cores_to_training_on_the_cpu() -> None:
    assert default_num_workers(CPU) <= default_num_workers(torch.device("cuda"))


@pytest.mark.parametrize(
    ("cores", "ranks", "expected"), [(1, 1, 1), (2, 1, 1), (8, 1, 7), (16, 1, 15), (64, 1, 16), (64, 8, 7), (8, 8, 1)]
)
def test_beside_a_gpu_all_cores_but_one_load(
    cores: int, ranks: int, expected: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("cliptune.runtime.device.num_cores", lambda: cores)
    monkeypatch.setenv("LOCAL_WORLD_SIZE", str(ranks))
    assert default_num_workers(torch.device("cuda")) == expected
    assert default_num_workers(CPU) == min(4, cores // 4)


def test_tf32_is_for_gpus_and_for_what_is_enclosed() -> None:
    before = torch.backends.cuda.matmul.allow_tf32
    with tf32(torch.device("cuda")):
        assert torch.backends.cuda.matmul.allow_tf32
        with tf32(CPU):
            assert not torch.backends.cuda.matmul.allow_tf32
    assert torch.backends.cuda.matmul.allow_tf32 == before


def test_peak_memory_rises_with_what_is_held() -> None:
    before = peak_memory(CPU)["process"]
    held = torch.ones(100_000_000, dtype=torch.uint8)
    after = peak_memory(CPU)
    assert set(after) == {"process"}
    assert before <= after["process"] < 1000
    assert after["process"] >= 0.1
    del held


FAULTS = """
import resource, torch
from cliptune.runtime.device import keep_freed_memory

def faults():
    before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
    for _ in range(20):
        torch.ones(4_000_000)
    return resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before

without = faults()
keep_freed_memory()
faults()
print(faults() < without / 5)
"""


@pytest.mark.slow
@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="another C library")
def test_freed_memory_is_used_again() -> None:
    done = subprocess.run([sys.executable, "-c", FAULTS], cwd=ROOT, capture_output=True, text=True, check=True)
    assert done.stdout == "True\n"
