"""What a few fixed captions find, drawn after each evaluation while the run goes on."""

from __future__ import annotations

import io
import logging
from collections.abc import Callable, Sequence
from functools import lru_cache
from typing import NamedTuple, TypeVar

import numpy as np
import torch
from PIL import Image, ImageDraw, ImageFont

from cliptune.data.pairs import Pairs
from cliptune.features.encode import Encoded
from cliptune.report.palette import BLUE, GREEN, GREY, INK, VERMILLION
from cliptune.report.style import drawable
from cliptune.report.thumbnails import small_image
from cliptune.runtime.messages import one_line, printable, shorten

logger = logging.getLogger("train")

T = TypeVar("T")

NUM_QUERIES, NUM_ANSWERS = 6, 3
SIDE, GAP, LETTERS = 112, 8, 13
"""Pixels of an image, between two, and of a line's letters."""
ROW = SIDE + GAP + 2 * LETTERS
MAX_BYTES, MAX_GALLERIES = 200_000, 200
"""Of an image; images that one start of a run writes: an evaluation may come every few steps."""
MARKS = {"right": ("✓", GREEN), "same": ("=", BLUE), "wrong": ("✗", VERMILLION)}
"""The caption's own image; one with the very same caption, or a copy of it; another one."""


class Gallery(NamedTuple):
    """An image for TensorBoard."""

    jpeg: bytes
    width: int
    height: int
    description: str
    """Markdown: what asks, in letters that no font lacks."""


class Answer(NamedTuple):
    """An image that a caption finds."""

    path: str
    score: float
    mark: str
    """Key of `MARKS`."""


class Found(NamedTuple):
    """Captions, by their rows, with the best images of each."""

    texts: list[int]
    answers: list[list[Answer]]


class LiveGallery:
    """Draw what a few captions of a data set find, the same ones every time.

    Args:
        pairs: that are evaluated.
        max_galleries: how many are drawn.
    """

    def __init__(self, pairs: Pairs, *, max_galleries: int = MAX_GALLERIES) -> None:
        images = np.linspace(0, max(len(pairs) - 1, 0), min(NUM_QUERIES, len(pairs))).astype(np.int64)
        self._pairs, self._queries, self._left = pairs, pairs.starts[np.unique(images)], max_galleries

    def find(self, encoded: Encoded) -> Found | None:
        """Return what the captions find in an evaluation; None: no more is drawn, or none can be, which is a warning.

        It has what `draw` needs, which may go on in another thread.
        """
        self._left -= 1
        return self._attempt(lambda: Found(*self._answers(encoded))) if self._left >= 0 else None

    def draw(self, found: Found) -> Gallery | None:
        """Return the image; None: there is nothing to draw, or it cannot be, which is a warning."""
        if not found.texts:
            return None
        return self._attempt(lambda: _drawn([self._pairs.captions[text] for text in found.texts], found.answers))

    def _attempt(self, work: Callable[[], T]) -> T | None:
        try:
            return work()
        except Exception as error:  # whatever it is: the run is worth more than a look at it
            logger.warning("no more retrievals are drawn for TensorBoard: %s", one_line(error))
            self._left = 0
            return None

    def _answers(self, encoded: Encoded) -> tuple[list[int], list[list[Answer]]]:
        """Return the captions that could be encoded, and the best images of each."""
        rows = torch.isin(encoded.text_indices, torch.from_numpy(self._queries)).nonzero().squeeze(1)
        features = encoded.text_features[rows.to(encoded.text_features.device)]
        scores = features.float() @ encoded.image_features.float().T  # [Q, N]
        values, columns = scores.topk(min(NUM_ANSWERS, scores.shape[1]))  # [Q, 3]
        answers = [
            [
                Answer(self._pairs.paths[int(encoded.image_indices[image])], score, _mark(encoded, text, image))
                for score, image in zip(found, images, strict=True)
            ]
            for text, found, images in zip(rows.tolist(), values.tolist(), columns.tolist(), strict=True)
        ]
        return encoded.text_indices[rows].tolist(), answers


