"""Exports of small random models: their libraries, and this toolkit, read the same features out of them."""

from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from clip_model import CLIPModel
from cliptune.export import forms
from cliptune.export.fold import fold_projections
from cliptune.export.forms import FORMS, check_can_hold, check_installed
from cliptune.export.probe import LOADERS
from cliptune.model.architectures import ARCHITECTURES, Architecture
from cliptune.preprocess.transforms import clip_transform, normalize
from tests.export.test_fold import projected, weights_of
from tests.helpers.models import SMALL_RESNET, SMALL_VIT

WIDE = replace(SMALL_VIT, vision_heads=1, transformer_width=64, transformer_heads=1)
SHAPES: dict[str, tuple[Architecture, int]] = {
    "as OpenAI's": (WIDE, 64),
    "a projection": (WIDE, 48),
    "GELU": (replace(SMALL_VIT, activation="gelu"), 64),
    "GELU by tanh, other sizes": (
        replace(
            SMALL_VIT, activation="gelu_tanh", image_resolution=96, context_length=40, vision_mlp_width=96,
            text_mlp_width=320, vision_eps=1e-3, text_eps=1e-4, mean=(0.5, 0.4, 0.3), std=(0.5, 0.25, 0.2),
        ),
        80,
    ),
    "an end token, more tokens": (replace(SMALL_VIT, text_pooling="end", end_token=49407, vocab_size=49_500), 64),
    "the mean of the patches": (replace(SMALL_VIT, image_pooling="average", causal=False, text_pooling="last"), 64),
    "a ResNet": (SMALL_RESNET, 64),
    "a ResNet with a projection": (SMALL_RESNET, 48),
}  # fmt: skip
LIBRARIES = [pytest.param("transformers", marks=pytest.mark.slow), "open_clip", "openai"]
"""Those whose import takes seconds are slow."""
TEXTS = ["a photo of a dog", "Two  small red boats, 3 people & a café", "very long " * 60]


@pytest.fixture(params=SHAPES)
def model(request: Any) -> Iterator[CLIPModel]:
    shape, size = SHAPES[request.param]
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(ARCHITECTURES, "tested", replace(shape, name="tested"))
        yield projected("tested", size)


def holds(form: str, model: CLIPModel) -> bool:
    return not list(FORMS[form].refusals(model.architecture))


def exported(form: str, model: CLIPModel, folder: Path) -> Path:
    write = FORMS[form].write
    assert write is not None
    write(fold_projections(weights_of(model)), folder)
    return folder


def assert_same_features(form: str, model: CLIPModel, folder: Path) -> None:
    """Of the library, from the same pixels and texts."""
    loaded, shape = LOADERS[form](folder), model.architecture
    pixels = torch.randint(0, 256, (3, 3, *[model.image_resolution] * 2), dtype=torch.uint8)
    found = loaded.encode_pixels(normalize(pixels, shape.mean, shape.std).numpy()), loaded.encode_texts(TEXTS)
    with torch.no_grad():
        expected = model.encode_image(pixels).numpy(), model.encode_text(TEXTS).numpy()
    for features, wanted in zip(found, expected, strict=True):
        unit = features / np.linalg.norm(features, axis=1, keepdims=True)
        assert np.linalg.norm(unit - wanted, axis=1).max() <= FORMS[form].tolerance


@pytest.mark.slow
@pytest.mark.parametrize("form", LIBRARIES)
def test_the_library_and_our_loader_give_the_same_features(form: str, model: CLIPModel, tmp_path: Path) -> None:
    pytest.importorskip("open_clip" if form == "open_clip" else "transformers")
    if not holds(form, model):
        pytest.skip("it cannot hold it")
    folder = exported(form, model, tmp_path)
    assert_same_features(form, model, folder)
    again = CLIPModel(pretrained=folder).eval()
    assert again.architecture.unseen() == model.architecture.unseen()
    pixels = torch.randint(0, 256, (2, 3, *[model.image_resolution] * 2), dtype=torch.uint8)
    with torch.no_grad():
        assert (again.encode_image(pixels) - model.encode_image(pixels)).norm(dim=1).max() < 1e-6
        assert (again.encode_text(TEXTS) - model.encode_text(TEXTS)).norm(dim=1).max() < 1e-6
    assert torch.equal(again.logit_scale, model.logit_scale)


@pytest.mark.parametrize("form", LIBRARIES)
def test_the_library_preprocesses_as_training_did(form: str, tmp_path: Path) -> None:
    pytest.importorskip("open_clip" if form == "open_clip" else "transformers")
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(ARCHITECTURES, "tested", replace(WIDE, name="tested"))
        model = projected("tested", 64)
    loaded, shape = LOADERS[form](exported(form, model, tmp_path)), model.architecture
    rng = np.random.default_rng(0)
    images = [Image.fromarray(rng.integers(0, 256, (*size, 3), dtype=np.uint8)) for size in ((90, 130), (128, 64))]
    for image, found in zip(images, loaded.preprocess(images), strict=True):
        wanted = normalize(clip_transform(64)(image), shape.mean, shape.std).numpy()
        assert np.abs((found - wanted) * np.array(shape.std)[:, None, None]).max() <= 1 / 255 + 1e-5


@pytest.mark.parametrize("shape", [shape for shape, _ in SHAPES.values()], ids=list(SHAPES))
def test_what_a_form_cannot_hold_is_refused_by_name(shape: Architecture) -> None:
    for form in FORMS.values():
        reasons = list(form.refusals(shape))
        if not reasons:
            check_can_hold(form, shape, "x.pth")
            continue
        with pytest.raises(ValueError, match=f"x.pth cannot be exported to {form.name}: ") as error:
            check_can_hold(form, shape, "x.pth")
        can = str(error.value).partition("These can hold it: ")[2].split(", ")
        assert can == [name for name, other in FORMS.items() if not list(other.refusals(shape))]


def test_what_each_form_refuses() -> None:
    def refused(shape: Architecture) -> set[str]:
        return {name for name, form in FORMS.items() if list(form.refusals(shape))}

    of_transformers = {"transformers", "sentence-transformers"}
    assert refused(WIDE) == set()
    assert refused(SMALL_RESNET) == {*of_transformers}
    assert refused(replace(WIDE, activation="gelu")) == {"openai"}
    assert refused(replace(WIDE, vision_heads=2)) == {"openai"}
    assert refused(replace(WIDE, text_mlp_width=96)) == {"openai"}
    assert refused(replace(WIDE, std=(0.5, 0.5, 0.5))) == {"openai"}
    assert refused(replace(WIDE, causal=False)) == {*of_transformers, "openai"}
    assert refused(replace(WIDE, text_pooling="end", end_token=2)) == {*of_transformers, "openai"}


def test_a_missing_library_is_told_with_the_command(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(forms.importlib.util, "find_spec", lambda name: None)
    with pytest.raises(ImportError, match=r"--to open_clip needs open_clip_torch: pip install open_clip_torch \(") as e:
        check_installed(FORMS["open_clip"])
    assert "[export]" in str(e.value)
    check_installed(FORMS["openai"])
