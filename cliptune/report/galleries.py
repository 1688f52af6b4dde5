"""Queries worth a look: which got better or worse by the training, which are still wrong, which are no errors."""

from __future__ import annotations

from collections.abc import Iterator
from typing import NamedTuple

import numpy as np

from cliptune.report.recorded_queries import Array, Queries
from cliptune.report.thumbnails import Thumbnails

NUM_CARDS, NUM_ANSWERS, NUM_OWN = 12, 5, 2
"""Queries of a gallery, answers of a query, and own captions of an image that are shown."""
WAYS = {"t2i": "caption", "i2t": "image"}
"""What asks in each direction."""


class Item(NamedTuple):
    """An image or a caption on the page."""

    text: str
    """Caption, or name of the image."""
    is_image: bool
    thumbnail: int | None = None
    """Place in the page's thumbnails; None: a caption, or an image that cannot be shown."""
    score: float | None = None
    """Cosine with the query."""
    mark: str = ""
    """`right`, `same` (the words of the right one, or a copy of its image), or nothing."""


class Card(NamedTuple):
    """A query with what it found."""

    query: Item
    own: list[Item]
    """What was to be found."""
    num_own: int
    columns: dict[str, list[Item]]
    """Answers under a heading such as `as loaded`."""
    ranks: list[float]
    """Of the own one, as many as columns."""


class Gallery(NamedTuple):
    """Queries of one kind, the most telling ones first."""

    key: str
    title: str
    note: str
    way: str
    num_found: int
    num_queries: int
    cards: list[Card]


class _Kind(NamedTuple):
    key: str
    title: str
    note: str
    is_of_it: Array
    weight: Array
    """The largest are shown."""


def galleries(queries: Queries, thumbnails: Thumbnails, *, best_name: str) -> list[Gallery]:
    """Choose queries and collect what is to be shown of them.

    Args:
        queries: with answers.
        thumbnails: take the images.
        best_name: what the best model is called, such as `epoch 3`.
    """
    models = {"as loaded": "loaded", **({best_name: "best"} if "best" in queries.answers else {})}
    owners = {"t2i": queries.owners, "i2t": None}
    return [
        Gallery(
            f"{kind.key}-{way}", kind.title, kind.note, way, int(kind.is_of_it.sum()), len(kind.is_of_it),
            [_card(queries, thumbnails, way, row, models) for row in _chosen(kind, owners[way])],
        )
        for way in WAYS
        for kind in _kinds(queries, way, is_trained=len(models) > 1)
    ]  # fmt: skip


def _kinds(queries: Queries, way: str, *, is_trained: bool) -> Iterator[_Kind]:
    """Sort queries by their ranks; one that is not ranked (NaN) is of no kind."""
    before, after = queries.ranks["loaded"][way], queries.ranks["best" if is_trained else "loaded"][way]
    # from 50 to 1 is more than from 500 to 100
    gain = np.log(before) - np.log(after)
    if is_trained:
        yield _Kind("better", "Got better", "The right one moved up.", gain > 0, gain)
        yield _Kind("worse", "Got worse", "The right one moved down.", gain < 0, -gain)
    wrong = (before > 1) & (after > 1)
    title = "Still wrong" if is_trained else "Wrong"
    yield _Kind("wrong", title, "Another one scores higher than the right one.", wrong, after)
    answers = queries.answers["best" if is_trained else "loaded"][f"{way}_ids"][:, 0]
    missed = np.flatnonzero(after > 1)
    same = np.zeros(len(after), dtype=bool)
    same[[row for row in missed.tolist() if answers[row] >= 0 and _is_same(queries, way, row, int(answers[row]))]] = (
        True
    )
    note = "The first answer has the words of the right one, or belongs to a copy of its image, and counts as an error."
    yield _Kind("duplicates", "Duplicates counted as errors", note, same, -after)


def _is_same(queries: Queries, way: str, query: int, answer: int) -> bool:
    return not queries.is_right(way, query, answer) and queries.is_same(way, query, answer)


def _chosen(kind: _Kind, owners: Array | None) -> list[int]:
    """Return the queries that are shown; of the captions of an image one."""
    rows = np.flatnonzero(kind.is_of_it)
    rows = rows[np.argsort(-kind.weight[rows], kind="stable")]
    if owners is not None:
        rows = rows[np.sort(np.unique(owners[rows], return_index=True)[1])]
    chosen: list[int] = rows[:NUM_CARDS].tolist()
    return chosen


def _card(queries: Queries, thumbnails: Thumbnails, way: str, row: int, models: dict[str, str]) -> Card:
    own = queries.captions_of(row) if way == "i2t" else [int(queries.owners[row])]
    answer_way = "t2i" if way == "i2t" else "i2t"
    columns = {}
    for heading, model in models.items():
        found = queries.answers[model]
        answers = zip(found[f"{way}_ids"][row].tolist(), found[f"{way}_scores"][row].tolist(), strict=True)
        columns[heading] = [
            item(queries, thumbnails, answer_way, answer, score=score, mark=_mark(queries, way, row, answer))
            for answer, score in list(answers)[:NUM_ANSWERS]
            if answer >= 0
        ]
    return Card(
        item(queries, thumbnails, way, row),
        [item(queries, thumbnails, answer_way, each) for each in own[:NUM_OWN]],
        len(own),
        columns,
        [float(queries.ranks[model][way][row]) for model in models.values()],
    )


def _mark(queries: Queries, way: str, query: int, answer: int) -> str:
    if queries.is_right(way, query, answer):
        return "right"
    return "same" if queries.is_same(way, query, answer) else ""


def item(
    queries: Queries, thumbnails: Thumbnails, way: str, row: int, *, score: float | None = None, mark: str = ""
) -> Item:
    """Return what asks in a direction, an image (`i2t`) or a caption (`t2i`), as the page shows it."""
    if way == "t2i":
        return Item(queries.caption(row), False, None, score, mark)
    name = queries.names[row]
    return Item(name, True, thumbnails.get(queries.paths[row], name), score, mark)
