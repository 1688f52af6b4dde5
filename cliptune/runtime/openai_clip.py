"""OpenAI's `clip` package, imported without what it does to others."""

from __future__ import annotations

import warnings
from types import ModuleType


def import_clip() -> ModuleType:
    """Import OpenAI's `clip`, without the warning of its PyPI form about `pkg_resources`.

    Raises:
        ImportError: it is not installed, or its PyPI form finds no `pkg_resources`; says what to install.
    """
    try:
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", message=".*pkg_resources is deprecated")
            import clip  # noqa: PLC0415
    except ModuleNotFoundError as error:
        way_out = "pip install 'setuptools<81'" if error.name == "pkg_resources" else "./setup.sh installs it"
        raise ImportError(f"OpenAI's clip package cannot be imported ({error}); {way_out}") from error
    module: ModuleType = clip
    return module
