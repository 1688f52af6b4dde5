"""The benchmarks run, on the smallest inputs; what they measure is never a test's business."""

import importlib
import json
import sys
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch

ROOT = Path(__file__).parent.parent


@pytest.fixture
def benchmark(monkeypatch: pytest.MonkeyPatch) -> Any:
    monkeypatch.syspath_prepend(str(ROOT / "benchmarks"))
    threads = torch.get_num_threads()

    def load(name: str) -> ModuleType:
        return importlib.import_module(name)

    yield load
    torch.set_num_threads(threads)
    for name in [path.stem for path in (ROOT / "benchmarks").glob("*.py")]:
        sys.modules.pop(name, None)


def test_train_step(benchmark: Any, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    figures = tmp_path / "step.json"
    flags = ["--quick", "--precisions", "fp32", "--json", str(figures)]
    assert benchmark("train_step").main(flags) == 0
    assert "| ours " in capsys.readouterr().out
    results = json.loads(figures.read_text())
    assert {name: len(seconds) for name, seconds in results["precisions"]["fp32"]["seconds"].items()} == {
        "ours": 3,
        "clip": 3,
    }


def test_a_step_counts_the_operations_of_a_plain_forward(benchmark: Any) -> None:
    step = benchmark("train_step")
    shape = step.ARCHITECTURES["ViT-B/32"]
    # 941 GFLOP at batch 32 with 14 tokens a caption: measured for this project by another way of counting
    assert step.step_flops(shape, torch.full((32,), 14)) == pytest.approx(941e9, rel=0.03)


def test_timings(benchmark: Any) -> None:
    timing = benchmark("timing")
    order: list[str] = []
    timings = timing.take_turns({name: lambda name=name: order.append(name) for name in "ab"}, repeats=2)
    assert order == list("ababab")
    assert [len(timings[name].seconds) for name in "ab"] == [2, 2]
    fixed = {"ours": timing.Timing([1.0, 2.0, 4.0]), "peer": timing.Timing([2.0, 6.0, 8.0])}
    assert timing.ratio(fixed, "ours", "peer") == 2.0
    assert (fixed["ours"].median, fixed["ours"].spread) == (2.0, 1.5)
