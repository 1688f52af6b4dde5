"""On the CPU, where torchvision's decoder of JPEGs stands in for the one of a GPU."""

import io
from collections.abc import Sequence
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from torch import Tensor

from cliptune.preprocess import jpeg_decoder
from cliptune.preprocess.decode import EncodedJpeg, open_image
from cliptune.preprocess.jpeg_decoder import JpegDecoder, JpegPart, JpegsLeft, LeavesJpegs, decoder_issue
from cliptune.preprocess.transforms import PixelTransform, train_transform
from tests.helpers.photos import photo

CPU = torch.device("cpu")
SIZES = [(240, 180), (90, 120), (64, 64), (33, 31), (200, 101)]


def encoded(image: Image.Image, kind: str = "JPEG", **options: Any) -> bytes:
    file = io.BytesIO()
    image.save(file, kind, **options)
    return file.getvalue()


def turned(image: Image.Image) -> bytes:
    exif = image.getexif()
    exif[0x0112] = 6
    return encoded(image, exif=exif)


def parts_of(transform: PixelTransform, contents: Sequence[bytes], seed: int = 0) -> list[JpegPart]:
    torch.manual_seed(seed)
    leaves = LeavesJpegs(transform)
    return [leaves(leaves.load(content)) for content in contents]


def pixels_of(transform: PixelTransform, contents: Sequence[bytes], seed: int = 0) -> Tensor:
    torch.manual_seed(seed)
    return torch.stack([transform(transform.load(content)) for content in contents])


@pytest.mark.parametrize(
    ("content", "is_left"),
    [
        (encoded(photo(0)), True),
        (encoded(photo(0).convert("L")), True),
        (encoded(photo(0), progressive=True, subsampling=0), True),
        (encoded(photo(0)) + b"\0\0", True),
        (encoded(photo(0)) + b"trailing", False),  # a decoder may take it for a file that was cut
        (encoded(photo(0).convert("CMYK")), False),
        (encoded(photo(0), keep_rgb=True), False),
        (turned(photo(0)), False),
        (encoded(photo(0), "PNG"), False),
        (encoded(photo(0), "MPO", save_all=True, append_images=[photo(1)]), False),
    ],
)
def test_only_plain_jpegs_are_left_encoded(content: bytes, is_left: bool) -> None:
    found = open_image(content)
    assert isinstance(found, EncodedJpeg) == is_left
    assert not isinstance(found, EncodedJpeg) or found == EncodedJpeg(content, (240, 180), "")


@pytest.mark.parametrize("limit", ["MAX_LEFT_BYTES", "MAX_LEFT_PIXELS"])
def test_large_jpegs_are_not_left(limit: str, monkeypatch: pytest.MonkeyPatch) -> None:
    content = encoded(photo(0))
    monkeypatch.setattr(f"cliptune.preprocess.decode.{limit}", 1000)
    assert not isinstance(open_image(content), EncodedJpeg)


def test_a_cut_file_is_an_error_where_it_is_opened() -> None:
    with pytest.raises(ValueError, match="cannot be read as an image"):
        open_image(encoded(photo(0))[:-500])


@pytest.mark.parametrize("augment", ["none", "crop"])
def test_pixels_are_those_of_the_transform_and_as_much_is_drawn(augment: str) -> None:
    transform = train_transform(48, augment)
    contents = [encoded(photo(seed, size), quality=90) for seed, size in enumerate(SIZES)]
    contents[2] = encoded(photo(2, SIZES[2]).convert("L"))
    parts = parts_of(transform, contents)
    drawn = torch.get_rng_state()
    pixels, errors = JpegDecoder(CPU).decode(parts)
    expected = pixels_of(transform, contents)
    assert torch.equal(torch.get_rng_state(), drawn)
    assert (pixels.dtype, pixels.shape, errors) == (torch.uint8, (len(SIZES), 3, 48, 48), {})
    assert (pixels.int() - expected.int()).abs().float().mean() < 0.5  # of 255: decoders differ a little


def test_what_only_pillow_resizes_is_decoded_where_it_is_opened() -> None:
    content = encoded(photo(0, (40, 100)))  # a centre crop; see `CenterTransform`
    leaves = LeavesJpegs(train_transform(32, "none"))
    assert torch.equal(leaves(leaves.load(content)), pixels_of(leaves.inner, [content])[0])
    assert isinstance(parts_of(train_transform(32, "crop"), [content])[0], JpegPart)
    with pytest.raises(ValueError, match="cannot be read as an image"):
        leaves.load(content[:300] + content[-2:])


def test_however_many_are_decoded_at_once_pixels_are_the_same(monkeypatch: pytest.MonkeyPatch) -> None:
    contents = [encoded(photo(seed, size)) for seed, size in enumerate(SIZES)]
    parts = parts_of(train_transform(32, "crop"), contents)
    whole, _ = JpegDecoder(CPU).decode(parts)
    sizes: list[int] = []
    decode_jpegs = jpeg_decoder.decode_jpegs

    def note(contents: Sequence[Tensor], device: torch.device) -> list[Tensor]:
        sizes.append(len(contents))
        return decode_jpegs(contents, device)

    monkeypatch.setattr(jpeg_decoder, "decode_jpegs", note)
    monkeypatch.setattr(jpeg_decoder, "DECODED_AT_ONCE", 3 * 240 * 180)
    monkeypatch.setattr(jpeg_decoder, "RESIZED_AT_ONCE", 240 * 180)
    assert torch.equal(JpegDecoder(CPU).decode(parts)[0], whole)
    assert sizes == [3, 2]


