from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from preprocessing import CLIP_MEAN, CLIP_STD, clip_transform, load_image, to_rgb, tokenize, train_transform
from runtime import import_clip

clip = import_clip()


def noise(*shape: int, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).integers(0, 256, shape, dtype=np.uint8)


@pytest.mark.parametrize("size", [(300, 200), (100, 333), (224, 224), (50, 40)])
@pytest.mark.parametrize("mode", ["RGB", "L"])
def test_pixels_are_those_of_clip(size: tuple[int, int], mode: str) -> None:
    image = Image.fromarray(noise(size[1], size[0], 3)).convert(mode)
    expected = clip.clip._transform(224)(image)
    assert torch.equal(clip_transform(224)(to_rgb(image)), expected)


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


def test_what_is_no_picture_is_named(tmp_path: Path) -> None:
    (tmp_path / "x.jpg").write_text("not a picture")
    with pytest.raises(ValueError, match=r"x\.jpg: cannot be read as a picture"):
        load_image(tmp_path / "x.jpg")
    with pytest.raises(FileNotFoundError):
        load_image(tmp_path / "gone.jpg")


def test_tokens_are_those_of_clip() -> None:
    texts = ["a dog", "Ein Hund &amp; <b>", "  spaces\tand\n lines ", "四 猫", "", "word " * 100, "naïve café"]
    tokens, num_truncated = tokenize(texts)
    assert torch.equal(tokens, clip.tokenize(texts, truncate=True).long())
    assert num_truncated == 1
    assert tokens[5, -1] == 49407


@pytest.mark.parametrize("augment", ["crop", "color"])
def test_augmentation_varies_keeps_the_scale_and_never_flips(augment: str) -> None:
    pixels = np.zeros((224, 224, 3), dtype=np.uint8)
    pixels[:, 112:] = 255
    transform = train_transform(224, augment)
    outputs = [transform(Image.fromarray(pixels)) for _ in range(8)]
    assert all(output.shape == (3, 224, 224) for output in outputs)
    assert not torch.equal(outputs[0], outputs[1])
    black = -torch.tensor(CLIP_MEAN) / torch.tensor(CLIP_STD)
    for output in outputs:
        assert output[0, :, -5:].mean() > output[0, :, :5].mean()  # white stays on the right
        assert torch.allclose(output[:, 100, 0], black, atol=0.8)
