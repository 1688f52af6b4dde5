"""The samples of one tar file: the files in it that share a key, read from its beginning to its end.

Nothing of a file is read before its size is known, and no header leads back or takes more memory than it may: a tar
file of 100 kB can name members of 5 GB.
"""

from __future__ import annotations

import json
import re
import tarfile
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from itertools import groupby
from operator import itemgetter
from pathlib import Path
from typing import Any, NamedTuple, TypeAlias
from urllib.parse import urlparse

from webdataset.gopen import gopen
from webdataset.tariterators import base_plus_ext

from cliptune.data.caption_lists import caption_list
from cliptune.data.column_names import ColumnNames, hint
from cliptune.data.index import check_caption
from cliptune.preprocess.decode import MAX_BYTES, part_path
from cliptune.preprocess.image_formats import COMMON_ENDINGS, IMAGE_ENDINGS

IMAGE_MEMBERS = frozenset((*(ending[1:] for ending in IMAGE_ENDINGS), "img", "image"))
TEXT_MEMBERS = ("txt", "caption", "captions", "cap", "text")
"""Endings of captions, one a line, the preferred one first."""
CAPTION_KEYS = ("caption", "captions")
"""Of JSON; under another usual name it holds captions if no text does."""
MAX_TEXT_BYTES = 2**24
"""Of a sample's captions; an image's limit is any image file's."""
MAX_READ = 2**20
"""Bytes of a shard that are read at once: no name and no header of a file in it is longer."""
MAX_SHOWN = 10
"""Endings or keys in a message."""
MAX_FILES, MAX_HELD = 64, 2**28
"""Files of one key, and their bytes, that are read before it is settled that they are several samples."""

_PACKED = {
    b"\x1f\x8b": "gunzip < IT > NEW.tar", b"BZh": "bunzip2 < IT > NEW.tar", b"\xfd7zXZ": "unxz < IT > NEW.tar",
    b"\x28\xb5\x2f\xfd": "unzstd < IT > NEW.tar", b"PK\3\4": "unzip, and give the folder",
}  # fmt: skip
"""What unpacks a file, by its beginning."""
_META = re.compile(r"__[^/]*__($|/)|(.*/)?\.[^/]*$", re.DOTALL)
"""What is no sample's: what webdataset skips, and hidden files, as macOS puts one beside each of its files."""
_COMMON = frozenset(ending[1:] for ending in COMMON_ENDINGS)
_APART = (
    "the files of a sample share the name up to the dot and stand next to each other: unpack the shard, and write it "
    "anew from the folder with --to_shards"
)


class _Refused(str):
    """Why a file of a shard is not read."""


