"""How many run at once, in which pieces they come, and what happens when memory is full."""

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor

from cliptune.data.issues import Issue
from cliptune.data.pairs import DataSource, Pairs, load_pairs
from cliptune.features.encode import Encoder, encode_pairs
from cliptune.runtime.device import Precision
from cliptune.training.loss import ContrastiveLoss
from data_loader import ImageTextDataset
from evaluation import validation_loss
from tests.helpers.datasets import make_images, make_index
from tests.helpers.models import FP32, make_model, small_architectures
from tests.helpers.no_float64 import NoFloat64

__all__ = ["small_architectures"]

BF16 = Precision("bf16", torch.bfloat16, scaled=False)


@pytest.fixture
def pairs(tmp_path: Path) -> Pairs:
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


@pytest.mark.parametrize("num_workers", [0, pytest.param(2, marks=pytest.mark.slow)])
def test_batches_that_come_in_pieces_are_the_same_batches(
    pairs: Pairs, num_workers: int, monkeypatch: pytest.MonkeyPatch
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
        found.append((encode_pairs(encoder, pairs, on_unreadable_image=issues.append), len(issues)))
    assert runs == [15, 4] * 3
    for encoded, num_issues in found:
        assert num_issues == 1
        assert torch.equal(encoded.image_features, found[0][0].image_features)
        assert torch.equal(encoded.image_indices, found[0][0].image_indices)
    assert len(found[0][0].image_features) == 19


def test_full_memory_halves_what_runs_at_once(
    pairs: Pairs, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    encoder = encoder_of(make_model("ViT-Mini"))
    whole = encode_pairs(encoder, pairs)
    for name in ("run_image_tower", "run_text_tower"):
        run = getattr(encoder.model, name)

        def full(inputs: Tensor, run: Any = run) -> Tensor:
            if len(inputs) > 5:
                raise torch.OutOfMemoryError("CUDA out of memory")
            result: Tensor = run(inputs)
            return result

        monkeypatch.setattr(encoder.model, name, full)
    halved = encode_pairs(encoder, pairs)
    assert torch.allclose(halved.image_features, whole.image_features, atol=1e-6)
    assert torch.allclose(halved.text_features, whole.text_features, atol=1e-6)
    assert "out of memory with 15 at once: encoding halves" in caplog.text


def test_one_that_does_not_fit_and_other_errors_come_through(pairs: Pairs, monkeypatch: pytest.MonkeyPatch) -> None:
    encoder = encoder_of(make_model("ViT-Mini"))
    for error in (torch.OutOfMemoryError("CUDA out of memory"), RuntimeError("shapes do not fit")):

        def broken(images: Tensor, error: Exception = error) -> Tensor:
            raise error

        monkeypatch.setattr(encoder.model, "run_image_tower", broken)
        with pytest.raises(type(error), match=str(error)):
            encode_pairs(encoder, pairs)


def test_encoding_and_the_validation_loss_need_no_float64(pairs: Pairs, monkeypatch: pytest.MonkeyPatch) -> None:
    """The CPU is in the place of the GPU; ranks are computed in main memory then."""
    encoder = encoder_of(make_model("ViT-Mini"))
    monkeypatch.setattr("cliptune.runtime.device._WITHOUT_FLOAT64", {"cpu"})
    loss = ContrastiveLoss(across_ranks=False)
    with NoFloat64("cpu"):
        encoded = encode_pairs(encoder, pairs)
        found, chance = validation_loss(encoded, encoder.model, loss, batch_size=8, captions=pairs.captions)
    assert found == pytest.approx(chance, rel=0.5)
