import logging
import struct
import zlib
from io import BytesIO
from typing import Any, Literal

import numpy as np
import pytest
from PIL import Image, TiffImagePlugin

from cliptune.preprocess import depth
from cliptune.preprocess.decode import load_image, to_rgb

RAMP = np.linspace(0, 1, 24 * 40).reshape(24, 40)


@pytest.fixture(autouse=True)
def _nothing_said() -> None:
    depth._said[:] = 0


def png16(values: np.ndarray, *, sbit: bytes = b"", trns: bytes = b"", orientation: int = 0) -> bytes:
    """A PNG of 16 bits, `[H, W]` or `[H, W, C]`, with the chunks that Pillow does not write."""

    def chunk(kind: bytes, content: bytes) -> bytes:
        return struct.pack(">I", len(content)) + kind + content + struct.pack(">I", zlib.crc32(kind + content))

    height, width, channels = (*values.shape, 1)[:3]
    exif = Image.Exif()
    exif[0x0112] = orientation
    rows = values.astype(">u2").reshape(height, -1)
    parts = [
        chunk(b"IHDR", struct.pack(">IIBBBBB", width, height, 16, {1: 0, 2: 4, 3: 2, 4: 6}[channels], 0, 0, 0)),
        chunk(b"sBIT", sbit) if sbit else b"",
        chunk(b"tRNS", trns) if trns else b"",
        chunk(b"eXIf", exif.tobytes()[6:]) if orientation else b"",
        chunk(b"IDAT", zlib.compress(b"".join(b"\0" + row.tobytes() for row in rows))),
        chunk(b"IEND", b""),
    ]
    return b"\x89PNG\r\n\x1a\n" + b"".join(parts)


def tiff(
    values: np.ndarray,
    order: Literal["<", ">"] = "<",
    extra: tuple[tuple[int, int, int], ...] = (),
    *,
    packed: bool = False,
    planes: bool = False,
) -> bytes:
    """A TIFF, `[H, W]` or `[H, W, C]`; `extra` are further tags, as kind of number and value."""
    height, width, channels = (*values.shape, 1)[:3]
    stored = values.astype(values.dtype.newbyteorder(order))
    parts = [stored[..., channel].tobytes() for channel in range(channels)] if planes else [stored.tobytes()]
    parts = [zlib.compress(part) for part in parts] if packed else parts
    content = b"".join(parts)
    bits = values.dtype.itemsize * 8
    after = 8 + len(content)
    per_channel = struct.pack(f"{order}{channels}H", *[bits] * channels)
    where = after + len(per_channel)
    starts = [8 + sum(map(len, parts[:part])) for part in range(len(parts))]
    per_channel += struct.pack(f"{order}{2 * len(parts)}I", *starts, *map(len, parts))
    tags = [
        (256, 4, 1, width), (257, 4, 1, height), (258, 3, channels, bits if channels == 1 else after),
        (259, 3, 1, 8 if packed else 1),
        (262, 3, 1, 1 if channels == 1 else 2), (277, 3, 1, channels), (278, 4, 1, height),
        (273, 4, len(parts), where if planes else 8), (284, 3, 1, 1 + planes),
        (279, 4, len(parts), where + 4 * len(parts) if planes else len(content)),
        (339, 3, 1, {"u": 1, "i": 2, "f": 3}[values.dtype.kind]),
        *((tag, kind, 1, value) for tag, kind, value in extra),
    ]  # fmt: skip
    directory = struct.pack(f"{order}H", len(tags))
    for tag, kind, number, value in sorted(tags):
        is_short = kind == 3 and number == 1
        directory += struct.pack(f"{order}HHI", tag, kind, number)
        directory += struct.pack(f"{order}HH", value, 0) if is_short else struct.pack(f"{order}I", value)
    start = after + len(per_channel)
    head = (b"II*\0" if order == "<" else b"MM\0*") + struct.pack(f"{order}I", start)
    return head + content + per_channel + directory + b"\0\0\0\0"


def saved(values: np.ndarray, form: str, **options: Any) -> bytes:
    buffer = BytesIO()
    Image.fromarray(values).save(buffer, form, **options)
    return buffer.getvalue()


def ramp(top: int, dtype: str = "u2") -> np.ndarray:
    values: np.ndarray = (RAMP * top).round().astype(dtype)
    return values


def grey(content: bytes) -> np.ndarray:
    pixels = np.asarray(load_image(content)).astype(int)
    assert (pixels[..., 0] == pixels[..., 2]).all()
    return pixels[..., 0]


def assert_ramp(pixels: np.ndarray) -> None:
    """Within a level of black to white; a rounding of the values may be on the way."""
    assert np.abs(pixels - RAMP * 255).max() <= 1


