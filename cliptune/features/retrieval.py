"""What each evaluation of a run found, query by query, in `results/retrieval.npz`: plain arrays of NumPy.

`np.load(path)` gives, for N images and M captions of the validation set, in its order, and E evaluations:

- `epochs`, `steps` `[E]`: where each evaluation stands in the run; the first is the model as loaded;
- `i2t` `[E, N]`, `t2i` `[E, M]`: rank of each query's best match, NaN where there is none; with `merged_` in front
  those that count equal captions and images as one, where evaluations have them;
- `groups` `[N]`, `text_to_image` `[M]`: group of each image, and image of each caption, as rows of this file;
- `image_paths` and `image_path_ends` `[N]`: the images' paths in UTF-8, one after another; `caption_ids` `[M]`;
- `captions` and `caption_ends` `[M]`: the captions, in the same way; not in older files, nor where they are over 64 MB;
- `loaded_` and `best_` in front, of the two models: `i2t_ids`, `t2i_ids` `[N or M, 10]`, the rows that score highest
  (-1: there are fewer), `i2t_scores`, `t2i_scores`, `i2t_own`, `t2i_own`, the score of the own caption or image, and
  `image_features`, `text_features` in float16. Without `best_` the model as loaded is the best.
"""

from __future__ import annotations

import logging
import math
import zipfile
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from cliptune.data.identity import text_hashes
from cliptune.data.pairs import Pairs
from cliptune.features.encode import Encoded
from cliptune.features.ranks import slices
from cliptune.runtime.device import exact_products
from cliptune.runtime.files import atomic_writer
from cliptune.runtime.messages import count, one_line

logger = logging.getLogger(__name__)

VERSION = 1
NUM_ANSWERS = 10
MAX_QUERIES = 2**20
"""Images and captions whose ranks are kept: 4 MB an evaluation. Of more, every second (third ...) image."""
MAX_FEATURE_BYTES = 2**26
"""Of a model's features: 5,000 images with 25,000 captions have 31 MB. Beyond it answers and features are left out."""
MAX_CAPTION_BYTES = 2**26
"""Of the captions' text, which is written anew with every evaluation; longer text is left out."""
SCORES_AT_ONCE = 2**24

Array = NDArray[Any]
Place = tuple[float, int]
"""Epoch and step of an evaluation."""


