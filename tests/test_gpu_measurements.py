"""What `benchmarks/gpu.sh` measures with: each script by itself, on the CPU and small models."""

import json
import math
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from benchmarks import agreement, gpu_idle, large_batch, loss_speed, step_times, train_step
from cliptune.model import programs
from cliptune.model.architectures import ARCHITECTURES
from tests.helpers.models import (
    SMALL_RESNET,
    SMALL_VIT,
    make_batch,
    make_model,
    small_architectures,  # noqa: F401  (a fixture)
)
from tests.helpers.rows import rows_of


@pytest.mark.slow
@pytest.mark.parametrize("name", [SMALL_VIT.name, SMALL_RESNET.name])
def test_a_step_on_the_cpu_agrees_with_itself(name: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert agreement.main(["--models", name, "--checks", "plain", "--precisions", "fp32,fp16"]) == 0
    rows = rows_of(capsys.readouterr().out)
    assert {row.verdict for row in rows.values()} == {"PASS", "skipped"}
    assert rows[f"{name}: micro-batches of 5 against 16 pairs, fp32"].value != 0
    assert rows["texts up to their ends against 77 positions, fp32: gradient"].value < 1e-5  # type: ignore[operator]


def test_a_gradient_that_is_another_is_seen() -> None:
    right = {"a": torch.tensor([3.0, 4.0]), "b": torch.tensor([0.0])}
    assert agreement.distance(right, right) == 0
    assert agreement.distance(right | {"b": torch.tensor([0.5])}, right) == pytest.approx(0.1)
    assert agreement.distance({"a": right["a"]}, right) == float("inf")
    model = agreement.make_model(SMALL_VIT.name)
    batch = agreement.make_batch(model)
    _, expected = agreement.plain_gradient(model, batch)
    fewer = tuple(each[:-1] for each in batch)
    found = agreement.step_gradient(model, fewer, torch.device("cpu"), "fp32")  # type: ignore[arg-type]
    assert agreement.distance(found, expected) > agreement.AGAINST_CPU["fp32"]


@pytest.mark.slow
def test_every_step_is_timed(capsys: pytest.CaptureFixture[str]) -> None:
    flags = ["--model", SMALL_VIT.name, "--batch_size", "8", "--steps", "22", "--precision", "fp32"]
    assert step_times.main(flags) == 0
    rows = rows_of(capsys.readouterr().out)
    slowest = rows["default flags: slowest step after the third over the median"]
    assert slowest.value is not None and slowest.value >= 1
    assert slowest.note.endswith("of 22")
    assert rows["default flags: graphs compiled after the third step"].value == 0


@pytest.mark.parametrize(
    ("intervals", "length"),
    [
        ([], 0),
        ([(1, 3)], 2),
        ([(5, 6), (1, 3)], 3),
        ([(1, 3), (3, 4)], 3),
        ([(1, 3), (2, 5)], 4),
        ([(1, 9), (2, 3), (4, 5), (8, 10)], 9),  # two streams
        ([(2, 2), (2, 4), (2, 4)], 2),
    ],
)
def test_what_intervals_cover_counts_once(intervals: list[tuple[float, float]], length: float) -> None:
    assert gpu_idle.covered(intervals) == length
    assert gpu_idle.covered(reversed(intervals)) == length


def test_what_a_gpu_did_is_told_from_what_a_profiler_has_besides() -> None:
    def event(device: str, start: float, end: float, **more: bool) -> SimpleNamespace:
        kind = getattr(torch.autograd.DeviceType, device)
        return SimpleNamespace(device_type=kind, time_range=SimpleNamespace(start=start, end=end), **more)

    events = [
        event("CPU", 0, 100),
        event("CUDA", 3, 5),
        event("CUDA", 0, 90, is_user_annotation=True),
        event("CUDA", 4, 8, is_user_annotation=False),
    ]
    assert gpu_idle.device_intervals(events) == [(3, 5), (4, 8)]
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU]) as profiler:
        torch.ones(3).sum()
    found = profiler.events()
    assert found is not None and len(found) > 0
    assert gpu_idle.device_intervals(found) == []


def test_a_step_is_timed_for_each_size_without_a_gpu(capsys: pytest.CaptureFixture[str]) -> None:
    flags = ["--model", SMALL_VIT.name, "--batch_sizes", "2,4", "--steps", "2", "--precision", "fp32"]
    assert gpu_idle.main(flags) == 0
    assert list(rows_of(capsys.readouterr().out)) == ["eager, batch 2: step", "eager, batch 4: step"]


def test_each_form_runs_the_towers_in_its_own_way(monkeypatch: pytest.MonkeyPatch) -> None:
    modes = []

    def compile_nothing(function: Any, **options: Any) -> Any:
        modes.append(options)
        return function

    monkeypatch.setattr(torch, "compile", compile_nothing)
    model = make_model(SMALL_VIT.name)
    images, tokens, _ = make_batch(model, 4)
    features = []
    for form in gpu_idle.FORMS:
        gpu_idle.use_form(model, form)
        features.append(model(images, tokens))
        assert model.backbone.compiled == (form != "eager")
        assert ("encode_image" in vars(model.backbone)) == (form == gpu_idle.FORMS[2])
    assert {"mode": "reduce-overhead"} in modes
    for found in features[1:]:
        assert all(torch.allclose(a, b, atol=1e-6) for a, b in zip(found, features[0], strict=True))
    gpu_idle.use_form(model, "eager")
    assert "encode_image" not in vars(model.backbone)


