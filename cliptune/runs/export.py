"""What is known of a model that is exported: the verdict of its run, its data, its settings."""

from __future__ import annotations

import logging
from pathlib import Path

from cliptune import results
from cliptune.cli import flags_of
from cliptune.export.card import About
from cliptune.model.checkpoint_file import BEST_NAME
from cliptune.runs.evaluation import Candidate
from cliptune.runtime.messages import count
from cliptune.settings import Config

logger = logging.getLogger(__name__)

_OF_MACHINES = {"run.", "data.data_dir", "data.val_data", "data.watch_data", "data.image_dir", "data.exclude"}
"""Settings that say where things lie, which is nobody else's business."""


def about_model(candidate: Candidate) -> About:
    """Collect what a checkpoint and the results file beside it say."""
    source = Path(candidate.path).name
    if candidate.config is None:
        return About(source, source, "", {}, [], {})
    found = _results_of(candidate)
    verdict, recalls = "The results of its run are not beside its checkpoint, or are of another model.", {}
    if found is not None:
        no_verdict = found.no_verdict or "Its run recorded no verdict."
        verdict = found.verdict.sentence() if found.verdict is not None else no_verdict
        rows = {"as loaded": found.baseline, "this model": found.metrics}
        recalls = {
            name: {key: getattr(row, key) for key in (*results.RECALL_KEYS, "rsum")} for name, row in rows.items()
        }
    return About(
        f"{candidate.config.model.name}, fine-tuned on {_data_name(candidate.config)}",
        source,
        verdict,
        recalls,
        _data_of(candidate),
        _settings_of(candidate.config),
    )


def _results_of(candidate: Candidate) -> results.TrainingResults | None:
    """Read the results of the run whose best model it is; None: they are not there, or of another run."""
    path = Path(candidate.path)
    file = path.parent.parent / "results" / "training_results.json"
    try:
        found = results.read(file)
    except (ValueError, OSError) as error:
        logger.info("no verdict for the model card: %s", error)
        return None
    is_own = isinstance(found, results.TrainingResults) and found.run_id == candidate.run_id
    return found if is_own and path.name == BEST_NAME else None  # type: ignore[return-value]


def _data_of(candidate: Candidate) -> list[str]:
    assert candidate.config is not None
    lines = [f"data set: {_data_name(candidate.config)}"]
    for split, snapshot in candidate.known.splits.items():
        if len(snapshot.files):
            lines.append(f"{split}: {count(len(snapshot.files), snapshot.what)}")
    return lines


def _data_name(config: Config) -> str:
    return Path(config.data.data_dir).absolute().name


def _settings_of(config: Config) -> dict[str, object]:
    """Return the settings that are not the defaults, without those that say where things lie."""
    values = config.model_dump()
    found = {}
    for flag in flags_of(Config):
        key = ".".join(flag.key)
        value = values[flag.key[0]][flag.key[1]]
        if not any(key.startswith(each) for each in _OF_MACHINES) and value != flag.field.default:
            found[flag.name] = Path(value).name if flag.name in {"pretrained", "classes"} else value
    return found
