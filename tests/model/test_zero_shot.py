"""Similarities and classes on the model's own scale, and lists that are encoded in batches."""

from collections.abc import Callable, Iterator
from functools import partial
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from torch import Tensor

from clip_model import CLIPModel
from cliptune.model.inputs import AT_ONCE
from tests.helpers.models import WORDS, make_model, small_architectures

__all__ = ["small_architectures"]

IMAGES = [Image.fromarray(np.random.default_rng(n).integers(0, 256, (40, 50, 3), dtype=np.uint8)) for n in range(3)]


@pytest.fixture
def model() -> CLIPModel:
    return make_model("ViT-Mini").eval()


def counted(model: CLIPModel, monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """Sizes of the batches that go through the towers."""
    sizes: list[int] = []

    def count(run: Callable[[Tensor], Tensor], batch: Tensor) -> Tensor:
        sizes.append(len(batch))
        return run(batch)

    for name in ("run_image_tower", "run_text_tower"):
        monkeypatch.setattr(model, name, partial(count, getattr(model, name)))
    return sizes


def test_similarity_is_the_models_logits(model: CLIPModel) -> None:
    with torch.no_grad():
        model.logit_scale.fill_(3.0)
        cosines = model.encode_image(IMAGES) @ model.encode_text(["a", "b"]).T
    found = model.similarity(IMAGES, ["a", "b"])
    assert torch.allclose(found, np.exp(3.0) * cosines)
    assert not found.requires_grad
    model.learn_bias()
    assert model.logit_bias is not None
    assert torch.allclose(model.similarity(IMAGES, ["a", "b"]), found + model.logit_bias.detach())


def test_classes_have_probabilities_the_most_likely_first(model: CLIPModel) -> None:
    names = ["cat", "dog", "boat"]
    found = model.classify(IMAGES, names)
    logits = model.similarity(IMAGES, [f"a photo of a {name}" for name in names])
    for row, expected in zip(found, logits.softmax(-1).tolist(), strict=True):
        assert [row[name] for name in names] == pytest.approx(expected, abs=1e-6)
        assert list(row.values()) == sorted(row.values(), reverse=True)
        assert sum(row.values()) == pytest.approx(1)


def test_a_class_is_the_mean_of_its_texts(model: CLIPModel) -> None:
    templates = ["a photo of a {}", "{}, drawn"]
    with torch.no_grad():
        texts = [[template.replace("{}", name) for template in templates] for name in ("cat", "dog")]
        means = torch.stack([model.encode_text(each).mean(0) for each in texts])
        features = model.encode_image(IMAGES[0])
        logits = model.logit_scale.exp() * features @ (means / means.norm(dim=1, keepdim=True)).T
    (found,) = model.classify(IMAGES[0], ["cat", "dog"], templates=templates)
    assert [found["cat"], found["dog"]] == pytest.approx(logits.softmax(-1)[0].tolist(), abs=1e-6)


@pytest.mark.parametrize(
    ("names", "templates", "message"),
    [
        ([], "{}", "at least one"),
        ("cat", "{}", "a list of names"),
        (["cat"], [], "at least one template"),
        (["cat", "dog", "cat"], "{}", "'cat' occurs twice"),
        (["cat"], "a photo", "has no {}"),
    ],
)
def test_what_are_no_classes_is_refused(model: CLIPModel, names: Any, templates: Any, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        model.classify(IMAGES, names, templates=templates)


def test_long_lists_go_in_batches_with_the_same_features(model: CLIPModel, monkeypatch: pytest.MonkeyPatch) -> None:
    num = 2 * AT_ONCE + 5
    images = [IMAGES[n % 3].rotate(n) for n in range(num)]
    texts = [" ".join(WORDS[(n * k) % 16] for k in range(1, 2 + n % 9)) for n in range(num)]
    with torch.no_grad():
        model.train()  # where a list is one batch
        sizes = counted(model, monkeypatch)
        whole = model.encode_image(images), model.encode_text(texts)
        assert sizes == [num, num]
        model.eval()
        sizes.clear()
        parts = model.encode_image(images), model.encode_text(texts)
    assert max(sizes) == AT_ONCE
    assert sum(sizes) == 2 * num
    for found, expected in zip(parts, whole, strict=True):
        assert (found - expected).abs().max() <= 1e-6


def test_images_of_a_generator_are_decoded_as_they_are_needed(
    model: CLIPModel, monkeypatch: pytest.MonkeyPatch
) -> None:
    drawn, sizes = 0, counted(model, monkeypatch)
    ahead: list[int] = []

    def draw() -> Iterator[Image.Image]:
        nonlocal drawn
        for n in range(2 * AT_ONCE):
            drawn += 1
            ahead.append(drawn - sum(sizes))
            yield IMAGES[n % 3]

    with torch.no_grad():
        assert len(model.encode_image(draw())) == 2 * AT_ONCE
    assert max(ahead) == AT_ONCE


def test_a_tensor_is_a_batch_already(model: CLIPModel, monkeypatch: pytest.MonkeyPatch) -> None:
    """Under FSDP every rank must run its towers as often as the others."""
    sizes = counted(model, monkeypatch)
    with torch.no_grad():
        model.encode_text(torch.full((AT_ONCE + 1, 77), 49407))
    assert sizes == [AT_ONCE + 1]
