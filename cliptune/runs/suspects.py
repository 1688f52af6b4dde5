"""`visualization.py --suspects train`: a run's training pairs that look mislabelled to its best model."""

from __future__ import annotations

import logging
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

from cliptune.data.pairs import DataSource, Pairs, load_pairs
from cliptune.data.suspects import MISLABELLED, Suspect, exclude, read_suspects, relative_name, update_suspects
from cliptune.features.encode import Encoder, encode_pairs
from cliptune.features.label_noise import Noise, mislabelled
from cliptune.results import TrainingResults, read
from cliptune.runs.evaluation import Candidate
from cliptune.runtime.device import resolve_precision
from cliptune.runtime.distributed import rank_device
from cliptune.runtime.messages import count, printable
from cliptune.training.checkpoint import RunFiles

logger = logging.getLogger(__name__)

ENCODE_BATCH = 100


class Found(NamedTuple):
    """What was found among the training pairs."""

    path: Path
    """The list."""
    rows: list[Suspect]
    """The worst first."""
    num_pairs: int
    noise: Noise

    def __str__(self) -> str:
        of_all = f"{len(self.rows):,} of the {count(self.num_pairs, 'training pair')}"
        if not self.noise.can_tell:
            return "no training pair is listed: the model cannot tell a swapped caption from its image's own"
        said = "looks" if len(self.rows) == 1 else "look"
        return (
            f"{of_all} {said} mislabelled, of which about {self.noise.expected:.0f} may be right. "
            f"Look at them in {printable(str(self.path))}: train.py --exclude leaves out those that say no to keep"
        )


def find_suspects(results_path: Path, *, build: Callable[..., Any], open_dataset: Callable[..., Any]) -> Found:
    """Encode a run's training pairs with its best model, and list those that look mislabelled in `suspects.csv`.

    Args:
        results_path: the run's `training_results.json`, in its `results` folder.
        build: makes a model, as `clip_model.CLIPModel` does.
        open_dataset: see `Encoder`.

    Raises:
        FileNotFoundError: the results, the best model or the training data are not there.
        ValueError: they are not the run's, or it was trained on shards.
        OSError: the list cannot be written.
    """
    results, files = read(results_path), RunFiles(results_path.resolve().parent.parent)
    if not isinstance(results, TrainingResults):
        raise ValueError(
            f"{results_path}: --suspects train is of a training run's results, and these are another stage's"
        )
    if not files.best.exists():
        raise FileNotFoundError(f"there is no {files.best}, the best model of the run of {results_path}")
    candidate = Candidate(str(files.best))
    if candidate.run_id != results.run_id:
        raise ValueError(f"{files.best} is of another run than {results_path}: name the results file of its own folder")
    pairs = training_pairs_of(candidate)
    path = results_path.with_name("suspects.csv")
    earlier = [row for row in read_suspects(path) if row.kind == MISLABELLED] if path.exists() else []
    device = rank_device("auto")
    model = build(pretrained=candidate.take_weights()).to(device).eval()
    encoder = Encoder(model, open_dataset, precision=resolve_precision("auto", device), batch_size=ENCODE_BATCH)
    encoded = encode_pairs(encoder, pairs)
    images, texts = (each.float().cpu().numpy() for each in encoded[:2])
    noise = mislabelled(images, texts, encoded.text_to_image.numpy())
    owners = encoded.image_indices[encoded.text_to_image]
    rows = [
        _row(pairs, int(owners[row]), int(encoded.text_indices[row]), float(noise.scores[row]))
        for row in noise.listed.tolist()
    ]
    # what an earlier list has kept out of this training is not judged here, and stays out
    others = exclude(pairs, [row._replace(keep=False) for row in earlier]).unmatched
    update_suspects(path, [*rows, *(row._replace(more=()) for row in others)], kinds=[MISLABELLED])
    return Found(path, rows, len(noise.scores), noise)


def _row(pairs: Pairs, image: int, text: int, score: float) -> Suspect:
    name = relative_name(pairs.paths[image], pairs.root)
    reason = f"{MISLABELLED}: scores as a caption of another image would ({score:.1f} spreads below what is usual)"
    return Suspect(name, " ".join(pairs.captions[text].split()), reason, keep=False)


def training_pairs_of(candidate: Candidate) -> Pairs:
    """Return what a run was trained on, where it lies now, without what `--exclude` had left out.

    Raises:
        FileNotFoundError, ValueError: it is not there, or nobody knows what it was.
    """
    if candidate.config is None or not candidate.known.holds("train"):
        raise ValueError(
            f"{candidate.path} does not say which images it was trained on (shards, or an older run's): "
            "--suspects train goes by images of an index"
        )
    data = candidate.config.data
    source = DataSource(
        data.data_dir, data.image_dir, data.caption_key, data.allowed_skipped_fraction,
        image_key=data.image_key, captions_from=data.captions_from, caption_template=data.caption_template,
    )  # fmt: skip
    pairs = candidate.known.select(load_pairs(source), "train", source)
    if data.exclude is None or not Path(data.exclude).exists():
        return pairs
    return exclude(pairs, read_suspects(Path(data.exclude))).pairs
