"""Two drawn worlds: one that a small model is trained on at length, and one that has shifted from it.

The first is `cliptune.data.sample_data`'s: flat shapes on a plain background, and its words. It stands for the web that
a published model has seen. The second stands for somebody's own images: the same kinds of scenes in another style
(tilted outlines on ruled, grainy paper), and described in other words (a huge amber spark, not a large orange star).
"""

from __future__ import annotations

import math
import random
import re
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image, ImageDraw

from cliptune.data.sample_data import COLOURS, IMAGE_SIZE, OUTLINES, Group, Scene, distinct_scenes, render
from cliptune.runtime.files import write_json

OTHER_WORDS = {
    "orange": "amber", "green": "emerald", "purple": "violet", "brown": "chestnut", "white": "snowy", "square": "box",
    "star": "spark", "cross": "plus", "hexagon": "nut", "diamond": "kite", "large": "huge", "small": "tiny",
    "picture": "drawing", "background": "paper",
}  # fmt: skip
"""A word of the first world, and what the second one says for it; other words are the same, as is their order."""
DESK = (150, 140, 128)
SHEET_SIDES = (190, 224)
"""Pixels: the sheet that a scene is drawn on lies somewhere on a desk."""
MAX_TILT = math.pi / 5
GRAIN = 24
"""Levels of 255 by which a grain of the paper differs from its colour, at most."""
RULING = 28
"""Pixels between two lines of the paper."""


def write_world(folder: Path, num_images: int, *, seed: int, shifted: bool) -> Path:
    """Write a data set of one of the worlds: `images/` and `data.json`, two captions an image.

    Args:
        folder: that does not hold it yet; a folder with its `data.json` is left as it is.
        num_images: how many scenes.
        seed: of the scenes; sample i does not depend on how many there are.
        shifted: the second world.

    Returns:
        The folder.
    """
    index = folder / "data.json"
    if index.exists():
        return folder
    (folder / "images").mkdir(parents=True, exist_ok=True)
    records: list[dict[str, Any]] = []
    for number, (scene, captions) in enumerate(distinct_scenes(num_images, seed=seed)):
        path = folder / "images" / f"{number:06d}.png"
        image = draw_shifted(scene, seed=number) if shifted else render(scene)
        image.save(path, compress_level=1)
        said = [in_other_words(caption) for caption in captions] if shifted else list(captions)
        records.append({"image_path": f"images/{path.name}", "caption": said})
    write_json(index, records)
    return folder


def in_other_words(caption: str) -> str:
    """Say a caption of the first world in the words of the second: `an orange star` is `an amber spark`."""
    words = re.sub(r"[a-z]+", _other_word, caption)
    return re.sub(r"\b(an?) (\w)", lambda found: f"{'an' if found[2] in 'aeiou' else 'a'} {found[2]}", words)


def _other_word(found: re.Match[str]) -> str:
    word = found[0]
    for ending in ("", "es", "s"):
        stem = word.removesuffix(ending) if ending else word
        if stem in OTHER_WORDS:
            other = OTHER_WORDS[stem]
            return other + (("es" if other.endswith(("s", "x")) else "s") if ending else "")
    return word


def draw_shifted(scene: Scene, *, seed: int) -> Image.Image:
    """Draw a scene of the second world, RGB 224 x 224."""
    rng = random.Random(seed)
    scale, size = 2, IMAGE_SIZE * 2
    image = Image.new("RGB", (size, size), COLOURS[scene.background])
    draw = ImageDraw.Draw(image)
    shade = 40 if sum(COLOURS[scene.background]) < 384 else -40
    line = tuple(min(max(level + shade, 0), 255) for level in COLOURS[scene.background])
    for offset in range(rng.randrange(RULING), size, RULING * scale):
        draw.line([(0, offset), (size, offset)], fill=line, width=scale)
    for group in scene.groups:
        tilt = rng.uniform(-MAX_TILT, MAX_TILT)
        for centre in group.centres:
            outline = _tilted(group, centre, tilt=tilt, scale=scale)
            draw.line([*outline, *outline[:2]], fill=COLOURS[group.colour], width=max(2, group.radius // 5) * scale)
    side = rng.randint(*SHEET_SIDES)
    desk = Image.new("RGB", (IMAGE_SIZE, IMAGE_SIZE), DESK)
    desk.paste(image.resize((side, side)), (rng.randint(0, IMAGE_SIZE - side), rng.randint(0, IMAGE_SIZE - side)))
    grain = np.random.default_rng(seed).integers(-GRAIN, GRAIN + 1, (IMAGE_SIZE, IMAGE_SIZE, 1))
    return Image.fromarray((np.asarray(desk) + grain).clip(0, 255).astype(np.uint8))


def _tilted(group: Group, centre: tuple[float, float], *, tilt: float, scale: int) -> list[tuple[float, float]]:
    cosine, sine, radius = math.cos(tilt), math.sin(tilt), group.radius * 0.9
    return [
        (scale * (centre[0] + radius * (x * cosine - y * sine)), scale * (centre[1] + radius * (x * sine + y * cosine)))
        for x, y in OUTLINES[group.shape]
    ]