class TarSample(NamedTuple):
    """The files of one sample that matter here."""

    key: str
    images: list[str | bytes]
    """The files that may be its image: their bytes, or their paths for `read_bytes`."""
    texts: dict[str, bytes]
    """The files of text by their endings: `json`, `txt`, ..., or `outputs.txt` of `0001.outputs.txt`."""
    refused: str = ""
    """Why a file of it is not read."""
    endings: Sequence[str] = ()
    """Of all its files."""

    def image(self) -> str | bytes:
        """Return the image's bytes, or its path for `read_bytes`.

        Raises:
            ValueError: there is none, or several, or a file of the sample is not read.
        """
        if self.refused:
            raise ValueError(self.refused)
        if len(self.images) != 1:
            if self.images:
                way_out = "name the one that is meant KEY.jpg, the others KEY.NAME.jpg"
                raise ValueError(f"{len(self.images)} images among {self._members()}: {way_out}")
            raise ValueError(f"no image among {self._members()}{self._apart(_is_text)}")
        return self.images[0]

    def captions(self, caption_key: str | None = None) -> tuple[str, ...]:
        """Return the captions: of the JSON under `caption_key` (`a,b`: both), or each line of the file that ends in it.

        Without that key it is what the JSON holds under `caption` or `captions`, else each line of the text, else what
        the JSON holds under another usual name.

        Raises:
            ValueError: there is none, or a file of the sample is not read.
        """
        if self.refused:
            raise ValueError(self.refused)
        values = self._json()
        if caption_key is None:
            found = _caption(values) or self._lines() or _columns(values, None) or _texts(values)
        else:
            files = (self.texts.get(ending, b"") for ending in _endings(caption_key))
            found = _columns(values, caption_key) or [line for file in files for line in _lines(file)]
        # a blank line is no caption; what is no text and no number at all is a mistake
        given = (caption for caption in found if not isinstance(caption, str) or caption.strip())
        captions = tuple(map(check_caption, given))
        if not captions:
            way_out = self._way_out(values)
            if caption_key is None:
                raise ValueError(f"no caption among {self._members()}{way_out}")
            raise ValueError(f"no caption under {caption_key!r}{way_out}")
        return captions

    def _json(self) -> Any:
        """Return what the JSON file holds; None without one."""
        content = next((self.texts[ending] for ending in self.texts if _last(ending) == "json"), None)
        try:
            return None if content is None else json.loads(content)
        except RecursionError:
            raise ValueError("its JSON is nested too deeply") from None

    def _lines(self) -> list[str]:
        """Return the lines of the text, be it .txt or .outputs.txt."""
        texts = [ending for ending in self.texts if _last(ending) in TEXT_MEMBERS]
        if len(texts) > 1 and not any(ending in TEXT_MEMBERS for ending in texts):
            raise ValueError(f"{len(texts)} texts among {self._members()}: name one with --caption_key {texts[0]}")
        texts.sort(key=lambda ending: TEXT_MEMBERS.index(_last(ending)))
        return next(filter(any, (_lines(self.texts[ending]) for ending in texts)), [])

    def _members(self) -> str:
        return ", ".join(f".{ending}" for ending in self.endings[:MAX_SHOWN])

    def _way_out(self, values: Any) -> str:
        if isinstance(values, dict):
            keys = ", ".join(list(values)[:MAX_SHOWN])
            return f"; its JSON has {keys}: name the one to take with --caption_key{hint(values, 'caption')}"
        if "cls" in self.endings:
            return "; .cls is a class and no caption, unless --caption_key cls says so"
        known = ", ".join(f".{ending}" for ending in TEXT_MEMBERS)
        return self._apart(_is_image) or ("" if self.texts else f"; texts are {known}, or what --caption_key names")

    def _apart(self, is_kind: Callable[[str], bool]) -> str:
        return f"; {_APART}" if all(map(is_kind, self.endings)) else ""


def _is_image(ending: str) -> bool:
    return _last(ending) in IMAGE_MEMBERS


def _is_text(ending: str) -> bool:
    return _last(ending) in {"json", *TEXT_MEMBERS}


def _last(ending: str) -> str:
    return ending.rpartition(".")[2]


def _lines(content: bytes) -> list[str]:
    return [line.strip() for line in content.decode("utf-8-sig").split("\n")]  # bad UTF-8 is a ValueError too


def _endings(caption_key: str | None) -> list[str]:
    """Return the endings of texts that a key names: it may name several."""
    return [key.lower() for key in ColumnNames(None, caption_key).caption_keys]


def _caption(values: Any) -> list[Any]:
    """Return what a JSON object holds as its caption or captions, in nearly every shard."""
    if not isinstance(values, dict):
        return []
    return _listed(next((values[key] for key in CAPTION_KEYS if values.get(key)), []))


def _columns(values: Any, caption_key: str | None) -> list[Any]:
    """Return what a JSON object holds where a table would have its captions."""
    given = [key for key, value in values.items() if value or type(value) is int] if isinstance(values, dict) else []
    names = next(iter(ColumnNames(None, caption_key).captions(given)), ())
    return [caption for name in names for caption in _listed(values[name])]


def _listed(found: Any) -> list[Any]:
    """Return a list; also of what is written as one in a text, as tables have it that shards are made of."""
    found = caption_list(found) if isinstance(found, str) else found
    return found if isinstance(found, list) else [found]


def _texts(values: Any) -> list[str]:
    """Return what JSON holds that is a text, or a list of texts."""
    values = [values] if isinstance(values, str) else values
    return values if isinstance(values, list) and all(isinstance(value, str) for value in values) else []


def is_local(url: str) -> bool:
    """Tell a path from a URL that webdataset opens."""
    return not urlparse(url).scheme


