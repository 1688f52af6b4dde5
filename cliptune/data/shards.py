"""A data set in tar files, as WebDataset has it: the files of a sample share a key, as 000.jpg, 000.txt, 000.json do.

Shards are read from the beginning to the end, wherever `webdataset` can open them. How many samples each holds must be
known before: it stands beside them in `shardindex.json`, in the form of webdataset's own index, or is counted once.
"""

from __future__ import annotations

import json
import logging
import os
import re
import tarfile
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager, suppress
from io import BytesIO
from itertools import accumulate, chain, count, groupby, islice
from pathlib import Path
from typing import Any, NamedTuple
from urllib.parse import urlparse

from braceexpand import braceexpand
from PIL import Image, UnidentifiedImageError
from webdataset.gopen import gopen, gopen_schemes
from webdataset.tariterators import base_plus_ext
from webdataset.writer import TarWriter

from cliptune.data.formats import IMAGE_ENDINGS
from cliptune.data.index import check_text
from cliptune.data.issues import Issue, Issues
from cliptune.data.table import RowBuffer, Rows
from cliptune.preprocess.decode import file_stamp, part_path, read_bytes
from cliptune.runtime.files import read_json_object
from cliptune.runtime.logs import progress_bar

logger = logging.getLogger(__name__)

INDEX_NAME = "shardindex.json"
INDEX_KIND = "wids-shard-index-v1"
CAPTION_KEYS = ("caption", "captions")
TEXT_ENDINGS = frozenset(("json", "txt"))

_SHARD_NAME = re.compile(r"""[^/\s'"]+\.tar(?=[\s'"?]|$)""")  # in an address, where more words of a command may follow
_META = re.compile(r"__[^/]*__($|/)")  # what webdataset leaves out


class Shard(NamedTuple):
    """One tar file."""

    url: str
    """Path, or an address that webdataset opens."""
    num_samples: int
    first: int
    """Number of its first sample in the data set."""

    @property
    def name(self) -> str:
        """The file's name, without its folder."""
        return _name(self.url)


class Shards:
    """A data set's shards; its length is the number of their samples."""

    def __init__(self, urls: Sequence[str], counts: Sequence[int]) -> None:
        *firsts, self._num_samples = accumulate(counts, initial=0)
        self.shards = [Shard(*each) for each in zip(urls, counts, firsts, strict=True)]

    def __len__(self) -> int:
        return self._num_samples

    def describe(self, number: int) -> str:
        """Say where the sample with a number of the data set is."""
        shard = next(shard for shard in reversed(self.shards) if shard.first <= number)
        return f"{shard.name} (sample {number - shard.first})"


class TarSample(NamedTuple):
    """The files of one sample that matter here."""

    key: str
    pictures: list[str | bytes]
    """The files with a picture's ending: their bytes, or where to read them."""
    texts: dict[str, bytes]
    """The files that end in `json` and `txt`."""

    def picture(self) -> str | bytes:
        """Return the picture's bytes, or where to read them.

        Raises:
            ValueError: there is none, or several.
        """
        if len(self.pictures) != 1:
            raise ValueError(f"{len(self.pictures)} pictures" if self.pictures else "no picture")
        return self.pictures[0]

    def captions(self, caption_key: str | None = None) -> tuple[str, ...]:
        """Return the captions: what the JSON holds under `caption_key`.

        Without that key it is what the JSON holds under `caption` or `captions`, else each line of the text.

        Raises:
            ValueError: there is none.
        """
        found = _json_captions(self.texts.get("json"), CAPTION_KEYS if caption_key is None else (caption_key,))
        if not found and caption_key is None:
            found = self.texts.get("txt", b"").decode("utf-8").split("\n")  # bad UTF-8 is a ValueError too
        captions = tuple(check_text("caption", caption) for caption in found if not _is_blank(caption))
        if not captions:
            raise ValueError("no caption" if caption_key is None else f"no caption under {caption_key!r}")
        return captions


