"""One run at a time in a folder, also where the file system has no locks."""

from __future__ import annotations

import errno
import logging
import os
import platform
import threading
import time
import uuid
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

from filelock import FileLock, Timeout

from cliptune.runtime.files import read_json_object, write_json
from cliptune.runtime.messages import count, shown

try:
    import fcntl
except ImportError:  # Windows
    fcntl = None  # type: ignore[assignment]

logger = logging.getLogger(__name__)

LOCK_NAME = ".lock"
MARKER_NAME = ".lock.json"
"""Says which process is in the folder; another file than the lock, since whoever deletes that one leaves this."""
NO_LOCKS = {errno.ENOLCK, errno.ENOSYS, errno.EOPNOTSUPP, errno.ENOTSUP, errno.EINVAL}
TOUCH_SECONDS = 15.0
GONE_SECONDS = 120.0
"""A marker of another machine that was not touched for so long is of a run that was killed."""
CONFIRM_SECONDS = 0.5
MAX_MARKER_BYTES = 10_000


@contextmanager
def exclusive(folder: Path) -> Iterator[None]:
    """Keep other runs out of a folder, which is made if it is missing.

    The system's lock, which it frees when the process ends, however it does, decides where there is one. Beside it a
    marker says which process holds it, for the case that the lock file is deleted, or that the file system has no
    locks: then a warning says so, and the marker of a process that lives keeps others out. No marker does for good.

    Raises:
        ValueError: another run is there; says how to go on.
    """
    folder.mkdir(parents=True, exist_ok=True)
    with _system_lock(folder) as lock_file:
        marker = _Marker(folder, lock_file)
        marker.take()
        try:
            yield
        finally:
            marker.release()


@contextmanager
def _system_lock(folder: Path) -> Iterator[int | None]:
    """Hold the system's lock; yields the inode of its file, None if the file system has no locks."""
    path = folder / LOCK_NAME
    if (reason := missing_locks(path)) is not None:
        logger.warning(
            "the file system of %s has no locks (%s), so runs are not surely kept apart: start no other one there",
            folder, reason,
        )  # fmt: skip
        yield None
        return
    lock = FileLock(path)
    try:
        lock.acquire(blocking=False)
    except Timeout:
        raise _busy(folder) from None
    try:
        yield path.stat().st_ino
    finally:
        lock.release()


def missing_locks(path: Path) -> str | None:
    """Return why the file system has no locks; None if it has.

    filelock would go on with a marker of its own, which locks others out for good once its process is killed.
    """
    if fcntl is None:
        return None
    descriptor = os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o644)
    try:
        # shared and at once free again: of two that start together, the last to come here gets the lock
        fcntl.flock(descriptor, fcntl.LOCK_SH | fcntl.LOCK_NB)
    except OSError as error:
        if error.errno in NO_LOCKS:
            return error.strerror or str(error)
        if error.errno not in {errno.EAGAIN, errno.EACCES}:
            raise
    finally:
        os.close(descriptor)
    return None


class _Marker:
    """The file that says which process is in a folder, touched by a thread as long as it is."""

    def __init__(self, folder: Path, lock_file: int | None) -> None:
        self.path, self.lock_file = folder / MARKER_NAME, lock_file
        self.own = {**_this_process(), "lock_file": lock_file, "token": uuid.uuid4().hex}
        self._ended = threading.Event()
        self._thread = threading.Thread(target=self._keep_touched, name="marker", daemon=True)

    def take(self) -> None:
        """Write the marker, unless the one that is there is of a run that lives."""
        self._refuse_living()
        write_json(self.path, self.own)
        if self.lock_file is None:
            # of two that found the folder free at the same moment, the later one has overwritten the other's marker
            time.sleep(CONFIRM_SECONDS)
            if self._read() != self.own:
                raise _busy(self.path.parent)
        self._thread.start()

    def release(self) -> None:
        """Remove the marker, if it is still this run's."""
        self._ended.set()
        self._thread.join(timeout=5)  # a file server may not answer
        with suppress(OSError):
            if self._read() == self.own:
                self.path.unlink()

    def _refuse_living(self) -> None:
        owner = self._read()
        # who held the lock of this very file is gone, since this process holds it now
        if owner is None or (self.lock_file is not None and owner.get("lock_file") == self.lock_file):
            return
        this, way_out = _this_process(), f"If there is none, delete {self.path}"
        if all(owner.get(key) == this[key] for key in ("host", "boot")):
            if _lives(owner.get("pid"), owner.get("seconds_after_boot")):
                raise _busy(self.path.parent, f" (process {owner['pid']})", way_out)
            return
        age = self._seconds_since_touched()
        if age < GONE_SECONDS:
            host = shown(owner.get("host", "another machine"), 100)
            who = f" on {host} (it was there {count(round(age), 'second')} ago)"
            left = count(round(GONE_SECONDS - age), "second")
            raise _busy(self.path.parent, who, f"If it was killed, the folder is free in {left}. {way_out}")

    def _seconds_since_touched(self) -> float:
        # both times are the file server's, whose clock need not be this machine's
        lock = self.path.with_name(LOCK_NAME)
        lock.touch()
        return abs(lock.stat().st_mtime - self.path.stat().st_mtime)

    def _read(self) -> dict[str, Any] | None:
        """Return what the marker says; nothing of a damaged one, None if there is none."""
        try:
            if not self.path.is_file() or self.path.stat().st_size > MAX_MARKER_BYTES:
                return {} if self.path.exists() else None
            return read_json_object(self.path)
        except FileNotFoundError:
            return None
        except ValueError:
            return {}

    def _keep_touched(self) -> None:
        while not self._ended.wait(TOUCH_SECONDS):
            with suppress(OSError):  # a file server that does not answer for a while
                if (owner := self._read()) == self.own:
                    os.utime(self.path)
                elif not owner and self.path.parent.is_dir():  # deleted, maybe with all that was in the folder
                    write_json(self.path, self.own)
                elif owner:
                    logger.warning("another run has begun in %s: the two overwrite each other", self.path.parent)
                    return


def _busy(folder: Path, who: str = "", way_out: str = "") -> ValueError:
    message = f"another run is writing to {folder}{who}: wait until it ends, or choose another --output_dir"
    return ValueError(f"{message}. {way_out}" if way_out else message)


def _this_process() -> dict[str, Any]:
    """Return what tells this process from all others, also from those that get its number later."""
    boot = ""
    with suppress(OSError):  # Linux: two containers may have one host name, and each a process 1
        boot = Path("/proc/sys/kernel/random/boot_id").read_text(encoding="ascii").strip()
        boot += f" {Path('/proc/self/ns/pid').readlink()}"
    pid = os.getpid()
    return {"host": platform.node(), "boot": boot, "pid": pid, "seconds_after_boot": _seconds_after_boot(pid)}


def _seconds_after_boot(pid: int) -> float:
    import psutil  # noqa: PLC0415  (reads /proc when it is imported)

    # not the time of the day, which changes for all processes when the clock is set
    return float(psutil.Process(pid).create_time() - psutil.boot_time())


def _lives(pid: Any, seconds_after_boot: Any) -> bool:
    import psutil  # noqa: PLC0415

    if not isinstance(pid, int):  # psutil takes None for this process
        return False
    try:
        same = abs(_seconds_after_boot(pid) - seconds_after_boot) < 2
        return bool(same and psutil.Process(pid).status() != psutil.STATUS_ZOMBIE)
    except psutil.AccessDenied:
        return True
    except (psutil.Error, TypeError, ValueError, OverflowError):  # no such process, or no marker of ours
        return False
