"""Log lines and progress bars."""

from __future__ import annotations

import logging
import os
import sys
from pathlib import Path
from typing import Any

from tqdm import tqdm

from cliptune.runtime.distributed import is_main


def progress_bar(*arguments: Any, **options: Any) -> Any:
    """Show progress on a terminal, in the main process."""
    return tqdm(*arguments, leave=False, disable=None if is_main() else True, **options)


def setup_logging(level: str, log_path: Path | None = None) -> None:
    """Send log lines to stderr and, if given, to a text file; of several processes all but the first only warn."""
    handlers: list[logging.Handler] = [logging.StreamHandler(sys.stderr)]
    rank = os.environ.get("RANK", "0")
    process = "" if rank == "0" else f"process {rank}: "
    handlers[0].setFormatter(logging.Formatter(process + ("%(name)s: " if level == "debug" else "") + "%(message)s"))
    if process and level == "info":
        level = "warning"
    if log_path is not None:
        log_path.parent.mkdir(parents=True, exist_ok=True)
        # names of files may be no UTF-8
        file_handler = logging.FileHandler(log_path, encoding="utf-8", errors="backslashreplace")
        file_handler.setFormatter(logging.Formatter("%(asctime)s %(levelname)s %(name)s: %(message)s"))
        handlers.append(file_handler)
    logging.basicConfig(level=level.upper(), handlers=handlers, force=True)
    for noisy in ("matplotlib", "PIL"):
        logging.getLogger(noisy).setLevel(logging.WARNING)
    logging.captureWarnings(True)