def _is_blank(caption: Any) -> bool:
    return isinstance(caption, str) and not caption.strip()


def _json_captions(content: bytes | None, keys: Sequence[str]) -> list[Any]:
    if content is None:
        return []
    try:
        values = json.loads(content)
    except RecursionError:
        raise ValueError("its JSON is nested too deeply") from None
    found = [values[key] for key in keys if values.get(key)] if isinstance(values, dict) else []
    captions = found[0] if found else []
    return captions if isinstance(captions, list) else [captions]


def is_shards(data_dir: str | Path) -> bool:
    """Tell whether this names tar files: `path/{00000..00099}.tar`, or a single one."""
    try:
        first = next(iter(braceexpand(str(data_dir))))
    except ValueError:  # braces that do not close: a path like any other
        return False
    is_tar = first.endswith(".tar") if _is_local(first) else _SHARD_NAME.search(first) is not None
    return is_tar and not Path(first).is_dir()


def open_shards(data_dir: str) -> Shards:
    """Find the shards that braces name, and how many samples each holds.

    Of several processes one should come first: the others find its counts in the index.

    Raises:
        FileNotFoundError: some of them are not there.
        ValueError: one of them twice, or shards elsewhere without an index.
        OSError: one of them cannot be read.
    """
    urls = _expand(data_dir)
    return Shards(urls, _counts(urls))


def read_samples(url: str, start: int = 0, end: int | None = None, *, by_path: bool = False) -> Iterator[TarSample]:
    """Yield a shard's samples, or those from position `start` up to `end`, in their order.

    Args:
        url: path, or an address that webdataset opens.
        start: position of the first one; what lies before it is passed over.
        end: position after the last one.
        by_path: leave the pictures where they are, and give each one's path for `preprocessing.read_bytes`.

    Raises:
        OSError: the shard cannot be read, or not to its end; names it.
    """
    with _opened(url) as tar:
        for position, members in groupby(_members(tar), key=lambda member: member.position):
            if end is not None and position >= end:
                return
            if position >= start:
                yield _sample(url, tar, members, by_path=by_path)


def read_rows(data_dir: str, *, caption_key: str | None = None) -> tuple[Rows, Issues]:
    """Read shards as an index is read: pictures by their place, captions; and what is wrong with single samples.

    Raises:
        ValueError: shards that are not files of this machine.
        FileNotFoundError: some of them are not there.
        OSError: one of them cannot be read.
    """
    urls = _expand(data_dir)
    elsewhere = [url for url in urls if not _is_local(url)]
    if elsewhere:
        raise ValueError(f"{elsewhere[0]}: only for training are shards read from elsewhere; copy them to this machine")
    _check_files(urls)
    rows, issues = RowBuffer(), Issues()
    for url in progress_bar(urls, desc="shards"):
        for sample in read_samples(os.path.realpath(url), by_path=True):
            place = f"{_name(url)}/{sample.key}"
            try:
                rows.append(str(sample.picture()), sample.captions(caption_key), split=None, group=None, number=0)
            except ValueError as error:
                issues.add(Issue(str(error), image=place))
    return rows.rows(""), issues


def write_shards(
    images: Iterable[tuple[str, Sequence[str]]], folder: Path, *, shard_size: int
) -> tuple[Shards, list[str]]:
    """Write pictures with their captions as shards `00000.tar`, `00001.tar`, ..., the same bytes each time.

    The pictures' files go in as they are; captions as `.json` (`{"captions": [...]}`) and as `.txt`, one a line. A
    shard has its name once it is whole, and the index comes last.

    Args:
        images: path and captions of each picture, in the order of the shards.
        folder: made if it is not there.
        shard_size: samples a shard.

    Returns:
        The shards, and why some pictures are not in them.

    Raises:
        ValueError: the folder holds tar files already, or none of the pictures can be read.
    """
    if any(folder.glob("*.tar")):
        raise ValueError(f"{folder} holds tar files already: name another folder, or delete them")
    folder.mkdir(parents=True, exist_ok=True)
    issues: list[str] = []
    samples = _to_write(images, issues)
    counts: dict[str, int] = {}
    for number in count():
        first = next(samples, None)
        if first is None:
            break
        path = folder / f"{number:05}.tar"
        counts[str(path)] = _write_shard(chain([first], islice(samples, shard_size - 1)), path)
    if not counts:
        raise ValueError(f"none of {len(issues)} pictures can be read; the first: {''.join(issues[:1])}")
    _write_index(folder / INDEX_NAME, {_name(path): _entry(path, number) for path, number in counts.items()})
    return Shards(list(counts), list(counts.values())), issues


