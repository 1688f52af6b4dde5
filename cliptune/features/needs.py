"""What features need of a stage's classes: a model with two towers, and a data set of images."""

from __future__ import annotations

from pathlib import Path
from typing import Any, Protocol

import torch
from torch import Tensor

from cliptune.data.loaders import SampleDataset
from cliptune.model.architectures import Architecture


class EncodingModel(Protocol):
    """What is needed of a model with two towers, such as `clip_model.CLIPModel`."""

    training: bool

    @property
    def architecture(self) -> Architecture:
        """Its sizes."""

    @property
    def device(self) -> torch.device:
        """Where it runs."""

    @property
    def image_resolution(self) -> int:
        """R, in pixels."""

    @property
    def projection_dim(self) -> int:
        """D, size of the shared space."""

    @property
    def logit_scale(self) -> Tensor:
        """Log of the inverse temperature, a scalar."""

    @property
    def frozen_towers(self) -> tuple[str, ...]:
        """Which of `image` and `text` never change."""

    def tower_state(self, tower: str, /) -> dict[str, Tensor]:
        """Return a tower's weights by name."""

    def run_image_tower(self, images: Tensor, /) -> Tensor:
        """Pixels `[B, 3, R, R]` to `[B, embed_dim]`."""

    def run_text_tower(self, tokens: Tensor, /) -> Tensor:
        """Tokens `[B, L]` to `[B, embed_dim]`."""

    def project_image(self, tower_output: Tensor, /) -> Tensor:
        """`[B, embed_dim]` to unit-norm `[B, D]`."""

    def project_text(self, tower_output: Tensor, /) -> Tensor:
        """`[B, embed_dim]` to unit-norm `[B, D]`."""

    def encode_image(self, images: Tensor, /) -> Tensor:
        """Tower and projection."""

    def encode_text(self, tokens: Tensor, /) -> Tensor:
        """Tower and projection."""

    def eval(self) -> Any:
        """Leave training mode."""

    def train(self, mode: bool, /) -> Any:
        """Set training mode."""


class ImageDataset(SampleDataset, Protocol):
    """What is needed of a data set, such as `data_loader.ImageTextDataset`."""

    def cache_images(self, folder: Path) -> None:
        """Cache each image in `folder` once it is decoded and shrunk."""