class Retrieval:
    """The ranks of a run's evaluations, and the answers of two of its models.

    Args:
        path: of the file.
        pairs: that are evaluated.
        run_id: of the run.

    Attributes:
        places: epoch and step of each evaluation that is kept.
        ranks: what each found, `i2t` and `t2i` and more of their shapes.
        answers: of the model as `loaded` and of the `best` one.
        begun_at: evaluations that the run had had when this was begun; 0 unless its data changed, or a file was lost.
        lacks: why there is no verdict, in words; empty: nothing is lacking.
    """

    def __init__(self, path: Path, pairs: Pairs, *, run_id: str, max_queries: int = MAX_QUERIES) -> None:
        self.path, self.run_id = path, run_id
        self.num_images, self.num_texts = len(pairs), pairs.num_pairs
        stride = max(-(-(self.num_images + self.num_texts) // max_queries), 1)
        owners = pairs.text_to_image.numpy()
        self._images, self._texts = np.arange(0, self.num_images, stride), np.flatnonzero(owners % stride == 0)
        self.groups = pairs.query_groups["i2t"][self._images]
        self.text_to_image = owners[self._texts] // stride
        captions = pairs.captions.take(self._texts)
        paths, path_ends = _joined(pairs.paths[index] for index in self._images.tolist())
        texts, text_ends = _joined(captions)
        self._names: dict[str, Array] = {
            "image_paths": paths,
            "image_path_ends": path_ends,
            "caption_ids": text_hashes(captions),
        }
        if texts.nbytes <= MAX_CAPTION_BYTES:
            self._names |= {"captions": texts, "caption_ends": text_ends}
        self.places: list[Place] = []
        self.ranks: list[dict[str, Array]] = []
        self.answers: dict[str, dict[str, Array]] = {}
        self.begun_at, self.lacks = 0, ""

    @property
    def query_groups(self) -> dict[str, Array]:
        """Group of each query, as `verdict.compare` takes them."""
        return {"i2t": self.groups, "t2i": self.groups[self.text_to_image]}

    @property
    def ranks_of_all(self) -> list[dict[str, Array]]:
        """Ranks of every evaluation of the run; none if some are lost, or if not all queries are kept."""
        return [] if self.lacks or len(self._images) < self.num_images else self.ranks

    def add(self, ranks: Mapping[str, Array], *, epoch: float, step: int) -> None:
        """Take in the ranks of all images and captions that an evaluation found."""
        chosen = {name: self._images if name.endswith("i2t") else self._texts for name in ranks}
        self.ranks.append({name: np.float32(ranks[name])[rows] for name, rows in chosen.items()})
        self.places.append((epoch, step))

    def keep_answers(self, model: str, encoded: Encoded, *, step: int, device: torch.device) -> None:
        """Take in what a model, `loaded` or `best`, answered; nothing of a set whose features take too much room."""
        num_bytes = 2 * encoded.image_features.shape[1] * (self.num_images + self.num_texts)
        if num_bytes > MAX_FEATURE_BYTES or len(self._images) < self.num_images:
            if model == "loaded":
                logger.info("%s: ranks alone; answers and features of so large a set are left out", self.path)
            return
        self.answers[model] = {
            "step": np.array(step),
            **best_answers(encoded, num_images=self.num_images, num_texts=self.num_texts, device=device),
        }

    def write(self) -> None:
        """Write all of it; a reader sees the file whole or not at all.

        Raises:
            OSError: it cannot be written.
        """
        names = self.ranks[0] if self.ranks else {}
        values: dict[str, Any] = {
            "version": VERSION,
            "run_id": self.run_id,
            "begun_at": self.begun_at,
            "lacks": self.lacks,
            "epochs": np.array([epoch for epoch, _ in self.places], dtype=np.float64),
            "steps": np.array([step for _, step in self.places], dtype=np.int64),
            **{name: np.stack([ranks[name] for ranks in self.ranks]) for name in names},
            "groups": self.groups,
            "text_to_image": self.text_to_image,
            **self._names,
            **{f"{model}_{name}": each for model, found in self.answers.items() for name, each in found.items()},
        }
        with atomic_writer(self.path) as file:
            np.savez(file, **values)

    def resume(self, source: Path, history: Sequence[Place], *, best_step: int) -> None:
        """Go on from a file, without the evaluations that a killed run had after its last state.

        What is not to be had is told, and stands in `lacks` from then on.

        Args:
            source: the file.
            history: epoch and step of all evaluations that the run has had.
            best_step: step of the best one.
        """
        try:
            reason = self._take(source, history)
        except (OSError, ValueError, KeyError, zipfile.BadZipFile, EOFError, MemoryError) as error:
            reason = one_line(error) if source.exists() else f"there is no {source}"
        if reason:
            self.places, self.ranks, self.answers, self.begun_at = [], [], {}, len(history)
            self.lacks = f"what the first {count(len(history), 'evaluation')} found, query by query, is lost"
            logger.warning("%s: %s", self.lacks, reason)
            return
        if "best" in self.answers and self.answers["best"]["step"] != best_step:
            del self.answers["best"]

    def _take(self, source: Path, history: Sequence[Place]) -> str:
        """Read a file; say why it is not this run's."""
        with np.load(source, allow_pickle=False) as file:
            values = {name: file[name] for name in file.files}
        if values["version"] != VERSION or values["run_id"] != self.run_id:
            return f"{source} is another run's"
        # not the paths: the data may have moved
        same = {"groups": self.groups, "text_to_image": self.text_to_image, "caption_ids": self._names["caption_ids"]}
        if not all(np.array_equal(values[name], own) for name, own in same.items()):
            return f"{source} is of other images"
        self.begun_at, self.lacks = int(values["begun_at"]), str(values["lacks"])
        self.places = list(zip(values["epochs"].tolist(), values["steps"].tolist(), strict=True))
        last = history[-1][1]
        num_kept = sum(step <= last for _, step in self.places)
        later = list(history[self.begun_at :])
        if self.places[num_kept - len(later) : num_kept] != later or (not self.begun_at and num_kept != len(later)):
            return f"{source} is of other evaluations"
        self.places = self.places[:num_kept]
        names = [name for name in values if name.removeprefix("merged_") in {"i2t", "t2i"}]
        if not all(values[name].shape[1:] == (len(self._rows(name)),) for name in names):
            return f"{source} is damaged"
        self.ranks = [{name: values[name][index] for name in names} for index in range(num_kept)]
        for model in ("loaded", "best"):
            found = {name: value for name, value in values.items() if name.startswith(f"{model}_")}
            if found:
                self.answers[model] = {name.removeprefix(f"{model}_"): value for name, value in found.items()}
        return ""

    def _rows(self, name: str) -> Array:
        return self._images if name.endswith("i2t") else self._texts


def duplicate_errors(ranks: Array, merged_ranks: Array) -> Array:
    """Return the queries `[n]` that missed the first rank for nothing but an equal caption or a copy of the image.

    Args:
        ranks: `[Q]`, of one evaluation and direction.
        merged_ranks: `[Q]`, with duplicates merged; NaN for all but the first of equal queries.
    """
    return np.flatnonzero((ranks > 1) & (merged_ranks == 1))


def _joined(texts: Iterable[str]) -> tuple[Array, Array]:
    """Return texts in UTF-8, one after another, and where each ends."""
    encoded = [text.encode("utf-8", "surrogatepass") for text in texts]
    return np.frombuffer(b"".join(encoded), dtype=np.uint8), np.cumsum([len(text) for text in encoded], dtype=np.int64)


@torch.no_grad()
def best_answers(encoded: Encoded, *, num_images: int, num_texts: int, device: torch.device) -> dict[str, Array]:
    """Return what scores highest for each query, in blocks; of equal scores the lower row is first.

    Args:
        encoded: features of what could be read.
        num_images, num_texts: of the data set.
        device: where the scores are computed.
    """
    rows = {"image": encoded.image_indices, "text": encoded.text_indices}
    features = {"image": encoded.image_features, "text": encoded.text_features}
    sizes = {"image": num_images, "text": num_texts}
    texts = torch.arange(len(encoded.text_to_image))
    values: dict[str, Array] = {}
    for direction, queries, gallery, own in (
        ("i2t", "image", "text", (encoded.text_to_image, texts)),
        ("t2i", "text", "image", (texts, encoded.text_to_image)),
    ):
        ids, scores, own_scores = _highest(features[queries], features[gallery], own, device=device)
        ids = torch.where(ids < 0, -1, rows[gallery][ids])
        for name, found, blank in (("ids", ids.int(), -1), ("scores", scores, math.nan), ("own", own_scores, math.nan)):
            values[f"{direction}_{name}"] = _placed(found, rows[queries], sizes[queries], blank)
    for name, found in features.items():
        values[f"{name}_features"] = _placed(found.half().cpu(), rows[name], sizes[name], math.nan)
    return values


def _highest(
    queries: Tensor, gallery: Tensor, own: tuple[Tensor, Tensor], *, device: torch.device
) -> tuple[Tensor, Tensor, Tensor]:
    """Return rows `[Q, 10]` and scores `[Q, 10]` of the best matches, and the best own score `[Q]`.

    Args:
        queries: `[Q, D]`.
        gallery: `[G, D]`.
        own: rows of the queries, in any order, and of the gallery, of all pairs that belong together.
        device: where it is computed.
    """
    num_answers, others = min(NUM_ANSWERS, len(gallery)), gallery.to(device, torch.float32)
    ids = torch.full((len(queries), NUM_ANSWERS), -1)
    scores = torch.full((len(queries), NUM_ANSWERS), math.nan)
    own_scores = torch.full((len(queries),), -math.inf)
    with exact_products():
        for rows in slices(len(queries), max(SCORES_AT_ONCE // len(gallery), 1)):
            block = queries[rows].to(device, torch.float32) @ others.T  # [rows, G]
            best = _highest_columns(block, num_answers)  # [rows, 10]
            ids[rows, :num_answers], scores[rows, :num_answers] = best.cpu(), block.gather(1, best).cpu()
            mine = ((own[0] >= rows.start) & (own[0] < rows.stop)).nonzero().squeeze(1)
            pair = block[(own[0][mine] - rows.start).to(device), own[1][mine].to(device)].cpu()
            own_scores.scatter_reduce_(0, own[0][mine], pair, "amax")
    return ids, scores, torch.where(own_scores.isfinite(), own_scores, math.nan)


def _highest_columns(scores: Tensor, number: int) -> Tensor:
    """Return the columns of the highest scores `[Q, number]` of each row; of equal ones the lower column is first."""
    values, columns = scores.topk(number)
    columns = columns.sort(1).values
    columns = columns.gather(1, torch.sort(scores.gather(1, columns), dim=1, descending=True, stable=True).indices)
    # where more columns score as the last of these than there is room for, topk has taken any of them
    tied = (scores >= values[:, -1:]).sum(1) > number
    if tied.any():
        columns[tied] = torch.sort(scores[tied], dim=1, descending=True, stable=True).indices[:, :number]
    return columns


def _placed(values: Tensor, rows: Tensor, size: int, blank: float) -> Array:
    """Put what was read at its place in the data set."""
    placed = torch.full((size, *values.shape[1:]), blank, dtype=values.dtype)
    placed[rows] = values
    array: Array = placed.numpy()
    return array