def _to_write(images: Iterable[tuple[str, Sequence[str]]], issues: list[str]) -> Iterator[dict[str, Any]]:
    number = 0
    for path, captions in images:
        try:
            content = read_bytes(path)
            with Image.open(BytesIO(content)) as image:
                known = Path(path).suffix.lower()
                ending = known if known in IMAGE_ENDINGS else f".{str(image.format).lower()}"
        except UnidentifiedImageError:
            issues.append(f"{path}: cannot be read as a picture: of no known format")
            continue
        except (OSError, ValueError, SyntaxError, Image.DecompressionBombError) as error:
            issues.append(f"{path}: {error}")
            continue
        lines = "\n".join(" ".join(caption.split("\n")) for caption in captions)
        texts = {"json": json.dumps({"captions": list(captions)}, ensure_ascii=False).encode(), "txt": lines.encode()}
        yield {"__key__": f"{number:09}", ending[1:]: content, **texts}
        number += 1


def _write_shard(samples: Iterable[dict[str, Any]], path: Path) -> int:
    temporary = path.with_suffix(".tmp")
    number = 0
    with temporary.open("wb") as file, TarWriter(file, encoder=False, mtime=0, user="", group="") as writer:
        for number, sample in enumerate(samples, 1):  # noqa: B007  (the last one counts them)
            writer.write(sample)
    temporary.replace(path)
    return number


def _name(url: str) -> str:
    match = None if _is_local(url) else _SHARD_NAME.search(url)
    return Path(url).name if match is None else match[0]


def _index_beside(url: str) -> str:
    return str(Path(url).with_name(INDEX_NAME)) if _is_local(url) else _SHARD_NAME.sub(INDEX_NAME, url)


def _is_local(url: str) -> bool:
    return not urlparse(url).scheme


def _expand(data_dir: str) -> list[str]:
    urls = list(braceexpand(data_dir))
    if len(set(urls)) < len(urls):
        twice = next(url for url in urls if urls.count(url) > 1)
        raise ValueError(f"{data_dir}: {twice} is named twice")
    scheme = urlparse(urls[0]).scheme
    if scheme and scheme != "file" and scheme not in gopen_schemes:
        raise ValueError(f"{urls[0]}: webdataset opens no {scheme}: addresses; a command that prints it can be named: "
                         f"'pipe:COMMAND {urls[0]}'")  # fmt: skip
    return urls


def _check_files(urls: Sequence[str]) -> None:
    missing = [url for url in urls if not Path(url).is_file()]
    if missing:
        raise FileNotFoundError(f"{len(missing)} of {len(urls)} shards are not there (first: {missing[0]})")


def _counts(urls: Sequence[str]) -> list[int]:
    found: dict[str, int] = {}
    _check_files([url for url in urls if _is_local(url)])
    with progress_bar(total=len(urls), desc="count samples", unit="shard") as bar:
        for index, group in groupby(urls, key=_index_beside):
            found |= _counts_beside(index, list(group), bar)
    return [found[url] for url in urls]


