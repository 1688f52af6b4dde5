"""OpenAI's `clip` package, imported without what it asks of others."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from contextlib import contextmanager
from types import ModuleType


def import_clip() -> ModuleType:
    """Import OpenAI's `clip`, also where setuptools no longer has the `pkg_resources` that its PyPI form imports.

    Raises:
        ImportError: it is not installed; says how to install it.
    """
    try:
        with _stand_in_for_pkg_resources():
            import clip  # noqa: PLC0415
    except ModuleNotFoundError as error:
        raise ImportError(
            f"OpenAI's clip package cannot be imported ({error}); try ./setup.sh, or pip install clip-anytorch"
        ) from error
    module: ModuleType = clip
    return module


@contextmanager
def _stand_in_for_pkg_resources() -> Iterator[None]:
    """Let `from pkg_resources import packaging` work while `clip` is imported.

    It is all that clip-anytorch takes from there. The real module went with setuptools 81; where there is one, it takes
    a fifth of a second to import and warns, so the stand-in is used as well.
    """
    if "clip" in sys.modules or "pkg_resources" in sys.modules:
        yield
        return
    import packaging.version  # noqa: PLC0415
    import torchvision.transforms  # noqa: F401, PLC0415  (whatever else clip imports meets no stand-in)

    stand_in = ModuleType("pkg_resources")
    stand_in.packaging = packaging  # type: ignore[attr-defined]
    sys.modules["pkg_resources"] = stand_in
    try:
        yield
    finally:
        del sys.modules["pkg_resources"]
