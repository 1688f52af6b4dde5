"""The samples of one tar file: the files in it that share a key, read from its beginning to its end.

Nothing of a file is read before its size is known, and no header leads back or takes more memory than it may: a tar
file of 100 kB can name members of 5 GB.
"""

from __future__ import annotations

import json
import re
import tarfile
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager, suppress
from itertools import groupby
from pathlib import Path
from typing import Any, NamedTuple
from urllib.parse import urlparse

from webdataset.gopen import gopen
from webdataset.tariterators import base_plus_ext

from cliptune.data.index import check_text
from cliptune.preprocess.decode import MAX_BYTES, part_path
from cliptune.preprocess.image_formats import IMAGE_ENDINGS

CAPTION_KEYS = ("caption", "captions")
TEXT_ENDINGS = frozenset(("json", "txt"))
MAX_TEXT_BYTES = 2**24
"""Of a sample's captions; an image's limit is any image file's."""
MAX_READ = 2**20
"""Bytes of a shard that are read at once: no name and no header of a file in it is longer."""

_META = re.compile(r"__[^/]*__($|/)")  # webdataset skips these


class TarSample(NamedTuple):
    """The files of one sample that matter here."""

    key: str
    images: list[str | bytes]
    """The files with an image's ending: their bytes, or their paths for `read_bytes`."""
    texts: dict[str, bytes]
    """The files that end in `json` and `txt`."""
    refused: str = ""
    """Why a file of it is not read."""

    def image(self) -> str | bytes:
        """Return the image's bytes, or its path for `read_bytes`.

        Raises:
            ValueError: there is none, or several, or a file of the sample is not read.
        """
        if self.refused:
            raise ValueError(self.refused)
        if len(self.images) != 1:
            raise ValueError(f"{len(self.images)} images" if self.images else "no image")
        return self.images[0]

    def captions(self, caption_key: str | None = None) -> tuple[str, ...]:
        """Return the captions: what the JSON holds under `caption_key`.

        Without that key it is what the JSON holds under `caption` or `captions`, else each line of the text.

        Raises:
            ValueError: there is none, or a file of the sample is not read.
        """
        if self.refused:
            raise ValueError(self.refused)
        found = _json_captions(self.texts.get("json"), CAPTION_KEYS if caption_key is None else (caption_key,))
        if not found and caption_key is None:
            found = self.texts.get("txt", b"").decode("utf-8").split("\n")  # bad UTF-8 is a ValueError too
        # a blank line is no caption; what is no text at all is a mistake
        given = (caption for caption in found if not isinstance(caption, str) or caption.strip())
        captions = tuple(check_text("caption", caption) for caption in given)
        if not captions:
            raise ValueError("no caption" if caption_key is None else f"no caption under {caption_key!r}")
        return captions


def _json_captions(content: bytes | None, keys: Sequence[str]) -> list[Any]:
    if content is None:
        return []
    try:
        values = json.loads(content)
    except RecursionError:
        raise ValueError("its JSON is nested too deeply") from None
    captions: Any = next((values[key] for key in keys if values.get(key)), []) if isinstance(values, dict) else []
    return captions if isinstance(captions, list) else [captions]


def is_local(url: str) -> bool:
    """Tell a path from a URL that webdataset opens."""
    return not urlparse(url).scheme


def read_samples(url: str, start: int = 0, end: int | None = None, *, by_path: bool = False) -> Iterator[TarSample]:
    """Yield a shard's samples, or those from position `start` up to `end`, in their order.

    Args:
        url: path, or a URL that webdataset opens.
        start: position of the first one; those before it are passed over.
        end: position after the last one.
        by_path: leave the images where they are, and give each one's path for `read_bytes`.

    Raises:
        OSError: the shard cannot be read, or not to its end; names it.
    """
    with _opened(url) as tar:
        for position, members in groupby(_members(tar), key=lambda member: member.position):
            if end is not None and position >= end:
                return
            if position >= start:
                yield _sample(url, tar, members, by_path=by_path)


