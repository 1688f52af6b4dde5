"""The installed commands `cliptune-train`, ...: each runs its stage as `python <stage>.py` does."""

from __future__ import annotations

import runpy


def train() -> None:
    """Run `train.py`."""
    _run("train")


def evaluate() -> None:
    """Run `evaluation.py`."""
    _run("evaluation")


def visualize() -> None:
    """Run `visualization.py`."""
    _run("visualization")


def data() -> None:
    """Run `data_loader.py`."""
    _run("data_loader")


def search() -> None:
    """Run `search.py`."""
    _run("search")


def export() -> None:
    """Run `export.py`."""
    _run("export")


def _run(stage: str) -> None:
    # as `__main__`, so that the stage answers --help and a wrong flag before it imports PyTorch
    runpy.run_module(stage, run_name="__main__", alter_sys=True)
