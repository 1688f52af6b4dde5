"""How many images and texts run at once, who loads them, and what happens when memory is full."""

import multiprocessing
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor

from cliptune.data import kept_workers
from cliptune.data.issues import Issue
from cliptune.data.kept_workers import KeptWorkers
from cliptune.data.pairs import DataSource, Pairs, load_pairs
from cliptune.features import encode
from cliptune.features.encode import Encoder, encode_images, encode_pairs
from cliptune.preprocess.transforms import PixelTransform
from cliptune.runtime.device import Precision
from cliptune.training.loss import ContrastiveLoss
from data_loader import ImageTextDataset
from evaluation import validation_loss
from tests.helpers.datasets import make_images, make_index
from tests.helpers.models import FP32, SMALL_RESNET, SMALL_VIT, make_model, small_architectures
from tests.helpers.no_float64 import NoFloat64

__all__ = ["small_architectures"]

BF16 = Precision("bf16", torch.bfloat16, scaled=False)


@pytest.fixture
def few_pairs(tmp_path: Path) -> Pairs:
    """20 images with two captions each; one image cannot be read."""
    names = [f"{n}.png" for n in range(20)]
    make_images(tmp_path, *names)
    (tmp_path / names[7]).write_bytes(b"no image")
    rows = [{"image": name, "caption": f"{text} {n}"} for n, name in enumerate(names) for text in ("a dog", "one")]
    return load_pairs(DataSource(make_index(tmp_path, rows)))


def encoder_of(model: Any, **options: Any) -> Encoder:
    return Encoder(model, ImageTextDataset, **{"precision": FP32, "batch_size": 8, "num_workers": 0, **options})


@pytest.mark.parametrize(
    ("device", "precision", "batch_size", "images", "texts"),
    [
        ("cpu", FP32, 8, 16, 64),
        ("cpu", BF16, 8, 8, 8),
        ("mps", FP32, 8, 16, 64),
        ("cuda:1", FP32, 8, 256, 1024),
        ("cuda", BF16, 32, 256, 1024),
        ("cuda", BF16, 2048, 2048, 2048),
    ],
)
def test_a_gpu_runs_more_at_once(device: str, precision: Precision, batch_size: int, images: int, texts: int) -> None:
    """In float32 a fixed number on each kind of device, whatever the batch size."""
    model = SimpleNamespace(device=torch.device(device))
    encoder = encoder_of(model, precision=precision, batch_size=batch_size)
    assert (encoder.images_at_once, encoder.texts_at_once) == (images, texts)


@pytest.mark.parametrize(("precision", "is_exact"), [(FP32, True), (BF16, False)])
def test_float32_has_all_its_bits_whatever_is_allowed(
    precision: Precision, is_exact: bool, few_pairs: Pairs, monkeypatch: pytest.MonkeyPatch
) -> None:
    """On a GPU PyTorch allows TF32 for convolutions by default, and somebody may have allowed it for products."""
    encoder = encoder_of(make_model(SMALL_RESNET.name), precision=precision)
    allowed = []
    run = encoder.model.run_image_tower

    def noted(images: Tensor) -> Tensor:
        allowed.append((torch.backends.cudnn.allow_tf32, torch.get_float32_matmul_precision() != "highest"))
        return run(images)

    monkeypatch.setattr(encoder.model, "run_image_tower", noted)
    before = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision("high")
    try:
        encode_pairs(encoder, few_pairs)
    finally:
        after = torch.get_float32_matmul_precision()
        torch.set_float32_matmul_precision(before)
    assert set(allowed) == {(not is_exact, not is_exact)}
    assert (after, torch.backends.cudnn.allow_tf32) == ("high", True)