def count_samples(url: str) -> int:
    """Count a shard's samples; raises as `read_samples` does."""
    position = -1
    with _opened(url) as tar:
        for member in _members(tar):
            position = member.position
    return position + 1


@contextmanager
def _opened(url: str) -> Iterator[tarfile.TarFile]:
    """Open a shard; one that is no whole tar file is an OSError that names it."""
    if is_local(url) and not Path(url).is_file():  # it may have become a pipe since, whose opening would never return
        raise FileNotFoundError(f"no such shard: {url}")
    stream = gopen(url)
    try:
        with tarfile.open(fileobj=_Forward(stream, can_seek=is_local(url)), mode="r:") as tar:  # type: ignore[call-overload]
            yield tar
    except (tarfile.TarError, EOFError, ValueError, ArithmeticError, LookupError) as error:  # of a damaged header
        raise OSError(f"{url}: cannot be read as a tar file: {error}") from None
    finally:
        with suppress(OSError):  # a `pipe:` command that is stopped before its end complains
            stream.close()


class _Forward:
    """A shard's bytes from its beginning to its end, few of them at once: a header may claim to be 5 GB long.

    A local file skips what nobody reads; of another stream it is read and dropped.
    """

    def __init__(self, stream: Any, *, can_seek: bool) -> None:
        self._stream, self._can_seek, self._position = stream, can_seek, 0

    def tell(self) -> int:
        return self._position

    def read(self, size: int) -> bytes:
        if not 0 <= size <= MAX_READ:
            raise tarfile.ReadError(f"a header of {size:,} bytes")
        content: bytes = self._stream.read(size)
        self._position += len(content)
        return content

    def seek(self, position: int) -> None:
        if position < self._position:
            raise tarfile.ReadError("a header that leads back")
        if self._can_seek:
            self._position = self._stream.seek(position)
        while self._position < position and self.read(min(position - self._position, MAX_READ)):
            pass


class _Member(NamedTuple):
    """A file of a shard."""

    position: int
    """Of its sample in the shard."""
    key: str
    ending: str
    info: tarfile.TarInfo


def _members(tar: tarfile.TarFile) -> Iterator[_Member]:
    """Yield a shard's files; a sample ends where the key changes, and the key at the first dot, as for webdataset."""
    position, last = -1, None
    for info in iter(tar.next, None):
        tar.members = []  # type: ignore[attr-defined]  # tarfile remembers every file: memory would grow with the shard
        key, ending = base_plus_ext(info.name)
        if key is not None and info.isreg() and not _META.match(info.name):
            position, last = position + (key != last), key
            yield _Member(position, key, ending.lower(), info)


def _sample(url: str, tar: tarfile.TarFile, members: Iterable[_Member], *, by_path: bool) -> TarSample:
    images: list[str | bytes] = []
    texts: dict[str, bytes] = {}
    refused = ""
    for _, key, ending, info in members:  # noqa: B007  (one key for all of them)
        is_text = ending in TEXT_ENDINGS
        if not is_text and f".{ending}" not in IMAGE_ENDINGS:
            continue
        if reason := _refusal(info, MAX_TEXT_BYTES if is_text else MAX_BYTES):
            refused = refused or f".{ending} is {reason}"
        elif is_text:
            texts[ending] = _content(tar, info)
        else:
            path = part_path(url, info.offset_data, info.size, info.name)
            images.append(path if by_path else _content(tar, info))
    return TarSample(key, images, texts, refused)


def _refusal(info: tarfile.TarInfo, limit: int) -> str:
    """Say why a file of a shard is not read; nothing where it is."""
    if info.issparse():
        return f"a sparse file, which unfolds to {info.size:,} bytes: write the shard without --sparse"
    return f"a file of {info.size:,} bytes; at most {limit:,} are read" if info.size > limit else ""


def _content(tar: tarfile.TarFile, info: tarfile.TarInfo) -> bytes:
    file = tar.extractfile(info)
    assert file is not None  # it is no folder and no link
    return b"".join(iter(lambda: file.read(MAX_READ), b""))
