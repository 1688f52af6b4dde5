import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from cliptune.preprocess.resize import Span, resize

ROOT = Path(__file__).parent.parent.parent


def noise(width: int, height: int, seed: int = 0) -> Image.Image:
    return Image.fromarray(np.random.default_rng(seed).integers(0, 256, (height, width, 3), dtype=np.uint8))


def padded(image: Image.Image) -> np.ndarray:
    return np.array(image.convert("RGBX"))


@pytest.mark.parametrize(
    ("size", "new_size"),
    [((300, 200), (90, 60)), ((61, 43), (122, 86)), ((200, 90), (7, 33)), ((33, 31), (33, 17)), ((31, 33), (17, 33))],
)
def test_a_resize_is_pillows(size: tuple[int, int], new_size: tuple[int, int]) -> None:
    image = noise(*size)
    (width, height), (new_width, new_height) = size, new_size
    got = resize(padded(image), Span(0, width, new_width, 0, new_width), Span(0, height, new_height, 0, new_height))
    assert got.shape == (new_height, new_width, 3)
    assert np.array_equal(got, np.asarray(image.resize(new_size, Image.Resampling.BICUBIC)))


def test_only_the_part_asked_for_is_read_and_computed() -> None:
    image = noise(200, 150)
    whole = image.crop((40, 30, 180, 130)).resize((70, 50), Image.Resampling.BICUBIC)
    pixels = padded(image)
    pixels[:30], pixels[130:], pixels[:, :40], pixels[:, 180:] = 255, 255, 255, 255  # outside of the crop
    got = resize(pixels, Span(40, 180, 70, 10, 20), Span(30, 130, 50, 5, 31))
    assert np.array_equal(got, np.asarray(whole.crop((10, 5, 30, 36))))


def test_where_pillow_takes_the_columns_first_pixels_differ_little() -> None:
    image = noise(60, 300)
    got = resize(padded(image), Span(0, 60, 40, 0, 40), Span(0, 300, 200, 0, 200))
    rows_first = image.resize((40, 300), Image.Resampling.BICUBIC).resize((40, 200), Image.Resampling.BICUBIC)
    assert np.array_equal(got, np.asarray(rows_first))
    difference = got.astype(int) - np.asarray(image.resize((40, 200), Image.Resampling.BICUBIC))
    assert np.abs(difference).mean() < 0.5  # noise is the worst case: it is cut off at 0 and 255 between the passes


@pytest.mark.slow
def test_where_nothing_can_be_written_the_machine_code_is_not_cached() -> None:
    """The code's folder is read-only, and there is no home: as for a user of a container."""
    code = (
        "import numba.core.caching as caching; caching.CacheImpl._locator_classes = []\n"
        "import numpy as np; from cliptune.preprocess.resize import Span, resize\n"
        "print(resize(np.zeros((9, 9, 4), np.uint8), Span(0, 9, 3, 0, 3), Span(0, 9, 3, 0, 3)).shape)"
    )
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True)
    assert done.stdout == "(3, 3, 3)\n"