def read_samples(
    url: str, start: int = 0, end: int | None = None, *, by_path: bool = False, caption_key: str | None = None
) -> Iterator[TarSample]:
    """Yield a shard's samples, or those from position `start` up to `end`, in their order.

    Args:
        url: path, or a URL that webdataset opens.
        start: position of the first one; those before it are passed over.
        end: position after the last one.
        by_path: leave the images where they are, and give each one's path for `read_bytes`.
        caption_key: endings of files that are texts besides those that always are.

    Raises:
        OSError: the shard cannot be read, or not to its end; names it.
    """
    if end is not None and end <= start:
        return
    asked = _endings(caption_key)
    with _opened(url) as tar:

        def load(info: tarfile.TarInfo, ending: str, last_position: int) -> str | bytes | None:
            is_image = _is_image(ending)
            if last_position < start or not (is_image or _is_text(ending) or ending in asked):
                return None
            if reason := _refusal(info, MAX_BYTES if is_image else MAX_TEXT_BYTES):
                return _Refused(f"its .{ending} is {reason}")
            if is_image and by_path:
                return part_path(url, info.offset_data, info.size, info.name)
            return _content(tar, info)

        for position, (key, files) in enumerate(_samples(tar, load)):
            if position >= start:
                yield _sample(key, files)
            if position + 1 == end:
                return


def count_samples(url: str) -> int:
    """Count a shard's samples; raises as `read_samples` does."""
    with _opened(url) as tar:
        return sum(1 for _ in _samples(tar, lambda *_: None))


@contextmanager
def _opened(url: str) -> Iterator[tarfile.TarFile]:
    """Open a shard; one that is no whole tar file is an OSError that names it."""
    if is_local(url) and not Path(url).is_file():  # it may have become a pipe since, whose opening would never return
        raise FileNotFoundError(f"no such shard: {url}")
    stream = gopen(url)
    bytes_ = _Forward(stream, can_seek=is_local(url))
    try:
        with tarfile.open(fileobj=bytes_, mode="r:") as tar:  # type: ignore[call-overload]
            yield tar
    except (tarfile.TarError, EOFError, ValueError, ArithmeticError, LookupError) as error:  # of a damaged header
        if program := next((name for start, name in _PACKED.items() if bytes_.first.startswith(start)), None):
            raise OSError(f"{url}: a packed file, which has no way in: unpack it ({program})") from None
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
        self.first = b""

    def tell(self) -> int:
        return self._position

    def read(self, size: int) -> bytes:
        if not 0 <= size <= MAX_READ:
            raise tarfile.ReadError(f"a header of {size:,} bytes")
        content: bytes = self._stream.read(size)
        self.first = self.first or content[:8]
        self._position += len(content)
        return content

    def seek(self, position: int) -> None:
        if position < self._position:
            raise tarfile.ReadError("a header that leads back")
        if self._can_seek:
            self._position = self._stream.seek(position)
        while self._position < position and self.read(min(position - self._position, MAX_READ)):
            pass


class _File(NamedTuple):
    """A file of a shard, `folder/key.name.ending`."""

    name: str
    """Between the key and the ending; mostly there is none."""
    ending: str
    """Behind the last dot, in lower case."""
    size: int
    content: str | bytes | None
    """None: not read."""


_Run: TypeAlias = list[_File]
"""Files that follow each other and differ by what is behind the last dot."""


def _samples(
    tar: tarfile.TarFile, load: Callable[[tarfile.TarInfo, str, int], str | bytes | None]
) -> Iterator[tuple[str, _Run]]:
    """Yield the key and the files of each sample. Names alone decide which they are: so counting agrees with reading.

    The key ends at the first dot, as for webdataset, unless what shares it is several samples: `v1.0001.jpg`,
    `v1.0001.txt`, `v1.0002.jpg`, `v1.0002.txt`, ... There it ends at the last dot.

    Args:
        tar: the shard.
        load: gives a file's content, asked with its ending, and the last position that its sample may turn out to have.
    """
    position = 0
    for key, files in groupby(_files(tar), key=itemgetter(0)):
        runs: list[_Run] = []
        is_split = False
        for _, ending, info in files:
            name, _, last = ending.rpartition(".")
            if not runs or runs[-1][0].name != name:
                if is_split:
                    yield _of_run(key, runs.pop())
                    position += 1
                runs.append([])
            runs[-1].append(_File(name, last, info.size, load(info, ending, position + len(runs) - 1)))
            if not is_split and _are_samples(runs):
                is_split = True
                yield from (_of_run(key, run) for run in runs[:-1])
                position += len(runs) - 1
                del runs[:-1]
        if not is_split and not _are_samples(runs, are_all=True):
            yield key, [file for run in runs for file in run]
            position += 1
            continue
        yield from (_of_run(key, run) for run in runs)
        position += len(runs)


