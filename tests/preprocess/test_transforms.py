from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image, ImageOps
from torchvision.transforms import Compose

from cliptune.preprocess.decode import decode_image, file_stamp, load_image, part_path, read_bytes, size_of, to_rgb
from cliptune.preprocess.transforms import (
    CenterTransform,
    CropTransform,
    clip_transform,
    draw_crop,
    normalize,
    train_transform,
)
from cliptune.runtime.openai_clip import import_clip

clip = import_clip()


def noise(*shape: int, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).integers(0, 256, shape, dtype=np.uint8)


@pytest.mark.parametrize("size", [(300, 200), (100, 333), (224, 224), (50, 40)])
@pytest.mark.parametrize("mode", ["RGB", "L"])
def test_pixels_are_those_of_clip(size: tuple[int, int], mode: str) -> None:
    image = Image.fromarray(noise(size[1], size[0], 3)).convert(mode)
    expected = clip.clip._transform(224)(image)
    pixels = clip_transform(224)(to_rgb(image))
    assert (pixels.dtype, pixels.shape) == (torch.uint8, (3, 224, 224))
    assert torch.equal(normalize(pixels), expected)


def smooth(width: int, height: int, *, scale: int = 8) -> Image.Image:
    """An image with blots of `scale` pixels and grain, as a camera gives it."""
    small = Image.fromarray(noise(max(height // scale, 2), max(width // scale, 2), 3))
    grain = noise(height, width, 3, seed=1) // 8
    return Image.fromarray(np.asarray(small.resize((width, height))) // 8 * 7 + grain)


SIZES = [
    (500, 375), (375, 500), (640, 427), (1000, 750), (1013, 761), (226, 224), (224, 230), (240, 225), (223, 300),
    (64, 50), (7, 5), (1, 1), (300, 20), (20, 300), (1200, 224), (224, 1200), (224, 448), (224, 447), (333, 667),
]  # fmt: skip


@pytest.mark.slow
@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize(
    "form", [{"quality": 90}, {"quality": 75, "subsampling": 0}, {"progressive": True}, {"gray": 1}]
)
def test_a_jpeg_gives_the_pixels_of_clip(size: tuple[int, int], form: dict[str, int], tmp_path: Path) -> None:
    form = dict(form)
    image = smooth(*size).convert("L" if form.pop("gray", 0) else "RGB")
    image.save(tmp_path / "x.jpg", **form)  # type: ignore[arg-type]
    transform = clip_transform(224)
    decoded = transform.load(tmp_path / "x.jpg")
    assert isinstance(decoded, np.ndarray)  # the fast way
    assert torch.equal(normalize(transform(decoded)), clip.clip._transform(224)(Image.open(tmp_path / "x.jpg")))


@pytest.mark.slow
def test_pixels_are_those_of_clip_for_many_sizes_and_resolutions() -> None:
    rng = np.random.default_rng(0)
    for _ in range(150):
        resolution = int(rng.choice([16, 56, 112]))
        width, height = rng.integers(resolution // 4, 4 * resolution, 2).tolist()
        image = Image.fromarray(noise(height, width, 3, seed=int(rng.integers(1 << 30))))
        pixels = np.ascontiguousarray(np.asarray(image.convert("RGBX")))
        got = normalize(clip_transform(resolution)(pixels))
        assert torch.equal(got, clip.clip._transform(resolution)(image)), (width, height, resolution)


@pytest.mark.parametrize("orientation", range(10))
def test_a_turned_jpeg_is_set_upright(orientation: int, tmp_path: Path) -> None:
    exif = Image.Exif()
    exif[0x0112] = orientation
    smooth(320, 240).save(tmp_path / "x.jpg", exif=exif)
    upright = ImageOps.exif_transpose(Image.open(tmp_path / "x.jpg"))
    decoded = decode_image(tmp_path / "x.jpg")
    assert isinstance(decoded, np.ndarray)
    assert decoded.flags.c_contiguous
    assert np.array_equal(decoded[..., :3], np.asarray(upright))
    transform = clip_transform(224)
    assert torch.equal(normalize(transform(decoded)), clip.clip._transform(224)(upright))


def test_other_files_go_through_pillow(tmp_path: Path) -> None:
    smooth(300, 200).convert("CMYK").save(tmp_path / "cmyk.jpg")
    Image.fromarray(noise(40, 60, 4)).save(tmp_path / "alpha.png")
    Image.fromarray(noise(40, 60).astype(np.uint16) * 257).save(tmp_path / "deep.png")
    smooth(60, 40).convert("P").save(tmp_path / "palette.gif")
    for path in tmp_path.iterdir():
        decoded = decode_image(path)
        assert isinstance(decoded, Image.Image), path
        assert np.array_equal(np.asarray(decoded), np.asarray(load_image(path))), path


def test_a_cut_off_jpeg_is_an_error_and_trailing_bytes_are_none(tmp_path: Path) -> None:
    smooth(300, 200).save(tmp_path / "whole.jpg")
    data = (tmp_path / "whole.jpg").read_bytes()
    (tmp_path / "cut.jpg").write_bytes(data[: len(data) // 2])
    with pytest.raises(ValueError, match=r"cut\.jpg: cannot be read as an image"):
        decode_image(tmp_path / "cut.jpg")
    (tmp_path / "more.jpg").write_bytes(data + b"trailing" * 100)
    assert np.array_equal(
        np.asarray(decode_image(tmp_path / "more.jpg")), np.asarray(decode_image(tmp_path / "whole.jpg"))
    )
    with pytest.raises(FileNotFoundError):
        decode_image(tmp_path / "gone.jpg")


@pytest.mark.parametrize(("augment", "mean_level", "largest_level"), [("none", 1.0, 8), ("crop", 4.0, 24)])
def test_fast_decode_decodes_less_and_changes_pixels_a_little(
    augment: str, mean_level: float, largest_level: int, tmp_path: Path
) -> None:
    smooth(2000, 1500, scale=50).save(tmp_path / "x.jpg", quality=90)
    exact, fast = train_transform(224, augment), train_transform(224, augment, fast_decode=True)
    assert size_of(exact.load(tmp_path / "x.jpg")) == (2000, 1500)
    decoded = fast.load(tmp_path / "x.jpg")
    assert fast.shrunk_side <= min(size_of(decoded)) < 2 * fast.shrunk_side
    results = []
    for transform in (exact, fast):
        torch.manual_seed(3)
        results.append(transform(transform.load(tmp_path / "x.jpg")).int())
    difference = (results[0] - results[1]).abs()
    assert 0 < difference.float().mean() < mean_level
    assert difference.max() <= largest_level


def test_fast_decode_leaves_images_whose_half_would_be_too_small(tmp_path: Path) -> None:
    fast = train_transform(224, "none", fast_decode=True)
    for size in ((500, 375), (300, 200)):
        smooth(*size).save(tmp_path / "x.jpg")
        assert torch.equal(fast(fast.load(tmp_path / "x.jpg")), clip_transform(224)(load_image(tmp_path / "x.jpg")))
    smooth(500, 450).save(tmp_path / "x.jpg")
    assert size_of(fast.load(tmp_path / "x.jpg")) == (250, 225)


@pytest.mark.parametrize("size", [(500, 375), (375, 500), (120, 90), (2000, 300), (1, 1)])
def test_random_crops_are_pillows_to_the_rounding(size: tuple[int, int], tmp_path: Path) -> None:
    smooth(*size).save(tmp_path / "x.jpg")
    transform = CropTransform(112)
    for seed in range(5):
        torch.manual_seed(seed)
        left, top, right, bottom = (round(edge) for edge in draw_crop(size))
        part = load_image(tmp_path / "x.jpg").crop((left, top, right, bottom))
        expected = np.asarray(part.resize((112, 112), Image.Resampling.BICUBIC)).transpose(2, 0, 1).astype(int)
        for decoded in (load_image(tmp_path / "x.jpg"), transform.load(tmp_path / "x.jpg")):
            torch.manual_seed(seed)
            assert np.abs(transform(decoded).numpy() - expected).max() <= isinstance(decoded, np.ndarray)


def test_crops_keep_area_and_shape_within_bounds_and_fall_everywhere() -> None:
    torch.manual_seed(0)
    boxes = np.array([draw_crop((600, 400)) for _ in range(500)])
    across, down = boxes[:, 2] - boxes[:, 0], boxes[:, 3] - boxes[:, 1]
    assert (boxes[:, :2] >= 0).all()
    assert (boxes[:, 2:] <= np.array([600, 400]) + 1e-6).all()
    fraction, ratio = across * down / (600 * 400), across / down
    assert (fraction.min(), fraction.max()) == pytest.approx((0.6, 8 / 9), abs=0.02)  # 4:3 of 3:2
    assert (ratio.min(), ratio.max()) == pytest.approx((0.9, 4 / 3), abs=0.02)  # 0.6 x 600 wide and 400 high
    assert (boxes[:, 0].min(), boxes[:, 2].max()) == pytest.approx((0, 600), abs=8)
    assert draw_crop((4000, 300)) == pytest.approx((1800, 0, 2200, 300))
    assert draw_crop((300, 4000)) == pytest.approx((0, 1800, 300, 2200))


def test_a_crop_of_the_shrunk_image_is_nearly_the_crop_of_the_file(tmp_path: Path) -> None:
    smooth(900, 600, scale=40).save(tmp_path / "x.jpg")
    transform = train_transform(112, "crop")
    decoded = transform.load(tmp_path / "x.jpg")
    shrunk = transform.shrink(decoded)
    assert shrunk.shape == (167, 167, 3)
    for seed in range(5):
        torch.manual_seed(seed)
        direct = transform(decoded).int()
        torch.manual_seed(seed)
        assert (transform.finish(shrunk, size_of(decoded)).int() - direct).abs().float().mean() < 4


def test_normalize_is_bit_equal_to_torchvision_and_leaves_float_pixels_alone() -> None:
    every_level = torch.arange(256, dtype=torch.uint8).view(1, 16, 16).expand(3, 16, 16)
    image = Image.fromarray(every_level.permute(1, 2, 0).numpy())
    steps = clip.clip._transform(16).transforms[-2:]
    with torch.inference_mode():
        assert torch.equal(normalize(every_level[None])[0], Compose(steps)(image))
    assert every_level[0, 15, 15] == 255
    pixels = torch.randn(1, 3, 4, 4)
    assert normalize(pixels) is pixels
    with pytest.raises(ValueError, match="pixels must be uint8"):
        normalize(torch.zeros(3, 4, 4, dtype=torch.int64))


@pytest.mark.parametrize("orientation", range(1, 9))
def test_exif_orientation_is_applied(orientation: int, tmp_path: Path) -> None:
    upright = np.zeros((40, 60, 3), dtype=np.uint8)
    upright[:20, :30] = 255  # the top left quarter is white
    undo: dict[int, Callable[[np.ndarray], np.ndarray]] = {
        1: lambda a: a, 2: np.fliplr, 3: lambda a: np.rot90(a, 2), 4: np.flipud, 5: lambda a: a.transpose(1, 0, 2),
        6: np.rot90, 7: lambda a: np.rot90(a, 2).transpose(1, 0, 2), 8: lambda a: np.rot90(a, 3),
    }  # fmt: skip
    exif = Image.Exif()
    exif[0x0112] = orientation
    Image.fromarray(np.ascontiguousarray(undo[orientation](upright))).save(tmp_path / "x.png", exif=exif)
    assert np.array_equal(np.asarray(load_image(tmp_path / "x.png")), upright)


def test_transparency_is_laid_on_white(tmp_path: Path) -> None:
    rgba = np.zeros((4, 4, 4), dtype=np.uint8)
    rgba[0, 0] = (10, 20, 30, 255)
    Image.fromarray(rgba).save(tmp_path / "x.png")
    pixels = np.asarray(load_image(tmp_path / "x.png"))
    assert tuple(pixels[0, 0]) == (10, 20, 30)
    assert (pixels[1:] == 255).all()
    palette = Image.fromarray(np.zeros((4, 4), dtype=np.uint8)).convert("P")
    palette.save(tmp_path / "p.png", transparency=0)
    assert (np.asarray(load_image(tmp_path / "p.png")) == 255).all()


def test_16_bit_grey_keeps_its_range(tmp_path: Path) -> None:
    ramp = np.linspace(0, 65535, 64, dtype=np.uint16).reshape(8, 8)
    Image.fromarray(ramp).save(tmp_path / "x.png")
    pixels = np.asarray(load_image(tmp_path / "x.png"))[..., 0]
    assert np.abs(pixels - ramp / 257).max() <= 0.51


def test_float_cmyk_and_animated_files(tmp_path: Path) -> None:
    Image.fromarray(np.full((4, 4), 0.5, dtype=np.float32)).save(tmp_path / "x.tiff")
    assert (np.asarray(load_image(tmp_path / "x.tiff")) == 128).all()
    Image.new("CMYK", (4, 4), (0, 255, 255, 0)).save(tmp_path / "x.jpg")
    red, green, _ = np.asarray(load_image(tmp_path / "x.jpg"))[0, 0].astype(int)
    assert red > 200
    assert green < 60
    frames = [Image.new("RGB", (4, 4), color) for color in ("red", "blue")]
    frames[0].save(tmp_path / "x.gif", save_all=True, append_images=frames[1:])
    assert tuple(np.asarray(load_image(tmp_path / "x.gif"))[0, 0]) == (255, 0, 0)


def test_a_file_that_is_no_image_is_named(tmp_path: Path) -> None:
    (tmp_path / "x.jpg").write_text("not an image")
    with pytest.raises(ValueError, match=r"x\.jpg: cannot be read as an image"):
        load_image(tmp_path / "x.jpg")
    with pytest.raises(ValueError, match=r"x\.jpg: cannot be read as an image: of no known format$"):
        decode_image(tmp_path / "x.jpg")
    with pytest.raises(FileNotFoundError):
        load_image(tmp_path / "gone.jpg")


@pytest.mark.parametrize("augment", ["crop", "color"])
def test_augmentation_varies_keeps_the_scale_and_never_flips(augment: str) -> None:
    pixels = np.zeros((224, 224, 3), dtype=np.uint8)
    pixels[:, 112:] = 255
    transform = train_transform(224, augment)
    outputs = [transform(Image.fromarray(pixels)) for _ in range(8)]
    assert all(output.shape == (3, 224, 224) for output in outputs)
    assert not torch.equal(outputs[0], outputs[1])
    for output in outputs:
        assert output.dtype == torch.uint8
        assert output[0, :, -5:].float().mean() > output[0, :, :5].float().mean()  # white stays on the right
        assert output[:, 100, 0].max() <= 50


def test_an_image_may_be_bytes_or_a_part_of_a_tar_file(tmp_path: Path) -> None:
    Image.new("RGB", (4, 3), (9, 8, 7)).save(tmp_path / "x.png")
    content = (tmp_path / "x.png").read_bytes()
    (tmp_path / "x.tar").write_bytes(b"before" + content + b"after")
    part = part_path(f"{tmp_path}/x.tar", 6, len(content), "a/x.png")
    assert read_bytes(part) == content == read_bytes(tmp_path / "x.png")
    assert file_stamp(part)[:2] == (len(content), (tmp_path / "x.tar").stat().st_mtime_ns)
    assert file_stamp(tmp_path / "x.png")[0] == len(content)
    for source in (content, part, tmp_path / "x.png"):
        assert size_of(clip_transform(2).load(source)) == (4, 3)
    assert load_image(part).getpixel((0, 0)) == (9, 8, 7)
    with pytest.raises(ValueError, match=r"^cannot be read as an image"):
        decode_image(content[:20])
    with pytest.raises(ValueError, match=r"x\.tar@0\+9/y: cannot be read as an image"):
        decode_image(part_path(f"{tmp_path}/x.tar", 0, 9, "y"))


@pytest.mark.parametrize("size", [(1, 300), (300, 1), (5001, 10), (10, 5001)])
def test_an_image_too_long_to_be_resized_whole_gives_the_same_pixels(size: tuple[int, int]) -> None:
    image = smooth(*size)
    whole, part = CenterTransform(56)(image).int(), CenterTransform(56, max_pixels=56 * 56 + 1)(image).int()
    assert (part - whole).abs().max() <= 3
