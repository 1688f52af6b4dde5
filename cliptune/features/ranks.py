"""Features to similarities to ranks to metrics: pure functions on tensors, over the full gallery, in blocks."""

from __future__ import annotations

import math
from collections.abc import Iterator
from itertools import islice
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from cliptune.runtime.device import exact_products
from cliptune.runtime.distributed import all_sum, rank, world_size

MAX_KEPT_BYTES = 2**27  # of products that are needed twice
CACHED_SCORES = 2**17  # that a core counts at once: 512 KiB, and as much room to count in


class Ranks(NamedTuple):
    """Rank of the best match of each query, 1 is best; halves come from ties."""

    i2t: Tensor
    """float64 `[number of images with a text]`."""
    t2i: Tensor
    """float64 `[number of texts]`."""


@torch.no_grad()
def retrieval_ranks(
    image_features: Tensor,
    text_features: Tensor,
    text_to_image: Tensor,
    *,
    image_block: int | None = None,
    text_block: int | None = None,
    device: torch.device | None = None,
) -> Ranks:
    """Rank every query's best match in the full gallery.

    Rank = 1 + the negatives that score higher + half of those that score the same. Every score, a match's too, is an
    element of a float32 product of one fixed, padded block shape: a product of another shape can differ in the last
    bit, which would break ties (a collapsed model would come out first or last, not in the middle).

    Args:
        image_features: `[N, D]`.
        text_features: `[M, D]`; a copy is sorted by image unless they are so already.
        text_to_image: `[M]`.
        image_block: images scored at once; None: what suits the device's caches.
        text_block: texts scored at once. Beside the features, memory is proportional to the two blocks' product.
        device: where the scores are computed; None: where the text features are. Features in main memory move there
            block by block, so a GPU need not hold them.

    Returns:
        Ranks in main memory.

    Raises:
        ValueError: shapes that do not fit, features that are not finite, an image row that is not there.
    """
    owners = _check_features(image_features, text_features, text_to_image)
    order = torch.argsort(owners, stable=True)  # then an image's texts lie in few blocks
    if not torch.equal(order, torch.arange(len(order))):
        text_features, owners = text_features[order.to(text_features.device)], owners[order]
    num_texts_of = torch.bincount(owners, minlength=len(image_features))
    products = _Products(
        image_features,
        text_features,
        image_block=image_block,
        text_block=text_block,
        device=text_features.device if device is None else device,
    )
    with exact_products():
        own = products.own_scores(owners, num_texts_of)
        best = torch.zeros(len(image_features)).scatter_reduce_(0, owners, own, "amax", include_self=False)
        ahead_of_image, ahead_of_text = products.count_halves(best, own)
    # an image's own captions that tie with its best are no negatives, nor is a text's own image
    ahead_of_image.scatter_add_(0, owners, -(own == best[owners]).double())
    t2i = torch.empty_like(ahead_of_text)
    t2i[order] = 1 + (ahead_of_text - 1) / 2
    return Ranks(1 + ahead_of_image[num_texts_of > 0] / 2, t2i)


class _Products:
    """Products of equal shape between blocks of images and blocks of texts, and what is counted in them.

    The blocks are large enough for the product to run at full speed. On a processor they are counted strip by strip, so
    that a strip and the room to count in it stay in the cores' own caches; on a GPU blocks are larger and one strip, so
    that the work outweighs the launches.
    """

    def __init__(
        self, images: Tensor, texts: Tensor, *, image_block: int | None, text_block: int | None, device: torch.device
    ) -> None:
        usual = (2048, 8192) if device.type == "cuda" else (1024, 1024)
        self.image_block = _block_size(len(images), image_block or usual[0])
        self.text_block = _block_size(len(texts), text_block or usual[1])
        strip = CACHED_SCORES * torch.get_num_threads() // self.text_block if device.type == "cpu" else self.image_block
        self.strip = max(strip, 1)
        self.images, self.texts, self.device = images, texts, device
        self._scores = torch.empty(self.image_block, self.text_block, device=device)
        self._kept: dict[tuple[int, int], Tensor] = {}

    def own_scores(self, owners: Tensor, num_texts_of: Tensor) -> Tensor:
        """Return each text's score with its own image, float32 `[M]`; `owners` is sorted."""
        own = torch.zeros(len(self.texts), device=self.device)
        first_text = [0, *num_texts_of.cumsum(0).tolist()]
        owners = owners.to(self.device)
        for rows in self._own_blocks():
            first, end = first_text[rows.start], first_text[rows.stop]
            images = self._block(self.images, rows, self.image_block)
            for start in range(first - first % self.text_block, end, self.text_block):
                columns = slice(start, min(start + self.text_block, len(self.texts)))
                scores = self._multiply(images, rows, columns, keep=True)
                mine = torch.arange(max(first, start), min(end, columns.stop), device=self.device)
                own[mine] = scores[owners[mine] - rows.start, mine - start]
        return all_sum(own).cpu()

    def count_halves(self, best: Tensor, own: Tensor) -> tuple[Tensor, Tensor]:
        """Count, in halves of a place, which scores come before: 2 for each that is higher, 1 for each that is equal.

        Args:
            best: score that a row's are compared with, float32 `[N]`.
            own: score that a column's are compared with, float32 `[M]`.

        Returns:
            float64 `[N]` and `[M]`; float64 counts exactly up to 2^53.
        """
        best, own = _padded(best.to(self.device), self.image_block), _padded(own.to(self.device), self.text_block)
        of_image, of_text = best.new_zeros(len(best), dtype=torch.float64), own.new_zeros(len(own), dtype=torch.float64)
        difference = torch.empty_like(self._scores[: self.strip])
        for rows in self._own_blocks():
            images = self._block(self.images, rows, self.image_block)
            for columns in _slices(len(self.texts), self.text_block):
                scores = self._multiply(images, rows, columns)
                all_columns = slice(columns.start, columns.start + self.text_block)
                for start in range(0, self.image_block, self.strip):
                    strip = scores[start : start + self.strip]
                    of_rows = slice(rows.start + start, rows.start + start + len(strip))
                    # the signs' sum is higher minus lower; a float32 sum of up to 2^24 signs is exact
                    signs = torch.sub(strip, best[of_rows, None], out=difference[: len(strip)]).sign_()
                    of_image[of_rows] += signs.sum(1)
                    of_text[all_columns] += strip.sub_(own[all_columns]).sign_().sum(0)
        # higher - lower + all = 2 higher + equal; the padding is lower than anything
        halves_of_image = all_sum(of_image)[: len(self.images)] + len(own)
        halves_of_text = all_sum(of_text)[: len(self.texts)] + len(best)
        return halves_of_image.cpu(), halves_of_text.cpu()

    def _own_blocks(self) -> Iterator[slice]:
        """Yield this process's blocks of images; the blocks are the same for any number of processes."""
        blocks = _slices(len(self.images), self.image_block)
        return islice(blocks, rank(), None, world_size())

    def _multiply(self, images: Tensor, rows: slice, columns: slice, *, keep: bool = False) -> Tensor:
        """Score a block; `keep` holds it, while there is room, for the next call that asks for it."""
        place = rows.start, columns.start
        if place in self._kept:
            return self._kept.pop(place)
        keep = keep and (len(self._kept) + 1) * self._scores.nbytes <= MAX_KEPT_BYTES
        scores = torch.empty_like(self._scores) if keep else self._scores
        torch.mm(images, self._block(self.texts, columns, self.text_block).T, out=scores)
        if rows.stop - rows.start < self.image_block:
            scores[rows.stop - rows.start :] = -math.inf
        if columns.stop - columns.start < self.text_block:
            scores[:, columns.stop - columns.start :] = -math.inf
        if keep:
            self._kept[place] = scores
        return scores

    def _block(self, features: Tensor, span: slice, size: int) -> Tensor:
        return _padded(features[span].to(self.device, torch.float32, non_blocking=True), size)


