"""Log lines and progress bars, neither of which disturbs the other."""

from __future__ import annotations

import logging
import os
import sys
from contextlib import suppress
from logging.handlers import WatchedFileHandler
from pathlib import Path
from typing import Any

from tqdm import tqdm

from cliptune.runtime.distributed import is_main
from cliptune.runtime.messages import message_line, one_line

SHOWN_BY_BAR = {"shown_by_bar": True}
"""`extra` of a log line that says what a progress bar shows as well: on a terminal it goes to the log file alone."""


def progress_bar(*arguments: Any, **options: Any) -> Any:
    """Show progress on a terminal, in the main rank."""
    options = {"leave": False, "disable": None if is_main() else True, **options}
    return tqdm(*arguments, **options)


def setup_logging(level: str, log_path: Path | None = None) -> None:
    """Send log lines to stderr and, if given, to a text file; of several ranks all but the first only warn.

    A message is one line, with what it quotes from files escaped and cut: no name writes a line of its own.
    """
    handlers: list[logging.Handler] = [_StderrHandler(sys.stderr)]
    rank = os.environ.get("RANK", "0")
    prefix = "" if rank == "0" else f"rank {rank}: "
    handlers[0].setFormatter(_Formatter(prefix + ("%(name)s: " if level == "debug" else "") + "%(message)s"))
    if prefix and level == "info":
        level = "warning"
    if log_path is not None:
        log_path.parent.mkdir(parents=True, exist_ok=True)
        # file names need not be UTF-8
        file_handler = _LogFile(log_path, encoding="utf-8", errors="backslashreplace")
        file_handler.setFormatter(_Formatter("%(asctime)s %(levelname)s %(name)s: %(message)s"))
        handlers.append(file_handler)
    logging.basicConfig(level=level.upper(), handlers=handlers, force=True)
    for noisy in ("matplotlib", "PIL"):
        logging.getLogger(noisy).setLevel(logging.WARNING)
    logging.captureWarnings(True)


def reopen_log_file() -> None:
    """Go on in a log file that is made anew, if somebody has removed the one that is written to."""
    for handler in logging.getLogger().handlers:
        if isinstance(handler, _LogFile):
            Path(handler.baseFilename).parent.mkdir(parents=True, exist_ok=True)
            handler.reopenIfNeeded()


class _Formatter(logging.Formatter):
    """Makes one printable line of each message."""

    def formatMessage(self, record: logging.LogRecord) -> str:  # noqa: N802
        if record.name == "py.warnings":  # "file:12: UserWarning: ...", then the line of code that warned
            record.message = " ".join(record.message.split())
        record.message = message_line(record.message)
        return super().formatMessage(record)

    def formatException(self, ei: Any) -> str:  # noqa: N802
        # set in, so that a line end in a file's name begins no line of the log
        return "\n".join(f"  {message_line(line)}" for line in super().formatException(ei).splitlines())


class _LogFile(WatchedFileHandler):
    """Goes on without the file once it cannot be written, and says so."""

    failed = False

    def close(self) -> None:
        with suppress(OSError):
            super().close()

    def emit(self, record: logging.LogRecord) -> None:
        # not as its parent does, which looks for the file before each line, and fails without its folder
        try:
            logging.FileHandler.emit(self, record)
        except OSError:  # a file that had been closed cannot be opened again
            self.handleError(record)

    def handleError(self, record: logging.LogRecord) -> None:  # noqa: N802
        error = sys.exc_info()[1]
        if not isinstance(error, OSError):
            super().handleError(record)
        elif not self.failed:
            self.failed = True
            print(f"{message_line(self.baseFilename)} cannot be written: {one_line(error)}", file=sys.stderr)


class _StderrHandler(logging.StreamHandler[Any]):
    """Clears the progress bars of a terminal before a line, and draws them again below it."""

    def __init__(self, stream: Any) -> None:
        super().__init__(stream)
        self._process = os.getpid()
        if stream.isatty():
            self.addFilter(lambda record: not getattr(record, "shown_by_bar", False))

    def emit(self, record: logging.LogRecord) -> None:
        if os.getpid() != self._process:  # a worker, forked with a copy of the bars and of whoever held their lock
            super().emit(record)
            return
        with tqdm.external_write_mode(file=self.stream):
            super().emit(record)
