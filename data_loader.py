"""Image-text pairs from disk to batches. As a stage it makes sample data, describes, checks or writes a data set:

python data_loader.py --data_dir ./data
python data_loader.py --data_dir ./data --check
python data_loader.py --data_dir ./data --to_shards ./shards
"""

from __future__ import annotations

import logging
import random
import sys
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

from config import (
    SAMPLE_SIZE,
    InspectSettings,
    check_command_line,
    parse_settings,
    run_stage,
)

if __name__ == "__main__":
    check_command_line(InspectSettings, str(__doc__))

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset, Sampler
from tqdm import tqdm

from data_check import check_data, describe_data
from distributed import share
from image_cache import ImageCache
from pairs import (
    SPLITS,
    Pairs,
    evaluation_pairs,
    holds_only_placeholders,
    load_pairs,
    split_pairs,
    training_pairs,
)
from preprocessing import (
    CONTEXT_LENGTH,
    PixelTransform,
    Transform,
    clip_transform,
    load_image,
    tokenize,
)
from rows import Problem, picture_problem
from runtime import leave_signals_to_main, setup_logging
from sample_data import create_sample_dataset
from shards import write_shards

logger = logging.getLogger(__name__)

PIECE_SIZE = 64
_GOLDEN_GAMMA = np.uint64(0x9E3779B97F4A7C15)

IntArray = np.ndarray[Any, np.dtype[np.int64]]
BitArray = np.ndarray[Any, np.dtype[np.uint64]]

__all__ = [
    "ImageTextDataset", "Pairs", "TrainLoader", "collate", "create_sample_dataset", "evaluation_pairs",
    "holds_only_placeholders", "load_pairs", "split_pairs", "training_pairs",
]  # fmt: skip


class Sample(NamedTuple):
    """One image with one of its captions."""

    image: Tensor | None
    """`[3, R, R]`, uint8, or what the user's transform gives; None if the picture cannot be read."""
    tokens: Tensor
    """`[77]` int64."""
    image_id: int
    """Number of the image in the data set."""
    caption_id: int
    """Number of the caption in the data set."""
    error: Problem | None = None
    """Why there is no image."""


class Batch(NamedTuple):
    """Samples whose picture could be read, and the reasons for those that could not."""

    images: Tensor
    """`[B, 3, R, R]`, uint8, or what the user's transform gives: float pixels are taken as normalised."""
    tokens: Tensor
    """`[B, 77]` int64."""
    image_ids: Tensor
    """`[B]` int64."""
    errors: list[Problem]
    caption_ids: Tensor
    """`[B]` int64."""


