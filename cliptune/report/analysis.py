"""What the recorded features say of the data: pairs that look mislabelled, hubs, a map."""

from __future__ import annotations

from pathlib import Path
from typing import NamedTuple

import numpy as np

from cliptune.data.suspects import MISLABELLED, read_suspects
from cliptune.features.feature_map import FeatureMap, feature_map
from cliptune.features.hubs import Hub, hubs
from cliptune.features.label_noise import MAX_REFERENCE, mislabelled
from cliptune.report.galleries import Item, item
from cliptune.report.recorded_queries import Array, Queries
from cliptune.report.thumbnails import Thumbnails
from cliptune.runtime.messages import one_line, printable, shorten

NUM_PAIRS, NUM_HUBS, NUM_QUERIES, NUM_POINTS = 24, 8, 3, 800
"""Pairs, hubs, queries of a hub and points of each modality that are shown."""
MAX_PRODUCTS = 25 * 10**6
"""Scores that looking for neighbours may take: a few seconds."""
MAP_WIDTH, MAP_HEIGHT, MARGIN = 640.0, 420.0, 12.0


class Pair(NamedTuple):
    """An image and a caption that hardly belong together."""

    image: Item
    caption: Item
    score: float


class Mislabelled(NamedTuple):
    """The pairs of the validation set that look mislabelled."""

    pairs: list[Pair]
    """The worst."""
    num_listed: int
    num_pairs: int
    expected: float
    """Of the listed that may be right."""
    can_tell: bool


class HubCard(NamedTuple):
    """What is returned too often, and for what."""

    item: Item
    num_queries: int
    expected: float
    queries: list[Item]


class HubList(NamedTuple):
    """The hubs of a direction."""

    way: str
    num_found: int
    skewness: float
    cards: list[HubCard]


class Map(NamedTuple):
    """The features in a plane, as paths."""

    method: str
    explained: float
    images: str
    texts: str
    num_shown: tuple[int, int]
    num_all: tuple[int, int]


class Analysis(NamedTuple):
    """Of the best model's features on validation."""

    mislabelled: Mislabelled
    hubs: list[HubList]
    map: Map


def analyse(queries: Queries, thumbnails: Thumbnails, *, umap: bool = False) -> Analysis:
    """Look at the features of the best model.

    Args:
        queries: with answers.
        thumbnails: take the images.
        umap: see `feature_map`.
    """
    found = queries.answers["best" if "best" in queries.answers else "loaded"]
    images, texts = (found[f"{name}_features"].astype(np.float32) for name in ("image", "text"))
    return Analysis(
        _mislabelled(queries, thumbnails, images, texts),
        [_hubs(queries, thumbnails, way, found[f"{way}_ids"]) for way in ("t2i", "i2t")],
        _map(feature_map(images, texts, max_points=NUM_POINTS, umap=umap)),
    )


def _mislabelled(queries: Queries, thumbnails: Thumbnails, images: Array, texts: Array) -> Mislabelled:
    reference = min(MAX_REFERENCE, max(MAX_PRODUCTS // max(len(images) + len(texts), 1), 500))
    noise = mislabelled(images, texts, queries.owners, max_reference=reference)
    pairs = [
        Pair(
            item(queries, thumbnails, "i2t", int(queries.owners[row])),
            item(queries, thumbnails, "t2i", row),
            float(noise.scores[row]),
        )
        for row in noise.listed[:NUM_PAIRS].tolist()
    ]
    return Mislabelled(pairs, len(noise.listed), len(texts), noise.expected, noise.can_tell)


def _hubs(queries: Queries, thumbnails: Thumbnails, way: str, answers: Array) -> HubList:
    """Find the images that too many captions return (`t2i`), or the captions that too many images do."""
    asked = np.arange(len(answers))[:, None]
    owned = np.where(answers < 0, 0, answers)
    is_own = queries.owners[asked] == answers if way == "t2i" else queries.owners[owned] == asked
    found = hubs(answers, len(queries.paths) if way == "t2i" else len(queries.owners), is_own=is_own)

    def card(hub: Hub) -> HubCard:
        asking = np.flatnonzero(((answers == hub.row) & ~is_own).any(axis=1))[:NUM_QUERIES]
        shown = [item(queries, thumbnails, way, row) for row in asking.tolist()]
        return HubCard(
            item(queries, thumbnails, "i2t" if way == "t2i" else "t2i", hub.row), hub.count, hub.expected, shown
        )

    return HubList(way, len(found.found), found.skewness, [card(hub) for hub in found.found[:NUM_HUBS]])


def _map(found: FeatureMap) -> Map:
    """Scale the points into the drawing: a dot for each image, a cross for each caption."""
    points = np.concatenate([found.images, found.texts])
    low, high = (points.min(0), points.max(0)) if len(points) else (np.zeros(2), np.ones(2))
    size = np.array([MAP_WIDTH, MAP_HEIGHT]) - 2 * MARGIN
    scale = (size / np.maximum(high - low, 1e-9)).min()  # the same on both axes: distances mean something
    rest = (size - scale * (high - low)) / 2

    def placed(part: Array) -> list[tuple[float, float]]:
        places = MARGIN + rest + scale * (part - low)
        return [(round(x, 1), round(MAP_HEIGHT - y, 1)) for x, y in places.tolist()]

    dots = "".join(f"M{x},{y}h0" for x, y in placed(found.images))
    crosses = "".join(f"M{x - 2:.1f},{y}h4m-2,-2v4" for x, y in placed(found.texts))
    shown, of_all = (len(found.images), len(found.texts)), (found.num_images, found.num_texts)
    return Map(found.method, found.explained, dots, crosses, shown, of_all)


class Listed(NamedTuple):
    """Training pairs of `suspects.csv` that look mislabelled to the run's model."""

    rows: list[tuple[str, str, str]]
    """Image, caption and reason of the first ones."""
    number: int
    failed: str


def listed_suspects(path: Path) -> Listed | None:
    """Read what `--suspects train` has found; None: it was not looked for, or nothing was found."""
    if not path.exists():
        return None
    try:
        found = [row for row in read_suspects(path) if row.reason.partition(":")[0].strip() == MISLABELLED]
    except (OSError, ValueError) as error:
        return Listed([], 0, printable(shorten(f"{path.name} cannot be read: {one_line(error)}", 300)))
    rows = [
        (printable(row.image), printable(shorten(row.caption, 300)), printable(shorten(row.reason, 200)))
        for row in found[:NUM_PAIRS]
    ]
    return Listed(rows, len(found), "") if found else None
