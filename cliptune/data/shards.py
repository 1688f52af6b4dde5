"""A data set in tar files as WebDataset has it: the files of a sample share a key, as 000.jpg, 000.txt, 000.json do.

Shards are read from the beginning to the end, wherever `webdataset` can open them. How many samples each holds must be
known before: it stands beside them in `shardindex.json`, in the form of webdataset's own index, or is counted once.
"""

from __future__ import annotations

import json
import logging
import math
import os
import re
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager, suppress
from itertools import accumulate, chain, groupby, islice
from pathlib import Path
from typing import Any, NamedTuple
from urllib.parse import urlparse

from braceexpand import braceexpand
from webdataset.gopen import gopen, gopen_schemes
from webdataset.writer import TarWriter

from cliptune.data.issues import Issue, Issues, image_issue
from cliptune.data.table import RowBuffer, Rows
from cliptune.data.tar_samples import count_samples, is_local, read_samples
from cliptune.preprocess.decode import file_stamp, image_format, read_bytes
from cliptune.preprocess.image_formats import IMAGE_ENDINGS
from cliptune.runtime.files import atomic_writer, read_json_object, write_json
from cliptune.runtime.logs import progress_bar
from cliptune.runtime.messages import count, first_few, shorten

logger = logging.getLogger(__name__)

INDEX_NAME = "shardindex.json"
INDEX_KIND = "wids-shard-index-v1"
_TAR = r"\.(?:tar(?:\.(?:gz|bz2|xz|zst))?|tgz)"  # a packed one is refused by name
_SHARD_NAME = re.compile(rf"""[^/\s'"]+{_TAR}(?=[\s'"?]|$)""")  # in a URL, or anywhere in a `pipe:` command
_SHELL = re.compile(r"""[\s'"`\\]""")  # in a URL that is no command: some versions of webdataset give URLs to a shell
_JOINED = re.compile(r"::(?![^\[\]]*\])")
COUNTED_BY = 2
"""Raised when other files are a sample: what an index says is counted again."""
MAX_SHARDS = 1_000_000
MAX_NESTING = 20
"""Of braces."""
UNFINISHED = ".shards.unfinished"
"""Stands beside shards while they are written."""

_RANGE = re.compile(r"(-?\d+|[a-zA-Z])\.\.(-?\d+|[a-zA-Z])(?:\.\.-?(\d+))?")
_INNERMOST = re.compile(r"\{([^{}]*)\}")


class Shard(NamedTuple):
    """One tar file."""

    url: str
    """Path, or a URL that webdataset opens."""
    num_samples: int
    first: int
    """Index of its first sample in the data set."""
    label: str
    """What tells it from the others: its name, or of several with that name the whole URL."""

    @property
    def name(self) -> str:
        """The file's name, without its folder."""
        return _name(self.url)

    @property
    def num_bytes(self) -> int:
        """Size of the file; 0 for one that is not on this machine."""
        return Path(self.url).stat().st_size if is_local(self.url) else 0


class Shards:
    """A data set's shards; its length is the number of their samples."""

    def __init__(self, urls: Sequence[str], counts: Sequence[int]) -> None:
        *firsts, self._num_samples = accumulate(counts, initial=0)
        self.shards = [Shard(*fields) for fields in zip(urls, counts, firsts, _labels(urls), strict=True)]

    def __len__(self) -> int:
        return self._num_samples

    def describe(self, index: int) -> str:
        """Say which sample of which shard a sample of the data set is."""
        shard = next(shard for shard in reversed(self.shards) if shard.first <= index)
        return f"{shard.label} (sample {index - shard.first})"


def is_shards(data_dir: str | Path) -> bool:
    """Tell whether this names tar files: `path/{00000..00099}.tar`, a single one, or several such with `::` between.

    Raises:
        ValueError: it names more files than a data set has.
    """
    return any(map(_is_tar, _sources(str(data_dir))))


def folder_of(data_dir: str) -> Path:
    """Return the folder that all of the shards lie in: of `a/x.tar::a/b/{0..9}.tar` it is a."""
    before_braces = (source.partition("{")[0] for source in _sources(data_dir))
    return Path(os.path.commonpath([os.path.realpath(os.path.dirname(source)) for source in before_braces]))  # noqa: PTH120


