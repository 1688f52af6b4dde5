"""Draws images whose captions say exactly what is in them.

A scene is one to three kinds of flat coloured shapes on a plain background: `draw_scene` makes one up, `describe`
puts it into words, `render` turns it into pixels, `create_sample_dataset` writes a folder of them. The captions name
sides, so mirroring these images (a horizontal flip as augmentation) makes their captions wrong.
"""

from __future__ import annotations

import logging
import math
import random
import re
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from filelock import FileLock, Timeout

from cliptune.runtime.files import write_json
from cliptune.runtime.lock import missing_locks

if TYPE_CHECKING:
    from PIL import Image

logger = logging.getLogger(__name__)

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

# The middle of each position in slots from the image's middle, and the words for it.
POSITIONS = {
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
MAX_SHIFT = 5  # pixels a group strays from its position; large: 46 + 5, small: 26 + 20 + 5, both < SLOT / 2

ROW = ((-1, 0), (1, 0))
COLUMN = ((0, -1), (0, 1))
ARRANGEMENTS = {
    1: (((0, 0),),),
    2: (ROW, COLUMN),
    3: (((0, -1), (-1, 1), (1, 1)), ((0, 1), (-1, -1), (1, -1))),
    4: (((-1, -1), (1, -1), (-1, 1), (1, 1)),),
}
COUNT_WORDS = {2: "two", 3: "three", 4: "four"}
EDGES = ("top", "bottom", "left", "right")  # where a pair of large objects fits, side by side along the edge

SCENE_FILE = re.compile(r"scene_\d{5,}\.(png|txt)")
LOCK = ".sample-data.lock"
UNFINISHED = ".captions.unfinished"  # what captions/ is called while samples are being written


@dataclass(frozen=True)
class Group:
    """One to four equal objects that stand together: what they are, and where in the image."""

    shape: str
    colour: str
    size: str
    position: str
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
    while True:  # until none overlap
        groups = [_draw_group(rng, *kind) for kind in zip(shapes, colours, sizes, strict=True)]
        if not any(_overlap(a, b) for index, a in enumerate(groups) for b in groups[:index]):
            return Scene(background, tuple(groups))


def _draw_size(rng: random.Random, *, large: float) -> str:
    return "large" if rng.random() < large else "small"


def _draw_group(rng: random.Random, shape: str, colour: str, size: str) -> Group:
    """Choose a position and set the objects there; only a pair of large ones along an edge needs more than one slot."""
    position = rng.choice(list(POSITIONS))
    x, y, _ = POSITIONS[position]
    if size == "small":
        arrangement = rng.choice(ARRANGEMENTS[rng.randint(1, 4)])
    elif position in EDGES and rng.random() < 0.5:
        arrangement = ROW if x == 0 else COLUMN
    else:
        arrangement = ARRANGEMENTS[1][0]
    middle_x = IMAGE_SIZE // 2 + x * SLOT + rng.randint(-MAX_SHIFT, MAX_SHIFT)
    middle_y = IMAGE_SIZE // 2 + y * SLOT + rng.randint(-MAX_SHIFT, MAX_SHIFT)
    step = SPACING[size]
    centres = tuple((middle_x + step * dx, middle_y + step * dy) for dx, dy in arrangement)
    return Group(shape, colour, size, position, rng.randint(*RADII[size]), centres)


def _overlap(first: Group, second: Group) -> bool:
    """Tell whether two groups' boxes come closer than 4 pixels."""
    left, top, right, bottom = first.box
    other_left, other_top, other_right, other_bottom = second.box
    beside = left < other_right + 4 and other_left < right + 4
    return beside and top < other_bottom + 4 and other_top < bottom + 4


# Putting it into words


def describe(scene: Scene) -> tuple[str, str]:
    """Return two captions of a scene in different words; both are true."""
    kinds = [f"{_kind(group)} {POSITIONS[group.position][2]}" for group in scene.groups]
    first = f"{_join(kinds)}, on {_article(scene.background)} background"
    if len(scene.groups) > 1 and (relation := _relation(scene.groups[0], scene.groups[1])):
        rest = [f"with {kind}" for kind in kinds[2:]]
        related = " ".join([_kind(scene.groups[0]), relation, _kind(scene.groups[1]), *rest])
        return first, f"{_article(scene.background)} picture of {related}"
    return first, f"{_article(scene.background)} picture of {_join(kinds[::-1])}"


def _kind(group: Group) -> str:
    words = f"{group.size} {group.colour} {group.shape}"
    if group.count == 1:
        return f"a {words}"
    plural = f"{words}es" if words.endswith(("s", "x")) else f"{words}s"
    return f"{COUNT_WORDS[group.count]} {plural}"


def _article(colour: str) -> str:
    return f"an {colour}" if colour[0] in "aeiou" else f"a {colour}"


def _join(parts: Sequence[str]) -> str:
    return parts[0] if len(parts) == 1 else f"{', '.join(parts[:-1])} and {parts[-1]}"


def _relation(first: Group, second: Group) -> str | None:
    """Say how the first group stands to the second, if it stands wholly on one side of it."""
    left, top, right, bottom = first.box
    other_left, other_top, other_right, other_bottom = second.box
    if right < other_left:
        return "to the left of"
    if left > other_right:
        return "to the right of"
    if bottom < other_top:
        return "above"
    return "below" if top > other_bottom else None


# Turning it into pixels


def render(scene: Scene) -> Image.Image:
    """Draw a scene, RGB 224 x 224: four times too large, then reduced, which smooths the edges."""
    from PIL import Image, ImageDraw  # noqa: PLC0415  (describing a scene needs no Pillow)

    scale = 4
    image = Image.new("RGB", (IMAGE_SIZE * scale,) * 2, COLOURS[scene.background])
    draw = ImageDraw.Draw(image)
    for group in scene.groups:
        for x, y in group.centres:
            outline = [
                (scale * (x + group.radius * dx), scale * (y + group.radius * dy)) for dx, dy in OUTLINES[group.shape]
            ]
            draw.polygon(outline, fill=COLOURS[group.colour])
    return image.reduce(scale)


# Writing a folder of them


def distinct_scenes(num_samples: int, *, seed: int = 0) -> Iterator[tuple[Scene, tuple[str, str]]]:
    """Yield scenes with their captions, all captions distinct; sample i does not depend on how many there are."""
    seen: set[str] = set()
    for index in range(num_samples):
        rng = random.Random(f"{seed}-{index}")
        scene = draw_scene(rng)
        while seen & set(describe(scene)):
            scene = draw_scene(rng)
        captions = describe(scene)
        seen.update(captions)
        yield scene, captions


def create_sample_dataset(
    data_dir: str | Path = "./data", num_samples: int = 100, *, seed: int = 0, exist_ok: bool = False
) -> Path:
    """Write drawn scenes as a data set: `images/`, `captions/` (one caption a line) and the index `data.json`.

    The captions stay under a hidden name until every image is there, and the index comes last, so that an
    interrupted creation is never taken for a data set, nor for one without an index; calling again starts it afresh.
    Of two processes that begin at once the second waits for the first.

    Args:
        data_dir: folder to write to, made if it is missing.
        num_samples: number of images; each has two captions.
        seed: the same seed gives the same files.
        exist_ok: take a `data.json` that is there already, such as another process has just made.

    Returns:
        The path of `data.json`.

    Raises:
        ValueError: fewer than one sample.
        FileExistsError: the folder holds a data set, or files of somebody else's.
    """
    if num_samples < 1:
        raise ValueError(f"num_samples must be at least 1, got {num_samples}")
    folder = Path(data_dir)
    folder.mkdir(parents=True, exist_ok=True)
    with _alone(folder):
        index_path = folder / "data.json"
        if not index_path.exists():
            return _create(folder, num_samples, seed)
        if exist_ok:
            return index_path
        raise FileExistsError(f"{index_path} is there already; choose an empty folder for the sample data")


@contextmanager
def _alone(folder: Path) -> Iterator[None]:
    """Wait until no other process makes sample data in a folder, and keep others out."""
    lock = FileLock(folder / LOCK)
    try:
        if missing_locks(folder / LOCK) is not None:
            raise NotImplementedError
        lock.acquire(timeout=1)
    except Timeout:
        logger.info("%s: another process makes sample data there: waiting for it", folder)
        lock.acquire()
    except (OSError, NotImplementedError):  # a file system without locks, or one that cannot be written
        yield
        return
    try:
        yield
    finally:
        (folder / LOCK).unlink(missing_ok=True)
        lock.release()


def _create(folder: Path, num_samples: int, seed: int) -> Path:
    index_path, captions_dir, unfinished = folder / "data.json", folder / "captions", folder / UNFINISHED
    if unfinished.is_dir():
        _undo(folder)
    _refuse_foreign_files(folder)
    for name in ("images", "captions"):
        (folder / name).mkdir(parents=True, exist_ok=True)
    captions_dir.rename(unfinished)
    hidden_index = folder / ".data.json"
    try:
        rows = [
            _write_sample(folder, f"scene_{index:05d}", *sample)
            for index, sample in enumerate(distinct_scenes(num_samples, seed=seed))
        ]
        write_json(hidden_index, rows)
    except BaseException:  # Ctrl-C above all
        _undo(folder)
        raise
    unfinished.rename(captions_dir)
    return hidden_index.replace(index_path)


def _write_sample(folder: Path, stem: str, scene: Scene, captions: tuple[str, str]) -> dict[str, object]:
    """Write an image and its captions; return their record of the index."""
    render(scene).save(folder / "images" / f"{stem}.png")
    (folder / UNFINISHED / f"{stem}.txt").write_text("\n".join(captions) + "\n", encoding="utf-8", newline="\n")
    return {"image_path": f"images/{stem}.png", "caption": list(captions)}


def _undo(folder: Path) -> None:
    """Remove the samples of an unfinished creation; only its hidden folder proves that scene files are ours."""
    for path in [*(folder / "images").glob("*"), *(folder / UNFINISHED).glob("*")]:
        if SCENE_FILE.fullmatch(path.name):
            path.unlink()
    (folder / UNFINISHED).rename(folder / "captions")


def _refuse_foreign_files(folder: Path) -> None:
    for name in ("images", "captions"):
        for path in (folder / name).glob("*"):
            if not path.name.startswith("."):
                raise FileExistsError(f"{path} is not ours to replace; choose an empty folder for the sample data")