@pytest.mark.parametrize("bits", [8, 10, 12, 14])
@pytest.mark.parametrize("store", ["png", "tiff", "tiff big-endian", "tiff lzw", "int16", "int32", "uint32"])
def test_grey_is_as_deep_as_its_values_need(bits: int, store: str, caplog: pytest.LogCaptureFixture) -> None:
    values = ramp(2**bits - 1)
    content = {
        "png": lambda: saved(values, "PNG"),
        "tiff": lambda: tiff(values),
        "tiff big-endian": lambda: tiff(values, ">"),
        "tiff lzw": lambda: saved(values, "TIFF", compression="tiff_lzw"),
        "int16": lambda: tiff(values.astype("i2")),
        "int32": lambda: tiff(values.astype("i4"), ">"),
        "uint32": lambda: tiff(values.astype("u4")),
    }[store]()
    for _ in range(2):
        assert_ramp(grey(content))
    assert len(caplog.messages) == 1
    assert f"from 0, black, to {2**bits - 1}, white" in caplog.text


def test_full_grey_is_as_it_was(caplog: pytest.LogCaptureFixture) -> None:
    values = ramp(65535)
    expected = (values / 257).round()
    for content in (saved(values, "PNG"), tiff(values), tiff(values, ">"), tiff(values.astype("u4"))):
        assert np.array_equal(grey(content), expected)
    assert np.array_equal(grey(saved(RAMP.astype("f4"), "TIFF")), (RAMP.astype("f4").astype(float) * 255).round())
    assert np.array_equal(grey(saved(ramp(255, "f4"), "TIFF")), ramp(255))
    assert not caplog.messages


@pytest.mark.parametrize(
    "content",
    [
        png16(ramp(1000), sbit=b"\x10"),
        tiff(ramp(1000), extra=((281, 3, 65535),)),
        b"P5 40 24 65535 " + ramp(1000).astype(">u2").tobytes(),
        saved(ramp(1000), "JPEG2000"),
    ],
    ids=["sBIT", "MaxSampleValue", "maxval", "JPEG 2000"],
)
def test_a_dark_image_whose_file_says_its_depth_stays_dark(content: bytes, caplog: pytest.LogCaptureFixture) -> None:
    assert np.abs(grey(content) - RAMP * 1000 / 257).max() <= 1
    assert not caplog.messages


def test_the_files_word_goes_first_unless_its_values_are_larger(caplog: pytest.LogCaptureFixture) -> None:
    for content in (
        png16(ramp(1000), sbit=b"\x0c"),
        tiff(ramp(1000), extra=((281, 3, 4095),)),
        b"P5 40 24 4095 " + ramp(1000).astype(">u2").tobytes(),
    ):
        assert np.abs(grey(content) - RAMP * 1000 / 4095 * 255).max() <= 1
    assert not caplog.messages
    assert np.array_equal(grey(png16(ramp(65535), sbit=b"\x0c")), (ramp(65535) / 257).round())  # scaled to 16 bits


@pytest.mark.parametrize(
    ("low", "high"), [(0, 4095), (-1, 1), (-1024, 3071), (0.2, 300), (0, 65535), (-0.5, 0.5), (-2, -1)]
)
def test_floats_beyond_the_usual_ranges_span_their_own(low: float, high: float) -> None:
    values = (low + RAMP * (high - low)).astype("f4")
    assert_ramp(grey(saved(values, "TIFF")))
    values[0, 0] = np.nan
    values[23, 39] = np.inf
    pixels = grey(saved(values, "TIFF"))
    assert_ramp(np.where(np.isfinite(values), pixels, RAMP * 255))


def test_floats_that_resampling_left_beyond_0_and_1_are_cut() -> None:
    assert np.array_equal(grey(saved((RAMP * 1.1 - 0.05).astype("f4"), "TIFF")).min(), 0)
    assert np.abs(grey(saved((RAMP * 1.05).astype("f4"), "TIFF")) - (RAMP * 1.05 * 255).clip(0, 255)).max() <= 1


def test_negative_integers_span_their_own_range() -> None:
    for values in (RAMP * 4095 - 1024, RAMP * 65535 - 32768):
        assert_ramp(grey(tiff(values.round().astype("i2"))))


def test_large_integers_are_no_white_image() -> None:
    assert_ramp(grey(tiff((RAMP * (2**24 - 1)).astype("u4"))))
    assert_ramp(grey(tiff((RAMP * (2**32 - 1)).astype("u4"))))


def test_one_value_is_an_image_too() -> None:
    for values in (np.full((4, 4), -3, "i2"), np.zeros((4, 4), "u2"), np.full((4, 4), np.nan, "f4")):
        assert len(np.unique(grey(tiff(values)))) == 1


COLORS = np.stack([RAMP, RAMP[::-1], RAMP[:, ::-1]], axis=-1)


