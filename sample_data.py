"""Draws pictures whose captions say exactly what is in them.

A scene is one to three kinds of flat coloured shapes on a plain background: `draw_scene` makes one up, `describe`
puts it into words, `render` turns it into pixels, `create_sample_dataset` writes a folder of them. The captions name
sides, so mirroring these pictures (a horizontal flip as augmentation) makes their captions wrong.
"""

from __future__ import annotations

import json
import math
import random
import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from PIL import Image

Point = tuple[float, float]

IMAGE_SIZE = 224
SLOT = IMAGE_SIZE // 2  # every group of objects lives in a square of this side, or in two of them side by side

COLOURS = {
    "red": (222, 28, 36),
    "orange": (255, 140, 0),
    "yellow": (255, 225, 40),
    "green": (30, 150, 60),
    "blue": (35, 80, 225),
    "purple": (125, 40, 165),
    "pink": (255, 150, 205),
    "brown": (115, 70, 35),
    "black": (15, 15, 15),
    "white": (250, 250, 250),
}
MIN_CONTRAST = 305.0  # of an object to its background, in units of `colour_distance` (black to white: about 705)

# The middle of each place in slots from the picture's middle, and the words for it.
PLACES = {
    "top left": (-0.5, -0.5, "in the top left"),
    "top": (0.0, -0.5, "at the top"),
    "top right": (0.5, -0.5, "in the top right"),
    "left": (-0.5, 0.0, "on the left"),
    "centre": (0.0, 0.0, "in the centre"),
    "right": (0.5, 0.0, "on the right"),
    "bottom left": (-0.5, 0.5, "in the bottom left"),
    "bottom": (0.0, 0.5, "at the bottom"),
    "bottom right": (0.5, 0.5, "in the bottom right"),
}