@pytest.mark.parametrize("refusal", ["error", "shape"])
def test_what_the_decoder_refuses_is_decoded_exactly_on_the_cpu_and_said_once(
    refusal: str, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    transform = train_transform(32, "crop")
    contents = [encoded(photo(seed)) for seed in range(4)]
    plain, _ = JpegDecoder(CPU).decode(parts_of(transform, contents))
    exact = pixels_of(transform, contents)
    decode_jpegs = jpeg_decoder.decode_jpegs

    def refuse(given: Sequence[Tensor], device: torch.device) -> list[Tensor]:
        images = decode_jpegs(given, device)
        for number, each in enumerate(given):
            if each.numpy().tobytes() in contents[1:3]:
                if refusal == "error":
                    raise RuntimeError("not to its taste")
                images[number] = images[number][:, :-1]
        return images

    monkeypatch.setattr(jpeg_decoder, "decode_jpegs", refuse)
    decoder = JpegDecoder(CPU)
    for _ in range(2):
        pixels, errors = decoder.decode(parts_of(transform, contents))
        assert errors == {}
        assert torch.equal(pixels[[0, 3]], plain[[0, 3]])
        assert torch.equal(pixels[1:3], exact[1:3])
    assert len(caplog.messages) == 1


def test_a_damaged_file_has_no_pixels_and_costs_no_other_its_own() -> None:
    contents = [encoded(photo(seed), quality=95) for seed in range(3)]
    tables = contents[1].index(b"\xff\xc4")  # Huffman's, after which Pillow's reading of the header ends
    contents[1] = contents[1][: tables + 4] + 17 * b"\xff" + contents[1][tables + 21 :]
    transform = train_transform(32, "none")
    pixels, errors = JpegDecoder(CPU).decode(parts_of(transform, contents))
    whole, _ = JpegDecoder(CPU).decode(parts_of(transform, contents[::2]))
    assert torch.equal(pixels[::2], whole)
    with pytest.raises(ValueError, match="cannot be read as an image") as reason:
        transform.load(contents[1])
    assert {index: str(error) for index, error in errors.items()} == {1: str(reason.value)}


def test_jpegs_travel_in_tensors() -> None:
    parts = parts_of(train_transform(32, "crop"), [encoded(photo(seed)) for seed in range(3)])
    sent = {row: part._replace(name=f"{row}.jpg") for row, part in zip((0, 2, 5), parts, strict=True)}
    received = JpegsLeft.packed(sent).unpacked()
    assert list(received) == [0, 2, 5]
    for row, part in received.items():
        assert part[1:] == sent[row][1:]
        assert torch.equal(part.content, sent[row].content)


def test_a_decoder_that_is_not_there_is_told_with_the_reason(monkeypatch: pytest.MonkeyPatch) -> None:
    assert decoder_issue(CPU) == "it needs a CUDA device, not cpu"
    assert decoder_issue(torch.device("mps")) == "it needs a CUDA device, not mps"
    cuda = torch.device("cuda")

    def fails(*_: Any) -> list[Tensor]:
        raise RuntimeError("built without\nnvJPEG")

    monkeypatch.setattr(jpeg_decoder, "decode_jpegs", fails)
    assert decoder_issue(cuda) == "torchvision decodes no JPEG on cuda: built without nvJPEG"
    monkeypatch.setattr(jpeg_decoder, "decode_jpegs", lambda *_: [torch.zeros(1, 16, 16)])
    assert decoder_issue(cuda) == "torchvision's decoder made [1, 16, 16] of 16 x 16 pixels"
    monkeypatch.setattr(jpeg_decoder, "decode_jpegs", lambda *_: [torch.zeros(3, 16, 16)])
    assert decoder_issue(cuda) is None


def test_a_torchvision_without_decoders_fails_this_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delattr("torchvision.io.decode_jpeg")
    reason = str(decoder_issue(torch.device("cuda")))
    assert reason.startswith("torchvision decodes no JPEG on cuda: cannot import name 'decode_jpeg'")


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_without_a_gpu_torchvision_itself_has_no_decoder() -> None:
    assert str(decoder_issue(torch.device("cuda"))).startswith("torchvision decodes no JPEG on cuda: ")


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
def test_a_gpu_gives_nearly_the_pixels_of_the_cpu() -> None:
    device = torch.device("cuda")
    if (issue := decoder_issue(device)) is not None:
        pytest.skip(issue)
    contents = [encoded(photo(seed, size), quality=90) for seed, size in enumerate(SIZES)]
    parts = parts_of(train_transform(48, "crop"), contents)
    got, expected = (JpegDecoder(each).decode(parts)[0].int() for each in (device, CPU))
    assert (got - expected).abs().float().mean() < 2


def test_resized_pixels_are_the_exact_ones_where_decoders_agree() -> None:
    """A grey level, which each decoder gives alike, in a border that the resize mixes."""
    pixels = np.zeros((64, 64, 3), dtype=np.uint8)
    pixels[:, 32:] = 255
    content = encoded(Image.fromarray(pixels).convert("L"), quality=100)
    transform = train_transform(20, "none")
    assert torch.equal(JpegDecoder(CPU).decode(parts_of(transform, [content]))[0], pixels_of(transform, [content]))