def test_losses_of_all_ways_are_one(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    def full(*_: object) -> torch.Tensor:
        raise torch.OutOfMemoryError

    monkeypatch.setitem(loss_speed.WAYS, "too large", full)
    assert loss_speed.main(["--sizes", "96", "--dim", "16", "--repeats", "1"]) == 0
    rows = rows_of(capsys.readouterr().out)
    for way in ("whole", "recomputed", "tiles"):
        assert rows[f"96 pairs: gradient against {way}'s"].verdict == "PASS"
        assert rows[f"96 pairs: {way} over ours"].value is not None
    assert rows["96 pairs: the three products over ours"].value is not None
    assert rows["96 pairs: too large"].note == "does not fit into memory"


def test_losses_in_several_slices_are_one() -> None:
    torch.manual_seed(0)
    images, texts = (torch.nn.functional.normalize(torch.randn(50, 8), dim=-1).requires_grad_() for _ in range(2))
    scale = torch.tensor(2.0)
    sliced = loss_speed.recomputed(images, texts, scale, rows=16)
    assert sliced.item() == pytest.approx(loss_speed.whole(images, texts, scale).item(), rel=1e-6)


@pytest.mark.parametrize("value", [0.0, 2.66, math.log(100)])
def test_losses_in_several_tiles_are_one(value: float) -> None:
    torch.manual_seed(0)
    inputs = [torch.nn.functional.normalize(torch.randn(50, 8), dim=-1) for _ in range(2)] + [torch.tensor(value)]
    for each in inputs:
        each.requires_grad_()
    expected = loss_speed.whole(*(each.double() for each in inputs))
    found = loss_speed.tiles(*inputs, side=16)  # the last tiles are smaller
    assert found.item() == pytest.approx(expected.item(), rel=1e-5)
    wanted = torch.autograd.grad(expected, inputs)
    for have, want in zip(torch.autograd.grad(found, inputs), wanted, strict=True):
        assert (have - want).norm() <= 1e-5 * want.norm()


def test_a_peer_that_is_not_installed_is_skipped(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    def missing(*_: object) -> Any:
        raise ModuleNotFoundError("No module named 'open_clip'")

    monkeypatch.setitem(train_step.MAKERS, "open_clip", missing)
    flags = ["--model", SMALL_VIT.name, "--batch_size", "4", "--batches", "2", "--steps", "3"]
    options = train_step.parse([*flags, "--cases", "ours,open_clip"])
    images, tokens = train_step.make_inputs(options, torch.device("cpu"))
    assert tokens.shape == (2, 4, 77)
    cases = train_step.make_cases(options, options.cases, images, tokens, torch.device("cpu"), "fp32")
    assert list(cases) == ["ours"]
    steps = cases["ours"]()
    assert isinstance(steps, list) and len(steps) == 3
    assert "open_clip is skipped: No module named 'open_clip'" in capsys.readouterr().out


def test_a_program_that_is_not_compiled_after_all_has_failed(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Two eager steps agree, which says nothing."""

    def broken(*_: Any) -> Any:
        raise torch._dynamo.exc.InternalTorchDynamoError("Triton is missing")

    monkeypatch.setattr(programs, "_program", lambda *_, **__: broken)
    monkeypatch.setattr(agreement, "make_shallow", lambda name: name)
    monkeypatch.setitem(ARCHITECTURES, "ViT-Ti/32", replace(SMALL_VIT, name="ViT-Ti/32"))
    assert agreement.main(["--models", "ViT-Ti/32", "--checks", "compiled", "--precisions", "fp32"]) == 0
    row = rows_of(capsys.readouterr().out)["ViT-Ti/32: compiled, fp32"]
    assert (row.verdict, row.is_failure) == ("FAILED", True)


@pytest.mark.parametrize("name", [SMALL_VIT.name, SMALL_RESNET.name])
def test_a_shallow_model_is_the_same_of_fewer_layers(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(agreement, "ARCHITECTURES", {name: replace(ARCHITECTURES[name], transformer_layers=9)})
    shallow = agreement.ARCHITECTURES[agreement.make_shallow(name)]
    assert replace(shallow, name=name) == ARCHITECTURES[name]


@pytest.mark.slow
def test_a_peer_that_takes_long_to_prepare_is_timed_after_the_others(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path, written = tmp_path / "x.json", []

    def late(*arguments: Any) -> Any:
        written.append(json.loads(path.read_text())["precisions"]["fp32"])
        return train_step.clip_step(*arguments)

    monkeypatch.setitem(train_step.MAKERS, "late", late)
    flags = ["--model", SMALL_VIT.name, "--batch_size", "4", "--repeats", "2", "--largest_side", "64"]
    flags += ["--cases", "ours,ours+eager", "--later", "late", "--precisions", "fp32", "--json", str(path)]
    assert train_step.main(flags) == 0
    found = json.loads(path.read_text())["precisions"]["fp32"]
    assert {name: len(seconds) for name, seconds in found["later_seconds"]["late"].items()} == {"ours": 2, "late": 2}
    assert written == [found | {"later_seconds": {}}]  # nothing is lost if that takes too long
    assert not found["ours_compiled"]


def test_a_large_batch_repeats_its_images(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(large_batch, "DIFFERENT", 4)
    images, tokens, ids = large_batch.make_batch(SMALL_VIT.name, 10)
    assert [len(each) for each in (images, tokens, ids)] == [10, 10, 10]
    assert torch.equal(images[4:8], images[:4]) and torch.equal(images[8:], images[:2])
    assert len({tuple(image.flatten().tolist()) for image in images[:4]}) == 4
    assert torch.equal(large_batch.make_texts(130)[64:128], large_batch.make_texts(64))
