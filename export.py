"""A checkpoint in the form that another library loads, verified by that library before it is announced:

python export.py --checkpoint model-checkpoint/best_model.pth --to transformers exported/transformers
"""

from __future__ import annotations

if __name__ == "__main__":
    from cliptune.runtime.stopping import leave_at_signals

    leave_at_signals()  # the imports take seconds

import logging
import sys
from importlib import metadata
from pathlib import Path
from typing import Any

from cliptune.cli import check_command_line, parse_settings, run_stage
from cliptune.stage_settings import EvaluationSettings, ExportSettings

if __name__ == "__main__":
    check_command_line(ExportSettings, str(__doc__))

import torch

from clip_model import CLIPModel
from cliptune.export import onnx
from cliptune.export.card import About, model_card
from cliptune.export.fold import fold_projections
from cliptune.export.folder import MARKER, check_free, new_export
from cliptune.export.forms import FORMS, Form, check_can_hold, check_installed
from cliptune.export.verify import Differences, verify
from cliptune.features.encode import Encoder
from cliptune.language.catalogue import language_of
from cliptune.model.self_test import compute_self_test
from cliptune.model.weights import Weights
from cliptune.runs.evaluation import Candidate, choose_images
from cliptune.runs.export import about_model
from cliptune.runtime.device import resolve_precision
from cliptune.runtime.files import require_free_space, write_json, write_text
from cliptune.runtime.logs import setup_logging
from cliptune.runtime.messages import printable
from data_loader import ImageTextDataset
from evaluation import evaluate

logger = logging.getLogger(__name__)

BATCHES = (1, 7, 64)
"""Sizes that graphs of a free batch size are tried with."""


def main(argv: list[str] | None = None) -> int:
    """Export a checkpoint; returns the exit code."""
    return run_stage(lambda: _export(argv), name="export.py", argv=argv)


def _export(argv: list[str] | None) -> int:
    settings, _ = parse_settings(ExportSettings, argv, description=str(__doc__))
    setup_logging(settings.log_level)
    form, folder = FORMS[settings.form], settings.folder
    check_installed(form)
    check_free(folder, overwrite=settings.overwrite)

    # the model, its projection layers folded into its towers
    candidate = Candidate(settings.checkpoint, activation=settings.activation)
    candidate.fetch()
    weights = fold_projections(candidate.take_weights())
    check_can_hold(form, weights.architecture, candidate.path)
    model = CLIPModel(pretrained=weights).eval()
    self_test = weights.self_test or compute_self_test(model)

    # the export, verified before it has its name
    with new_export(folder) as temporary:
        _check_room(weights, temporary, is_graph=form.write is None)
        _write(form, weights, model, temporary, settings)
        logger.info("written; %s loads it in a process of its own", form.name)
        batches = BATCHES if form.write is None else ()
        differences = verify(form.name, temporary, model, self_test, tolerance=form.tolerance, batches=batches)
        notes = _quantize(candidate, model, temporary, settings) if settings.quantize else []
        if model.logit_bias is not None:
            notes.append(f"Logits are scale * cosine + {model.logit_bias.item():.4f}, a sigmoid loss's bias.")
        about = about_model(candidate)
        _describe(form, about, weights, temporary, named=folder, differences=differences, notes=notes)
    print(language_of(settings.language).say_lines("\n".join(_announced(form, folder, differences, notes))))
    return 0


def _check_room(weights: Weights, folder: Path, *, is_graph: bool) -> None:
    num_bytes = sum(tensor.nbytes for tensor in weights.tensors.values())
    # a graph is put together in memory, and its quantised form lies beside it
    require_free_space(
        folder, (2 if is_graph else 1) * num_bytes + 2**24, what=f"the export in {folder.parent}",
        way_out="Make room, or name a folder on another disk",
    )  # fmt: skip


def _write(form: Form, weights: Weights, model: CLIPModel, folder: Path, settings: ExportSettings) -> None:
    if form.write is None:
        onnx.write(model, folder, files=settings.onnx_files)
    else:
        form.write(weights, folder)


def _quantize(candidate: Candidate, model: CLIPModel, folder: Path, settings: ExportSettings) -> list[str]:
    """Write the quantised graphs, and say what they cost: RSum on the images that the run validated on."""
    onnx.quantize(folder, files=settings.onnx_files)
    quantized = onnx.QuantizedModel(model, folder)
    asked = EvaluationSettings(checkpoint=[settings.checkpoint], num_workers=settings.num_workers)
    try:
        chosen = choose_images(asked, None, [candidate])
    except (ValueError, OSError) as error:
        logger.warning("what the quantised graphs cost is not measured: %s", error)
        return ["Quantised graphs (`*_int8.onnx`): what they cost was not measured, for want of validation images."]
    exact, rounded = (_rsum(each, chosen.pairs, settings.num_workers) for each in (model, quantized))
    return onnx.cost_of_rounding(exact, rounded, num_images=len(chosen.pairs))


def _describe(
    form: Form,
    about: About,
    weights: Weights,
    folder: Path,
    *,
    named: Path,
    differences: Differences,
    notes: list[str],
) -> None:
    """Write the model card, and the same for programs, to a folder that is going to be called `named`."""
    versions = {name: metadata.version(name) for name in ("torch", *form.packages.values())}
    shape = weights.architecture
    card = model_card(form.name, shape, about, differences, folder=named, versions=versions, notes=notes)
    write_text(folder / "README.md", card)
    write_json(folder / MARKER, {
        "form": form.name, "source": about.source, "verdict": about.verdict,
        "architecture": shape.to_dict(), "differences": differences._asdict(),
        "versions": versions, "notes": notes,
    })  # fmt: skip


def _rsum(model: Any, pairs: Any, num_workers: int | None) -> float:
    precision = resolve_precision("fp32", torch.device("cpu"))
    encoder = Encoder(model, ImageTextDataset, precision=precision, batch_size=64, num_workers=num_workers)
    return evaluate(encoder, pairs).metrics["rsum"]


def _announced(form: Form, folder: Path, differences: Differences, notes: list[str]) -> list[str]:
    shifted = "its preprocessing cuts out one pixel beside where CLIP does for some sizes: see README.md"
    return [
        f"exported: {printable(str(folder))}, loaded by {form.name} in a process of its own; largest differences from "
        f"the checkpoint: {differences} (at most {form.tolerance:g}, {form.tolerance:g} and 1/255)",
        *([shifted] if differences.is_shifted else []),
        *notes,
        f"{printable(str(folder / 'README.md'))} tells how to load it; its licence is to be filled in",
    ]


if __name__ == "__main__":
    sys.exit(main())
