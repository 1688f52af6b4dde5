"""What people give a model to encode: taken as meant, or refused by name."""

import io
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest
import torch
from PIL import Image
from torch import Tensor

from clip_model import CLIPModel
from cliptune.preprocess.tokens import tokenize
from tests.helpers.models import small_architectures

__all__ = ["small_architectures"]

COLOUR = np.random.default_rng(0).integers(0, 256, (90, 120, 3), dtype=np.uint8)
GREY = COLOUR[..., 0]
PNG = io.BytesIO()
Image.fromarray(COLOUR).save(PNG, "PNG")


@pytest.fixture
def model() -> CLIPModel:
    torch.manual_seed(0)
    return CLIPModel("ViT-Mini", pretrained="none").eval()


@pytest.fixture
def path(tmp_path: Path) -> Path:
    (tmp_path / "a.png").write_bytes(PNG.getvalue())
    return tmp_path / "a.png"


def opened(path: Path) -> Any:
    return path.open("rb")


FORMS: list[Callable[[Path], Any]] = [
    lambda path: COLOUR, lambda path: [COLOUR], lambda path: COLOUR[None], lambda path: PNG.getvalue(),
    lambda path: bytearray(PNG.getvalue()), lambda path: io.BytesIO(PNG.getvalue()), opened, str,
    lambda path: [opened(path)], lambda path: (path for path in [path]), lambda path: pd.Series([str(path)]),
    lambda path: np.array([str(path)]), lambda path: COLOUR.copy(order="F"), lambda path: (Image.fromarray(COLOUR),),
]  # fmt: skip


@pytest.mark.parametrize("number", range(len(FORMS)))
def test_an_image_is_the_same_in_every_form(number: int, model: CLIPModel, path: Path) -> None:
    with torch.no_grad():
        expected = model.encode_image(Image.fromarray(COLOUR))
        assert torch.equal(model.encode_image(FORMS[number](path)), expected)


def test_arrays_of_other_channels_are_images(model: CLIPModel) -> None:
    opaque = np.dstack([COLOUR, np.full(GREY.shape, 255, np.uint8)])
    with torch.no_grad():
        grey = model.encode_image(np.dstack([GREY] * 3))
        assert torch.equal(model.encode_image(GREY), grey)
        assert torch.equal(model.encode_image([GREY[..., None]]), grey)
        assert torch.equal(model.encode_image(opaque), model.encode_image(COLOUR))
        mixed = model.encode_image([GREY, Image.fromarray(COLOUR), PNG.getvalue()])
        assert torch.allclose(mixed, torch.cat([grey, *[model.encode_image(COLOUR)] * 2]), atol=1e-6)


def test_pixels_come_one_or_many_of_any_type(model: CLIPModel) -> None:
    pixels = torch.rand(2, 3, 64, 64)
    whole = torch.randint(0, 256, (2, 3, 64, 64), dtype=torch.uint8)
    with torch.no_grad():
        for given in (pixels, whole):
            expected = model.encode_image(given)
            for form in (given.numpy(), list(given), list(given.numpy()), {"pixel_values": given}):
                assert torch.allclose(model.encode_image(form), expected, atol=1e-6)
            one = model.encode_image(given[0])
            assert torch.allclose(one, expected[:1], atol=1e-6)
            assert torch.equal(model.encode_image(given[0].numpy()), one)
        assert torch.allclose(model.encode_image(pixels.double()), model.encode_image(pixels), atol=1e-6)
        assert torch.allclose(model.encode_image(pixels.half()), model.encode_image(pixels), atol=1e-2)


@pytest.mark.parametrize(
    "shape", [(1, 3, 64, 72), (1, 3, 70, 70), (1, 64, 64, 3), (1, 1, 64, 64), (64, 64), (3, 65, 64)]
)
def test_pixels_of_another_shape_are_refused(shape: tuple[int, ...], model: CLIPModel) -> None:
    for given in (torch.zeros(shape), torch.zeros(shape, dtype=torch.uint8), [torch.zeros(shape)]):
        with pytest.raises(ValueError, match=r"pixels of shape \[.*\], torch\.(float32|uint8): .* \[B, 3, 64, 64\]"):
            model.encode_image(given)


@pytest.mark.parametrize(("given", "message"), [
    (np.zeros((90, 120, 3)), r"images cannot be encoded: ndarray of shape \[90, 120, 3\], float64; try"),
    ([None], r"images\[0\] cannot be encoded: NoneType None"),
    ([COLOUR, 3.5], r"images\[1\] cannot be encoded: float 3\.5"),
    (7, "images cannot be encoded: int 7"),
    (b"no image", "images: cannot be read as an image"),
    (io.BytesIO(), "images has no bytes, or has been read to its end"),
    (io.StringIO("text"), "images cannot be encoded: StringIO"),
    ({"pixels": 1, "x": 2}, "images: a mapping without 'pixel_values'; it has pixels, x"),
    ([torch.zeros(3, 64, 64), COLOUR], "images mixes pixels"),
    (torch.zeros(1, 3, 64, 64, dtype=torch.int64), "must be uint8, or float and normalised, got torch.int64"),
])  # fmt: skip
def test_what_is_no_image_is_named(given: Any, message: str, model: CLIPModel) -> None:
    with pytest.raises(ValueError, match=message):
        model.encode_image(given)


