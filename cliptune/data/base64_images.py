"""Chinese-CLIP's pairs of files: images in base64, a line each, and their captions as JSON lines."""

from __future__ import annotations

import json
import re
from array import array
from pathlib import Path
from typing import Any

from cliptune.data.documents import json_lines
from cliptune.data.index import Records, is_id, kind, quote
from cliptune.data.text_stream import TextFile
from cliptune.preprocess.decode import MAX_BYTES
from cliptune.preprocess.encoded import base64_path

TEXTS, IMAGES = "texts.jsonl", "imgs.tsv"
_IMAGE_LINE = re.compile(r"[^\t]+\t(/9j/|_9j_|iVBORw|R0lGOD|UklGR)")
"""An id, and the first bytes of a JPEG, PNG, GIF or WebP file in base64."""


def images_beside(texts: Path) -> Path | None:
    """Return where the images of `train_texts.jsonl` are: in `train_imgs.tsv`; None for a file of another name."""
    name = texts.name
    return texts.with_name(name.removesuffix(TEXTS) + IMAGES) if name.endswith(TEXTS) else None


def split_of_texts(path: Path) -> str | None:
    """Return what the name of a file of captions begins with: `train`; None if no file of images is beside it."""
    images = images_beside(path)
    return path.name.removesuffix(TEXTS).rstrip("_-.") if images is not None and images.is_file() else None


def refuse_images(path: Path, line: str) -> None:
    """Raise if a file, by its first line, holds the images themselves."""
    if _IMAGE_LINE.match(line):
        raise ValueError(f"{path}: images in base64: name the file of their captions, such as train_{TEXTS}")


def is_texts(line: str) -> bool:
    """Tell by its first line whether a file holds such captions."""
    try:
        value = json.loads(line)
    except (ValueError, RecursionError):
        return False
    return isinstance(value, dict) and isinstance(value.get("image_ids"), list) and "text" in value


def read_texts(found: Records, text: TextFile) -> str:
    """Take the captions of each image; an image gets its address in the file that holds it, see `base64_path`."""
    found.refuse_caption_key("Chinese-CLIP")
    found.unit = "line"
    path = images_beside(found.path)
    if path is None or not path.is_file():
        expected = f"{path.name if path else '*_' + IMAGES} beside it"
        raise ValueError(
            f"{found.path}: captions of images in base64 (Chinese-CLIP's form), but there is no {expected}"
        )
    images = _Images(found, path)
    for number, value in json_lines(text):
        ids = value.get("image_ids") if isinstance(value, dict) else None
        if not isinstance(ids, list):
            reason = str(value) if isinstance(value, ValueError) else f"image_ids is {kind(ids)}, not a list"
            found.issue(number, reason)
        elif not ids:
            found.issue(number, "a caption of no image: image_ids is empty")
        for image_id in ids if isinstance(ids, list) else []:
            address = images.take(image_id)
            if address is None:
                found.issue(number, f"image_ids: {path.name} has no image {quote(image_id)}")
            else:
                found.add(number, address, value.get("text"))
    images.note_uncaptioned()
    return "chinese-clip"


class _Images:
    """Where each image of a file lies in it, by its id."""

    def __init__(self, found: Records, path: Path) -> None:
        from cliptune.runtime.logs import progress_bar  # noqa: PLC0415  (it imports PyTorch, and few files are read here)

        self._found, self._path = found, path
        self._file = str(path.absolute())
        self._row_of: dict[str, int] = {}
        self._numbers, self._offsets, self._sizes = array("q"), array("q"), array("q")
        self._taken = bytearray()
        with path.open("rb") as file:
            lines = iter(lambda: file.readline(MAX_BYTES), b"")
            offset = 0
            for number, line in enumerate(progress_bar(lines, desc=path.name, unit="image"), 1):
                self._note(number, offset, line)
                offset += len(line)

    def _note(self, number: int, offset: int, line: bytes) -> None:
        name, tab, text = line.rstrip(b"\r\n").partition(b"\t")
        image_id = name.decode(errors="replace").strip()
        if not tab or not text:
            if line.strip():
                self._issue(number, "no image: expected an id, a tab and the image in base64")
        elif image_id in self._row_of:
            self._issue(number, f"id {quote(image_id)} stands twice")
        else:
            self._row_of[image_id] = len(self._numbers)
            self._numbers.append(number)
            self._offsets.append(offset + len(name) + 1)
            self._sizes.append(len(text))
            self._taken.append(False)

    def take(self, image_id: Any) -> str | None:
        """Return the address of an image, which has a caption now; None: there is no such image."""
        row = self._row_of.get(str(image_id)) if is_id(image_id) else None
        if row is None:
            return None
        self._taken[row] = True
        return base64_path(self._file, self._offsets[row], self._sizes[row], str(image_id))

    def note_uncaptioned(self) -> None:
        """Note the images without a caption."""
        for row, number in enumerate(self._numbers):
            if not self._taken[row]:
                self._issue(number, "no caption")

    def _issue(self, number: int, reason: str) -> None:
        self._found.issue(f"{self._path.name}: line {number}", reason)
