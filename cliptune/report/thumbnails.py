"""Small copies of images that a page holds itself, each once however often it is shown."""

from __future__ import annotations

import base64
import io
import time
from collections.abc import Hashable
from typing import NamedTuple

from PIL import Image

from cliptune.preprocess.decode import decode_image
from cliptune.runtime.messages import one_line, printable

SIDE, QUALITY = 144, 74
"""Pixels of the longer side, and of JPEG."""
MAX_BYTES, MAX_SECONDS = 6 * 2**20, 30.0
"""Of all of them on a page, as it stores them."""


class Thumbnail(NamedTuple):
    """An image as the page stores it."""

    name: str
    width: int
    height: int
    uri: str


class Thumbnails:
    """Make thumbnails until there is no more room or time; of those not made it is known why.

    Args:
        enabled: False: make none.
        max_bytes: of all of them.
        max_seconds: from the first one on.
    """

    def __init__(self, *, enabled: bool = True, max_bytes: int = MAX_BYTES, max_seconds: float = MAX_SECONDS) -> None:
        self.enabled, self._bytes_left, self._seconds = enabled, max_bytes, max_seconds
        self._until: float | None = None
        self._known: dict[Hashable, int | None] = {}
        self.made: list[Thumbnail] = []
        self.unreadable: dict[str, str] = {}
        """By name: why."""
        self.num_left_out = 0
        """For want of room or time."""

    def get(self, path: str, name: str) -> int | None:
        """Return the place of an image's thumbnail in `made`; None: it cannot be shown."""
        if not self.enabled:
            return None
        if path not in self._known:
            self._known[path] = self._make(path, name)
        return self._known[path]

    def _make(self, path: str, name: str) -> int | None:
        now = time.monotonic()
        self._until = now + self._seconds if self._until is None else self._until
        if self._bytes_left <= 0 or now > self._until:
            self.num_left_out += 1
            return None
        try:
            image = small_image(path)
        except (OSError, ValueError, MemoryError) as error:
            # the reason without the folder, which is nobody's business
            self.unreadable[name] = printable(one_line(error).replace(path, name))
            return None
        file = io.BytesIO()
        image.save(file, "JPEG", quality=QUALITY, optimize=True)
        uri = "data:image/jpeg;base64," + base64.b64encode(file.getvalue()).decode("ascii")
        self._bytes_left -= len(uri)
        self.made.append(Thumbnail(name, image.width, image.height, uri))
        return len(self.made) - 1


def small_image(path: str, *, side: int = SIDE) -> Image.Image:
    """Decode an image, `side` pixels long at most.

    Raises:
        ValueError: it is no image, or a damaged one.
        OSError: it cannot be read.
    """
    decoded = decode_image(path, shortest_side=side)
    image = decoded if isinstance(decoded, Image.Image) else Image.fromarray(decoded[..., :3])
    image.thumbnail((side, side))
    return image
