"""Drawn images as rich as photos, for what compares pixels."""

import json
import shutil
from pathlib import Path

import numpy as np
from PIL import Image

from benchmarks.near_duplicates import cropped, encoded


def photo(seed: int, size: tuple[int, int] = (240, 180)) -> Image.Image:
    """Coloured clouds with finer ones on them; each seed gives others."""
    rng = np.random.default_rng(seed)
    pixels = np.zeros((size[1], size[0], 3))
    for cells, weight in ((4, 0.5), (9, 0.3), (24, 0.2)):
        grid = Image.fromarray(rng.integers(0, 256, (cells, cells, 3), dtype=np.uint8))
        pixels += weight * np.asarray(grid.resize(size, Image.Resampling.BICUBIC), dtype=float)
    return Image.fromarray(np.clip(2 * (pixels - 128) + 110, 0, 255).astype(np.uint8))


def make_with_copies(folder: Path) -> Path:
    """Thirty images; of the first three a crop, a JPEG and the same file again: all without groups."""
    folder.mkdir()
    rng = np.random.default_rng(0)
    for i in range(30):
        photo(i).save(folder / f"{i:02}.png")
    for i in range(3):
        cropped(photo(i), rng).save(folder / f"crop-{i}.png")
        encoded(photo(i), rng).save(folder / f"jpeg-{i}.jpg")
        shutil.copy(folder / f"{i:02}.png", folder / f"same-{i}.png")
    records = [{"image": path.name, "caption": f"clouds {path.stem}"} for path in sorted(folder.glob("*.*g"))]
    (folder / "data.json").write_text(json.dumps(records))
    return folder