def _is_tar(source: str) -> bool:
    try:
        first = next(iter(braceexpand(source)))
    except ValueError:  # braces that do not close: a path like any other
        return False
    # the first of path/{00..99}.tar stands for all; of a URL any part may name it: pipe:curl https://x/00.tar?key=1
    found = re.search(rf"{_TAR}\Z", first) if is_local(first) else _SHARD_NAME.search(first)
    return found is not None and not Path(first).is_dir()


def open_shards(data_dir: str, *, may_run_commands: bool = False) -> Shards:
    """Find the shards that braces name, and how many samples each holds.

    One of several ranks should come first: the others find its counts in the index.

    Args:
        data_dir: as `path/{00000..00099}.tar`.
        may_run_commands: a `pipe:` address may be in it, whose command is run by the shell.

    Raises:
        FileNotFoundError: some of them are missing.
        ValueError: one of them is named twice, or remote shards have no index.
        OSError: one of them cannot be read.
    """
    urls = _expand(data_dir, may_run_commands=may_run_commands)
    return Shards(urls, _counts(urls))


def read_rows(data_dir: str, *, caption_key: str | None = None) -> tuple[Rows, Issues]:
    """Read shards as an index is read: paths of the images, captions; and what is wrong with single samples.

    Raises:
        ValueError: shards that are not files of this machine.
        FileNotFoundError: some of them are missing.
        OSError: one of them cannot be read.
    """
    urls = _expand(data_dir, may_run_commands=False)
    remote = [url for url in urls if not is_local(url)]
    if remote:
        raise ValueError(f"{remote[0]}: remote shards are only for training; copy them to this machine")
    _check_files(urls)
    rows, issues = RowBuffer(), Issues()
    for url, label in zip(progress_bar(urls, desc="shards"), _labels(urls), strict=True):
        for sample in read_samples(os.path.realpath(url), by_path=True, caption_key=caption_key):
            try:
                rows.append(str(sample.image()), sample.captions(caption_key), split=None, group=None, number=0)
            except ValueError as error:
                issues.add(Issue(str(error), image=f"{label}/{sample.key}"))
    return rows.rows(""), issues


def write_shards(
    images: Iterable[tuple[str, Sequence[str]]], folder: Path, *, shard_size: int
) -> tuple[Shards, list[Issue]]:
    """Write images with their captions as shards `00000.tar`, `00001.tar`, ..., the same bytes each time.

    The images' files go in as they are; captions as `.json` (`{"captions": [...]}`) and as `.txt`, one a line. A shard
    has its name once it is whole, and the index comes last.

    Args:
        images: path and captions of each image, in the order of the shards.
        folder: made if it is not there.
        shard_size: samples a shard.

    Returns:
        The shards, and why some images are not in them.

    Raises:
        ValueError: the folder holds tar files already, or none of the images can be read.
    """
    _refuse_unfinished(folder)
    if any(folder.glob("*.tar")):
        raise ValueError(f"{folder} holds tar files already: name another folder, or delete them")
    issues: list[Issue] = []
    samples = _to_write(images, issues)
    counts: dict[str, int] = {}
    with _all_or_none(folder, counts):
        while (first := next(samples, None)) is not None:
            path = folder / f"{len(counts):05}.tar"
            counts[str(path)] = 0
            counts[str(path)] = _write_shard(chain([first], islice(samples, shard_size - 1)), path)
        if not counts:
            raise ValueError(f"no image can be read: {first_few(issues)}")
        _write_index(folder / INDEX_NAME, {_name(path): _record(path, n) for path, n in counts.items()})
    return Shards(list(counts), list(counts.values())), issues


@contextmanager
def _all_or_none(folder: Path, paths: Iterable[str]) -> Iterator[None]:
    """Mark a folder as unfinished within the block; if it raises, delete the files that `paths` then gives."""
    folder.mkdir(parents=True, exist_ok=True)
    marker = folder / UNFINISHED
    marker.touch(exist_ok=False)  # it fails where another process has just begun
    try:
        yield
    except BaseException:  # a signal above all
        for path in map(Path, paths):
            path.unlink(missing_ok=True)
        (folder / INDEX_NAME).unlink(missing_ok=True)
        marker.unlink(missing_ok=True)
        with suppress(OSError):  # it holds something of the user's
            folder.rmdir()
        raise
    marker.unlink()


