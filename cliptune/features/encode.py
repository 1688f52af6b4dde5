"""From a model and a data set to features: the one loop over images, the one over texts, and what goes through them."""

from __future__ import annotations

import functools
import logging
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from cliptune.data.cached_loader import reader_of
from cliptune.data.issues import Issue
from cliptune.data.kept_workers import KeptWorkers
from cliptune.data.loaders import Batch, SampleDataset, collate
from cliptune.data.pairs import Pairs
from cliptune.data.workers import make_loader
from cliptune.features.distinct import Distinct, Tokens, distinct
from cliptune.features.needs import EncodingModel, ImageDataset
from cliptune.features.tower_outputs import PairOutputs, TowerOutputs
from cliptune.model.mode import evaluating
from cliptune.preprocess.transforms import clip_transform
from cliptune.runtime.device import (
    Precision,
    autocast,
    default_num_workers,
    exact_products,
    is_out_of_memory,
    release_memory,
    to_device,
)
from cliptune.runtime.distributed import gather_rows, rank, world_size
from cliptune.runtime.logs import progress_bar

logger = logging.getLogger(__name__)

IMAGES_AT_ONCE, TEXTS_AT_ONCE = {"cpu": 16, "cuda": 256}, {"cpu": 64, "cuda": 1024}
"""Of a forward pass in float32 by the type of device, see `Encoder.images_at_once`: more are no faster on a processor
(ViT-B/32), and fewer do not fill a GPU, whose kernels take as long to launch for one image as for many."""
IMAGES_OF_A_WORKER = 32
"""That a worker hands over at once to a GPU: many workers then have a part in each of its large batches."""

IMAGES_PER_WORKER, IMAGES_PER_KEPT_WORKER = 32, 16
"""Fewer are no work for a worker: starting one takes as long as the main process needs for some 15 photos (eight
took 0.4 s beside a GPU). One that is kept is started once for many evaluations."""

Run = Callable[[Tensor], Tensor]
"""A method of the model, such as `encode_image`, on one batch."""


