"""Standard streams that end no run: closed ones, those that nobody reads any more, those that cannot show a name."""

from __future__ import annotations

import errno
import io
import os
import sys
from typing import Any

_NOBODY_READS = {errno.EPIPE, errno.EIO}  # a pipe whose reader ended, a terminal that was closed


def name_all_files() -> None:
    """Start this script anew if Python cannot name files outside ASCII (`LC_ALL=C`); what it prints stays ASCII."""
    if sys.getfilesystemencoding().lower() in {"ascii", "us-ascii", "ansi_x3.4-1968"}:
        os.environ.setdefault("PYTHONIOENCODING", "ascii:backslashreplace")
        os.execv(sys.executable, [sys.executable, "-X", "utf8", *sys.orig_argv[1:]])


def open_streams() -> None:
    """Open standard streams that are closed (`2>&-`, cron) on nothing, and let go of readers that leave (`| head`).

    What a stream cannot show, such as a file's name, it shows escaped. A stream that somebody has replaced, as a
    notebook does, stays theirs.
    """
    for descriptor in range(3):  # in order: the system hands out the lowest free number, later to a file of the run
        try:
            os.fstat(descriptor)
        except OSError:
            os.set_inheritable(os.open(os.devnull, os.O_RDWR), True)
    if sys.stdin is None:
        sys.stdin = open(0, closefd=False, encoding="utf-8")  # noqa: SIM115
    for name, descriptor in (("stdout", 1), ("stderr", 2)):
        stream: Any = getattr(sys, name)
        if stream is None or _is_plain(stream, descriptor):
            setattr(sys, name, _outlet(descriptor, stream))
        elif isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="backslashreplace")


def _is_plain(stream: Any, descriptor: int) -> bool:
    """Tell whether a stream is as Python opened it."""
    if type(stream) is not io.TextIOWrapper or stream.closed:
        return False
    return stream.fileno() == descriptor and not isinstance(getattr(stream.buffer, "raw", None), _Outlet)


def _outlet(descriptor: int, like: io.TextIOWrapper | None) -> io.TextIOWrapper:
    if like is not None:
        like.flush()
    return io.TextIOWrapper(
        io.BufferedWriter(_Outlet(descriptor, "w", closefd=False)),
        encoding="utf-8" if like is None else like.encoding,
        errors="backslashreplace",
        line_buffering=descriptor == 2 or (like is not None and (like.line_buffering or like.write_through)),
    )


class _Outlet(io.FileIO):
    """A descriptor that leads nowhere once writing to it has failed, so that nothing fails again at exit."""

    def write(self, data: Any, /) -> int:
        try:
            return super().write(data)
        except OSError as error:
            nowhere = os.open(os.devnull, os.O_WRONLY)
            os.dup2(nowhere, self.fileno())  # for what else holds the descriptor, such as a library in C, too
            os.close(nowhere)
            if error.errno not in _NOBODY_READS:  # a full disk, say
                what = "standard output" if self.fileno() == 1 else "standard error"
                raise OSError(error.errno, error.strerror, what) from None
            return len(data)
