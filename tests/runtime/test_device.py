import logging
import platform
import subprocess
import sys
from collections.abc import Iterator
from operator import attrgetter
from pathlib import Path
from typing import Any

import pytest
import torch

from cliptune.runtime.device import (
    compiler_issue,
    default_num_workers,
    exact_products,
    is_out_of_memory,
    peak_memory,
    product_precision,
    resolve_device,
    resolve_precision,
    tf32,
    to_device,
)

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


@pytest.mark.parametrize(("index", "name"), [(0, "bf16"), (1, "fp16")])
def test_an_old_gpu_trains_in_fp16(index: int, name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Whatever GPU stands beside it: here the current one has bf16 in hardware."""
    capability = {0: (8, 0), 1: (7, 5)}
    monkeypatch.setattr("torch.cuda.get_device_capability", lambda device: capability[device.index])
    precision = resolve_precision("auto", torch.device("cuda", index))
    assert (precision.name, precision.scaled) == (name, name == "fp16")
    assert resolve_precision("fp16", torch.device("cuda")).scaled
    assert resolve_precision("auto", torch.device("mps")).name == "fp32"


def test_only_cuda_copies_while_the_cpu_goes_on_and_from_pinned_memory(monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[str] = []

    def to(self: torch.Tensor, device: torch.device, dtype: torch.dtype | None, **options: bool) -> torch.Tensor:
        seen.append(f"{device}, later" if options.get("non_blocking") else f"{device}")
        return self

    def pin(self: torch.Tensor) -> torch.Tensor:
        seen.append(f"pin {self.nbytes}")
        return self

    monkeypatch.setattr("torch.Tensor.to", to)
    monkeypatch.setattr("torch.Tensor.pin_memory", pin)
    monkeypatch.setattr("torch.Tensor.is_pinned", lambda self: self.numel() == 2)
    for name in ("cpu", "mps", "cuda:1"):
        to_device(torch.ones(1), torch.device(name))
    assert seen == ["cpu", "mps", "pin 4", "cuda:1, later"]
    seen.clear()
    for values in (torch.ones(2), torch.empty(2**22 + 1), torch.ones(1, device="meta")):
        to_device(values, torch.device("cuda"))
    assert seen == ["cuda, later"] * 3


@pytest.mark.parametrize("kind", [torch.OutOfMemoryError, MemoryError, RuntimeError])
def test_full_memory_is_known_by_its_error(kind: type[Exception]) -> None:
    messages = [
        "DefaultCPUAllocator: can't allocate memory: you tried to allocate 1 bytes",
        "CUDA error: CUBLAS_STATUS_ALLOC_FAILED when calling `cublasCreate(handle)`",
        "cuDNN error: CUDNN_STATUS_ALLOC_FAILED",
        "CUDA error: out of memory",
        "CUDA driver error: out of memory",
        "Triton Error [CUDA]: out of memory",
        "MPS backend out of memory (MPS allocated: 1 GB)",
    ]
    assert all(is_out_of_memory(kind(message)) for message in messages)
    assert not is_out_of_memory(RuntimeError("CUDA error: an illegal memory access was encountered"))


@pytest.mark.parametrize(("device", "num_lines"), [("cpu", 0), ("cuda", 1)])
def test_a_compiler_for_the_cpu_says_nothing_of_cuda(
    device: str, num_lines: int, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """PyTorch warns when it looks for CUDA, which it does as the compiler is imported."""
    extensions = logging.getLogger("torch.utils.cpp_extension")

    def compiled(function: Any) -> Any:
        extensions.warning("No CUDA runtime is found, using CUDA_HOME='/usr/local'")
        return function

    monkeypatch.setattr("torch.compile", compiled)

    def ones_here(*shape: int, device: torch.device, **options: Any) -> torch.Tensor:
        return torch.zeros(*shape, **options)

    monkeypatch.setattr("torch.ones", ones_here)
    assert compiler_issue(torch.device(device)) is None
    assert len(caplog.records) == num_lines
    extensions.warning("told")
    assert caplog.messages[-1] == "told"


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


@pytest.fixture
def nothing_said() -> Iterator[None]:
    """What a process begins with, also where earlier tests have asked for products of some kind."""

    def forget() -> None:
        torch.set_float32_matmul_precision("highest")
        for part in (torch.backends.cuda.matmul, torch.backends.mkldnn.matmul):  # type: ignore[attr-defined]
            if hasattr(part, "fp32_precision"):
                part.fp32_precision = "none"

    forget()
    yield
    forget()


@pytest.mark.usefixtures("nothing_said")
def test_tf32_is_for_gpus_and_for_what_is_enclosed() -> None:
    before = torch.backends.cuda.matmul.allow_tf32
    for _ in range(2):
        with tf32(torch.device("cuda")):
            assert torch.backends.cuda.matmul.allow_tf32
        with exact_products():  # an evaluation between two steps
            assert not torch.backends.cuda.matmul.allow_tf32
    assert torch.backends.cuda.matmul.allow_tf32 == before
    with tf32(CPU):
        assert torch.backends.cuda.matmul.allow_tf32 == before


@pytest.mark.usefixtures("nothing_said")
@pytest.mark.parametrize("device", ["cpu", "cuda"])
def test_what_a_notebook_allows_is_left_alone(device: str) -> None:
    """Both settings of one flag would make PyTorch refuse to say what is allowed."""
    before = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision("medium")
    try:
        with tf32(torch.device(device)):
            pass
        with exact_products():
            assert torch.get_float32_matmul_precision() == "highest"
        assert torch.get_float32_matmul_precision() == "medium"
    finally:
        torch.set_float32_matmul_precision(before)


@pytest.mark.parametrize("how", ["cuda.matmul", "", "older"])
def test_full_float32_is_kept_where_a_notebook_asks_for_it(how: str, newer_api: Any) -> None:
    if how == "older":
        torch.set_float32_matmul_precision("highest")
    else:
        (attrgetter(how)(newer_api) if how else newer_api).fp32_precision = "ieee"
    for _ in range(2):
        with tf32(torch.device("cuda")):
            assert newer_settings()["cuda.matmul"] == "ieee"
        with exact_products():
            pass
    assert newer_settings()["cuda.matmul"] == "ieee"


def newer_settings() -> dict[str, str]:
    backends: Any = torch.backends
    parts = {
        "all": backends, "cudnn": backends.cudnn, "mkldnn": backends.mkldnn, "cuda.matmul": backends.cuda.matmul,
        "cudnn.conv": backends.cudnn.conv, "mkldnn.matmul": backends.mkldnn.matmul, "mkldnn.conv": backends.mkldnn.conv,
    }  # fmt: skip
    return {name: part.fp32_precision for name, part in parts.items()}


@pytest.fixture
def newer_api(nothing_said: None) -> Iterator[Any]:
    """PyTorch's newer way to allow less precision, from 2.9 on; afterwards all is as it was."""
    backends: Any = torch.backends
    if not hasattr(backends, "fp32_precision"):
        pytest.skip("this PyTorch has the older way alone")
    products, before = torch.get_float32_matmul_precision(), newer_settings()
    yield backends
    for part in (backends, backends.cudnn, backends.mkldnn, backends.cuda.matmul, backends.mkldnn.matmul):
        part.fp32_precision = "none"
    backends.mkldnn.conv.fp32_precision = "none"
    backends.cudnn.allow_tf32 = True
    torch.set_float32_matmul_precision(products)
    assert newer_settings()["cudnn.conv"] == before["cudnn.conv"]


@pytest.mark.parametrize(
    ("part", "value"),
    [
        ("cuda.matmul", "tf32"), ("", "tf32"), ("", "bf16"), ("", "ieee"), ("cudnn", "tf32"), ("cudnn", "ieee"),
        ("cudnn.conv", "ieee"), ("mkldnn", "bf16"), ("mkldnn.matmul", "bf16"), ("mkldnn.matmul", "tf32"),
        ("mkldnn.conv", "bf16"),
    ],
)  # fmt: skip
def test_products_are_exact_also_where_a_notebook_has_allowed_less_by_the_newer_api(
    part: str, value: str, newer_api: Any
) -> None:
    """The older API then refuses to say what is allowed, and a checkpoint could not be loaded."""
    owner = attrgetter(part)(newer_api) if part else newer_api
    owner.fp32_precision = value
    before = newer_settings()
    with exact_products():
        inside = newer_settings()
        assert {inside[name] for name in inside if "." in name} <= {"ieee", "none"}
    assert newer_settings() == before
    rounded = {name for name in before if "." in name and name != "cudnn.conv" and before[name] not in {"ieee", "none"}}
    says = product_precision()
    assert (says == "highest") == (not rounded), says
    assert all(name in says for name in rounded)
    with tf32(torch.device("cuda")):
        assert newer_settings()["cuda.matmul"] in {before["cuda.matmul"], "tf32"}


def test_a_part_that_goes_by_its_backend_does_so_afterwards(newer_api: Any) -> None:
    newer_api.fp32_precision = "tf32"
    with exact_products():
        pass
    newer_api.fp32_precision = "ieee"
    assert newer_settings()["cuda.matmul"] == newer_settings()["mkldnn.matmul"] == "ieee"


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
