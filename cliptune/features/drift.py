"""How far a model's features have moved: of generic texts and drawn scenes, which no run is trained on.

Where nobody has named a data set that tells what is forgotten, this tells at least whether anything can be: a model
whose neighbours are all the same as before has lost nothing that retrieval would show.
"""

from __future__ import annotations

from importlib.resources import files
from itertools import islice
from typing import NamedTuple

import torch
from torch import Tensor

from cliptune.data.sample_data import distinct_scenes, render
from cliptune.features.encode import Encoder
from cliptune.preprocess.tokens import tokenize
from cliptune.preprocess.transforms import clip_transform
from cliptune.runtime.device import autocast, exact_products

NUM_SCENES = 32
SCENE_SEED = 2**31
"""Of the scenes: one that no sample data set is made with, unless somebody asks for it."""
NUM_NEIGHBOURS = 5
LITTLE, MUCH = 90.0, 60.0
"""Percent of the neighbours: with more than the first that stay the model is much as it was, with fewer than the second
much of it has moved. Of random features 2.5% (of 200 texts) and 16% (of 32 scenes) stay."""


class ProbeFeatures(NamedTuple):
    """What a model makes of the generic texts `[200, D]` and the drawn scenes `[32, D]`; unit norm, float32."""

    texts: Tensor
    images: Tensor


class Drift(NamedTuple):
    """How far features are from those of the model as loaded."""

    text_overlap: float
    """Percent of each text's nearest neighbours among the texts that are still the same."""
    image_overlap: float
    text_cosine: float
    """Mean cosine of a feature with itself before."""
    image_cosine: float
    num_texts: int
    num_images: int
    num_neighbours: int

    def describe(self) -> str:
        """Say it in a line, and what it means."""
        stays = min(self.text_overlap, self.image_overlap)
        meaning = "hardly anything that it knew has moved" if stays > LITTLE else "part of what it knew has moved"
        meaning = "much of what it knew has moved" if stays < MUCH else meaning
        return (
            f"drift: of the {self.num_neighbours} nearest neighbours {self.text_overlap:.0f}% stay among "
            f"{self.num_texts} generic texts and {self.image_overlap:.0f}% among {self.num_images} drawn scenes (mean "
            f"cosine with the model as loaded {self.text_cosine:.2f} and {self.image_cosine:.2f}): {meaning}; "
            "--watch_data DIR tells what that costs"
        )


def generic_texts() -> list[str]:
    """Return class names, each in a sentence, and captions of all kinds."""
    return files("cliptune.features").joinpath("generic_texts.txt").read_text(encoding="utf-8").splitlines()


def encode_probes(encoder: Encoder) -> ProbeFeatures:
    """Encode the generic texts and the drawn scenes; every rank does all of them, with a model that is not sharded.

    Args:
        encoder: its model is in evaluation mode.
    """
    model, transform = encoder.model, clip_transform(encoder.model.image_resolution)
    tokens, _ = tokenize(generic_texts(), model.architecture.context_length)  # [200, L]
    scenes = (scene for scene, _ in distinct_scenes(NUM_SCENES, seed=SCENE_SEED))
    texts, images = [], []
    with torch.no_grad(), autocast(model.device, encoder.precision):
        for batch in tokens.split(encoder.batch_size):
            texts.append(model.encode_text(batch).cpu())
        while pixels := [transform(render(scene)) for scene in islice(scenes, encoder.batch_size)]:
            images.append(model.encode_image(torch.stack(pixels)).cpu())
    return ProbeFeatures(torch.cat(texts), torch.cat(images))


def drift_between(before: ProbeFeatures, after: ProbeFeatures, *, num_neighbours: int = NUM_NEIGHBOURS) -> Drift:
    """Compare a model's features with those of the model as loaded."""
    return Drift(
        text_overlap=neighbour_overlap(before.texts, after.texts, k=num_neighbours),
        image_overlap=neighbour_overlap(before.images, after.images, k=num_neighbours),
        text_cosine=(before.texts * after.texts).sum(1).mean().item(),
        image_cosine=(before.images * after.images).sum(1).mean().item(),
        num_texts=len(before.texts),
        num_images=len(before.images),
        num_neighbours=num_neighbours,
    )


def neighbour_overlap(before: Tensor, after: Tensor, *, k: int) -> float:
    """Return which percentage of the k nearest neighbours, by cosine and without the item itself, are the same.

    Neighbours 1 2 3 before and 2 3 4 after, of k = 3: 2/3 stay. Features that were turned as a whole keep all of them,
    though every cosine with themselves before has changed.

    Args:
        before: unit-norm features `[N, D]`, N > k.
        after: of the same items, `[N, D']`.
        k: how many neighbours of each.
    """
    neighbours = []
    for features in (before, after):
        with exact_products():
            cosines = (features @ features.T).fill_diagonal_(-torch.inf)
        neighbours.append(cosines.topk(k).indices)  # [N, k]
    same = (neighbours[0][:, :, None] == neighbours[1][:, None, :]).any(2)  # [N, k]
    return 100 * same.double().mean().item()
