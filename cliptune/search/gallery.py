"""What queries have found as one page, which needs no other file and asks nothing of a network."""

from __future__ import annotations

import base64
from collections.abc import Sequence
from io import BytesIO
from pathlib import Path
from typing import Any, NamedTuple

from jinja2 import Environment, PackageLoader, StrictUndefined
from PIL import Image

from cliptune.language.catalogue import language_of
from cliptune.language.pages import say_page
from cliptune.preprocess.decode import MAX_PIXELS, decode_image
from cliptune.runtime.files import write_text
from cliptune.runtime.messages import printable, shorten
from cliptune.search.index import ImageIndex
from cliptune.search.searcher import Match

THUMBNAIL_SIDE = 256
JPEG_QUALITY = 82
MAX_THUMBNAILS = 400
"""Of a page, which then has about 5 MB."""
MAX_QUERY_SHOWN = 300


class Answer(NamedTuple):
    """What a query found."""

    query: str
    """The text, or the image's path."""
    is_image: bool
    matches: list[Match]


def render(name: str, *, language: str = "en", **values: Any) -> str:
    """Fill in a page of the folder pages/ in a language; what is put into it is escaped."""
    pages = Environment(
        loader=PackageLoader("cliptune.search", "pages"), autoescape=True, undefined=StrictUndefined,
        trim_blocks=True, lstrip_blocks=True,
    )  # fmt: skip
    return say_page(pages.get_template(name).render(values), language_of(language))


def thumbnail(image: str | Path | bytes, side: int = THUMBNAIL_SIDE, *, max_pixels: int = MAX_PIXELS) -> bytes:
    """Return a JPEG of an image, upright and without metadata, whose sides are at most `side`.

    Raises:
        ValueError: no image, or a damaged one.
        OSError: no such file, or it cannot be read.
    """
    decoded = decode_image(image, shortest_side=side, max_pixels=max_pixels)
    small = decoded if isinstance(decoded, Image.Image) else Image.fromarray(decoded[..., :3])
    small.thumbnail((side, side))
    file = BytesIO()
    small.save(file, "JPEG", quality=JPEG_QUALITY)
    return file.getvalue()


def write_gallery(
    path: Path, answers: Sequence[Answer], index: ImageIndex, *, folder: str, language: str = "en"
) -> None:
    """Write a page with the images that each query found, as many of each as fit.

    Args:
        path: of the page.
        answers: what the queries found.
        index: the images.
        folder: how its folder was called.
        language: of the page.

    Raises:
        OSError: the page cannot be written.
    """
    each = max(1, MAX_THUMBNAILS // len(answers))
    shown = [
        {
            "query": printable(shorten(answer.query, MAX_QUERY_SHOWN)),
            "picture": picture(answer.query) if answer.is_image else None,
            "num_matches": len(answer.matches),
            "cards": [
                {"name": printable(match.path), "score": match.score, "picture": picture(index.paths[match.image])}
                for match in answer.matches[:each]
            ],
        }
        for answer in answers[:MAX_THUMBNAILS]
    ]
    page = render(
        "gallery.html",
        answers=shown,
        num_answers=len(answers),
        num_images=len(index.paths),
        folder=printable(folder),
        language=language,
        heading=language_of(language).say("Search"),
    )
    write_text(path, page)


def picture(path: str, side: int = THUMBNAIL_SIDE) -> str | None:
    """Return a thumbnail as a data URI; None if the image cannot be read, or no longer."""
    try:
        return "data:image/jpeg;base64," + base64.b64encode(thumbnail(path, side)).decode()
    except (OSError, ValueError):
        return None