def test_files_that_are_not_there_are_named(model: CLIPModel) -> None:
    with pytest.raises(FileNotFoundError, match=r"https://example.org/a.png is an address, not a file"):
        model.encode_image("https://example.org/a.png")
    with pytest.raises(FileNotFoundError, match=r"gone\.png"):
        model.encode_image(["gone.png"])


@pytest.mark.parametrize("make", [list, np.array, lambda rows: (row for row in rows)])
def test_nothing_gives_no_features(make: Callable[[Any], Any], model: CLIPModel) -> None:
    assert model.encode_image(make([])).shape == model.encode_text(make([])).shape == (0, 64)
    assert model.encode_image(torch.zeros(0, 3, 64, 64)).shape == (0, 64)
    assert model.encode_text(torch.zeros(0, 77, dtype=torch.long)).shape == (0, 64)


IDS = tokenize(["a red dog", "two cats on a mat"])[0]
LENGTHS = (IDS != 0).sum(1).tolist()
TEXT_FORMS: list[Any] = [
    IDS, IDS.int(), IDS.numpy(), IDS.numpy().astype(np.uint16), IDS.tolist(), list(IDS), IDS[:, :12],
    [row[:length].tolist() for row, length in zip(IDS, LENGTHS, strict=True)],
    [row[:length].numpy() for row, length in zip(IDS, LENGTHS, strict=True)],
    {"input_ids": IDS, "attention_mask": IDS != 0}, {"input_ids": IDS.tolist()},
    np.array(["a red dog", "two cats on a mat"]), pd.Series(["a red dog", "two cats on a mat"]),
    ("a red dog", "two cats on a mat"),
]  # fmt: skip


@pytest.mark.parametrize("number", range(len(TEXT_FORMS)))
def test_a_text_is_the_same_in_every_form(number: int, model: CLIPModel) -> None:
    with torch.no_grad():
        expected = model.encode_text(["a red dog", "two cats on a mat"])
        assert torch.allclose(model.encode_text(TEXT_FORMS[number]), expected, atol=1e-6)


@pytest.mark.parametrize("form", [lambda ids: ids, lambda ids: ids.tolist(), lambda ids: ids.numpy()])
def test_a_row_of_ids_is_one_text(form: Callable[[Tensor], Any], model: CLIPModel) -> None:
    with torch.no_grad():
        assert torch.allclose(model.encode_text(form(IDS[0])), model.encode_text("a red dog"), atol=1e-6)


def test_a_tokenizers_output_is_its_ids(model: CLIPModel) -> None:
    transformers = pytest.importorskip("transformers")
    batch = transformers.BatchEncoding({"input_ids": IDS, "attention_mask": (IDS != 0).long()})
    with torch.no_grad():
        assert torch.equal(model.encode_text(batch), model.encode_text(IDS))


@pytest.mark.parametrize(("given", "message"), [
    (torch.full((1, 100), 5), r"tokens: Tensor of shape \[1, 100\], torch\.int64; .* \[B, L\], L at most 77"),
    (torch.zeros(1, 2, 3, dtype=torch.long), r"tokens: Tensor of shape \[1, 2, 3\]"),
    (torch.tensor([[49406, 60000, 49407]]), "ids from 49406 to 60000, this model has those from 0 to 49407"),
    ([[49406, -5, 49407]], "ids from -5 to 49407"),
    (IDS.float(), r"Tensor of shape \[2, 77\], torch\.float32; ids are integers"),
    ([None], r"texts\[0\] is neither a text nor a row of token ids: NoneType None"),
    (["a", float("nan")], r"texts\[0\] is neither|texts\[1\] is neither a text nor a row of token ids: float nan"),
    (["a", ["b", "c"]], r"is neither a text nor a row"),
    ([True, False], r"texts\[0\] is neither a text nor a row of token ids: bool True"),
    (b"a dog", "texts cannot be encoded: bytes b'a dog'"),
    (12, "texts cannot be encoded: int 12"),
    ({"ids": IDS}, "texts: a mapping without 'input_ids'; it has ids"),
])  # fmt: skip
def test_what_is_no_text_is_named(given: Any, message: str, model: CLIPModel) -> None:
    with pytest.raises(ValueError, match=message):
        model.encode_text(given)
