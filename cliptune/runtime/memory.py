"""Errors that say that memory ran out, whoever raised them; nothing slow is imported here."""

from __future__ import annotations

import errno
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from types import TracebackType

from cliptune.runtime.messages import one_line

SMALL_ADDRESS_SPACE = 6 * 2**30
"""Bytes; the imports take about 4 GB of addresses with PyTorch's CUDA libraries, most of them never touched."""

_SIGNS = (
    "can't allocate memory",  # PyTorch
    "annot allocate memory",  # the system, within another error's text
    "unable to mmap",
    "failed to map segment",  # the loader of shared libraries
    "find/load shared object file",  # llvmlite, of the same
    "can't start new thread",
    "std::bad_alloc",
)


def says_out_of_memory(error: BaseException) -> bool:
    """Tell whether an error says that this process got no more memory."""
    if isinstance(error, MemoryError) or (isinstance(error, OSError) and error.errno == errno.ENOMEM):
        return True
    return isinstance(error, RuntimeError | ImportError | OSError) and any(sign in str(error) for sign in _SIGNS)


def out_of_memory(error: BaseException) -> str:
    """Say it in one line, with the way out unless the error names one."""
    message = one_line(error)
    if isinstance(error, MemoryError) and str(error):
        return message
    reason = "" if isinstance(error, MemoryError) else f" ({message})"
    return f"not enough memory{reason}: end other programs, raise ulimit -v or -u, or use a machine with more"


def try_imports() -> int:
    """Import this stage in a process of its own where the system allows little memory: libraries abort without a word.

    Returns:
        0, a stage's exit code.

    Raises:
        MemoryError: it does not fit.
    """
    limit = _address_space()
    if limit is None or limit > SMALL_ADDRESS_SPACE:
        return 0
    code = f"import sys; sys.path[:] = {sys.path!r}; import {Path(sys.argv[0]).stem}"
    try:
        done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
        # what else may be wrong will be told by this process itself
        fits = done.returncode >= 0 and not any(sign in done.stderr for sign in (*_SIGNS, "MemoryError"))
    except OSError:
        fits = False
    if not fits:
        raise MemoryError(
            f"not enough memory: {limit / 1e9:.1f} GB of addresses are allowed (ulimit -v), and PyTorch alone takes "
            "more; try ulimit -v unlimited"
        )
    return 0


def explain_out_of_memory(
    kind: type[BaseException],
    error: BaseException,
    trace: TracebackType | None,
    *,
    say: Callable[[str], str] = str,
) -> None:
    """Stand for `sys.excepthook`: say in one line that an import did not fit into memory. Python ends with code 1.

    Args:
        kind, error, trace: what `sys.excepthook` is given.
        say: returns a text in the user's language.
    """
    if says_out_of_memory(error):
        print(say(f"{Path(sys.argv[0]).name}: error: ") + say(out_of_memory(error)), file=sys.stderr)
    else:
        sys.__excepthook__(kind, error, trace)


def _address_space() -> int | None:
    """Return how many bytes of addresses the system allows this process; None: as many as there are."""
    try:
        import resource  # noqa: PLC0415  (not on Windows)
    except ImportError:
        return None
    limit = resource.getrlimit(resource.RLIMIT_AS)[0]
    return None if limit == resource.RLIM_INFINITY else limit
