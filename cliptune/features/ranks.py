"""From features to the rank of every query's best match: over the full gallery, in blocks, no score matrix is held."""

from __future__ import annotations

import logging
import math
from collections.abc import Iterator
from typing import Any, NamedTuple

import torch
from torch import Tensor

from cliptune.runtime.device import exact_products, free_memory, to_device
from cliptune.runtime.distributed import all_sum, rank_slice
from cliptune.runtime.messages import one_line

logger = logging.getLogger(__name__)

MAX_CACHED_BYTES = {"cpu": 2**27, "cuda": 2**30}  # of products that are needed twice
SCORES_AT_ONCE = 2**17  # that a core counts: 512 KiB, and as much room to count in, stay in its cache
BLOCKS = {"cpu": (1024, 1024), "cuda": (2048, 4096)}
"""Images and texts that are scored at once. A GPU's 32 MiB, and half as much room to count in, are about what the cache
of a large one holds, and their product outweighs the launches."""
RESIDENT_FRACTION = 0.25
"""Of a GPU's free memory: features that take no more move there as a whole, larger ones block by block."""
COMPILED_SCORES = 2**37
"""From which on counting is compiled on a GPU: the product alone takes seconds, and compiling takes about as many."""
FLAGS_IN_A_BYTE = 32
"""Of each kind that are added up in a byte of a word, see `_Products._count_flags`: twice 32 leave its top bit free."""


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
    blocks: tuple[int, int] | None = None,
    device: torch.device | None = None,
    scores_at_once: int = SCORES_AT_ONCE,
    max_cached_bytes: int | None = None,
    counting: str | None = None,
) -> Ranks:
    """Rank every query's best match in the full gallery.

    Rank = 1 + the negatives that score higher + half of those that score the same, which is the mean rank over all
    orders of the ties: a match that scores 0.8 among negatives of 0.9, 0.8, 0.8 and 0.1 has rank 1 + 1 + 2/2 = 3, the
    middle of 2, 3 and 4. So a collapsed model, whose scores are all the same, comes out in the middle, not first.

    For that a match's score must be the very bits of the block product that its negatives are in. A product of another
    shape adds in another order and can differ in the last bit (0.80000001 for the match, 0.8 for all its equals: rank
    2), so every score, a match's too, is an element of a float32 product of one fixed, padded block shape.

    Args:
        image_features: `[N, D]`.
        text_features: `[M, D]`; a copy is sorted by image unless they are so already.
        text_to_image: image of each text, `[M]`; or, where a text may have several, each match once as image and text,
            `[2, E]`.
        blocks: images and texts scored at once; None: what suits the device's caches. Beside the features, memory is
            proportional to their product.
        device: where the scores are computed; None: where the text features are. Features in main memory move there
            block by block where they are large, so a GPU need not hold them.
        scores_at_once: scores that a core of the processor counts at once.
        max_cached_bytes: of products that hold a match and are needed twice; beyond it they are computed again. None:
            what suits the device.
        counting: by `signs` of a strip, by `flags` of a block, or `compiled`, where that works; the counts are the
            same. None: what suits the device and the number of scores.

    Returns:
        Ranks in main memory. A query's rank is that of its best match, and its other matches are never ahead of it.

    Raises:
        ValueError: shapes that do not fit, features that are not finite, an image or text that is not there.
    """
    device = text_features.device if device is None else device
    image_features, text_features = _resident(image_features, text_features, device=device)
    images, texts = check_features(image_features, text_features, text_to_image)
    # then an image's texts lie in few blocks
    first_image = torch.full((len(text_features),), len(image_features)).scatter_reduce_(0, texts, images, "amin")
    order = torch.argsort(first_image, stable=True)
    if not torch.equal(order, torch.arange(len(order))):
        text_features, texts = text_features[order.to(text_features.device)], torch.argsort(order)[texts]
    products = _Products(
        image_features, text_features, blocks=blocks, device=device, scores_at_once=scores_at_once,
        max_cached_bytes=max_cached_bytes, counting=counting,
    )  # fmt: skip
    with exact_products():
        own = products.own_scores(images, texts)
        best_of_image, best_of_text = (
            torch.zeros(size).scatter_reduce_(0, index, own, "amax", include_self=False)
            for size, index in ((len(image_features), images), (len(text_features), texts))
        )
        ahead_of_image, ahead_of_text = products.count_halves(best_of_image, best_of_text)
    # counted as ties so far, in halves: a query's best match and its others that score the same
    ahead_of_image.scatter_add_(0, images, -(own == best_of_image[images]).double())
    ahead_of_text.scatter_add_(0, texts, -(own == best_of_text[texts]).double())
    t2i = torch.empty_like(ahead_of_text)
    t2i[order] = 1 + ahead_of_text / 2
    return Ranks(1 + ahead_of_image[images.unique()] / 2, t2i)