def _refuse_unfinished(folder: Path) -> None:
    if (folder / UNFINISHED).exists():
        raise ValueError(
            f"{folder} holds shards that are being written, or were not finished: wait, or delete the folder and write "
            "them once more"
        )


def _to_write(images: Iterable[tuple[str, Sequence[str]]], issues: list[Issue]) -> Iterator[dict[str, Any]]:
    """Yield samples in the form of webdataset's writer; note the images that are none."""
    index = 0
    for path, captions in images:
        try:
            content = read_bytes(path)
            found = image_format(content)
        except (OSError, ValueError) as error:
            issues.append(image_issue(path, error))
            continue
        suffix = Path(path).suffix.lower()
        ending = suffix.removeprefix(".") if suffix in IMAGE_ENDINGS else found
        lines = "\n".join(" ".join(caption.split("\n")) for caption in captions)
        texts = {"json": json.dumps({"captions": list(captions)}, ensure_ascii=False).encode(), "txt": lines.encode()}
        yield {"__key__": f"{index:09}", ending: content, **texts}
        index += 1


def _write_shard(samples: Iterable[dict[str, Any]], path: Path) -> int:
    num_samples = 0
    # no time, no user: equal samples are equal bytes
    with atomic_writer(path) as file, TarWriter(file, encoder=False, mtime=0, user="", group="") as writer:
        for sample in samples:
            writer.write(sample)
            num_samples += 1
    return num_samples


def _name(url: str) -> str:
    match = None if is_local(url) else _SHARD_NAME.search(url)
    return Path(url).name if match is None else match[0]


def _labels(urls: Sequence[str]) -> list[str]:
    num_of = Counter(map(_name, urls))
    return [name if num_of[name := _name(url)] == 1 else url for url in urls]


def _index_beside(url: str) -> str:
    return str(Path(url).with_name(INDEX_NAME)) if is_local(url) else _SHARD_NAME.sub(INDEX_NAME, url)


def _expand(data_dir: str, *, may_run_commands: bool) -> list[str]:
    urls = [url for source in _sources(data_dir) for url in braceexpand(source)]
    # asked of each one, since braces may hide it: {a.tar,{p}ipe:command .tar}
    command = None if may_run_commands else next((url for url in urls if urlparse(url).scheme == "pipe"), None)
    if command is not None:
        raise ValueError(
            f"{shorten(command)} would run a command. Commands are run only if --data_dir gives them on the command "
            "line of this very run: none from a config file, a checkpoint or other data, and none as a validation set"
        )
    odd = next((url for url in urls if urlparse(url).scheme not in {"", "file", "pipe"} and _SHELL.search(url)), None)
    if odd is not None:
        raise ValueError(f"{shorten(odd)}: a URL holds no spaces, quotes or backslashes; write them as %20, %27, ...")
    if len(set(urls)) < len(urls):
        [(twice, _)] = Counter(urls).most_common(1)
        raise ValueError(f"{data_dir}: {twice} is named twice")
    known = {"", "file", *gopen_schemes}
    foreign = next((url for url in urls if urlparse(url).scheme not in known), None)
    if foreign is not None:
        raise ValueError(
            f"{foreign}: webdataset cannot open {urlparse(foreign).scheme}: URLs; try a command that prints the file: "
            f"'pipe:COMMAND {foreign}'"
        )
    return urls


def _sources(pattern: str) -> list[str]:
    """Return what `::` joins, as `a.tar::b/{00..99}.tar`; a file of such a name is itself, and `[::1]` an address.

    Raises:
        ValueError: their braces name too many shards, which is found before they are expanded.
    """
    sources = [pattern] if os.path.exists(pattern) else _JOINED.split(pattern)  # noqa: PTH110  (never an error)
    if sum(map(_num_expansions, sources)) > MAX_SHARDS:
        raise ValueError(f"{shorten(pattern)}: its braces name more than {MAX_SHARDS:,} shards, which is the limit")
    return sources


def _num_expansions(pattern: str) -> int:
    """Count what braces name, the innermost first: `{a,b{0..9}}` becomes `{a,b<10>}`, which becomes `<11>`.

    It counts no further than a little over `MAX_SHARDS`.
    """
    text = re.sub(r"\\.", "", pattern.replace("\0", ""), flags=re.DOTALL)
    for _ in range(MAX_NESTING):
        text, num_replaced = _INNERMOST.subn(lambda braces: f"\0{_num_alternatives(braces[1])}\0", text)
        if not num_replaced:
            return _num_combinations(text)
    raise ValueError(f"{shorten(pattern)}: its braces are nested more than {MAX_NESTING} deep")


