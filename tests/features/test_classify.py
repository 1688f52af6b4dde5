import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from cliptune.data.pairs import load_pairs
from cliptune.features.classify import Classified, class_features, classify, summary, wilson_interval
from cliptune.features.encode import Encoder
from data_loader import ImageTextDataset
from tests.helpers.datasets import make_images, make_index
from tests.helpers.models import FP32, SMALL_VIT, make_model, small_architectures

__all__ = ["small_architectures"]

CLASSES = {"cat": ["cat", "kitten"], "dog": ["dog"], "sea": ["the sea", "an ocean", "waves"]}
TEMPLATES = ["a photo of a {}", "{} in the rain"]


def encoder() -> Encoder:
    return Encoder(make_model(SMALL_VIT.name), ImageTextDataset, precision=FP32, batch_size=64, num_workers=0)


def test_a_class_is_the_mean_of_its_texts() -> None:
    model = encoder().model
    found = class_features(encoder(), CLASSES, TEMPLATES)
    for row, names in zip(found, CLASSES.values(), strict=True):
        texts = [template.format(name) for name in names for template in TEMPLATES]
        mean = model.encode_text(texts).detach().mean(0)  # type: ignore[arg-type]
        assert torch.allclose(row, mean / mean.norm(), atol=1e-5)


def test_images_are_ranked_as_by_hand(tmp_path: Path) -> None:
    names = [f"{number}.png" for number in range(12)]
    make_images(tmp_path, *names)
    make_index(tmp_path, [{"image_path": name, "caption": "x"} for name in names])
    pairs = load_pairs(tmp_path)
    Path(pairs.paths[4]).write_text("broken")
    labels = np.arange(12) % 3
    own = encoder()
    of_classes = class_features(own, CLASSES, TEMPLATES)
    found = classify(own, pairs, labels, of_classes)
    kept = [index for index in range(12) if index != 4]
    features = own.model.encode_image([pairs.paths[index] for index in kept]).detach()  # type: ignore[arg-type]
    scores = features @ of_classes.T
    probabilities = (own.model.logit_scale.exp() * scores).softmax(1).detach()
    assert math.isnan(found.ranks[4])
    assert found.predicted[4] == -1
    assert found.predicted[kept].tolist() == scores.argmax(1).tolist()
    assert found.probabilities[kept] == pytest.approx(probabilities.max(1).values.numpy(), rel=1e-3)
    order = scores.argsort(1, descending=True)
    by_hand = [order[row].tolist().index(labels[index]) + 1 for row, index in enumerate(kept)]
    assert found.ranks[kept].tolist() == by_hand


def test_a_model_comes_back_in_its_own_mode_from_an_error(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    def broken(_: Any) -> Any:
        raise RuntimeError("shapes do not fit")

    failing = encoder()
    monkeypatch.setattr(failing.model, "encode_text", broken)
    monkeypatch.setattr(failing.model, "run_image_tower", broken)
    make_images(tmp_path, "a.png")
    make_index(tmp_path, [{"image": "a.png", "caption": "a dog"}])
    with pytest.raises(RuntimeError, match="do not fit"):
        class_features(failing, CLASSES, TEMPLATES)
    assert failing.model.training
    with pytest.raises(RuntimeError, match="do not fit"):
        classify(failing, load_pairs(tmp_path), np.array([0]), torch.eye(1, failing.model.projection_dim))
    assert failing.model.training


def test_a_collapsed_model_is_in_the_middle(tmp_path: Path) -> None:
    make_images(tmp_path, "a.png", "b.png")
    make_index(tmp_path, [{"image_path": name, "caption": "x"} for name in ("a.png", "b.png")])
    own = encoder()
    of_classes = torch.ones(5, own.model.projection_dim) / math.sqrt(own.model.projection_dim)
    found = classify(own, load_pairs(tmp_path), np.array([0, 3]), of_classes)
    assert found.ranks.tolist() == [3, 3]
    assert found.probabilities.tolist() == pytest.approx([0.2, 0.2])


def test_what_is_summed_up() -> None:
    labels = np.array([0, 0, 0, 0, 1, 1, 3])
    predicted = np.array([0, 0, 1, 1, 1, 0, -1])
    ranks = np.array([1, 1, 2, 6, 1, 3, math.nan], dtype=np.float32)
    found = Classified(ranks, predicted, np.array([0.9, 0.9, 0.9, 0.9, 0.9, 0.3, math.nan], dtype=np.float32))
    values = summary(found, labels, ["cat", "dog", "sea", "sky"], np.arange(7))
    assert (values["num_images"], values["top1"], values["top5"]) == (6, pytest.approx(50), pytest.approx(500 / 6))
    assert values["mean_per_class"] == pytest.approx(50)
    assert values["mean_probability"] == pytest.approx(80)
    assert values["confusions"] == [("cat", "dog", 2), ("dog", "cat", 1)]
    assert [(each["label"], each["num_images"], each["top1"], each["top5"]) for each in values["classes"]] == [
        ("cat", 4, 50, 75),
        ("dog", 2, 50, 100),
    ]
    low, high = values["intervals"]["top1"]
    assert low < 50 < high
    assert summary(found, labels, ["cat", "dog", "sea", "sky"], np.zeros(7, dtype=int))["intervals"] == {}


def test_wilsons_interval_is_that_of_the_paper() -> None:
    assert wilson_interval(0, 10) == pytest.approx((0, 27.75), abs=0.01)
    assert wilson_interval(10, 10) == pytest.approx((72.25, 100), abs=0.01)
    assert wilson_interval(50, 100) == pytest.approx((40.38, 59.62), abs=0.01)