class _Products:
    """Products of equal shape between blocks of images and blocks of texts, and what is counted in them.

    The blocks are large enough for the product to run at full speed. On a processor they are counted strip by strip, so
    that a strip and the room to count in it stay in the cores' own caches; on a GPU blocks are larger and counted as a
    whole, so that the work outweighs the launches.
    """

    def __init__(
        self,
        images: Tensor,
        texts: Tensor,
        *,
        blocks: tuple[int, int] | None,
        device: torch.device,
        scores_at_once: int,
        max_cached_bytes: int | None,
        counting: str | None,
    ) -> None:
        self.images, self.texts, self.device = images, texts, device
        self.counting = counting or _usual_counting(len(images) * len(texts), device)
        # flags are added up eight at a time in words, and these 32 at a time
        multiple = 16 if self.counting == "signs" else 8 * FLAGS_IN_A_BYTE
        most = blocks or BLOCKS.get(device.type, BLOCKS["cpu"])
        self.image_block, self.text_block = (
            _block_size(len(side), size, multiple) for side, size in zip((images, texts), most, strict=True)
        )
        usual_bytes = MAX_CACHED_BYTES.get(device.type, MAX_CACHED_BYTES["cpu"])
        self.max_cached_bytes = usual_bytes if max_cached_bytes is None else max_cached_bytes
        self.strip = max(scores_at_once * torch.get_num_threads() // self.text_block, 1)
        self._compiled: Any = torch.compile(_halves, dynamic=False) if self.counting == "compiled" else None
        self._scores = torch.empty(self.image_block, self.text_block, device=device)
        self._rooms: dict[str, Tensor] = {}
        self._cached: dict[tuple[int, int], Tensor] = {}

    def own_scores(self, images: Tensor, texts: Tensor) -> Tensor:
        """Return the score of each match of an image, `[E]`, with a text, `[E]`: float32 `[E]`."""
        own = torch.zeros(len(images), device=self.device)
        by_image = torch.argsort(images, stable=True)
        starts = torch.arange(0, len(self.images) + self.image_block, self.image_block)
        bounds = torch.searchsorted(images[by_image], starts).tolist()
        for rows in self._own_blocks():
            number = rows.start // self.image_block
            of_rows = by_image[bounds[number] : bounds[number + 1]]
            block_of = texts[of_rows] // self.text_block
            features = self._block(self.images, rows, self.image_block)
            for block in block_of.unique().tolist():  # in which this block of images has a match
                start = block * self.text_block
                columns = slice(start, min(start + self.text_block, len(self.texts)))
                scores = self._multiply(features, rows, columns, cache=True)  # [image_block, text_block]
                mine = of_rows[block_of == block]
                where = [
                    to_device(index, self.device) for index in (mine, images[mine] - rows.start, texts[mine] - start)
                ]
                own[where[0]] = scores[where[1], where[2]]
        return all_sum(own).cpu()

    def count_halves(self, best_of_image: Tensor, best_of_text: Tensor) -> tuple[Tensor, Tensor]:
        """Count in halves, which stay whole numbers: 2 for each score that is higher, 1 for each that is equal.

        Args:
            best_of_image: score that a row's are compared with, float32 `[N]`.
            best_of_text: score that a column's are compared with, float32 `[M]`.

        Returns:
            float64 `[N]` and `[M]` in main memory; float64 counts exactly up to 2^53.
        """
        best = _padded(best_of_image.to(self.device), self.image_block)
        own = _padded(best_of_text.to(self.device), self.text_block)
        # not every GPU has float64
        dtype = torch.float64 if self.counting == "signs" else torch.int64
        of_image, of_text = best.new_zeros(len(best), dtype=dtype), own.new_zeros(len(own), dtype=dtype)
        for rows in self._own_blocks():
            images = self._block(self.images, rows, self.image_block)
            all_rows = slice(rows.start, rows.start + self.image_block)
            for columns in slices(len(self.texts), self.text_block):
                scores = self._multiply(images, rows, columns)  # [image_block, text_block]
                all_columns = slice(columns.start, columns.start + self.text_block)
                count = self._count_signs if self.counting == "signs" else self._count_flags
                count(scores, best[all_rows], own[all_columns], of_image[all_rows], of_text[all_columns])
        return all_sum(of_image)[: len(self.images)].cpu().double(), all_sum(of_text)[: len(self.texts)].cpu().double()

    def _count_signs(self, scores: Tensor, best: Tensor, own: Tensor, of_image: Tensor, of_text: Tensor) -> None:
        """Add a block's halves, strip by strip; its scores are overwritten.

        With signs: 2 higher + equal = (higher - lower) + (higher + equal + lower), so one sum of signs does it.
        Scores 9 8 8 1 against 8: signs + 0 0 -, sum 0, of 4 scores: 4 halves = 2 * 1 + 2.
        """
        difference = self._room("difference", scores[: self.strip], torch.float32)
        for start in range(0, self.image_block, self.strip):
            strip = scores[start : start + self.strip]
            of_rows = slice(start, start + len(strip))
            # the signs' sum is higher minus lower; a float32 sum of up to 2^24 signs is exact
            signs = torch.sub(strip, best[of_rows, None], out=difference[: len(strip)]).sign_()
            of_image[of_rows] += signs.sum(1)
            of_text += strip.sub_(own).sign_().sum(0)
        # higher - lower + all = 2 higher + equal; the padding is lower than anything
        of_image += self.text_block
        of_text += self.image_block

    def _count_flags(self, scores: Tensor, best: Tensor, own: Tensor, of_image: Tensor, of_text: Tensor) -> None:
        """Add a block's halves: those higher, and those at least as high.

        Each score is read as often as it is compared, and a flag is a byte: 24 bytes a score, of which signs take 40.
        PyTorch makes int64 of flags to add them up. So eight at a time are taken for a word, and words are added: no
        byte runs over as long as it gets fewer than 256.
        """
        if self._compiled is not None:
            try:
                of_rows, of_columns = self._compiled(scores, best, own)
            except Exception as error:  # compilers fail in many ways
                logger.info("counting goes on without torch.compile: %s", one_line(error))
                self._compiled = None
            else:
                of_image += of_rows
                of_text += of_columns
                return
        flags = self._room("flags", scores.expand(2, -1, -1), torch.bool)  # [2, image_block, text_block]
        words = flags.view(torch.int64)  # [2, image_block, text_block / 8]
        torch.gt(scores, best[:, None], out=flags[0])
        torch.ge(scores, best[:, None], out=flags[1])
        of_image += words.unflatten(2, (-1, FLAGS_IN_A_BYTE)).sum((0, 3)).view(torch.uint8).sum(1)
        torch.gt(scores, own, out=flags[0])
        torch.ge(scores, own, out=flags[1])
        of_text += words.unflatten(1, (-1, FLAGS_IN_A_BYTE)).sum((0, 2)).view(torch.uint8).sum(0)

    def _room(self, name: str, like: Tensor, dtype: torch.dtype) -> Tensor:
        """Return memory to count in, the same each time."""
        if name not in self._rooms:
            self._rooms[name] = torch.empty(like.shape, dtype=dtype, device=self.device)
        return self._rooms[name]

    def _own_blocks(self) -> list[slice]:
        """Return this rank's blocks of images; the blocks are the same for any world size, and so is every bit."""
        blocks = list(slices(len(self.images), self.image_block))
        return blocks[rank_slice(len(blocks))]

    def _multiply(self, images: Tensor, rows: slice, columns: slice, *, cache: bool = False) -> Tensor:
        """Score a block; `cache` holds it, while there is room, for the next call that asks for it."""
        block = rows.start, columns.start
        if block in self._cached:
            return self._cached.pop(block)
        cache = cache and (len(self._cached) + 1) * self._scores.nbytes <= self.max_cached_bytes
        scores = torch.empty_like(self._scores) if cache else self._scores
        torch.mm(images, self._block(self.texts, columns, self.text_block).T, out=scores)
        # what pads the block scores lower than anything
        if rows.stop - rows.start < self.image_block:
            scores[rows.stop - rows.start :] = -math.inf
        if columns.stop - columns.start < self.text_block:
            scores[:, columns.stop - columns.start :] = -math.inf
        if cache:
            self._cached[block] = scores
        return scores

    def _block(self, features: Tensor, span: slice, size: int) -> Tensor:
        return _padded(to_device(features[span], self.device, torch.float32), size)


def slices(total: int, size: int) -> Iterator[slice]:
    """Cut `total` rows into slices of `size`, the last one smaller."""
    for start in range(0, total, size):
        yield slice(start, min(start + size, total))


def _halves(scores: Tensor, best: Tensor, own: Tensor) -> tuple[Tensor, Tensor]:
    """Count a block's halves by rows and by columns: to be compiled, as each line makes a large tensor else."""
    halves = [(scores > other).int() + (scores >= other).int() for other in (best[:, None], own)]
    return halves[0].sum(1, dtype=torch.int32), halves[1].sum(0, dtype=torch.int32)


def _usual_counting(num_scores: int, device: torch.device) -> str:
    if device.type != "cuda":
        return "signs" if device.type == "cpu" else "flags"
    return "compiled" if num_scores >= COMPILED_SCORES else "flags"


def _resident(*features: Tensor, device: torch.device) -> tuple[Tensor, ...]:
    """Bring features to a GPU as a whole if they are small beside its memory: each block of them is used many times."""
    if device.type != "cuda":
        return features
    missing = 4 * sum(each.numel() for each in features if each.device.type != "cuda")
    if missing > RESIDENT_FRACTION * free_memory(device):
        return features
    return tuple(to_device(each, device, torch.float32) for each in features)


def _block_size(total: int, most: int, multiple: int) -> int:
    """Divide into equal blocks, as few as possible, so that little is padding; products of few rows are slow."""
    # 1,100 in blocks of at most 1,024: two of 560, not 1,024 and 76
    num_blocks = -(-total // most)
    return max(-(-total // (num_blocks * multiple)) * multiple, 64)


def _padded(values: Tensor, multiple: int) -> Tensor:
    """Append zeros until the length is a multiple."""
    missing = -len(values) % multiple
    return torch.cat([values, values.new_zeros(missing, *values.shape[1:])]) if missing else values


def check_features(image_features: Tensor, text_features: Tensor, matches: Tensor) -> tuple[Tensor, Tensor]:
    """Return the image and the text of each match, int64 `[E]` in main memory, if all fits together.

    Args:
        image_features: `[N, D]`.
        text_features: `[M, D]`.
        matches: image of each text, `[M]`, or image and text of each match, `[2, E]`.

    Raises:
        ValueError: shapes that do not fit, features that are not finite, an image or text that is not there.
    """
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
    given = torch.as_tensor(matches, dtype=torch.int64).cpu()
    images, texts = given if given.ndim == 2 and len(given) == 2 else (given, torch.arange(len(given)))
    each_has_one = given.ndim == 2 or images.shape == (len(text_features),)
    if image_features.shape[1] != text_features.shape[1] or not each_has_one:
        shapes = f"{tuple(image_features.shape)}, {tuple(text_features.shape)}, {tuple(given.shape)}"
        raise ValueError(f"image_features [N, D], text_features [M, D], text_to_image [M] do not fit: {shapes}")
    for name, rows, size in (("image", images, len(image_features)), ("text", texts, len(text_features))):
        if int(rows.min()) < 0 or int(rows.max()) >= size:
            bad = int(rows.min()) if int(rows.min()) < 0 else int(rows.max())
            raise ValueError(f"text_to_image names {name} row {bad}, but there are {size} {name}s")
    return images, texts