class ImageTextDataset(Dataset[Sample]):
    """Pairs as samples for training: one random caption an image each epoch, or every pair.

    Args:
        data_dir: a folder, an index file, or pairs already read.
        split: `train`, `val` or `test`: what the index declares, else split off by group; None: everything.
        transform: RGB image to `[3, R, R]`, uint8, or float and normalised; CLIP's own by default. A random one is
            reproducible as long as it draws from `torch` or `random`.
        image_dir: folder that image paths are relative to; None: the index file's.
        caption_key: column that holds the captions; None: `caption`, `captions` or `title`.
        captions: `random`: an item an image; `all`: an item a pair.
        val_split: share of the groups kept for validation.
        seed: of the split, the caption choice and a random transform.

    Attributes:
        num_views: views that a random transform makes of an image, taken in turn by the epochs: epoch e sees view
            `(e - 1) % num_views`; 0: a new view every epoch, and for every pair.

    Raises:
        FileNotFoundError: nothing there.
        ValueError: an index that cannot be read, or no image in that split.
    """

    def __init__(
        self,
        data_dir: str | Path | Pairs,
        *,
        split: str | None = None,
        transform: PixelTransform | Transform | None = None,
        image_dir: str | Path | None = None,
        caption_key: str | None = None,
        captions: str = "random",
        val_split: float = 0.1,
        seed: int = 42,
    ) -> None:
        if split is not None and split not in SPLITS:
            raise ValueError(f"unknown split {split!r}; known: {', '.join(SPLITS)}")
        if captions not in {"random", "all"}:
            raise ValueError(f"captions must be 'random' or 'all', got {captions!r}")
        if not isinstance(data_dir, Pairs):
            pairs = load_pairs(data_dir, image_dir=image_dir, caption_key=caption_key)
            data_dir = pairs if split is None else split_pairs(pairs, val_split=val_split, seed=seed)[split]
        if not len(data_dir):
            raise ValueError(f"no image in the split {split!r}" if split else "no image in the data set")
        self.pairs = data_dir
        self.transform = transform if transform is not None else clip_transform(224)
        self.cache: ImageCache | None = None
        self.every_pair = captions == "all"
        self.seed = seed
        self.num_views = 0
        self._image_of_pair = self.pairs.text_to_image.numpy()
        # shared memory, so that loading processes that stay alive see a new epoch
        self._epoch = torch.zeros((), dtype=torch.int64).share_memory_()

    def keep_images(self, folder: Path) -> None:
        """Keep each picture in `folder` once it is decoded and shrunk.

        Raises:
            ValueError: the disk has no room, or the transform is not one of `preprocessing`'s.
        """
        if not isinstance(self.transform, PixelTransform):
            raise ValueError("pictures are kept between the steps of a PixelTransform, and this transform is another")
        self.cache = ImageCache(folder, self.pairs.paths, self.transform)

    def set_epoch(self, epoch: int) -> None:
        """Choose the epoch, by which captions and augmentation vary."""
        self._epoch.fill_(epoch)

    def __len__(self) -> int:
        return self.pairs.num_pairs if self.every_pair else len(self.pairs)

    def __getitem__(self, index: int) -> Sample:
        if not 0 <= index < len(self):
            raise IndexError(index)
        image, caption = (int(number[0]) for number in self.choose(np.array([index])))
        tokens = tokenize([self.pairs.captions[caption]])[0][0]
        try:
            finish = self._open(self.pairs.paths[image])
        except (ValueError, OSError) as error:
            return Sample(None, tokens, image, caption, picture_problem(self.pairs.paths[image], error))
        with seeded(self._transform_seed(image, index)):
            return Sample(finish(), tokens, image, caption)

    def _open(self, path: str) -> Callable[[], Tensor]:
        """Read a picture; return the rest of the work, which may be random."""
        if self.cache is not None:
            return partial(self.cache.transform.finish, *self.cache.load(path))
        if isinstance(self.transform, PixelTransform):
            return partial(self.transform, self.transform.load(path))
        return partial(self.transform, load_image(path))

    def choose(self, items: IntArray) -> tuple[IntArray, IntArray]:
        """Return the image and this epoch's caption of each item, by their numbers: two int64 arrays `[len(items)]`."""
        if self.every_pair:
            return self._image_of_pair[items], items
        first, end = self.pairs.starts[items], self.pairs.starts[items + 1]
        draws = draw_bits(self.seed, int(self._epoch), items)
        return items, first + (draws % (end - first).astype(np.uint64)).astype(np.int64)

    @property
    def view(self) -> int:
        """Number of the view that this epoch sees; without `num_views`, the epoch itself."""
        epoch = int(self._epoch)
        return (epoch - 1) % self.num_views if self.num_views else epoch

    def _transform_seed(self, image: int, index: int) -> int:
        item = np.array([image if self.num_views else index])
        return int(draw_bits(self.seed, self.view, item, stream=1)[0] >> np.uint64(1))


def draw_bits(seed: int, round_number: int, items: IntArray, *, stream: int = 0) -> BitArray:
    """Draw 64 random bits for each item that depend on the four arguments alone, for any number of items at once.

    SplitMix64 (Steele, Lea, Flood 2014) over seed, stream and round gives a start, and over start and item the bits.
    """
    state = np.zeros(1, dtype=np.uint64)
    for number in (seed, stream, round_number):
        state = _split_mix(state + np.uint64(number % 2**64))
    return _split_mix(state + items.astype(np.uint64) * _GOLDEN_GAMMA)


