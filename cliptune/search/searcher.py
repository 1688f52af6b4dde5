"""Queries, texts or images, to the images that fit them best."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor

from cliptune.features.encode import Encoder
from cliptune.preprocess.decode import MAX_PIXELS, decode_image
from cliptune.preprocess.tokens import tokenize
from cliptune.preprocess.transforms import clip_transform
from cliptune.runtime.device import autocast
from cliptune.search.index import ImageIndex
from cliptune.search.lookup import ExactLookup, Lookup

BATCH = 64


class Match(NamedTuple):
    """An image that was found."""

    image: int
    """Its index."""
    path: str
    """Below the folder that was indexed."""
    score: float
    """Cosine of its feature with the query's."""


def encode_texts(encoder: Encoder, texts: Sequence[str]) -> tuple[Tensor, int]:
    """Return the features of texts, float32 `[Q, D]`, and how many were cut at the model's context length."""
    model = encoder.model
    if not texts:
        return torch.empty(0, model.projection_dim), 0
    tokens, num_truncated = tokenize(texts, model.architecture.context_length)
    with torch.no_grad(), autocast(model.device, encoder.precision), _one_thread(only_if=len(texts) == 1):
        features = [model.encode_text(part).float().cpu() for part in tokens.split(BATCH)]
    return torch.cat(features), num_truncated


def encode_image(encoder: Encoder, image: str | Path | bytes, *, max_pixels: int = MAX_PIXELS) -> Tensor:
    """Return the feature of an image, by its path or its file's bytes: float32 `[1, D]`.

    Raises:
        ValueError: no image, a damaged one, or one of more than `max_pixels`.
        OSError: no such file, or it cannot be read.
    """
    model = encoder.model
    pixels = clip_transform(model.image_resolution)(decode_image(image, max_pixels=max_pixels))[None]  # [1, 3, R, R]
    with torch.no_grad(), autocast(model.device, encoder.precision):
        return model.encode_image(pixels).float().cpu()


@contextmanager
def _one_thread(*, only_if: bool) -> Iterator[None]:
    """Compute in this thread alone: one text is too little work to be divided.

    Where other programs keep the cores busy, as a training does, threads that wait for each other at every layer took
    ten times as long as one.
    """
    before = torch.get_num_threads()
    if only_if:
        torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(before)


class Searcher:
    """Images that can be found.

    Args:
        index: the images.
        lookup: over their features; None: an exact one.
    """

    def __init__(self, index: ImageIndex, lookup: Lookup | None = None) -> None:
        self.index = index
        self.lookup: Lookup = lookup or ExactLookup(index.features)

    def nearest(self, features: Tensor, top: int) -> list[list[Match]]:
        """Return the `top` images for each query's feature, `[Q, D]`, best first."""
        found = self.lookup.nearest(features, top)
        return [
            [
                Match(image, self.index.name_of(image), score)
                for score, image in zip(scores, images, strict=True)
                if image >= 0
            ]
            for scores, images in zip(found.scores.tolist(), found.indices.tolist(), strict=True)
        ]

    def like(self, image: int, top: int) -> list[Match]:
        """Return the `top` images that are most like one of the index, without itself."""
        (matches,) = self.nearest(self.index.features[image][None], top + 1)
        return [match for match in matches if match.image != image][:top]