def deep_colors(top: int, channels: int, alpha: float = 1, alpha_top: int = 65535) -> np.ndarray:
    colors = COLORS if channels > 2 else COLORS[..., :1]
    values = (colors * top).round().astype("u2")
    opacity = np.full((24, 40, 1), round(alpha * alpha_top), "u2")
    return np.concatenate([values, opacity], -1) if channels in {2, 4} else values


@pytest.mark.parametrize("channels", [2, 3, 4])
@pytest.mark.parametrize("bits", [8, 12, 14, 16])
def test_colors_are_as_deep_as_their_values_need(
    bits: int, channels: int, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    values = deep_colors(2**bits - 1, channels)
    contents = [png16(values)]
    if channels == 3:
        contents += [tiff(values, order, packed=packed) for order in ("<", ">") for packed in (False, True)]
    expected = COLORS * 255 if channels > 2 else COLORS[..., [0, 0, 0]] * 255
    if bits == 16:
        expected = (values[..., :3] if channels > 2 else values[..., [0, 0, 0]]) >> 8  # as Pillow has it
    for strip in (depth.STRIP_PIXELS, 100):
        monkeypatch.setattr(depth, "STRIP_PIXELS", strip)
        for content in contents:
            pixels = np.asarray(load_image(content)).astype(int)
            assert np.abs(pixels - expected).max() <= (0 if bits == 16 else 1)
            assert np.array_equal(np.asarray(to_rgb(Image.open(BytesIO(content)))), pixels)
    assert len(caplog.messages) == (bits < 16)


def test_planes_are_read_unless_pillow_misreads_them() -> None:
    bytes_, values = deep_colors(255, 3).astype("u1"), deep_colors(65535, 3)
    for content in (tiff(bytes_, planes=True), tiff(bytes_, planes=True, packed=True)):
        assert np.array_equal(np.asarray(load_image(content)), bytes_)
    assert np.array_equal(np.asarray(load_image(tiff(values, planes=True, packed=True))), values >> 8)
    for content in (tiff(values, planes=True), tiff(deep_colors(4095, 3), planes=True, packed=True)):
        with pytest.raises(ValueError, match="which Pillow misreads"):
            load_image(content)


@pytest.mark.parametrize("alpha_top", [4095, 65535])
@pytest.mark.parametrize("channels", [2, 4])
def test_transparency_of_16_bits_is_laid_on_white(channels: int, alpha_top: int) -> None:
    values = deep_colors(4095, channels, alpha=0.5, alpha_top=alpha_top)
    values[0, 0, -1] = alpha_top
    expected = (COLORS if channels > 2 else COLORS[..., [0, 0, 0]]) * 127.5 + 127.5
    pixels = np.asarray(load_image(png16(values))).astype(int)
    assert np.abs(pixels - expected)[1:].max() <= 2


def test_dark_colors_whose_file_says_16_bits_stay_dark() -> None:
    pixels = np.asarray(load_image(png16(deep_colors(4095, 3), sbit=b"\x10\x10\x10")))
    assert pixels.max() == 15


@pytest.mark.parametrize("top", [4095, 65535])
def test_the_transparent_value_of_16_bits_is_white(top: int) -> None:
    values = ramp(top)
    key = int(values[5, 5])
    pixels = grey(png16(values, trns=struct.pack(">H", key)))
    others = values != key
    assert (pixels[~others] == 255).all()
    assert np.abs(pixels - RAMP * 255)[others].max() <= 1
    colors = deep_colors(top, 3)
    pixels = np.asarray(load_image(png16(colors, trns=colors[5, 5].astype(">u2").tobytes()))).astype(int)
    others = (colors != colors[5, 5]).any(-1)
    assert (pixels[~others] == 255).all()
    assert np.abs(pixels - COLORS * 255)[others].max() <= 1
    assert (~others).sum() < 10


def test_deep_images_are_set_upright() -> None:
    for values in (ramp(4095), deep_colors(4095, 3)):
        turned = np.asarray(load_image(png16(np.ascontiguousarray(np.rot90(values)), orientation=6)))
        assert np.array_equal(turned, np.asarray(load_image(png16(values))))
    exif = TiffImagePlugin.ImageFileDirectory_v2()
    exif[0x0112] = 6
    upright = np.ascontiguousarray(np.rot90(ramp(4095)))
    assert_ramp(grey(saved(upright, "TIFF", tiffinfo=exif)))


def test_workers_and_ranks_say_it_once(caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("RANK", "1")
    load_image(png16(ramp(1023)))
    assert not caplog.messages
    monkeypatch.setenv("RANK", "0")
    with caplog.at_level(logging.WARNING):
        for _ in range(3):
            load_image(png16(ramp(1023)))
            load_image(png16(ramp(4095)))
    assert len(caplog.messages) == 2