def _split_mix(state: BitArray) -> BitArray:
    z = state + _GOLDEN_GAMMA
    z = (z ^ (z >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    z = (z ^ (z >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    mixed: BitArray = z ^ (z >> np.uint64(31))
    return mixed


class seeded:  # noqa: N801  (used as a function)
    """Seed `torch` and `random` for one sample's transform, and put their states back."""

    def __init__(self, seed: int) -> None:
        self.seed = seed

    def __enter__(self) -> None:
        self.states = torch.get_rng_state(), random.getstate()
        torch.manual_seed(self.seed)
        random.seed(self.seed)

    def __exit__(self, *_: object) -> None:
        torch.set_rng_state(self.states[0])
        random.setstate(self.states[1])


class EpochBatches(Sampler[list[int]]):
    """Every item once an epoch, in an order drawn from seed and epoch.

    A single item left over joins the batch before it: alone it would have nothing to be contrasted with.

    Attributes:
        epoch: decides the order.
        start: number of the batch that comes first; those before it are left out.
    """

    def __init__(self, num_items: int, batch_size: int, *, seed: int) -> None:
        self.num_items = num_items
        self.batch_size = batch_size
        self.seed = seed
        self.epoch = 0
        self.start = 0

    def __len__(self) -> int:
        batches, rest = divmod(self.num_items, self.batch_size)
        return max(batches + (rest > 1), 1)

    def __iter__(self) -> Iterator[list[int]]:
        generator = torch.Generator().manual_seed(random.Random(f"{self.seed}/{self.epoch}").getrandbits(63))
        order = torch.randperm(self.num_items, generator=generator)
        for number in range(self.start, len(self)):
            end = None if number == len(self) - 1 else (number + 1) * self.batch_size
            yield order[number * self.batch_size : end].tolist()  # a list of all would be several times as large


class _Pieces(Sampler[list[int]]):
    """This process's share of each batch in pieces, so that all loading processes work on the batch that comes next."""

    def __init__(self, batches: EpochBatches) -> None:
        self.batches = batches

    def __iter__(self) -> Iterator[list[int]]:
        for items in self.batches:
            own = items[share(len(items))]
            yield from (own[start : start + PIECE_SIZE] for start in range(0, len(own), PIECE_SIZE))


class TrainLoader:
    """Batches of a data set, epoch after epoch; with several processes each gets its share of every batch.

    Args:
        dataset: what is loaded.
        batch_size: pairs of a batch, over all processes.
        num_workers: loading processes of each process; 0: none.
        device: where the batches will be used.
    """

    def __init__(self, dataset: ImageTextDataset, *, batch_size: int, num_workers: int, device: torch.device) -> None:
        self.dataset = dataset
        self.batches = EpochBatches(len(dataset), batch_size, seed=dataset.seed)
        self.pin_memory = device.type == "cuda"
        self.loader = DataLoader(
            dataset,
            batch_sampler=_Pieces(self.batches),
            num_workers=num_workers,
            collate_fn=collate,
            pin_memory=self.pin_memory,
            persistent_workers=num_workers > 0,
            worker_init_fn=leave_signals_to_main,
        )

    def __len__(self) -> int:
        return len(self.batches)

    def epoch(self, epoch: int, *, start: int = 0) -> Iterator[Batch]:
        """Yield the batches of one epoch from number `start` on; the same for the same seed, whatever came before."""
        self.batches.epoch, self.batches.start = epoch, start
        self.dataset.set_epoch(epoch)
        pieces = iter(self.loader)
        for items in self.batches:
            num_items = len(items[share(len(items))])
            num_pieces = -(-num_items // PIECE_SIZE)
            yield join_pieces(pieces, num_items, num_pieces=num_pieces, pin_memory=self.pin_memory)


def join_pieces(pieces: Iterator[Batch], num_items: int, *, num_pieces: int, pin_memory: bool) -> Batch:
    """Make one batch of the next `num_items` items, which are the next `num_pieces` pieces; holds it and one piece."""
    if num_pieces <= 1:
        return next(pieces) if num_pieces else collate([])
    images: Tensor | None = None
    parts = []
    end = 0
    for _ in range(num_pieces):
        piece = next(pieces)
        if len(piece.images):
            if images is None:
                shape = (num_items, *piece.images.shape[1:])
                images = torch.empty(shape, dtype=piece.images.dtype, pin_memory=pin_memory)
            images[end : end + len(piece.images)] = piece.images
            end += len(piece.images)
        parts.append(piece._replace(images=torch.empty(0)))
    return Batch(
        torch.empty(0) if images is None else images[:end],
        torch.cat([part.tokens for part in parts]),
        torch.cat([part.image_ids for part in parts]),
        [error for part in parts for error in part.errors],
        torch.cat([part.caption_ids for part in parts]),
    )


def collate(samples: Sequence[Sample]) -> Batch:
    """Put samples into a batch; those without a picture leave it, and their reasons are kept."""
    good = [sample for sample in samples if sample.image is not None]
    errors = [sample.error for sample in samples if sample.error is not None]
    if not good:
        no_ids = torch.empty(0, dtype=torch.long)
        return Batch(torch.empty(0), torch.empty(0, CONTEXT_LENGTH, dtype=torch.long), no_ids, errors, no_ids)
    images = torch.stack([sample.image for sample in good if sample.image is not None])
    ids = torch.tensor([sample.image_id for sample in good])
    captions = torch.tensor([sample.caption_id for sample in good])
    return Batch(images, torch.stack([sample.tokens for sample in good]), ids, errors, captions)


def main(argv: list[str] | None = None) -> int:
    """Make sample data, print what a data set holds or what is wrong with it, or write it as shards.

    Returns:
        The exit code: 1 if `--check` found anything wrong.
    """
    return run_stage(lambda: _inspect(argv), name="data_loader.py")


def _inspect(argv: list[str] | None) -> int:
    settings, given = parse_settings(InspectSettings, argv, description=str(__doc__))
    setup_logging("info")
    folder = Path(settings.data_dir)
    wants_sample = settings.num_samples is not None or "data_dir" not in given
    if settings.num_samples is not None or (wants_sample and holds_only_placeholders(folder)):
        index = create_sample_dataset(folder, settings.num_samples or SAMPLE_SIZE, seed=settings.seed)
        print(f"made sample data: {index}")
    pairs = load_pairs(
        folder,
        image_dir=settings.image_dir,
        caption_key=settings.caption_key,
        max_bad_share=1.0 if settings.check else settings.max_bad_share,
    )
    if settings.check:
        check = check_data(pairs, num_workers=settings.num_workers)
        print("\n".join(check.lines()))
        return 1 if check.problems.count else 0
    splits = split_pairs(pairs, val_split=settings.val_split, seed=settings.seed)
    if settings.to_shards is None:
        print("\n".join(describe_data(pairs, splits)))
    else:
        chosen = {**splits, "all": pairs}[settings.split]
        _write_shards(chosen, Path(settings.to_shards), shard_size=settings.shard_size, seed=settings.seed)
    return 0


def _write_shards(pairs: Pairs, folder: Path, *, shard_size: int, seed: int) -> None:
    """Write pairs as shards, in an order drawn from the seed, so that each shard is a mixture of all of them."""
    if not len(pairs):
        raise ValueError("no image in that split; --split all takes everything")
    order = list(range(len(pairs)))
    random.Random(seed).shuffle(order)
    images = ((pairs.paths[number], pairs.captions_of(number)) for number in tqdm(order, desc="shards", disable=None))
    shards, problems = write_shards(images, folder, shard_size=shard_size)
    for problem in problems:
        logger.warning("left out: %s", problem)
    first, last = shards.shards[0], shards.shards[-1]
    print(f"written: {len(shards)} images in {len(shards.shards)} shards, {first.url} to {last.name}")


if __name__ == "__main__":
    sys.exit(main())
