"""Whether an export gives what its checkpoint gives: loaded by its library, in a process of its own."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from PIL import Image

from cliptune.preprocess.tokens import tokenize
from cliptune.preprocess.transforms import clip_transform, normalize
from cliptune.runtime.device import exact_products

PROBE = Path(__file__).with_name("probe.py")
SIZES = ((500, 333), (333, 500), (224, 224), (97, 101), (61, 400))
"""Width and height of the images that are drawn for preprocessing, beside those of the self-test and one that a crop
of the centre cannot halve evenly."""
MORE_TEXTS = ("A  big RED\tdog's 3.5 balls!", "naïve 日本 🦊, (and) so-on...", "very long " * 60)
"""Spaces, capitals, endings, numbers, marks, other scripts, and more tokens than a context has."""
MAX_PIXEL = 1 / 255
SECONDS = 600


class Differences(NamedTuple):
    """Between an export and its checkpoint, each the largest that was found."""

    images: float
    """Distance of unit-norm features of the same pixels."""
    texts: float
    """Distance of unit-norm features of the same texts."""
    pixels: float
    """Of preprocessed images, as fractions of 255 / 255."""
    is_shifted: bool
    """The library crops one pixel further to the left or to the top where the middle lies between two pixels."""

    def __str__(self) -> str:
        return f"images {self.images:.1e}, texts {self.texts:.1e}, pixels {255 * self.pixels:.2f}/255"


def verify(
    form: str, folder: Path, model: Any, self_test: dict[str, Any], *, tolerance: float, batches: Sequence[int] = ()
) -> Differences:
    """Load an export in a fresh process and compare features and pixels.

    Args:
        form: of the export, a key of `probe.LOADERS`.
        folder: of the export.
        model: the `CLIPModel` that was exported.
        self_test: of its checkpoint, see `cliptune.model.self_test`.
        tolerance: largest distance of two unit-norm features.
        batches: sizes of batches that are tried as well.

    Returns:
        What was found.

    Raises:
        ValueError: its library cannot load it, or gives something else; says the numbers.
    """
    images = [pixels.permute(1, 2, 0).numpy() for pixels in self_test["pixels"]]
    shape, side = model.architecture, model.image_resolution
    drawn = [*images, *map(_draw, (*SIZES, (side + 3, side)))]
    expected = torch.stack([clip_transform(side)(Image.fromarray(image)) for image in drawn])  # uint8 [N, 3, R, R]
    texts = [*self_test["texts"], *MORE_TEXTS]
    with torch.no_grad(), exact_products():
        text_features = torch.cat(
            [self_test["text_features"], model.encode_text(tokenize(MORE_TEXTS, shape.context_length)[0])]
        )
    found = _run(
        form, folder, batches=np.array(batches, dtype=np.int64), texts=np.array(json.dumps(texts)),
        pixels=normalize(expected[: len(images)], shape.mean, shape.std).numpy(),
        **{f"image_{number}": image for number, image in enumerate(drawn)},
    )  # fmt: skip
    mean, std = (np.array(values, dtype=np.float32)[:, None, None] for values in (shape.mean, shape.std))
    features = {"image": self_test["image_features"].numpy(), "text": text_features.numpy()}
    distances = {kind: [_distance(found[f"{kind}_features"], wanted)] for kind, wanted in features.items()}
    for kind, wanted in features.items():
        for size in batches:
            distances[kind].append(_distance(found[f"{kind}_features_{size}"], np.repeat(wanted[:1], size, axis=0)))
    pixels, is_shifted = _compare_pixels(found["preprocessed"] * std + mean, expected.numpy(), drawn)
    differences = Differences(max(distances["image"]), max(distances["text"]), pixels, is_shifted)
    # negated, so that NaN is refused; 1e-5: float32 of a pixel that was normalised and taken back
    if not (differences.images <= tolerance and differences.texts <= tolerance and pixels <= MAX_PIXEL + 1e-5):
        raise ValueError(
            f"the export as {form} does not give what the checkpoint gives ({differences}; at most {tolerance:g}, "
            f"{tolerance:g} and 1/255), and is removed: try another form, or another version of its library"
        )
    return differences


def _run(form: str, folder: Path, **inputs: Any) -> dict[str, NDArray[np.float32]]:
    """Run the probe; `inputs` are as its `main` says."""
    with tempfile.TemporaryDirectory() as scratch:
        given, taken = Path(scratch) / "given.npz", Path(scratch) / "taken.npz"
        np.savez(given, **inputs)
        # by its path, and from an empty folder: nothing of this toolkit, and no file of the user's, is on sys.path
        code = f"import runpy; runpy.run_path({str(PROBE)!r}, run_name='__main__')"
        command = [sys.executable, "-W", "ignore", "-c", code, form, str(folder.resolve()), str(given), str(taken)]
        offline = {"HF_HUB_OFFLINE": "1", "TRANSFORMERS_OFFLINE": "1", "CUDA_VISIBLE_DEVICES": ""}
        environment = {**os.environ, **offline}
        try:
            done = subprocess.run(
                command, cwd=scratch, env=environment, capture_output=True, text=True, errors="replace",
                timeout=SECONDS, check=False,
            )  # fmt: skip
        except subprocess.TimeoutExpired:
            raise ValueError(f"the export as {form} was not loaded within {SECONDS} seconds, and is removed") from None
        if done.returncode or not taken.is_file():
            lines = done.stderr.strip().splitlines() or [f"exit code {done.returncode}"]
            raise ValueError(f"the export as {form} cannot be loaded by its library, and is removed: {lines[-1]}")
        with np.load(taken) as content:
            return {name: content[name] for name in content.files}


def _draw(size: tuple[int, int]) -> NDArray[np.uint8]:
    """Draw noise on a gradient, uint8 `[H, W, 3]`: sharp, so that another filter of the resize shows."""
    width, height = size
    noise = np.random.default_rng(width * height).integers(0, 128, (height, width, 3))
    slope = np.linspace(0, 127, width)[None, :, None] * np.linspace(0, 1, height)[:, None, None]
    return (noise + slope).astype(np.uint8)


def _distance(found: NDArray[np.float32], wanted: NDArray[np.float32]) -> float:
    if found.shape != wanted.shape:
        return float("nan")
    return float(np.linalg.norm(found - wanted, axis=1).max())


def _compare_pixels(
    found: NDArray[np.float32], wanted: NDArray[np.uint8], images: Sequence[NDArray[np.uint8]]
) -> tuple[float, bool]:
    """Return the largest difference, and whether an image was cropped a pixel beside where it is cropped here.

    `[N, 3, R, R]` each. Where the middle lies between two pixels, CLIP rounds to the even one and some libraries down:
    of 67 columns CLIP takes 64 from the 2nd, they from the 1st. The rest must be the same.
    """
    if found.shape != wanted.shape:
        return float("nan"), False
    largest, is_shifted = 0.0, False
    for own, ours, image in zip(found, wanted, images, strict=True):
        here, there = (float(np.abs(own - each / np.float32(255)).max()) for each in (ours, _rounded_down(image, ours)))
        is_shifted |= there < here
        largest = float(np.maximum(largest, min(here, there)))  # a NaN stays one
    return largest, is_shifted


def _rounded_down(image: NDArray[np.uint8], like: NDArray[np.uint8]) -> NDArray[np.uint8]:
    """Preprocess an image as CLIP does, but for where the crop begins: uint8 `[3, R, R]`."""
    side, (height, width) = like.shape[-1], image.shape[:2]
    size = [int(side * length / min(width, height)) for length in (width, height)]
    left, top = ((length - side) // 2 for length in size)
    resized = Image.fromarray(image).resize((size[0], size[1]), Image.Resampling.BICUBIC)
    cut: NDArray[np.uint8] = np.asarray(resized.crop((left, top, left + side, top + side)))
    return np.ascontiguousarray(cut.transpose(2, 0, 1))
