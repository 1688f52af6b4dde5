"""Image-text pairs from disk to batches. As a stage it makes sample data, or prints what a data set holds:

python data_loader.py --data_dir ./data
"""

from __future__ import annotations

import hashlib
import logging
import os
import random
import stat
import sys
from collections import Counter, defaultdict
from collections.abc import Callable, Iterable, Iterator, Sequence
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

from config import (
    DEFAULT_DATA_DIR,
    SAMPLE_SIZE,
    DataSettings,
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

from annotations import Index, Row, find_index, read_directory, read_index
from image_cache import ImageCache
from preprocessing import (
    CONTEXT_LENGTH,
    PixelTransform,
    Transform,
    clip_transform,
    count_tokens,
    load_image,
    tokenize,
)
from runtime import setup_logging
from sample_data import UNFINISHED, create_sample_dataset

logger = logging.getLogger(__name__)

SPLITS = ("train", "val", "test")
MAX_VAL_IMAGES = 5000
MIN_PAIRS = 50
MAX_BAD_SHARE = 0.01
_GOLDEN_GAMMA = np.uint64(0x9E3779B97F4A7C15)

IntArray = np.ndarray[Any, np.dtype[np.int64]]
BitArray = np.ndarray[Any, np.dtype[np.uint64]]


class Strings(Sequence[str]):
    """Many strings in two arrays: worker processes share them, where a list of strings is copied page by page."""

    def __init__(self, strings: Iterable[str]) -> None:
        encoded = [text.encode("utf-8", "surrogateescape") for text in strings]
        self._ends = np.cumsum([len(text) for text in encoded], dtype=np.int64)
        self._bytes = np.frombuffer(b"".join(encoded), dtype=np.uint8)

    def __len__(self) -> int:
        return len(self._ends)

    def __getitem__(self, index: Any) -> Any:
        if isinstance(index, slice):
            return [self[i] for i in range(*index.indices(len(self)))]
        if not -len(self) <= index < len(self):
            raise IndexError(index)
        index = int(index) % len(self)
        start = self._ends[index - 1] if index else 0
        return self._bytes[start : self._ends[index]].tobytes().decode("utf-8", "surrogateescape")


class Pairs:
    """Images with their captions, fixed and compact.

    Attributes:
        paths: resolved path of each image, which is its identity.
        captions: every caption, image by image.
        starts: int64 `[N + 1]`: image i has captions `starts[i]` to `starts[i + 1]`.
        groups: unit of the split of each image.
        splits: the split that the index declares for each image, or an empty string.
    """

    def __init__(self, records: Sequence[Row]) -> None:
        self.paths = Strings(record.image for record in records)
        self.captions = Strings(caption for record in records for caption in record.captions)
        self.starts = np.cumsum([0, *(len(record.captions) for record in records)], dtype=np.int64)
        self.groups = Strings(record.group or record.image for record in records)
        self.splits = Strings(record.split or "" for record in records)

    def __len__(self) -> int:
        return len(self.paths)

    @property
    def num_pairs(self) -> int:
        """Number of captions, each with its image."""
        return len(self.captions)

    @property
    def text_to_image(self) -> Tensor:
        """Image row of each caption, int64 `[num_pairs]`."""
        return torch.from_numpy(np.repeat(np.arange(len(self)), np.diff(self.starts)))

    def captions_of(self, image: int) -> list[str]:
        """Return one image's captions."""
        captions: list[str] = self.captions[int(self.starts[image]) : int(self.starts[image + 1])]
        return captions

    def select(self, images: Iterable[int]) -> Pairs:
        """Return some of the images, in the order given."""
        return Pairs(
            [Row(self.paths[i], tuple(self.captions_of(i)), self.splits[i] or None, self.groups[i], "") for i in images]
        )

    def declared(self) -> set[str]:
        """Return the splits that the index declares."""
        return set(self.splits) - {""}


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
    error: str | None = None
    """Why there is no image."""


class Batch(NamedTuple):
    """Samples whose picture could be read, and the reasons for those that could not."""

    images: Tensor
    """`[B, 3, R, R]`, uint8, or what the user's transform gives: float pixels are taken as normalised."""
    tokens: Tensor
    """`[B, 77]` int64."""
    image_ids: Tensor
    """`[B]` int64."""
    errors: list[str]
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
            return Sample(None, tokens, image, caption, str(error))
        with _seeded(self._transform_seed(image, index)):
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


class _seeded:  # noqa: N801  (used as a function)
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
    """

    def __init__(self, num_items: int, batch_size: int, *, seed: int) -> None:
        self.num_items = num_items
        self.batch_size = batch_size
        self.seed = seed
        self.epoch = 0

    def __len__(self) -> int:
        batches, rest = divmod(self.num_items, self.batch_size)
        return max(batches + (rest > 1), 1)

    def __iter__(self) -> Iterator[list[int]]:
        generator = torch.Generator().manual_seed(random.Random(f"{self.seed}/{self.epoch}").getrandbits(63))
        order = torch.randperm(self.num_items, generator=generator).tolist()
        for number in range(len(self)):
            end = None if number == len(self) - 1 else (number + 1) * self.batch_size
            yield order[number * self.batch_size : end]


class TrainLoader:
    """Batches of a data set, epoch after epoch."""

    def __init__(self, dataset: ImageTextDataset, *, batch_size: int, num_workers: int, device: torch.device) -> None:
        self.dataset = dataset
        self.batches = EpochBatches(len(dataset), batch_size, seed=dataset.seed)
        self.loader = DataLoader(
            dataset,
            batch_sampler=self.batches,
            num_workers=num_workers,
            collate_fn=collate,
            pin_memory=device.type == "cuda",
            persistent_workers=num_workers > 0,
        )

    def __len__(self) -> int:
        return len(self.batches)

    def epoch(self, epoch: int) -> Iterator[Batch]:
        """Yield the batches of one epoch; the same for the same seed, whatever came before."""
        self.batches.epoch = epoch
        self.dataset.set_epoch(epoch)
        yield from self.loader


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


def holds_only_placeholders(folder: Path) -> bool:
    """Tell whether a folder is missing, holds nothing but hidden files and empty folders, or unfinished sample data."""
    if (folder / UNFINISHED).is_dir():
        return True
    return not any(not path.name.startswith(".") and not path.is_dir() for path in folder.rglob("*"))


def load_pairs(data_dir: str | Path, *, image_dir: str | Path | None = None, caption_key: str | None = None) -> Pairs:
    """Read a data set: its index, the identity of its images, and which of them are there.

    Args:
        data_dir: folder or index file.
        image_dir: folder that image paths are relative to; None: the index file's.
        caption_key: column that holds the captions.

    Raises:
        FileNotFoundError: nothing there; mentions the stage that makes sample data.
        ValueError: an index that cannot be read, or more than 1% of its entries are bad; lists them.
    """
    path = Path(data_dir)
    if not path.exists() or (path.is_dir() and holds_only_placeholders(path)):
        what = "holds no data" if path.exists() else "does not exist"
        raise FileNotFoundError(f"{path} {what}; `python data_loader.py` makes sample data in {DEFAULT_DATA_DIR}")
    if image_dir is not None and not Path(image_dir).is_dir():
        raise FileNotFoundError(f"--image_dir: no such folder: {image_dir}")
    records: list[Row] = []
    problems: list[str] = []
    for index_path, declared in _index_paths(path):
        is_folder = index_path.is_dir()
        index = read_directory(index_path) if is_folder else read_index(index_path, caption_key=caption_key)
        _report_columns(index, index_path)
        root = Path(image_dir) if image_dir is not None else index_path if is_folder else index_path.parent
        found, missing = _resolve_images(index.rows, root)
        records += [row._replace(split=declared) for row in found] if declared else found
        problems += index.problems + missing
    records, repeated = _merge(records)
    _judge(problems + repeated, num_good=len(records), path=path)
    return Pairs(records)


def split_pairs(pairs: Pairs, *, val_split: float = 0.1, seed: int = 42) -> dict[str, Pairs]:
    """Split by group: no group is on both sides, and the same seed gives the same split on every machine.

    Splits that the index declares are honoured. If it declares no `val`, groups are drawn from what is left until they
    hold `val_split` of its images, at most 5,000.

    Returns:
        `train`, `val` and `test`; those that there are not hold no image.
    """
    splits = np.array(list(pairs.splits), dtype=object)
    splits[splits == ""] = "train"
    if "val" not in pairs.declared():
        pool = np.flatnonzero(splits == "train")
        splits[_choose_validation(pairs, pool, val_split=val_split, seed=seed)] = "val"
    return {split: pairs.select(np.flatnonzero(splits == split).tolist()) for split in SPLITS}


def training_pairs(settings: DataSettings, *, seed: int) -> dict[str, Pairs]:
    """Return a run's `train` and `val` pairs, checked to be enough.

    Raises:
        ValueError: fewer than 2 training images or 1 validation image.
    """
    options = {"image_dir": settings.image_dir, "caption_key": settings.caption_key}
    pairs = load_pairs(settings.data_dir, **options)
    if settings.val_data is None:
        splits = split_pairs(pairs, val_split=settings.val_split, seed=seed)
    else:
        held = [i for i, split in enumerate(pairs.splits) if split not in {"val", "test"}]
        splits = {"train": pairs.select(held), "val": evaluation_pairs(settings.val_data, split=None, **options)}
    train, val = _without_shared_images(splits["train"], splits["val"]), splits["val"]
    if len(train) < 2 or len(val) < 1:
        found = f"{len(train)} training and {len(val)} validation image(s)"
        raise ValueError(f"{settings.data_dir}: {found}; at least 2 and 1 are needed")
    num_pairs = train.num_pairs + val.num_pairs
    if num_pairs < MIN_PAIRS:
        logger.warning("only %d pairs: at least %d are needed for more than a try-out", num_pairs, MIN_PAIRS)
    return {"train": train, "val": val}


def evaluation_pairs(
    data_dir: str | Path,
    *,
    split: str | None,
    image_dir: str | Path | None = None,
    caption_key: str | None = None,
) -> Pairs:
    """Return the pairs to evaluate on: a declared split, `all`, or (None) `val` if declared, else everything.

    Raises:
        ValueError: the data set declares no such split.
    """
    pairs = load_pairs(data_dir, image_dir=image_dir, caption_key=caption_key)
    declared = pairs.declared()
    if split is None:
        split = "val" if "val" in declared else "all"
    if split == "all":
        return pairs
    if split not in declared:
        known = ", ".join(sorted(declared)) or "none"
        raise ValueError(f"{data_dir} has no split {split!r} (declared: {known}); use --split all for everything")
    return pairs.select(i for i, own in enumerate(pairs.splits) if own == split)


def _index_paths(path: Path) -> list[tuple[Path, str | None]]:
    found = find_index(path) if path.is_dir() else path
    if isinstance(found, dict):
        return [(index_path, split) for split, index_path in found.items()]
    return [(found, None)]


def _report_columns(index: Index, path: Path) -> None:
    if index.ignored_columns:
        columns = ", ".join(f"{name} ({count})" for name, count in index.ignored_columns.items())
        logger.info("%s: columns ignored (rows): %s", path, columns)


def _resolve_images(rows: Sequence[Row], root: Path) -> tuple[list[Row], list[str]]:
    """Give each row its image's resolved path; those that are not files become problems."""
    folders: dict[str, str] = {}
    found, problems = [], []
    for row in rows:
        folder, name = os.path.split(os.path.join(root, row.image))  # noqa: PTH118  (a million times faster matters)
        if folder not in folders:
            folders[folder] = os.path.realpath(folder)
        path = os.path.join(folders[folder], name)  # noqa: PTH118
        try:
            mode = os.lstat(path).st_mode
            if stat.S_ISLNK(mode):
                path = os.path.realpath(path, strict=True)
                mode = os.stat(path).st_mode  # noqa: PTH116
            reason = None if stat.S_ISREG(mode) else "not a file"
        except (OSError, ValueError) as error:
            reason = getattr(error, "strerror", None) or str(error)
        if reason is None:
            found.append(row._replace(image=path))
        else:
            problems.append(f"{row.place}: image {row.image}: {reason}")
    return found, problems


def _merge(rows: Sequence[Row]) -> tuple[list[Row], list[str]]:
    """Join rows that turn out to be the same file."""
    merged: dict[str, Row] = {}
    problems = []
    for row in rows:
        first = merged.get(row.image)
        if first is None:
            merged[row.image] = row
        elif first.split != row.split:
            problems.append(f"{row.place}: {row.image} is in {row.split} here and in {first.split} at {first.place}")
        else:
            merged[row.image] = first._replace(captions=first.captions + row.captions, group=first.group or row.group)
    return list(merged.values()), problems


def _judge(problems: list[str], *, num_good: int, path: Path) -> None:
    """Say which entries are left out; too many of them are an error."""
    if not problems:
        return
    shown = "; ".join(problems[:10]) + (f"; and {len(problems) - 10} more" if len(problems) > 10 else "")
    if len(problems) > MAX_BAD_SHARE * (num_good + len(problems)):
        raise ValueError(f"{path}: {len(problems)} bad entries beside {num_good} good images: {shown}")
    logger.warning("%s: %d bad entries are left out: %s", path, len(problems), shown)


def _choose_validation(pairs: Pairs, pool: np.ndarray[Any, Any], *, val_split: float, seed: int) -> list[int]:
    members: dict[str, list[int]] = defaultdict(list)
    for image in pool.tolist():
        members[pairs.groups[image]].append(image)
    groups = sorted(members)
    # RandomState's stream is frozen for good, the newer generators' is not
    order = np.random.RandomState(seed % 2**32).permutation(len(groups))
    target = min(max(round(val_split * len(pool)), 1), MAX_VAL_IMAGES)
    chosen: list[int] = []
    for number in order[:-1].tolist():  # one group at least stays for training
        images = members[groups[number]]
        if not chosen or len(chosen) + len(images) <= target:
            chosen += images
        if len(chosen) >= target:
            break
    return chosen


def _without_shared_images(train: Pairs, val: Pairs) -> Pairs:
    shared = set(val.paths)
    kept = [image for image, path in enumerate(train.paths) if path not in shared]
    if len(kept) == len(train):
        return train
    logger.warning("%d image(s) of the validation set were left out of training", len(train) - len(kept))
    return train.select(kept)


def describe_data(pairs: Pairs, splits: dict[str, Pairs]) -> list[str]:
    """Say what a data set holds, a line a fact."""
    lengths = np.array([count_tokens(caption) for caption in tqdm(pairs.captions, desc="tokens", disable=None)])
    repeated = sum(count for count in Counter(pairs.captions).values() if count > 1)
    declared = "as declared" if pairs.declared() else "by group"
    per_image = np.diff(pairs.starts)
    parts = ", ".join(f"{name} {len(part)}" for name, part in splits.items())
    twins = _identical_across(splits)
    return [
        f"images      {len(pairs)}, {pairs.num_pairs} pairs, {per_image.min()} to {per_image.max()} captions an image",
        f"split       {parts} images ({declared})",
        f"captions    {lengths.mean():.1f} tokens on average, longest {lengths.max()}",
        f"truncated   {int((lengths > CONTEXT_LENGTH).sum())} captions longer than {CONTEXT_LENGTH} tokens",
        f"repeated    {100 * repeated / pairs.num_pairs:.1f}% of the captions occur more than once",
        f"identical   {len(twins)} byte-identical pictures on both sides of the split",
        *(f"            {first} = {second}" for first, second in twins[:5]),
    ]


def _identical_across(splits: dict[str, Pairs]) -> list[tuple[str, str]]:
    """Find byte-identical files in different splits; only files of the same size are read."""
    by_size: dict[int, list[tuple[str, str]]] = defaultdict(list)
    for split, pairs in splits.items():
        for path in pairs.paths:
            by_size[Path(path).stat().st_size].append((split, path))
    suspects = [same for same in by_size.values() if len({split for split, _ in same}) > 1]
    first_of: dict[tuple[int, bytes], tuple[str, str]] = {}
    twins = []
    for number, same in enumerate(tqdm(suspects, desc="identical pictures", disable=None)):
        for split, path in same:
            digest = hashlib.sha256(Path(path).read_bytes()).digest()
            other_split, other = first_of.setdefault((number, digest), (split, path))
            if other_split != split:
                twins.append((other, path))
    return twins


def main(argv: list[str] | None = None) -> int:
    """Make sample data, or print what a data set holds; returns the exit code."""
    return run_stage(lambda: _inspect(argv), name="data_loader.py")


def _inspect(argv: list[str] | None) -> int:
    settings, given = parse_settings(InspectSettings, argv, description=str(__doc__))
    setup_logging("info")
    folder = Path(settings.data_dir)
    wants_sample = settings.num_samples is not None or "data_dir" not in given
    if settings.num_samples is not None or (wants_sample and holds_only_placeholders(folder)):
        index = create_sample_dataset(folder, settings.num_samples or SAMPLE_SIZE, seed=settings.seed)
        print(f"made sample data: {index}")
    pairs = load_pairs(folder, image_dir=settings.image_dir, caption_key=settings.caption_key)
    splits = split_pairs(pairs, val_split=settings.val_split, seed=settings.seed)
    print("\n".join(describe_data(pairs, splits)))
    return 0


if __name__ == "__main__":
    sys.exit(main())