@dataclass(frozen=True)
class Encoder:
    """A model with all that decides how data goes through it.

    Args:
        model: on its device.
        open_dataset: makes a data set of `(pairs, transform=..., seed=...)`, as `data_loader.ImageTextDataset` does.
        precision: of the forward passes.
        batch_size: images or texts that are encoded at once; on a GPU at least `IMAGES_AT_ONCE` and `TEXTS_AT_ONCE`;
            it does not count in float32, see `images_at_once`.
        num_workers: of the image loader; None: chosen for the machine.
        image_cache_dir: folder where decoded images are cached; None: they are not. The features are the same.
        kept: workers that are kept from one data set's evaluation to the next; None: each starts its own.
    """

    model: EncodingModel
    open_dataset: Callable[..., ImageDataset]
    precision: Precision
    batch_size: int
    num_workers: int | None = None
    image_cache_dir: Path | None = None
    kept: KeptWorkers | None = None

    @property
    def images_at_once(self) -> int:
        """Images of one forward pass.

        A matrix product of another shape adds up in another order, and its last bits differ: in a batch of 7 or 100 a
        text's feature is off by 1e-7, enough to turn ranks that nearly tie. Exact numbers must not hang on that, so in
        float32 what runs together is always the same.
        """
        return self._at_once(IMAGES_AT_ONCE)

    @property
    def texts_at_once(self) -> int:
        """Texts of one forward pass, as `images_at_once`."""
        return self._at_once(TEXTS_AT_ONCE)

    def _at_once(self, fixed: Mapping[str, int]) -> int:
        kind = self.model.device.type
        if self.precision.dtype is None:
            return fixed.get(kind, fixed["cpu"])
        return max(self.batch_size, fixed[kind] if kind == "cuda" else 0)

    def run_images(
        self, dataset: SampleDataset, items: Tensor, run: Run, *, across_ranks: bool, desc: str
    ) -> Iterator[tuple[Batch, Tensor | None]]:
        """Run images through the model, each once, on this rank.

        Args:
            dataset: gives an image for each item.
            items: int64 `[N]`: which items of the data set.
            run: what the model does with a batch of pixels.
            across_ranks: all ranks have the same `items`, and each does its part; False: this one does all of them.
            desc: what the progress bar says.

        Yields:
            A batch, without the images that cannot be read, and what `run` gave, `[B, ...]`; None if no image was left.
        """
        model = self.model
        batches, num_rounds = _deal(items.split(self.images_at_once), across_ranks=across_ranks)
        pieces = [piece for batch in batches for piece in batch.split(self._images_of_a_worker)]
        loaded = self._loaded(dataset, [piece.tolist() for piece in pieces])
        blank = torch.zeros(1, 3, model.image_resolution, model.image_resolution, dtype=torch.uint8)
        for number in progress_bar(range(num_rounds), desc=desc):
            batch = self._joined(loaded, len(batches[number])) if number < len(batches) else None
            if batch is not None and len(batch.image_ids):
                yield batch, self._run(run, batch.images)
                continue
            if world_size() > 1 and across_ranks:
                self._run(run, blank)  # the other ranks may need this rank's shard of the weights for their batch
            if batch is not None:
                yield batch, None

    @property
    def _images_of_a_worker(self) -> int:
        return min(self.images_at_once, IMAGES_OF_A_WORKER) if self.model.device.type == "cuda" else self.images_at_once

    def _joined(self, pieces: Iterator[Batch], num_images: int) -> Batch | None:
        """Put the next pieces together on the device, each copied there while the next one is loaded."""
        device, num_pieces = self.model.device, -(-num_images // self._images_of_a_worker)
        parts = [piece._replace(images=to_device(piece.images, device)) for piece in islice(pieces, num_pieces)]
        if len(parts) < 2:
            return parts[0] if parts else None
        readable = [piece for piece in parts if len(piece.image_ids)] or parts[:1]
        joined: dict[str, Any] = {
            name: torch.cat([getattr(piece, name) for piece in readable])
            for name in Batch._fields if name not in {"issues", "jpegs"}
        }  # fmt: skip
        return Batch(issues=[issue for piece in parts for issue in piece.issues], **joined)

    def open_images(self, pairs: Pairs) -> SampleDataset:
        """Open images to be encoded, cached if they are to be; with `kept` the same data set each time."""
        resolution = self.model.image_resolution

        def make() -> ImageDataset:
            dataset = self.open_dataset(pairs, transform=clip_transform(resolution))
            if self.image_cache_dir is not None:
                try:
                    dataset.cache_images(self.image_cache_dir)
                except OSError as error:  # a disk that has filled up since the run began does not end it
                    _warn_once(f"images to be encoded are not cached: {error}")
            return dataset

        return make() if self.kept is None else self.kept.open((pairs, resolution), make)

    def _loaded(self, dataset: SampleDataset, batches: list[list[int]]) -> Iterator[Batch]:
        """Load batches: from the image cache if all are there, else with as many workers as there is work for."""
        device = self.model.device
        num_workers = default_num_workers(device) if self.num_workers is None else self.num_workers
        reader = reader_of(dataset, num_threads=num_workers, device=device)
        if reader is not None and reader.is_ready():
            if self.kept is not None:
                self.kept.end()  # they have nothing to do any more
            return reader.batches(batches)
        kept = self.kept if self.kept is not None and self.kept.holds(dataset) else None
        per_worker = IMAGES_PER_WORKER if kept is None else IMAGES_PER_KEPT_WORKER
        # a batch is one worker's work: for a single one none need be started
        most = min(len(batches), sum(map(len, batches)) // per_worker)
        num_workers = min(num_workers, most) if most > 1 else 0
        if kept is not None and num_workers:
            return kept.load(dataset, batches, num_workers=num_workers, device=device)
        return iter(
            make_loader(dataset, batch_sampler=batches, num_workers=num_workers, device=device, collate_fn=collate)
        )

    def run_texts(self, tokens: Tokens, run: Run, *, across_ranks: bool, desc: str) -> Iterator[tuple[Tensor, Tensor]]:
        """Run texts through the model, each once, on this rank.

        A batch costs as much as its longest text, so batches are made of texts of similar length:
        lengths 9 70 8 69 in batches of two run as 8 9 | 69 70, not as 9 70 | 8 69.

        Args:
            tokens: of the texts, `[M, L]`.
            run: what the model does with a batch of tokens.
            across_ranks, desc: as `run_images`'.

        Yields:
            Rows of `tokens` that are a batch, `[B]`, and what `run` gave, `[B, ...]`.
        """
        # a text ends with the highest token there is
        by_length = torch.from_numpy(np.argsort(tokens.argmax(1), kind="stable"))
        batches, num_rounds = _deal(by_length.split(self.texts_at_once), across_ranks=across_ranks)
        with progress_bar(total=len(tokens), unit="text", desc=desc) as bar:
            for batch in batches:
                yield batch, self._run(run, self._whole(tokens[batch.numpy()]))
                bar.update(len(batch) * (world_size() if across_ranks else 1))
            for _ in range(num_rounds - len(batches)):
                self._run(run, self._whole(tokens[:1]))  # for the other ranks, as with images

    def _whole(self, tokens: Tokens) -> Tensor:
        """Return tokens as the model takes them, int64 `[B, context_length]`."""
        whole = torch.zeros(len(tokens), self.model.architecture.context_length, dtype=torch.int64)
        whole[:, : tokens.shape[1]] = torch.from_numpy(tokens.astype(np.int64))
        return whole

    def project(self, cached: TowerOutputs, indices: Tensor, run: Run) -> Tensor:
        """Take cached outputs of a frozen tower into the shared space: float32 `[len(indices), D]` on the device."""
        features = torch.empty(len(indices), self.model.projection_dim, device=self.model.device)
        for start in range(0, len(indices), self.texts_at_once):
            rows = slice(start, start + self.texts_at_once)
            features[rows] = self._run(run, cached[indices[rows].numpy()])
        return features

    def _run(self, run: Run, inputs: Tensor) -> Tensor:
        try:
            # PyTorch lets convolutions on an NVIDIA GPU, a ResNet's, round their factors to 10 bits by default
            is_exact = self.precision.dtype is None
            # not inference_mode: FSDP's buffers would be unfit for training afterwards
            with (
                torch.no_grad(),
                autocast(self.model.device, self.precision),
                exact_products() if is_exact else nullcontext(),
            ):
                return run(inputs)
        except Exception as error:
            # the ranks of a sharded model must run it equally often
            if not is_out_of_memory(error) or len(inputs) == 1 or hasattr(self.model, "unshard"):
                raise
        # below the handler, which holds on to the tensors of what failed
        _warn_once(f"out of memory with {len(inputs)} at once: encoding halves, whose last digits may differ")
        release_memory(self.model.device)
        return torch.cat([self._run(run, half) for half in inputs.chunk(2)])


class Encoded(NamedTuple):
    """A data set's features, and how fast they came."""

    image_features: Tensor
    """float32 `[N, D]`."""
    text_features: Tensor
    """float32 `[M, D]`."""
    text_to_image: Tensor
    """int64 `[M]`: image of each text."""
    image_indices: Tensor
    """int64 `[N]`: which of the data set's images these are; those that could not be read are missing."""
    text_indices: Tensor
    """int64 `[M]`: which of its captions."""
    image_kinds: Tensor
    """int64 `[N]`: row of the first image whose file has the same bytes."""
    text_kinds: Tensor
    """int64 `[M]`: row of the first text that has the same tokens."""
    images_per_second: float
    texts_per_second: float


def log_issue(issue: Issue) -> None:
    """Warn of an image that is skipped."""
    logger.warning("skipped: %s", issue)


def encode_pairs(
    encoder: Encoder,
    pairs: Pairs,
    *,
    cached: PairOutputs | None = None,
    on_unreadable_image: Callable[[Issue], None] = log_issue,
) -> Encoded:
    """Encode every image and every caption, without the images that cannot be read and their captions.

    Each distinct text and each distinct image runs once, so equal ones have the very same feature and tie exactly.
    Features leave the device batch by batch: however large the data set, a GPU holds one batch.

    Args:
        encoder: its model comes back in the mode it came in.
        pairs: images with all their captions.
        cached: outputs of the model's frozen towers, which are then only projected.
        on_unreadable_image: called with each image that cannot be read, in the rank that met it.

    Raises:
        ValueError: no image could be read.
    """
    model, outputs = encoder.model, cached or PairOutputs(None, None)
    with evaluating(model):
        start = time.perf_counter()
        same = distinct(pairs, model.architecture.context_length)
        image_features, readable = encode_images(
            encoder, pairs, cached=outputs.images, on_unreadable_image=on_unreadable_image
        )
        middle = time.perf_counter()
        # the images that could be read are counted anew: of 0 1 2 without 1, 0 -> 0 and 2 -> 1
        new_index = torch.full((len(pairs),), -1)
        new_index[readable] = torch.arange(len(readable))
        text_to_image = new_index[pairs.text_to_image]
        text_indices = (text_to_image >= 0).nonzero().squeeze(1)
        text_rows = torch.from_numpy(same.text_rows)[text_indices]
        text_features = _encode_texts(encoder, same, text_rows, outputs.texts)
        end = time.perf_counter()
    return Encoded(
        image_features,
        text_features,
        text_to_image[text_indices],
        readable,
        text_indices,
        _first_equal(torch.from_numpy(same.image_kinds)[readable]),
        _first_equal(text_rows),
        images_per_second=len(image_features) / (middle - start),
        texts_per_second=len(text_features) / (end - middle),
    )


def _first_equal(codes: Tensor) -> Tensor:
    """Return the index of the first code that equals each one: 7 5 7 -> 0 1 0."""
    kinds, row_of_kind = torch.unique(codes, return_inverse=True)
    first = torch.full((len(kinds),), len(codes)).scatter_reduce_(0, row_of_kind, torch.arange(len(codes)), "amin")
    return first[row_of_kind]


def encode_images(
    encoder: Encoder,
    pairs: Pairs,
    *,
    cached: TowerOutputs | None = None,
    on_unreadable_image: Callable[[Issue], None] = log_issue,
) -> tuple[Tensor, Tensor]:
    """Return the features `[N, D]` of the images that could be read, and their indices `[N]`.

    Args:
        encoder: its model is in evaluation mode.
        pairs: the images.
        cached: outputs of the model's frozen image tower.
        on_unreadable_image: called with each image that cannot be read, in the rank that met it.

    Raises:
        ValueError: no image could be read.
    """
    same = distinct(pairs, encoder.model.architecture.context_length)
    kinds = torch.from_numpy(same.image_kinds)  # [all images]
    indices = torch.arange(len(pairs))
    if cached is not None:
        for issue in cached.issues.values():
            on_unreadable_image(issue)
        is_readable = torch.from_numpy(cached.rows >= 0)
        _check_any(is_readable)
        sources = torch.where(is_readable[kinds], kinds, indices)[is_readable]
        encoded = sources.unique()
        features = encoder.project(cached, encoded, encoder.model.project_image)
    else:
        features, encoded = _run_images(encoder, pairs, (kinds == indices).nonzero().squeeze(1), on_unreadable_image)
        is_readable = torch.zeros(len(pairs), dtype=torch.bool)
        is_readable[encoded] = True
        # copies of what cannot be read are tried, too, and each is an issue of its own
        copies = ((kinds != indices) & ~is_readable[kinds]).nonzero().squeeze(1)
        if len(copies):
            more, found = _run_images(encoder, pairs, copies, on_unreadable_image)
            is_readable[found] = True
            order = torch.argsort(torch.cat([encoded, found]))
            features, encoded = torch.cat([features, more])[order], torch.cat([encoded, found])[order]
        _check_any(is_readable)
        sources = torch.where(is_readable[kinds], kinds, indices)
        is_readable |= is_readable[kinds]
        sources = sources[is_readable]
    if len(encoded) < len(sources):  # rows of copies: `encoded` is sorted
        features = features[torch.searchsorted(encoded, sources).to(features.device)]
    return features, is_readable.nonzero().squeeze(1)


def _run_images(
    encoder: Encoder, pairs: Pairs, items: Tensor, on_unreadable_image: Callable[[Issue], None]
) -> tuple[Tensor, Tensor]:
    """Encode some images; return the features of those that could be read, and their indices, sorted."""
    model = encoder.model
    dataset = encoder.open_images(pairs)
    found = _FeatureRows(len(items), encoder)
    for batch, features in encoder.run_images(
        dataset, items, model.encode_image, across_ranks=True, desc="encode images"
    ):
        for issue in batch.issues:
            on_unreadable_image(issue)
        if features is not None:
            found.add(batch.image_ids, features)
    return found.of_all_ranks()


def _encode_texts(encoder: Encoder, same: Distinct, rows: Tensor, cached: TowerOutputs | None) -> Tensor:
    """Return the features `[M, D]` of texts, of which row `rows` `[M]` of the distinct ones is each."""
    model = encoder.model
    wanted, row_of_text = torch.unique(rows, return_inverse=True)
    if cached is not None:
        features = encoder.project(cached, torch.from_numpy(same.first_captions)[wanted], model.project_text)
    else:
        found = _FeatureRows(len(wanted), encoder)
        tokens = same.tokens[wanted.numpy()]
        for batch, features in encoder.run_texts(tokens, model.encode_text, across_ranks=True, desc="encode texts"):
            found.add(batch, features)
        features = found.of_all_ranks()[0]
    is_same = len(wanted) == len(rows) and bool((row_of_text == torch.arange(len(rows))).all())
    return features if is_same else features[row_of_text.to(features.device)]


@functools.cache
def _warn_once(message: str) -> None:
    logger.warning(message)


def _check_any(is_readable: Tensor) -> None:
    if not is_readable.any():
        raise ValueError("none of the images could be read; try data_loader.py --check, which lists what is wrong")


class _FeatureRows:
    """Features on their way from the device to main memory; the device goes on while they are copied."""

    def __init__(self, num_all: int, encoder: Encoder) -> None:
        self.device = encoder.model.device
        self.on_gpu = self.device.type == "cuda"
        # a rank has its part of the batches, rounded up to a whole one
        num_own = num_all // world_size() + 2 * max(encoder.images_at_once, encoder.texts_at_once)
        self.rows = torch.empty(min(num_all, num_own), encoder.model.projection_dim, pin_memory=self.on_gpu)
        self.indices = [torch.empty(0, dtype=torch.int64)]
        self.end = 0

    def add(self, indices: Tensor, features: Tensor) -> None:
        start, self.end = self.end, self.end + len(features)
        self.rows[start : self.end].copy_(features, non_blocking=self.on_gpu)
        self.indices.append(indices)

    def of_all_ranks(self) -> tuple[Tensor, Tensor]:
        """Return all ranks' features `[N, D]` in the order of their indices, and the indices `[N]`."""
        if self.on_gpu:
            torch.cuda.synchronize(self.device)  # once, for all copies
        indices, rows = gather_rows(torch.cat(self.indices)), gather_rows(self.rows[: self.end])
        order = torch.argsort(indices)
        return rows[order], indices[order]


def _deal(batches: Sequence[Tensor], *, across_ranks: bool) -> tuple[Sequence[Tensor], int]:
    """Return this rank's batches, whole ones in turn, and how many the rank with the most has."""
    if not across_ranks:
        return batches, len(batches)
    return batches[rank() :: world_size()], -(-len(batches) // world_size())