@pytest.mark.parametrize("num_workers", [0, pytest.param(2, marks=pytest.mark.slow)])
def test_batches_that_come_in_pieces_are_the_same_batches(
    few_pairs: Pairs, num_workers: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As on a GPU; pieces of one image: one of them has none that can be read."""
    encoder = encoder_of(make_model("ViT-Mini"), num_workers=num_workers)
    runs: list[int] = []
    run = encoder.model.run_image_tower

    def counted(images: Tensor) -> Tensor:
        runs.append(len(images))
        return run(images)

    monkeypatch.setattr(encoder.model, "run_image_tower", counted)
    found = []
    for size in (16, 3, 1):
        monkeypatch.setattr(Encoder, "_images_of_a_worker", size)
        issues: list[Issue] = []
        found.append((encode_pairs(encoder, few_pairs, on_unreadable_image=issues.append), len(issues)))
    assert runs == [15, 4] * 3
    for encoded, num_issues in found:
        assert num_issues == 1
        assert torch.equal(encoded.image_features, found[0][0].image_features)
        assert torch.equal(encoded.image_indices, found[0][0].image_indices)
    assert len(found[0][0].image_features) == 19


def test_full_memory_halves_what_runs_at_once(
    few_pairs: Pairs, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    encoder = encoder_of(make_model("ViT-Mini"))
    whole = encode_pairs(encoder, few_pairs)
    for name in ("run_image_tower", "run_text_tower"):
        run = getattr(encoder.model, name)

        def full(inputs: Tensor, run: Any = run) -> Tensor:
            if len(inputs) > 5:
                raise torch.OutOfMemoryError("CUDA out of memory")
            result: Tensor = run(inputs)
            return result

        monkeypatch.setattr(encoder.model, name, full)
    halved = encode_pairs(encoder, few_pairs)
    assert torch.allclose(halved.image_features, whole.image_features, atol=1e-6)
    assert torch.allclose(halved.text_features, whole.text_features, atol=1e-6)
    assert "out of memory with 15 at once: encoding halves" in caplog.text


def test_one_that_does_not_fit_and_other_errors_come_through(few_pairs: Pairs, monkeypatch: pytest.MonkeyPatch) -> None:
    encoder = encoder_of(make_model("ViT-Mini"))
    for error in (torch.OutOfMemoryError("CUDA out of memory"), RuntimeError("shapes do not fit")):

        def broken(images: Tensor, error: Exception = error) -> Tensor:
            raise error

        monkeypatch.setattr(encoder.model, "run_image_tower", broken)
        with pytest.raises(type(error), match=str(error)):
            encode_pairs(encoder, few_pairs)
        assert encoder.model.training  # a notebook may go on with it


def test_encoding_and_the_validation_loss_need_no_float64(few_pairs: Pairs, monkeypatch: pytest.MonkeyPatch) -> None:
    """The CPU is in the place of the GPU; ranks are computed in main memory then."""
    encoder = encoder_of(make_model("ViT-Mini"))
    monkeypatch.setattr("cliptune.runtime.device._WITHOUT_FLOAT64", {"cpu"})
    loss = ContrastiveLoss(across_ranks=False)
    with NoFloat64("cpu"):
        encoded = encode_pairs(encoder, few_pairs)
        found, chance = validation_loss(encoded, encoder.model, loss, batch_size=8, captions=few_pairs.captions)
    assert found == pytest.approx(chance, rel=0.5)


@pytest.fixture
def pairs(sample_dir: Path) -> Pairs:
    return load_pairs(sample_dir)


@pytest.fixture
def encoder() -> Encoder:
    return Encoder(make_model(SMALL_VIT.name).eval(), ImageTextDataset, precision=FP32, batch_size=16, num_workers=0)


def children() -> set[int | None]:
    return {child.pid for child in multiprocessing.active_children()}


def note_workers(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """Let loaders give nothing; return how many workers each has."""
    asked: list[int] = []

    def make_loader(*_: Any, num_workers: int, **__: Any) -> list[Any]:
        asked.append(num_workers)
        return []

    for module in (encode, kept_workers):
        monkeypatch.setattr(module, "make_loader", make_loader)
    return asked


@pytest.mark.slow
def test_evaluations_share_workers_and_give_the_same_features(encoder: Encoder, pairs: Pairs) -> None:
    want, before = encode_images(encoder, pairs)[0], children()
    watched = pairs.select(range(10, 50))
    kept = replace(encoder, num_workers=2, kept=KeptWorkers())
    seen = []
    for _ in range(3):
        assert torch.equal(encode_images(kept, pairs)[0], want)
        assert torch.equal(encode_images(replace(kept, model=encoder.model), watched)[0], want[10:50])
        seen.append(children() - before)
    assert [len(pids) for pids in seen] == [2, 2, 2]
    assert seen[0] == seen[1] == seen[2]
    del kept
    assert children() == before


@pytest.mark.parametrize(("num_images", "kept", "expected"), [(20, None, 0), (60, None, 0), (60, KeptWorkers(), 3)])
def test_few_images_are_no_work_for_workers(
    num_images: int, kept: KeptWorkers | None, expected: int, encoder: Encoder, pairs: Pairs, monkeypatch: Any
) -> None:
    asked = note_workers(monkeypatch)
    with pytest.raises(ValueError, match="none of the images could be read"):
        encode_images(replace(encoder, num_workers=8, kept=kept), pairs.select(range(num_images)))
    assert asked == [expected]


def test_a_hundred_images_start_few_workers_and_many_start_all(encoder: Encoder, monkeypatch: Any) -> None:
    asked = note_workers(monkeypatch)
    for number in (60, 100, 200, 5000):
        batches = [list(range(start, min(start + 16, number))) for start in range(0, number, 16)]
        replace(encoder, num_workers=8)._loaded(ImageTextDataset.__new__(ImageTextDataset), batches)
    assert asked == [0, 3, 6, 8]


@pytest.mark.slow
def test_once_images_are_cached_no_worker_loads_and_nothing_is_decoded(
    encoder: Encoder, pairs: Pairs, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    want, before = encode_images(encoder, pairs), children()
    kept = replace(encoder, num_workers=2, image_cache_dir=tmp_path, kept=KeptWorkers())
    for number in range(3):
        got = encode_images(kept, pairs)
        assert all(torch.equal(one, two) for one, two in zip(got, want, strict=True))
        assert len(children() - before) == (0 if number else 2)
        monkeypatch.setattr(PixelTransform, "load", lambda *_: pytest.fail("an image is decoded"))
    assert torch.equal(encode_images(replace(kept, kept=None), pairs)[0], want[0])


@pytest.mark.parametrize("name", [SMALL_VIT.name, SMALL_RESNET.name])
def test_pixels_with_their_channels_last_give_the_same_features(name: str) -> None:
    model = make_model(name).eval()
    images = torch.randint(0, 256, (5, 3, 64, 64), dtype=torch.uint8)
    with torch.no_grad():
        want = model.encode_image(images)
        assert torch.equal(model.encode_image(images.contiguous(memory_format=torch.channels_last)), want)
