"""Drawn images as rich as photos, for what compares pixels."""

import numpy as np
from PIL import Image


def photo(seed: int, size: tuple[int, int] = (240, 180)) -> Image.Image:
    """Coloured clouds with finer ones on them; each seed gives others."""
    rng = np.random.default_rng(seed)
    pixels = np.zeros((size[1], size[0], 3))
    for cells, weight in ((4, 0.5), (9, 0.3), (24, 0.2)):
        grid = Image.fromarray(rng.integers(0, 256, (cells, cells, 3), dtype=np.uint8))
        pixels += weight * np.asarray(grid.resize(size, Image.Resampling.BICUBIC), dtype=float)
    return Image.fromarray(np.clip(2 * (pixels - 128) + 110, 0, 255).astype(np.uint8))
