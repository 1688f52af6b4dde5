"""The forms that a checkpoint can be exported in: who writes them, what they cannot hold, what they need installed."""

from __future__ import annotations

import importlib.util
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import NamedTuple

from cliptune.export import open_clip, openai, sentence_transformers, transformers
from cliptune.model.architectures import Architecture
from cliptune.model.weights import Weights

FP32, ROUNDED = 1e-5, 2e-3


class Form(NamedTuple):
    """One form."""

    name: str
    packages: dict[str, str]
    """Modules that it needs, with what pip calls them."""
    refusals: Callable[[Architecture], Iterator[str]]
    write: Callable[[Weights, Path], None] | None = None
    """None: of a graph, which is traced rather than written down, see `onnx`."""
    tolerance: float = FP32
    """Largest distance of unit-norm features; `openai` rounds weights to float16 when it loads them."""


def _refuse_nothing(shape: Architecture) -> Iterator[str]:
    return iter(())


_TRANSFORMERS = {"transformers": "transformers"}
_FORMS = (
    Form("transformers", _TRANSFORMERS, transformers.refusals, transformers.write),
    Form("open_clip", {"open_clip": "open_clip_torch"}, open_clip.refusals, open_clip.write),
    Form(
        "sentence-transformers", {**_TRANSFORMERS, "sentence_transformers": "sentence-transformers"},
        sentence_transformers.refusals, sentence_transformers.write,
    ),
    Form(
        "onnx", {**_TRANSFORMERS, "onnx": "onnx", "onnxscript": "onnxscript", "onnxruntime": "onnxruntime"},
        _refuse_nothing,
    ),
    Form("openai", {}, openai.refusals, openai.write, ROUNDED),
)  # fmt: skip
FORMS = {form.name: form for form in _FORMS}


def check_can_hold(form: Form, shape: Architecture, source: str) -> None:
    """Refuse a model that a form cannot hold.

    Raises:
        ValueError: says why, and names the forms that can.
    """
    reasons = list(form.refusals(shape))
    if reasons:
        others = [name for name, other in FORMS.items() if not list(other.refusals(shape))]
        raise ValueError(
            f"{source} cannot be exported to {form.name}: {'; '.join(reasons)}. These can hold it: {', '.join(others)}"
        )


def check_installed(form: Form) -> None:
    """Refuse a form whose library is not here.

    Raises:
        ImportError: says how to install it.
    """
    missing = [package for module, package in form.packages.items() if importlib.util.find_spec(module) is None]
    if missing:
        raise ImportError(
            f"--to {form.name} needs {', '.join(missing)}: pip install {' '.join(missing)} (for all forms, in "
            "the toolkit's folder: pip install '.[export]')"
        )