def _counts_beside(index: str, urls: Sequence[str], bar: Any) -> dict[str, int]:
    """Return how many samples each of the shards beside one index holds; what it does not tell is counted, and kept."""
    if not _is_local(index):
        entries = _entries(_fetch_index(index, urls[0]), index)
        missing = [url for url in urls if _name(url) not in entries]
        if missing:
            raise ValueError(f"{index} tells of {len(urls) - len(missing)} of {len(urls)} shards (not of {missing[0]})")
        return {url: entries[_name(url)]["nsamples"] for url in urls}
    path = Path(index)
    entries = _entries(read_json_object(path), index) if path.is_file() else {}
    new: dict[str, Any] = {}
    for url in urls:
        known = entries.get(_name(url))
        if known is None or (known.get("filesize"), known.get("mtime_ns")) != file_stamp(url):
            new[_name(url)] = _entry(url, _count(url))
        bar.update()
    if new:
        logger.info("%s: counted the samples of %d shard(s)", path.parent, len(new))
        try:
            _write_index(path, entries | new)
        except OSError as error:
            logger.info("%s: the counts are not kept, the next run counts again: %s", path, error)
    return {url: (entries | new)[_name(url)]["nsamples"] for url in urls}


def _count(url: str) -> int:
    position = -1
    with _opened(url) as tar:
        for member in _members(tar):
            position = member.position
    return position + 1


def _fetch_index(index: str, url: str) -> Any:
    try:
        with gopen(index) as stream:
            return json.loads(stream.read())
    except (OSError, ValueError) as error:
        raise ValueError(f"{url}: how many samples such shards hold is read from {INDEX_NAME} beside them, and {index} "
                         f"cannot be read: {error}") from None  # fmt: skip


def _entries(index: Any, address: str) -> dict[str, dict[str, Any]]:
    """Return webdataset's index by the shards' names."""
    try:
        return {_name(entry["url"]): {**entry, "nsamples": int(entry["nsamples"])} for entry in index["shardlist"]}
    except (TypeError, KeyError, ValueError):
        raise ValueError(f"{address} is no index of shards: delete it, and the samples are counted") from None


def _entry(path: str, num_samples: int) -> dict[str, Any]:
    size, changed = file_stamp(path)
    return {"url": _name(path), "nsamples": num_samples, "filesize": size, "mtime_ns": changed}


def _write_index(path: Path, entries: dict[str, dict[str, Any]]) -> None:
    index = {"__kind__": INDEX_KIND, "wids_version": 1, "shardlist": [entries[name] for name in sorted(entries)]}
    temporary = path.with_suffix(f".{os.getpid()}.tmp")
    temporary.write_text(json.dumps(index, indent=1) + "\n", encoding="utf-8")
    temporary.replace(path)


@contextmanager
def _opened(url: str) -> Iterator[tarfile.TarFile]:
    """Open a shard; one that is no whole tar file is an OSError that names it."""
    stream = gopen(url)
    try:
        with tarfile.open(fileobj=stream, mode="r:" if _is_local(url) else "r|") as tar:
            yield tar
    except (tarfile.TarError, EOFError) as error:
        raise OSError(f"{url}: cannot be read as a tar file: {error}") from None
    finally:
        with suppress(OSError):  # a command that is left before its end says so
            stream.close()


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
        tar.members = []  # type: ignore[attr-defined]  # else memory would grow with the shard
        key, ending = base_plus_ext(info.name)
        if key is not None and info.isreg() and not _META.match(info.name):
            position, last = position + (key != last), key
            yield _Member(position, key, ending.lower(), info)


def _sample(url: str, tar: tarfile.TarFile, members: Iterable[_Member], *, by_path: bool) -> TarSample:
    pictures: list[str | bytes] = []
    texts: dict[str, bytes] = {}
    for _, key, ending, info in members:  # noqa: B007  (one key for all of them)
        if ending in TEXT_ENDINGS:
            texts[ending] = _content(tar, info)
        elif f".{ending}" in IMAGE_ENDINGS:
            place = part_path(url, info.offset_data, info.size, info.name)
            pictures.append(place if by_path else _content(tar, info))
    return TarSample(key, pictures, texts)


def _content(tar: tarfile.TarFile, info: tarfile.TarInfo) -> bytes:
    file = tar.extractfile(info)
    assert file is not None  # it is no folder and no link
    return file.read()
