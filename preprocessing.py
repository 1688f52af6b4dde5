"""A picture to pixels, a string to tokens; augmentation. The same for training, evaluation and use."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import lru_cache
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np
import torch
from PIL import Image, ImageOps
from torchvision import transforms

from runtime import import_clip

CLIP_MEAN = (0.48145466, 0.4578275, 0.40821073)
CLIP_STD = (0.26862954, 0.26130258, 0.27577711)
CONTEXT_LENGTH = 77
VERSION = 1
"""Raised whenever the same picture gives other pixels or the same text other tokens: kept features go by it."""
BICUBIC = transforms.InterpolationMode.BICUBIC

Transform = Callable[[Image.Image], torch.Tensor]


def load_image(source: str | Path | BinaryIO) -> Image.Image:
    """Open a picture as upright RGB.

    Raises:
        ValueError: the file is no picture, or a damaged one; names the file.
        FileNotFoundError: no such file.
    """
    try:
        with Image.open(source) as image:
            return to_rgb(image)
    except FileNotFoundError:
        raise
    except (OSError, ValueError, SyntaxError, Image.DecompressionBombError, EOFError) as error:
        raise ValueError(f"{source}: cannot be read as a picture: {error}") from None


def to_rgb(image: Image.Image) -> Image.Image:
    """Turn any Pillow image into 8-bit RGB: first frame, EXIF orientation applied, transparency laid on white.

    16-bit grey keeps its range (divided by 257); float images are taken as [0, 1] if they stay within it.
    """
    image = ImageOps.exif_transpose(image)
    if image.mode.startswith("I") or image.mode == "F":
        image = _to_8_bit(image)
    if image.mode in {"RGBA", "LA", "PA", "RGBa", "La"} or "transparency" in image.info:
        rgba = image.convert("RGBA")
        white = Image.new("RGBA", rgba.size, (255, 255, 255, 255))
        image = Image.alpha_composite(white, rgba)
    return image.convert("RGB")


def clip_transform(resolution: int) -> Transform:
    """CLIP's own preprocessing: RGB image to normalised float32 `[3, resolution, resolution]`.

    Bicubic resize of the short side, centre crop, CLIP's mean and standard deviation (`clip.clip._transform`).
    """
    resize = transforms.Resize(resolution, interpolation=BICUBIC)
    return _compose([resize, transforms.CenterCrop(resolution)])


def train_transform(resolution: int, augment: str) -> Transform:
    """Preprocessing for training: `none` is CLIP's own, `crop` adds random crops, `color` colour changes as well.

    Nothing flips, because captions say left and right; colours move little, because captions name them.
    """
    if augment == "none":
        return clip_transform(resolution)
    steps: list[Any] = [transforms.RandomResizedCrop(resolution, scale=(0.6, 1.0), interpolation=BICUBIC)]
    if augment == "color":
        steps.append(transforms.ColorJitter(brightness=0.2, contrast=0.2, saturation=0.2, hue=0.02))
    return _compose(steps)


def tokenize(texts: Sequence[str], context_length: int = CONTEXT_LENGTH) -> tuple[torch.Tensor, int]:
    """Tokenise with CLIP's byte-pair encoding.

    Returns:
        Tokens, int64 `[len(texts), context_length]`, padded with 0 after the end-of-text token, which a text that is
        too long keeps as its last; and how many texts were too long.
    """
    tokens = torch.zeros(len(texts), context_length, dtype=torch.long)
    num_truncated = 0
    for row, text in enumerate(texts):
        ids = _encode(text)
        if len(ids) > context_length:
            ids = [*ids[: context_length - 1], ids[-1]]
            num_truncated += 1
        tokens[row, : len(ids)] = torch.tensor(ids)
    return tokens, num_truncated


def count_tokens(text: str) -> int:
    """Count a text's tokens, start and end included; more than 77 are truncated in training."""
    return len(_encode(text))


def _encode(text: str) -> list[int]:
    tokenizer = _tokenizer()
    encoder: dict[str, int] = tokenizer.encoder
    return [encoder["<|startoftext|>"], *tokenizer.encode(text), encoder["<|endoftext|>"]]


@lru_cache(maxsize=1)
def _tokenizer() -> Any:
    return import_clip().simple_tokenizer.SimpleTokenizer()


def _compose(steps: list[Any]) -> Transform:
    compose: Transform = transforms.Compose([*steps, transforms.ToTensor(), transforms.Normalize(CLIP_MEAN, CLIP_STD)])
    return compose


def _to_8_bit(image: Image.Image) -> Image.Image:
    pixels = np.asarray(image, dtype=np.float64)
    if image.mode != "F":
        pixels = pixels / 257
    elif np.nanmax(pixels, initial=0) <= 1:
        pixels = pixels * 255
    return Image.fromarray(np.nan_to_num(pixels).round().clip(0, 255).astype(np.uint8))
