"""What `results/retrieval.npz` says of each query: its rank and its answers, before the training and after."""

from __future__ import annotations

import os
import zipfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from cliptune.runtime.messages import count, one_line, printable, shorten

Array = NDArray[Any]

MAX_CAPTION = 300
"""Characters of a caption on the page; it may have ten thousand."""


class Missing(NamedTuple):
    """Why there is nothing to show, in words."""

    reason: str


class Queries:
    """The validation set of a run, and what two of its models answered.

    Args:
        values: the arrays of the file.
        best_step: of the results' best model.

    Attributes:
        paths: of the images.
        names: the same below the folder that all of them lie in, since a page travels.
        owners: image of each caption, `[M]`.
        ranks: `loaded` and `best`, of each `i2t` and `t2i`.
        answers: `loaded` and, unless it is the best itself, `best`: the arrays of the file without their prefix.

    Raises:
        ValueError: parts of the file do not fit together.
    """

    def __init__(self, values: dict[str, Array], *, best_step: int) -> None:
        self.paths = list(_texts(values["image_paths"], values["image_path_ends"]))
        self.names = _below_their_folder(self.paths)
        self.owners: Array = values["text_to_image"]
        self.text_ids: Array = values["caption_ids"]
        captions = "captions" in values and "caption_ends" in values
        self._captions = list(_texts(values["captions"], values["caption_ends"])) if captions else None
        self._order = np.argsort(self.owners, kind="stable")
        self._starts = np.searchsorted(self.owners[self._order], np.arange(len(self.paths) + 1))
        steps = values["steps"].tolist()
        best = steps.index(best_step) if best_step in steps else 0
        rows = {"loaded": 0, "best": best} if steps else {}
        self.ranks = {model: {way: values[way][row] for way in ("i2t", "t2i")} for model, row in rows.items()}
        self.answers = {
            model: {name.removeprefix(f"{model}_"): each for name, each in values.items() if name.startswith(model)}
            for model in ("loaded", "best")
            if f"{model}_i2t_ids" in values and (model == "loaded" or values["best_step"] == best_step)
        }
        if len(self.owners) != len(self.text_ids) or len(self.paths) != len(values["groups"]):
            raise ValueError("its parts do not fit together")

    @property
    def has_captions(self) -> bool:
        """Tell whether the file holds the captions' texts."""
        return self._captions is not None

    def caption(self, row: int) -> str:
        """Return a caption as the page shows it."""
        if self._captions is None:
            return f"caption {row + 1:,} of {self.names[self.owners[row]]}"
        return printable(shorten(self._captions[row], MAX_CAPTION))

    def captions_of(self, image: int) -> list[int]:
        """List the rows of an image's captions."""
        rows: list[int] = self._order[self._starts[image] : self._starts[image + 1]].tolist()
        return rows

    def is_right(self, way: str, query: int, answer: int) -> bool:
        """Tell whether an answer is the query's own caption or image."""
        return bool(self.owners[answer] == query) if way == "i2t" else bool(self.owners[query] == answer)

    def is_same(self, way: str, query: int, answer: int) -> bool:
        """Tell whether a wrong answer has the very words of the right one, or belongs to a copy of its image."""
        text, image = (answer, query) if way == "i2t" else (query, answer)
        own = self.text_ids[self.captions_of(image)]
        return bool(np.isin(self.text_ids[text], own)) or self._are_copies(image, int(self.owners[text]))

    def _are_copies(self, first: int, second: int) -> bool:
        # files of equal bytes are encoded once, so their features are equal to the last bit
        features = self.answers["loaded"]["image_features"]
        return bool(np.array_equal(features[first], features[second]))  # NaN, an unreadable image, equals nothing


def read_queries(path: Path, *, run_id: str, best_step: int) -> Queries | Missing:
    """Read what a run's evaluations found, if it is there and of this run.

    Args:
        path: of `retrieval.npz`.
        run_id: of the results.
        best_step: step of the best evaluation.
    """
    if not path.exists():
        return Missing(f"There is no {path.name} beside the results: the run is older than it, or it was not kept.")
    try:
        with np.load(path, allow_pickle=False) as file:
            values = {name: file[name] for name in file.files}
        if run_id and values["run_id"] != run_id:
            return Missing(f"{path.name} is another run's.")
        return Queries(values, best_step=best_step)
    except (OSError, ValueError, KeyError, IndexError, zipfile.BadZipFile, EOFError) as error:
        return Missing(f"{path.name} cannot be read: {one_line(error)}")


def lacking(queries: Queries) -> str:
    """Say why answers cannot be shown; nothing if they can."""
    if not queries.ranks:
        return "What the run's evaluations found, query by query, was lost."
    if "loaded" not in queries.answers:
        size = count(len(queries.paths), "image")
        return f"Answers are not recorded of so large a validation set ({size} with their ranks alone)."
    return ""


def _texts(letters: Array, ends: Array) -> Iterator[str]:
    """Take apart what was written one after another, in UTF-8."""
    whole, start = letters.tobytes(), 0
    for end in ends.tolist():
        yield whole[start:end].decode("utf-8", "surrogatepass")
        start = end


def _below_their_folder(paths: list[str]) -> list[str]:
    folders = {os.path.dirname(path) for path in paths}  # noqa: PTH120  (100,000 of them: Path takes seconds)
    try:
        shared = os.path.commonpath(folders) if folders else ""
    except ValueError:  # drives of Windows, or relative and absolute ones
        shared = ""
    start = len(shared.rstrip("/\\")) + 1 if shared else 0
    return [printable(path[start:].replace("\\", "/")) for path in paths]