RADII = {"large": (41, 46), "small": (17, 20)}  # pixels, drawn once per group
SPACING = {"large": SLOT // 2, "small": 26}  # pixels from the middle of a group to the middles of its objects
MAX_SHIFT = 5  # pixels a group strays from the middle of its place; large: 46 + 5, small: 26 + 20 + 5, both < SLOT / 2

ROW = ((-1, 0), (1, 0))
COLUMN = ((0, -1), (0, 1))
ARRANGEMENTS = {
    1: (((0, 0),),),
    2: (ROW, COLUMN),
    3: (((0, -1), (-1, 1), (1, 1)), ((0, 1), (-1, -1), (1, -1))),
    4: (((-1, -1), (1, -1), (-1, 1), (1, 1)),),
}
COUNT_WORDS = {2: "two", 3: "three", 4: "four"}
OPPOSITES = {"above": "below", "below": "above", "left": "right", "right": "left"}

SCENE_FILE = re.compile(r"scene_\d{5,}\.(png|txt)")


@dataclass(frozen=True)
class Group:
    """One to four equal objects that stand together: what they are, and where in the picture."""

    shape: str
    colour: str
    size: str
    place: str
    radius: int  # pixels: half the side of the square that holds one object
    centres: tuple[Point, ...]  # pixels (x to the right, y down), one for each object

    @property
    def count(self) -> int:
        """How many objects there are."""
        return len(self.centres)

    @property
    def box(self) -> tuple[float, float, float, float]:
        """Left, top, right and bottom bounds in pixels."""
        xs, ys = zip(*self.centres, strict=True)
        return min(xs) - self.radius, min(ys) - self.radius, max(xs) + self.radius, max(ys) + self.radius


@dataclass(frozen=True)
class Scene:
    """A background colour and one to three groups, all of different shapes and colours, none overlapping."""

    background: str
    groups: tuple[Group, ...]


# Shapes: closed outlines within -1 .. 1, y pointing down.


def _arc(start: float, stop: float, *, radius: float = 1.0, middle: float = 0.0, steps: int = 60) -> list[Point]:
    """Return points of a circle around (middle, 0) from one angle to another, in radians."""
    angles = [start + (stop - start) * step / steps for step in range(steps + 1)]
    return [(middle + radius * math.cos(angle), radius * math.sin(angle)) for angle in angles]


def _corners(radii: Sequence[float]) -> list[Point]:
    """Return one point for each radius, at equal angles, the first one straight up."""
    angles = [2 * math.pi * index / len(radii) - math.pi / 2 for index in range(len(radii))]
    return [(radius * math.cos(angle), radius * math.sin(angle)) for radius, angle in zip(radii, angles, strict=True)]


def _heart() -> list[Point]:
    """Return the well-known heart curve (16 sin^3 t; 13 cos t - 5 cos 2t - 2 cos 3t - cos 4t), brought to size."""
    outline = []
    for step in range(60):
        t = 2 * math.pi * step / 60
        height = 13 * math.cos(t) - 5 * math.cos(2 * t) - 2 * math.cos(3 * t) - math.cos(4 * t)
        outline.append((math.sin(t) ** 3, -(height + 2.5) / 16))
    return outline


def _outlines() -> dict[str, list[Point]]:
    """Return the outline of every shape by its name."""
    bar, end = 0.32, 0.95
    cross = [(bar, -end), (bar, -bar), (end, -bar), (end, bar), (bar, bar), (bar, end)]
    cross += [(-x, -y) for x, y in cross]
    horn = 1.11  # where the two circles of the crescent meet, as an angle of its outer circle
    bite = math.atan2(math.sin(horn), math.cos(horn) - 0.55)
    bite_radius = math.hypot(math.sin(horn), math.cos(horn) - 0.55)
    crescent = _arc(horn, 2 * math.pi - horn)
    crescent += _arc(2 * math.pi - bite, bite, radius=bite_radius, middle=0.55)
    return {
        "circle": _arc(0, 2 * math.pi),
        "square": [(-0.88, -0.88), (0.88, -0.88), (0.88, 0.88), (-0.88, 0.88)],
        "triangle": [(0.0, -0.9), (1.0, 0.83), (-1.0, 0.83)],
        "star": _corners((1.0, 0.42) * 5),
        "ring": _arc(0, 2 * math.pi) + _arc(2 * math.pi, 0, radius=0.52),
        "cross": cross,
        "heart": _heart(),
        "hexagon": _corners((1.0,) * 6),
        "crescent": [(x + 0.25, y) for x, y in crescent],
        "diamond": [(0.0, -1.0), (0.72, 0.0), (0.0, 1.0), (-0.72, 0.0)],
    }


OUTLINES = _outlines()


# Making a scene up


def colour_distance(first: str, second: str) -> float:
    """Return how different two named colours look (the "redmean" weighted RGB distance, compuphase.com/cmetric.htm)."""
    (r1, g1, b1), (r2, g2, b2) = COLOURS[first], COLOURS[second]
    mean = (r1 + r2) / 512
    return math.sqrt((2 + mean) * (r1 - r2) ** 2 + 4 * (g1 - g2) ** 2 + (3 - mean) * (b1 - b2) ** 2)


def draw_scene(rng: random.Random) -> Scene:
    """Make up one scene; the first group is more often large than the others."""
    num_groups = rng.choices((1, 2, 3), weights=(3, 5, 2))[0]
    background = rng.choice(list(COLOURS))
    visible = [colour for colour in COLOURS if colour_distance(colour, background) >= MIN_CONTRAST]
    colours = rng.sample(visible, num_groups)
    shapes = rng.sample(list(OUTLINES), num_groups)
    sizes = [_draw_size(rng, large=0.75 if index == 0 else 0.35) for index in range(num_groups)]
    while True:
        groups = [_draw_group(rng, *kind) for kind in zip(shapes, colours, sizes, strict=True)]
        if not any(_overlap(a, b) for index, a in enumerate(groups) for b in groups[:index]):
            return Scene(background, tuple(groups))


def _draw_size(rng: random.Random, *, large: float) -> str:
    return "large" if rng.random() < large else "small"


def _draw_group(rng: random.Random, shape: str, colour: str, size: str) -> Group:
    """Choose a place and set the objects there; only a pair of large ones along an edge needs more than one slot."""
    place = rng.choice(list(PLACES))
    x, y, _ = PLACES[place]
    if size == "small":
        arrangement = rng.choice(ARRANGEMENTS[rng.randint(1, 4)])
    elif place in OPPOSITE_EDGES and rng.random() < 0.5:
        arrangement = ROW if x == 0 else COLUMN
    else:
        arrangement = ARRANGEMENTS[1][0]
    middle_x = IMAGE_SIZE // 2 + x * SLOT + rng.randint(-MAX_SHIFT, MAX_SHIFT)
    middle_y = IMAGE_SIZE // 2 + y * SLOT + rng.randint(-MAX_SHIFT, MAX_SHIFT)
    step = SPACING[size]
    centres = tuple((middle_x + step * dx, middle_y + step * dy) for dx, dy in arrangement)
    return Group(shape, colour, size, place, rng.randint(*RADII[size]), centres)
