"""What a checkpoint proves itself by: images and texts with the features that its model gave for them.

Tensors tell neither their activation nor their preprocessing, and the wrong ones change results silently. So a
checkpoint holds images as they are before preprocessing, texts, and the features of both, and whoever loads it
computes them again.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from typing import Any

import torch
from PIL import Image
from torch import Tensor

from cliptune.model.architectures import Architecture
from cliptune.model.mode import evaluating
from cliptune.preprocess.transforms import VERSION, clip_transform
from cliptune.runtime.device import exact_products

TOLERANCE = 1e-4
"""Largest distance of two unit vectors; other instruction sets and numbers of threads make about a hundredth of it."""
HEIGHT, WIDTH = 40, 56
TEXTS = ["a photo of a dog", "Two small red boats, 3 people & a café by the river"]


def compute_self_test(model: Any, *, is_alone: bool = True) -> dict[str, Any]:
    """Compute a model's proof, for its checkpoint.

    Args:
        model: a `CLIPModel`, float32; comes back in the mode it came in.
        is_alone: no other thread computes. Otherwise settings of the whole process stay as they are, and the model must
            be on the CPU, whose products are exact unless somebody has lowered the precision of all.

    Returns:
        `pixels` uint8 `[2, 3, 40, 56]` (RGB, not preprocessed), `texts`, and the unit-norm `image_features` and
        `text_features`, float32 `[2, D]`.

    Raises:
        FloatingPointError: features that are not finite.
    """
    self_test = {"pixels": _patterns(), "texts": TEXTS}
    image_features, text_features = _encode(model, self_test, is_alone=is_alone)
    if not (image_features.isfinite().all() and text_features.isfinite().all()):
        raise FloatingPointError("the weights give features that are not finite: they are not saved")
    return {**self_test, "image_features": image_features, "text_features": text_features}


def describe_preprocessing(architecture: Architecture) -> dict[str, Any]:
    """Return what a checkpoint tells people of the preprocessing that its features depend on."""
    mean, std = list(architecture.mean), list(architecture.std)
    return {"version": VERSION, "mean": mean, "std": std, "resolution": architecture.image_resolution}


def check_self_test(model: Any, self_test: Any, *, source: str) -> None:
    """Compute the features of a checkpoint's proof again.

    Args:
        model: as the checkpoint says, float32; comes back in the mode it came in.
        self_test: what `compute_self_test` returned.
        source: where both come from.

    Raises:
        ValueError: other features, or no proof; says what the reason may be.
    """
    try:
        expected = self_test["image_features"], self_test["text_features"]
        # features of another shape, or of no number, are refused as well
        image, text = (_distance(*pair) for pair in zip(_encode(model, self_test), expected, strict=True))
    except (KeyError, TypeError, AttributeError, RuntimeError, IndexError, ValueError) as error:
        reason = f"{type(error).__name__}: {error}"
        raise ValueError(f"{source}: damaged: no self_test that its model can be checked by ({reason})") from None
    if not (image <= TOLERANCE and text <= TOLERANCE):
        raise ValueError(
            f"{source}: its model does not give the features that it was saved with (distance of images {image:.2g}, "
            f"of texts {text:.2g}, at most {TOLERANCE:g}): damaged weights, another activation, or other "
            "preprocessing than this version's; try an earlier one, or the version of this toolkit that wrote it"
        )


def _distance(found: Tensor, expected: Tensor) -> float:
    if found.shape != expected.shape or not len(found):
        return math.nan
    return float((found - expected).norm(dim=1).max())


def _patterns() -> Tensor:
    """Draw black and white curves that differ by colour; neither square nor of a model's size, so every step counts.

    They are of integers alone, so every machine draws the same. Their frequency grows to the right and downwards: up to
    one change a pixel, which another filter of the resize shows at once; a photo's smooth areas would hide it.
    """
    y, x = torch.meshgrid(torch.arange(HEIGHT), torch.arange(WIDTH), indexing="ij")
    images = []
    for across, down in ((1, 2), (2, 1)):
        curves = [
            (across * x * (x + 5 * c) + down * y * (y + 3 * c) + 7 * c * x * y) // (9 + c) % 2 * 255 for c in range(3)
        ]
        images.append(torch.stack(curves))  # [3, HEIGHT, WIDTH]
    return torch.stack(images).to(torch.uint8)


def _encode(model: Any, self_test: dict[str, Any], *, is_alone: bool = True) -> tuple[Tensor, Tensor]:
    transform = clip_transform(model.image_resolution)
    images = [Image.fromarray(pixels.permute(1, 2, 0).numpy()) for pixels in self_test["pixels"]]
    # whatever training allows itself: the tolerance is for float32 with all its bits
    with evaluating(model), torch.no_grad(), _undisturbed(model.device) if is_alone else nullcontext():
        image_features = model.encode_image(torch.stack([transform(image) for image in images]))
        text_features = model.encode_text(self_test["texts"])
    return image_features.cpu(), text_features.cpu()


@contextmanager
def _undisturbed(device: torch.device) -> Iterator[None]:
    with exact_products(), torch.autocast(device.type, enabled=False):
        yield
