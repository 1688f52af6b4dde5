"""Evaluation mode for a while."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any


@contextmanager
def evaluating(model: Any) -> Iterator[None]:
    """Run what is enclosed with a model in evaluation mode; it comes back in its own, also when an error ends it."""
    training = model.training
    model.eval()
    try:
        yield
    finally:
        model.train(training)
