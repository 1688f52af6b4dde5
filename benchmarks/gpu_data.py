"""What measurements on a GPU run on, made up: captions of real lengths, JPEG files with photos' statistics."""

from __future__ import annotations

import json
import multiprocessing
import random
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np

LENGTHS = {
    5: 42, 6: 185, 7: 503, 8: 1146, 9: 2438, 10: 3202, 11: 3627, 12: 4154, 13: 4264, 14: 4108, 15: 3729, 16: 3203,
    17: 2611, 18: 1999, 19: 1500, 20: 1070, 21: 817, 22: 572, 23: 400, 24: 256, 25: 189, 26: 130, 27: 96, 28: 71,
    29: 43, 30: 33, 31: 14, 32: 9, 33: 10, 34: 8, 35: 6, 36: 4, 37: 3, 38: 1, 39: 1, 42: 1,
}  # fmt: skip
"""How many of Flickr8k's captions have so many tokens, with those of start and end; 14.1 on average."""

WORDS = [
    "a", "the", "dog", "man", "woman", "girl", "boy", "child", "white", "black", "red", "blue", "green", "brown",
    "young", "old", "small", "large", "two", "three", "people", "group", "dogs", "running", "playing", "standing",
    "sitting", "jumping", "walking", "water", "grass", "snow", "street", "beach", "ball", "field", "park", "wearing",
    "shirt", "dress", "hat", "jacket", "hair", "while", "with", "and", "in", "on", "near", "over", "through", "from",
    "next", "front", "down", "holding", "looking", "at", "bike", "air",
]  # fmt: skip
"""Each is one token."""
SIZE = 640, 480
NUM_PHOTOS = 48


def drawn_captions(number: int, *, seed: int = 0) -> list[str]:
    """Draw captions whose lengths in tokens are as often as in `LENGTHS`."""
    rng = random.Random(seed)
    lengths = rng.choices(list(LENGTHS), weights=list(LENGTHS.values()), k=number)
    return [" ".join(rng.choices(WORDS, k=length - 2)) for length in lengths]


def make_captions(folder: Path, number: int) -> Path:
    """Write an index of captions whose images are not there, for benchmarks that make their images up."""
    return _write_index(folder / f"captions_{number}.json", number)


def make_jpegs(folder: Path, number: int, *, size: tuple[int, int] = SIZE) -> Path:
    """Make a data set of so many JPEG files; those that are there from before are taken.

    Returns:
        Its index file.
    """
    images = folder / f"jpegs_{size[0]}x{size[1]}"
    images.mkdir(parents=True, exist_ok=True)
    missing = [index for index in range(number) if not _image_path(images, index).exists()]
    if missing:
        _photos[:] = _make_photos(images, min(NUM_PHOTOS, len(missing)), size)
        write = partial(_write_mixture, images, size)
        if len(missing) < 200:
            list(map(write, missing))
        else:
            with multiprocessing.get_context("fork").Pool() as pool:
                pool.map(write, missing, chunksize=64)
                pool.close()  # see `gpu_runs.decoding_rate`
                pool.join()
        _photos.clear()
    return _write_index(folder / f"index_{size[0]}x{size[1]}_{number}.json", number, images)


def _make_photos(folder: Path, number: int, size: tuple[int, int]) -> list[np.ndarray[Any, Any]]:
    import simplejpeg  # noqa: PLC0415  (--help and --table need none of it)

    from benchmarks.data_pipeline import make_photo  # noqa: PLC0415  (imports PyTorch, and files may be there already)

    width, height = 3 * size[0] // 2, 3 * size[1] // 2
    paths = [folder / f"photo{index}.jpg" for index in range(number)]
    pixels = []
    for index, path in enumerate(paths):
        make_photo(path, width, height, seed=index)
        pixels.append(simplejpeg.decode_jpeg(path.read_bytes(), "RGB"))
        path.unlink()
    return pixels


_photos: list[np.ndarray[Any, Any]] = []
"""What images are mixed of. Forked processes find it in memory; 100 MB sent with each piece of work took minutes."""


def _write_mixture(folder: Path, size: tuple[int, int], index: int) -> None:
    """Write a file of two photos' parts laid over each other: another image for each index, quick to make."""
    import simplejpeg  # noqa: PLC0415

    rng = np.random.default_rng(index)
    width, height = size
    parts = []
    for photo in (_photos[choice] for choice in rng.integers(len(_photos), size=2)):
        x, y = rng.integers(photo.shape[1] - width), rng.integers(photo.shape[0] - height)
        parts.append(photo[y : y + height, x : x + width].astype(np.uint16))
    weight = int(rng.integers(64, 193))
    mixed = ((weight * parts[0] + (256 - weight) * parts[1]) >> 8).astype(np.uint8)
    part = folder / f"{index:06}.part"
    part.write_bytes(simplejpeg.encode_jpeg(mixed, quality=90, colorspace="RGB"))
    part.replace(_image_path(folder, index))


def _image_path(folder: Path, index: int) -> Path:
    return folder / f"{index:06}.jpg"


def _write_index(path: Path, number: int, images: Path | None = None) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    folder = Path("images") if images is None else images.relative_to(path.parent)
    records = [
        {"image_path": str(_image_path(folder, index)), "caption": caption}
        for index, caption in enumerate(drawn_captions(number))
    ]
    path.write_text(json.dumps(records), encoding="utf-8")
    return path
