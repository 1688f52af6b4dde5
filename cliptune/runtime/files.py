"""Files that a reader sees whole or not at all, and room for them on the disk."""

from __future__ import annotations

import errno
import json
import logging
import os
import re
import shutil
import time
import uuid
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from stat import S_ISREG
from typing import Any, BinaryIO

from cliptune.runtime.messages import shorten

logger = logging.getLogger(__name__)

TEMPORARY_SUFFIX = ".cliptune.tmp"
"""Of a file that is being written. Its name starts with a dot, so patterns such as `*.pth` do not find it."""
TEMPORARY_NAME = re.compile(r"\..+\.[0-9a-f]{32}" + re.escape(TEMPORARY_SUFFIX), re.DOTALL)
FULL = {errno.ENOSPC, errno.EDQUOT, errno.EFBIG}
NO_SYNC = {errno.EINVAL, errno.ENOSYS, errno.ENOTSUP, errno.EOPNOTSUPP}
"""Errors of file systems that cannot bring a file to the disk when asked to, and do so later."""


@contextmanager
def atomic_writer(path: Path) -> Iterator[BinaryIO]:
    """Write a binary file under a temporary name; once it is whole and on the disk it takes the name `path`.

    A reader sees the old file or the new one, never a part, and so does whoever looks after a crash: first the content
    goes to the disk, then the name. If the block raises, the file that was there is untouched.

    Args:
        path: of the file; its folder is made if it is missing.

    Raises:
        OSError: it cannot be written.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = _temporary(path)
    try:
        with temporary.open("wb") as file:
            yield file
            file.flush()
            _sync(file.fileno(), path)
        temporary.replace(path)
        _sync_folder(path.parent)
    except OSError as error:
        if error.errno not in FULL or error.filename is not None:
            raise
        raise OSError(error.errno, error.strerror, str(path)) from error  # the system does not say which file
    finally:
        temporary.unlink(missing_ok=True)


def has_link(source: Path, path: Path) -> bool:
    """Give a file a second name, which another file may have had; tell whether this disk takes one."""
    temporary = _temporary(path)
    try:
        temporary.hardlink_to(source)
        temporary.replace(path)
    except OSError:
        return False
    finally:
        temporary.unlink(missing_ok=True)  # renaming a file to its own other name does nothing
    return True


def write_text(path: Path, text: str) -> None:
    """Write a UTF-8 text file as `atomic_writer` does; what is not Unicode in it is escaped."""
    with atomic_writer(path) as file:
        file.write(text.encode("utf-8", "backslashreplace"))


def write_json(path: Path, values: Any) -> None:
    """Write a JSON file as `atomic_writer` does."""
    write_text(path, json.dumps(values, indent=1) + "\n")


def require_free_space(folder: Path, num_bytes: int, *, what: str, way_out: str) -> None:
    """Refuse to begin what the disk has no room for.

    Args:
        folder: on the disk in question; it must exist.
        num_bytes: needed.
        what: what would be written, the subject of the message.
        way_out: what to do instead.

    Raises:
        OSError: there is less; says how much is needed, how much is free and the way out.
    """
    free = shutil.disk_usage(folder).free
    if free < num_bytes:
        raise OSError(
            f"no room for {what}: it needs {num_bytes / 1e9:.2f} GB, and {free / 1e9:.2f} GB are free in {folder}. "
            f"{way_out}"
        )


def read_json_object(path: Path) -> dict[str, Any]:
    """Read a JSON file that must hold an object.

    Raises:
        ValueError: it does not, naming the file, line and column; or one of its objects has a key twice.
    """
    try:
        values = json.loads(path.read_text(encoding="utf-8-sig"), object_pairs_hook=_without_twins)
    except json.JSONDecodeError as error:
        raise ValueError(f"{path}: not valid JSON at line {error.lineno}, column {error.colno}: {error.msg}") from None
    except (ValueError, RecursionError) as error:  # not UTF-8, a number of thousands of digits, endless nesting
        raise ValueError(f"{path}: not valid JSON: {error}") from None
    if not isinstance(values, dict):
        raise ValueError(f"{path}: expected a JSON object, found {type(values).__name__}")
    return values


def _temporary(path: Path) -> Path:
    # the random part keeps two writers of the same file apart, also on two machines
    return path.with_name(f".{path.name}.{uuid.uuid4().hex}{TEMPORARY_SUFFIX}")


def remove_partial_files(folder: Path, *, older_than: float = 0.0) -> None:
    """Delete what `atomic_writer` has left in a folder, of processes that were killed while they wrote; no other file.

    Args:
        folder: it need not exist.
        older_than: seconds; what was written since then stays, since another process may still write it.
    """
    for path in folder.glob(f".*{TEMPORARY_SUFFIX}"):
        if TEMPORARY_NAME.fullmatch(path.name) is None:
            continue
        try:
            if time.time() - path.lstat().st_mtime >= older_than:
                path.unlink()
        except FileNotFoundError:  # it has its name now
            continue
        except OSError as error:
            logger.warning("a partial file cannot be deleted: %s", error)


def size_on_disk(*paths: Path) -> int:
    """Return the bytes that files, and all files of folders, hold; one with several names counts once."""
    inside = [Path(root) / name for path in paths for root, _, names in os.walk(path) for name in names]
    sizes = {}
    for path in (*paths, *inside):
        with suppress(FileNotFoundError):
            info = path.stat()
            if S_ISREG(info.st_mode):
                sizes[info.st_dev, info.st_ino] = info.st_size
    return sum(sizes.values())


def _sync(descriptor: int, path: Path) -> None:
    """Bring a file's content to the disk, where the file system can; an input/output error is raised."""
    try:
        os.fsync(descriptor)
    except OSError as error:
        if error.errno not in NO_SYNC:
            raise OSError(error.errno, error.strerror, str(path)) from error


def _without_twins(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    """Make an object of its keys and values; JSON itself would take the last of equal keys without a word."""
    values = dict(pairs)
    if len(values) < len(pairs):
        twice = next(key for key, number in Counter(key for key, _ in pairs).items() if number > 1)
        raise ValueError(f"the key {shorten(twice)!r} occurs twice in one object; keep one of them")
    return values


def _sync_folder(folder: Path) -> None:
    """Bring a new name to the disk, where the system can."""
    if os.name != "posix":
        return
    try:
        descriptor = os.open(folder, os.O_RDONLY)
    except OSError:  # it may be written, but not read
        return
    try:
        _sync(descriptor, folder)
    except OSError as error:
        if error.errno in {errno.EIO, *FULL}:  # others: network file systems that cannot
            raise
    finally:
        os.close(descriptor)