def _of_run(key: str, run: _Run) -> tuple[str, _Run]:
    """Return the key and the files of a run that is a sample of its own."""
    name = run[0].name
    return f"{key}.{name}" if name else key, [file._replace(name="") for file in run]


def _files(tar: tarfile.TarFile) -> Iterator[tuple[str, str, tarfile.TarInfo]]:
    """Yield a shard's files as webdataset has them: what is before the first dot, and behind it in lower case."""
    for info in iter(tar.next, None):
        tar.members = []  # type: ignore[attr-defined]  # tarfile remembers every file: memory would grow with the shard
        key, ending = base_plus_ext(info.name)
        if key is not None and info.isreg() and not _META.match(info.name):
            yield key, ending.lower(), info


def _are_samples(runs: Sequence[_Run], *, are_all: bool = False) -> bool:
    """Tell whether the files of one key are several samples, as far as is known; once they are, they stay so.

    Two images with a text of their own each are. So are several images, none of which is `key.jpg`, unless there is a
    text for all of them; as long as that is not seen, no more than `MAX_FILES` wait for it.
    """
    if len(runs) == 1:  # as nearly always
        return False
    of_run = [{"image" if file.ending in IMAGE_MEMBERS else file.ending for file in run} for run in runs]
    has_plain = any(not run[0].name and "image" in endings for run, endings in zip(runs, of_run, strict=True))
    # 0001.depth.png with its 0001.depth.json is a part of 0001.jpg
    texts = {*TEXT_MEMBERS} if has_plain else {*TEXT_MEMBERS, "json"}
    if sum("image" in endings and not texts.isdisjoint(endings) for endings in of_run) > 1:
        return True
    if has_plain:
        return False
    if not are_all:
        files = [file for run in runs for file in run]
        return len(files) > MAX_FILES or sum(file.size for file in files) > MAX_HELD
    is_shared = any("image" not in endings and not texts.isdisjoint(endings) for endings in of_run)
    return sum("image" in endings for endings in of_run) > 1 and not is_shared


def _sample(key: str, files: Sequence[_File]) -> TarSample:
    """Choose the image: `key.jpg` before `key.psd`, and that before `key.input.jpg`; texts likewise."""
    images = [file for file in files if file.ending in IMAGE_MEMBERS]
    if len(images) > 1:
        ranks = [(bool(file.name), file.ending not in _COMMON) for file in images]
        images = [file for file, rank in zip(images, ranks, strict=True) if rank == min(ranks)]
    texts = [file for file in files if file.content is not None and file.ending not in IMAGE_MEMBERS]
    texts.sort(key=lambda file: bool(file.name))
    if any(file.ending in TEXT_MEMBERS and not file.name for file in texts):
        texts = [file for file in texts if not file.name]
    refused = (file.content for file in (*images, *texts) if isinstance(file.content, _Refused))
    return TarSample(
        key,
        images=[file.content for file in images if file.content is not None],
        texts={_ending(file): file.content for file in texts if isinstance(file.content, bytes)},
        refused=next(refused, ""),
        endings=[_ending(file) for file in files],
    )


def _ending(file: _File) -> str:
    return f"{file.name}.{file.ending}" if file.name else file.ending


def _refusal(info: tarfile.TarInfo, limit: int) -> str:
    """Say why a file of a shard is not read; nothing where it is."""
    if info.issparse():
        return f"a sparse file, which unfolds to {info.size:,} bytes: write the shard without --sparse"
    return f"a file of {info.size:,} bytes; at most {limit:,} are read" if info.size > limit else ""


def _content(tar: tarfile.TarFile, info: tarfile.TarInfo) -> bytes:
    file = tar.extractfile(info)
    assert file is not None  # it is no folder and no link
    return b"".join(iter(lambda: file.read(MAX_READ), b""))
