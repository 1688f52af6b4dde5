"""Planted copies among the images of a folder: how many are found, what else is taken for one, and the time.

python benchmarks/near_duplicates.py --folder photos

A planted copy is resized, re-encoded, cropped by 5% or brightened by a fifth, turn by turn. What is found beside them
is of the folder itself: `--names` lists it, for it may be right.
"""

from __future__ import annotations

import io
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
from PIL import Image, ImageEnhance
from pydantic import Field

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from cliptune.cli import parse_settings, run_stage
from cliptune.data.near_duplicates import NearDuplicates, find_near_duplicates
from cliptune.data.sample_data import create_sample_dataset
from cliptune.data.table import Strings
from cliptune.preprocess.decode import load_image
from cliptune.preprocess.image_formats import COMMON_ENDINGS
from cliptune.settings import PositiveInt, Settings

Random = np.random.Generator


class BenchmarkSettings(Settings):
    """Settings of this benchmark."""

    folder: str | None = Field(None, description="folder of images; none: drawn scenes")
    num_images: PositiveInt = Field(3000, description="images of the folder that are taken")
    seed: int = Field(0, description="of the images taken and the copies planted")
    names: bool = Field(False, description="list the pairs that are found in the folder itself")


def resized(image: Image.Image, rng: Random) -> Image.Image:
    """Make it 0.6 times as large."""
    return image.resize((round(image.width * 0.6), round(image.height * 0.6)), Image.Resampling.LANCZOS)


def encoded(image: Image.Image, rng: Random) -> Image.Image:
    """Encode it as a JPEG of low quality."""
    file = io.BytesIO()
    image.save(file, "JPEG", quality=40)
    return Image.open(file).convert("RGB")


def cropped(image: Image.Image, rng: Random) -> Image.Image:
    """Cut off 5% of both sides, from anywhere."""
    width, height = round(image.width * 0.05), round(image.height * 0.05)
    left, top = int(rng.integers(0, width + 1)), int(rng.integers(0, height + 1))
    return image.crop((left, top, image.width - width + left, image.height - height + top))


def brightened(image: Image.Image, rng: Random) -> Image.Image:
    """Make it a fifth brighter."""
    return ImageEnhance.Brightness(image).enhance(1.2)


COPIES: dict[str, Callable[[Image.Image, Random], Image.Image]] = {
    "resized": resized, "encoded": encoded, "cropped": cropped, "brightened": brightened,
}  # fmt: skip


def main(argv: list[str] | None = None) -> int:
    """Print the table; returns the exit code."""
    return run_stage(lambda: _run(argv), name="near_duplicates.py")


def _run(argv: list[str] | None) -> int:
    settings, _ = parse_settings(BenchmarkSettings, argv, description=str(__doc__))
    rng = np.random.default_rng(settings.seed)
    with tempfile.TemporaryDirectory() as work:
        folder = Path(work, "scenes") if settings.folder is None else Path(settings.folder)
        if settings.folder is None:
            create_sample_dataset(folder, settings.num_images)
        paths = sorted(str(path) for path in folder.rglob("*") if path.suffix.lower() in COMMON_ENDINGS)
        paths = [paths[i] for i in rng.permutation(len(paths))[: settings.num_images]]
        print(
            "| planted | images | recall | "
            + " | ".join(COPIES)
            + " | precision | in the folder itself | ms an image |"
        )
        print("|---|---|---|" + "---|" * (len(COPIES) + 3))
        for fraction in (0.01, 0.1):
            print(_row(paths, fraction, Path(work, f"{fraction:g}"), rng), flush=True)
        if settings.names:
            own = find_near_duplicates(Strings.of(paths), cache_dir=None)
            for (first, second), distance in zip(own.pairs.tolist(), own.distances.tolist(), strict=True):
                print(f"{distance:5.1f}  {paths[first]}  {paths[second]}")
    return 0


def _row(paths: list[str], fraction: float, folder: Path, rng: Random) -> str:
    """Plant copies of a fraction of the images, look for them, and say what was found."""
    folder.mkdir()
    originals = rng.permutation(len(paths))[: max(round(fraction * len(paths)), len(COPIES))]
    kinds = [list(COPIES)[i % len(COPIES)] for i in range(len(originals))]
    planted = []
    for copy, (original, kind) in enumerate(zip(originals.tolist(), kinds, strict=True)):
        planted.append(str(folder / f"{copy:05}-{kind}.png"))
        COPIES[kind](load_image(paths[original]), rng).save(planted[-1])
    start = time.perf_counter()
    found = find_near_duplicates(Strings.of([*paths, *planted]), cache_dir=None)
    seconds = time.perf_counter() - start
    return _describe(found, len(paths), originals.tolist(), kinds, seconds)


def _describe(found: NearDuplicates, num_images: int, originals: list[int], kinds: list[str], seconds: float) -> str:
    source = np.arange(num_images + len(originals))
    source[found.pairs[found.identical, 1]] = found.pairs[found.identical, 0]  # of equal files the first stands for all
    source[num_images:] = source[originals]
    with_copy = found.pairs[(found.pairs >= num_images).any(axis=1)]
    right = source[with_copy[:, 0]] == source[with_copy[:, 1]]
    known = set(map(tuple, with_copy.tolist()))
    hits = [(int(source[num_images + copy]), num_images + copy) in known for copy in range(len(originals))]
    by_kind = [[hit for hit, kind in zip(hits, kinds, strict=True) if kind == name] for name in COPIES]
    own = len(found.pairs) - len(with_copy)
    cells = [
        f"{len(originals):,}", f"{num_images:,}", f"{np.mean(hits):.1%}", *(f"{np.mean(kind):.1%}" for kind in by_kind),
        f"{right.sum() / max(len(right), 1):.1%}", f"{own:,}",
        f"{1000 * seconds / (num_images + len(originals)):.1f}",
    ]  # fmt: skip
    return f"| {' | '.join(cells)} |"


if __name__ == "__main__":
    sys.exit(main())