def _num_alternatives(inside: str) -> int:
    """Count what one pair of braces stands for; within it, `<10>` stands for ten."""
    if match := _RANGE.fullmatch(inside):
        first, last = (ord(end) if end.isalpha() else int(end[:19]) for end in match.groups()[:2])
        return min(abs(last - first) // max(int((match[3] or "1")[:19]), 1), MAX_SHARDS) + 1
    if "," not in inside:
        return _num_combinations(inside)
    return min(sum(map(_num_combinations, inside.split(","))), MAX_SHARDS + 1)


def _num_combinations(text: str) -> int:
    return min(math.prod(map(int, re.findall("\0(\\d+)\0", text))), MAX_SHARDS + 1)


def _check_files(urls: Sequence[str]) -> None:
    for folder in {os.path.dirname(url) for url in urls}:  # noqa: PTH120  (of a million shards)
        _refuse_unfinished(Path(folder))
    missing = [url for url in urls if not Path(url).is_file()]
    if missing:
        raise FileNotFoundError(f"missing {len(missing)} of {count(len(urls), 'shard')} (first: {missing[0]})")


def _counts(urls: Sequence[str]) -> list[int]:
    found: dict[str, int] = {}
    _check_files([url for url in urls if is_local(url)])
    with progress_bar(total=len(urls), desc="count samples", unit="shard") as bar:
        for index, group in groupby(urls, key=_index_beside):
            found |= _counts_beside(index, list(group), bar)
    return [found[url] for url in urls]


def _counts_beside(index: str, urls: Sequence[str], bar: Any) -> dict[str, int]:
    """Return how many samples each of the shards beside one index holds; what it does not say is counted and added."""
    if not is_local(index):
        records = _records(_fetch_index(index, urls[0]), index)
        missing = [url for url in urls if _name(url) not in records]
        if missing:
            found = len(urls) - len(missing)
            raise ValueError(f"{index} lists {found} of {count(len(urls), 'shard')} (missing: {missing[0]})")
        return {url: records[_name(url)]["nsamples"] for url in urls}
    path = Path(index)
    records = _records(read_json_object(path), index) if path.is_file() else {}
    new: dict[str, Any] = {}
    for url in urls:
        known = records.get(_name(url), {})
        # new, or written again since: a shard of the same size and time is not read to be counted
        said = known.get("filesize"), known.get("mtime_ns"), known.get("counted_by")
        if said != (*file_stamp(url)[:2], COUNTED_BY):
            new[_name(url)] = _record(url, count_samples(url))
        bar.update()
    if new:
        logger.info("%s: counted the samples of %s", path.parent, count(len(new), "shard"))
        try:
            _write_index(path, records | new)
        except OSError as error:
            logger.info("%s: cannot save the counts, so the next run counts again: %s", path, error)
    return {url: (records | new)[_name(url)]["nsamples"] for url in urls}


def _fetch_index(index: str, url: str) -> Any:
    try:
        with gopen(index) as stream:
            return json.loads(stream.read())
    except (OSError, ValueError) as error:
        raise ValueError(
            f"{url}: the number of samples of remote shards is read from {INDEX_NAME} beside them, "
            f"but {index} cannot be read: {error}"
        ) from None


def _records(index: Any, url: str) -> dict[str, dict[str, Any]]:
    """Return the records of webdataset's index by the shards' names."""
    try:
        return {_name(record["url"]): {**record, "nsamples": int(record["nsamples"])} for record in index["shardlist"]}
    except (TypeError, KeyError, ValueError):
        raise ValueError(f"{url} is not an index of shards: delete it, and the samples are counted again") from None


def _record(path: str, num_samples: int) -> dict[str, Any]:
    size, changed, *_ = file_stamp(path)
    facts = {"filesize": size, "mtime_ns": changed, "counted_by": COUNTED_BY}
    return {"url": _name(path), "nsamples": num_samples, **facts}


def _write_index(path: Path, records: dict[str, dict[str, Any]]) -> None:
    shards = [records[name] for name in sorted(records)]
    write_json(path, {"__kind__": INDEX_KIND, "wids_version": 1, "shardlist": shards})
