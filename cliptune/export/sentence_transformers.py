"""An export for sentence-transformers: transformers' model in a folder of its own, then unit norm."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

from cliptune.export import transformers
from cliptune.model.architectures import Architecture
from cliptune.model.weights import Weights
from cliptune.runtime.files import write_json

INNER = "0_CLIPModel"


def refusals(shape: Architecture) -> Iterator[str]:
    """Yield what the library's class has no place for."""
    return transformers.refusals(shape)


def write(weights: Weights, folder: Path) -> None:
    """Write weights without projection layers, and the list of what a text or an image goes through."""
    (folder / INNER).mkdir()
    transformers.write(weights, folder / INNER)
    # Pillow's resize, as in training: the other one differs by up to 2/255
    write_json(folder / INNER / "sentence_bert_config.json", {"processor_kwargs": {"backend": "pil"}})
    (folder / "1_Normalize").mkdir()
    write_json(folder / "1_Normalize" / "config.json", {})
    kinds = (INNER, "CLIPModel"), ("1_Normalize", "Normalize")
    write_json(folder / "modules.json", [
        {"idx": index, "name": str(index), "path": path, "type": f"sentence_transformers.models.{kind}"}
        for index, (path, kind) in enumerate(kinds)
    ])  # fmt: skip
    write_json(folder / "config_sentence_transformers.json", {"similarity_fn_name": "cosine"})
