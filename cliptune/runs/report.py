"""The report of a run, at its end: what goes wrong in writing it takes nothing from the run."""

from __future__ import annotations

import logging
import shlex
from pathlib import Path

from cliptune.report.page import write_report
from cliptune.runtime.messages import one_line, printable

logger = logging.getLogger("train")


def leave_report(results_path: Path, kind: str, *, language: str = "en") -> Path | None:
    """Write the page of a run beside its results; what fails is a warning with the command that makes it again.

    Args:
        results_path: of the run.
        kind: `full`, `no-images` or `none`.
        language: of the page.

    Returns:
        The page; None: there is none.
    """
    if kind == "none":
        return None
    try:
        return write_report(results_path, images=kind == "full", language=language)
    except Exception as error:  # whatever it is: the run is done, and its results are written
        command = f"python visualization.py --report {kind} --results {shlex.quote(str(results_path))}"
        logger.warning("no report was written: %s; %s makes it", one_line(error), printable(command))
        return None