def _mark(encoded: Encoded, text: int, image: int) -> str:
    own = int(encoded.text_to_image[text])
    if image == own:
        return "right"
    equal_texts = encoded.text_to_image[encoded.text_kinds == encoded.text_kinds[text]]
    is_copy = encoded.image_kinds[image] == encoded.image_kinds[own]
    return "same" if is_copy or bool((equal_texts == image).any()) else "wrong"


def _drawn(captions: Sequence[str], answers: Sequence[Sequence[Answer]]) -> Gallery:
    captions = [printable(shorten(" ".join(caption.split()), 300)) for caption in captions]
    canvas = Image.new("RGB", (NUM_ANSWERS * (SIDE + GAP) + GAP, len(captions) * ROW + GAP), "white")
    draw = ImageDraw.Draw(canvas)
    for row, (caption, found) in enumerate(zip(captions, answers, strict=True)):
        top = GAP + row * ROW
        _write_line(draw, (GAP, top), caption, width=canvas.width - 2 * GAP)
        for column, answer in enumerate(found):
            _place(canvas, draw, answer, (GAP + column * (SIDE + GAP), top + LETTERS + GAP))
    # four spaces: markdown takes nothing in it for its own, such as a link or an image
    lines = "\n".join(f"    {number}. {caption}" for number, caption in enumerate(captions, 1))
    about = "The best images of a few captions: ✓ its own, = one with the same caption or a copy, ✗ another.\n\n"
    return Gallery(_jpeg(canvas), *canvas.size, about + lines)


def _write_line(draw: ImageDraw.ImageDraw, where: tuple[int, int], text: str, *, width: int) -> None:
    """Write one line, cut where it is too long."""
    text, families = drawable(text)
    font = _font(families[-1])  # of several the last has the letters that the others lack, and Latin ones
    length = len(text)
    while length and font.getlength(text[:length] + ("…" if length < len(text) else "")) > width:
        length -= 1
    draw.text(where, text[:length] + ("…" if length < len(text) else ""), fill=INK, font=font)


def _place(canvas: Image.Image, draw: ImageDraw.ImageDraw, answer: Answer, where: tuple[int, int]) -> None:
    """Draw an image in a frame of its mark's colour, with its mark and score."""
    (x, y), (sign, colour) = where, MARKS[answer.mark]
    try:
        image = _thumbnail(answer.path)
        canvas.paste(image, (x + (SIDE - image.width) // 2, y + (SIDE - image.height) // 2))
    except (OSError, ValueError, MemoryError):
        draw.text((x + GAP, y + SIDE // 2), "not readable", fill=GREY, font=_font("DejaVu Sans"))
    draw.rectangle((x, y, x + SIDE - 1, y + SIDE - 1), outline=colour, width=4)
    draw.rectangle((x, y, x + 58, y + LETTERS + 4), fill=colour)
    draw.text((x + 5, y + 1), f"{sign} {answer.score:.2f}", fill="white", font=_font("DejaVu Sans"))


@lru_cache(maxsize=256)
def _thumbnail(path: str) -> Image.Image:
    """Return a small copy; the same images are found again and again."""
    return small_image(path, side=SIDE)


@lru_cache(maxsize=8)
def _font(family: str) -> ImageFont.FreeTypeFont:
    from matplotlib import font_manager  # noqa: PLC0415  (slow, and `drawable` has it already)

    return ImageFont.truetype(font_manager.findfont(font_manager.FontProperties(family=[family])), LETTERS)


def _jpeg(canvas: Image.Image) -> bytes:
    """Return a JPEG file of at most `MAX_BYTES`; it has so few pixels that the last quality is small enough."""
    for quality in (85, 60, 30):
        file = io.BytesIO()
        canvas.save(file, "JPEG", quality=quality, optimize=True)
        if file.tell() <= MAX_BYTES:
            break
    return file.getvalue()