def _slices(total: int, size: int) -> Iterator[slice]:
    for start in range(0, total, size):
        yield slice(start, min(start + size, total))


def _block_size(total: int, most: int) -> int:
    """Divide into equal blocks, as few as possible, so that little is padding; products of few rows are slow."""
    number = -(-total // most)
    return max(-(-total // (number * 16)) * 16, 64)


def _padded(values: Tensor, multiple: int) -> Tensor:
    """Append zeros until the length is a multiple."""
    missing = -len(values) % multiple
    return torch.cat([values, values.new_zeros(missing, *values.shape[1:])]) if missing else values


def _check_features(image_features: Tensor, text_features: Tensor, text_to_image: Tensor) -> Tensor:
    """Return `text_to_image` in main memory, if all fits together."""
    largest_product = 1.0
    for name, features in (("image_features", image_features), ("text_features", text_features)):
        if features.ndim != 2 or not features.numel():
            raise ValueError(f"{name} must be [N, D] with N > 0, got {tuple(features.shape)}")
        largest = torch.stack(features.aminmax()).abs().max().item()  # needs no copy; NaN comes through
        if not math.isfinite(largest):
            raise ValueError(f"{name} are not finite: the model has diverged")
        largest_product *= largest
    if largest_product * text_features.shape[1] > torch.finfo(torch.float32).max:
        raise ValueError("the features are too large: their products overflow float32")
    owners = torch.as_tensor(text_to_image, dtype=torch.int64).cpu()
    if image_features.shape[1] != text_features.shape[1] or owners.shape != (len(text_features),):
        shapes = f"{tuple(image_features.shape)}, {tuple(text_features.shape)}, {tuple(owners.shape)}"
        raise ValueError(f"image_features [N, D], text_features [M, D], text_to_image [M] do not fit: {shapes}")
    if int(owners.min()) < 0 or int(owners.max()) >= len(image_features):
        bad = int(owners.min()) if int(owners.min()) < 0 else int(owners.max())
        raise ValueError(f"text_to_image names image row {bad}, but there are {len(image_features)} images")
    return owners


def validation_loss(
    image_features: Tensor, text_features: Tensor, text_to_image: Tensor, *, scale: float, batch_size: int
) -> float:
    """Return the mean contrastive loss (nats) of each image's first text, in batches of the training's size.

    The loss depends on the batch size, so only full batches count; a smaller set is one batch.
    """
    owners = torch.as_tensor(text_to_image).cpu()
    images, first = torch.unique(owners, return_inverse=True)
    first_text = torch.full((len(images),), len(owners)).scatter_reduce_(0, first, torch.arange(len(owners)), "amin")
    losses = []
    for start in range(0, max(len(images) - batch_size, 0) + 1, batch_size):
        rows = slice(start, start + batch_size)
        logits = scale * (image_features[images[rows]].float() @ text_features[first_text[rows]].float().T)
        labels = torch.arange(len(logits), device=logits.device)
        losses.append((F.cross_entropy(logits, labels) + F.cross_entropy(logits.T, labels)) / 2)
    return torch.stack(losses).mean().item()
