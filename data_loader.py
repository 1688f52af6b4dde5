"""Image-text pairs from disk to batches. As a stage it makes sample data, describes, checks or writes a data set:

python data_loader.py --data_dir ./data
python data_loader.py --data_dir ./data --check
python data_loader.py --data_dir ./data --to_shards ./shards
"""

from __future__ import annotations

if __name__ == "__main__":
    from cliptune.runtime.stopping import leave_at_signals

    leave_at_signals()  # the imports take seconds

import logging
import random
import sys
from collections.abc import Callable
from functools import partial
from pathlib import Path

from cliptune.cli import check_command_line, parse_settings, run_stage
from cliptune.settings import DEFAULT_DATA_DIR, SAMPLE_SIZE
from cliptune.stage_settings import InspectSettings

if __name__ == "__main__":
    check_command_line(InspectSettings, str(__doc__))  # a wrong flag is told before PyTorch is imported

import numpy as np
from torch import Tensor
from torch.utils.data import Dataset

from cliptune.data.issues import image_issue
from cliptune.data.loaders import Sample, caption_id
from cliptune.data.pairs import DataSource, Pairs, holds_only_placeholders, load_pairs
from cliptune.data.row_store import ImageCache
from cliptune.data.sample_data import create_sample_dataset
from cliptune.data.shards import write_shards
from cliptune.data.splits import separate_validation, split_pairs
from cliptune.data.table import SPLITS
from cliptune.data.workers import shared_number
from cliptune.language.catalogue import language_of
from cliptune.preprocess.decode import load_image
from cliptune.preprocess.tokens import CONTEXT_LENGTH, tokenize
from cliptune.preprocess.transforms import PixelTransform, Transform, clip_transform
from cliptune.runs.check import check, describe_data, split_as_a_run
from cliptune.runtime.logs import progress_bar, setup_logging
from cliptune.runtime.messages import count, printable
from cliptune.runtime.rng import IntArray, draw_bits, seeded

logger = logging.getLogger(__name__)

__all__ = ["ImageTextDataset", "create_sample_dataset", "main"]


class ImageTextDataset(Dataset[Sample]):
    """Pairs as samples for training: one random caption an image each epoch, or every pair.

    Args:
        data_dir: a folder, an index file, or pairs already read.
        split: `train`, `val` or `test`: what the index declares, else split off by group; None: everything.
        transform: RGB image to `[3, R, R]`, uint8, or float and normalised; CLIP's own by default. A random one is
            reproducible as long as it draws from `torch` or `random`.
        image_dir: folder that image paths are relative to; None: the index file's.
        image_key: column that holds the image paths; None: the first known one.
        caption_key: column that holds the captions, or several: `caption_en,caption_de`; None: the first known one.
        captions_from: `json`, `txt` or `caption` files beside the images of a folder, or the names: `folder` or
            `filename`; None: found by what the folder holds.
        caption_template: caption in which `{}` stands for such a name.
        captions: `random`: an item an image; `all`: an item a pair.
        val_split: fraction of the images for validation, in (0, 1): whole groups of them, with files of the same bytes.
            A run joins copies that are not the same file as well.
        seed: of the split, the caption choice and a random transform.
        context_length: tokens of a caption, the model's: a longer one is truncated.

    Attributes:
        num_views: views that a random transform makes of an image, taken in turn by the epochs: epoch e sees view
            `(e - 1) % num_views`; 0: a new view every epoch, and for every pair.

    Raises:
        FileNotFoundError: no such data set.
        ValueError: an index that cannot be read, or no image in that split.
    """

    def __init__(  # noqa: PLR0913  (what a notebook and a run choose differently)
        self,
        data_dir: str | Path | Pairs,
        *,
        split: str | None = None,
        transform: PixelTransform | Transform | None = None,
        image_dir: str | Path | None = None,
        image_key: str | None = None,
        caption_key: str | None = None,
        captions_from: str | None = None,
        caption_template: str | None = None,
        captions: str = "random",
        val_split: float = 0.1,
        seed: int = 42,
        context_length: int = CONTEXT_LENGTH,
    ) -> None:
        if split is not None and split not in SPLITS:
            raise ValueError(f"unknown split {split!r}; known: {', '.join(SPLITS)}")
        if captions not in {"random", "all"}:
            raise ValueError(f"captions must be 'random' or 'all', got {captions!r}")
        if not isinstance(data_dir, Pairs):
            source = DataSource(
                data_dir, image_dir, caption_key, image_key=image_key, captions_from=captions_from,
                caption_template=caption_template,
            )  # fmt: skip
            pairs = load_pairs(source)
            data_dir = pairs if split is None else split_pairs(pairs, val_split=val_split, seed=seed)[split]
        if not len(data_dir):
            raise ValueError(f"no image in the split {split!r}" if split else "no image in the data set")
        self.pairs = data_dir
        self.transform = transform if transform is not None else clip_transform(224)
        self.cache: ImageCache | None = None
        self.every_pair = captions == "all"
        self.seed = seed
        self.context_length = context_length
        self.num_views = 0
        self._image_of_pair = self.pairs.text_to_image.numpy()
        self._epoch = shared_number()  # workers that stay alive see a new epoch

    def cache_images(self, folder: Path) -> None:
        """Cache each image in `folder` once it is decoded and shrunk.

        Raises:
            ValueError: the transform is not a `PixelTransform`, or the disk has no room.
        """
        if not isinstance(self.transform, PixelTransform):
            raise ValueError("images are cached between the two steps of a PixelTransform; this transform is another")
        self.cache = ImageCache(folder, self.pairs.paths, self.transform)

    def set_epoch(self, epoch: int) -> None:
        """Choose the epoch, by which captions and augmentation vary."""
        self._epoch.fill_(epoch)

    def __len__(self) -> int:
        return self.pairs.num_pairs if self.every_pair else len(self.pairs)

    def __getitem__(self, index: int) -> Sample:
        if not 0 <= index < len(self):
            raise IndexError(index)
        image_index, caption_index = (int(found[0]) for found in self.choose(np.array([index])))
        path, caption = self.pairs.paths[image_index], self.pairs.captions[caption_index]
        tokens = tokenize([caption], self.context_length)[0][0]
        sample = Sample(None, tokens, image_index, caption_id(caption), caption_index)
        try:
            finish = self._open(path)
        except (ValueError, OSError) as error:
            return sample._replace(issue=image_issue(path, error))
        if isinstance(self.transform, PixelTransform) and self.transform.is_final:  # it draws nothing
            return sample._replace(image=finish())
        with seeded(self._transform_seed(image_index, index)):  # which takes a quarter of the time from the cache
            return sample._replace(image=finish())

    def _open(self, path: str) -> Callable[[], Tensor]:
        """Read an image; return the rest of the work, which may be random."""
        if self.cache is not None:
            return partial(self.cache.transform.finish, *self.cache.load(path))
        if isinstance(self.transform, PixelTransform):
            return partial(self.transform, self.transform.load(path))
        return partial(self.transform, load_image(path))

    def choose(self, items: IntArray) -> tuple[IntArray, IntArray]:
        """Return the indices of each item's image and of its caption in this epoch: two int64 arrays `[len(items)]`."""
        if self.every_pair:
            return self._image_of_pair[items], items
        first, end = self.pairs.starts[items], self.pairs.starts[items + 1]
        draws = draw_bits(self.seed, int(self._epoch), items)  # of seed, epoch and item alone: the same in any worker
        return items, first + (draws % (end - first).astype(np.uint64)).astype(np.int64)

    @property
    def view(self) -> int:
        """Index of the view that this epoch sees; without `num_views`, the epoch itself."""
        epoch = int(self._epoch)
        return (epoch - 1) % self.num_views if self.num_views else epoch

    def _transform_seed(self, image_index: int, index: int) -> int:
        # a view is the image's, whichever of its pairs asks for it
        item = np.array([image_index if self.num_views else index])
        return int(draw_bits(self.seed, self.view, item, stream=1)[0] >> np.uint64(1))


def main(argv: list[str] | None = None) -> int:
    """Make sample data, print what a data set holds or what is wrong with it, or write it as shards.

    Returns:
        The exit code: 1 if `--check` found anything wrong.
    """
    return run_stage(lambda: _inspect(argv), name="data_loader.py", argv=argv)


def _inspect(argv: list[str] | None) -> int:
    settings, given = parse_settings(InspectSettings, argv, description=str(__doc__))
    setup_logging("info")
    folder, language = Path(settings.data_dir), language_of(settings.language)
    wants_sample = settings.num_samples is not None or not (
        "data_dir" in given or settings.data_dir != DEFAULT_DATA_DIR
    )
    if settings.num_samples is not None or (wants_sample and holds_only_placeholders(folder)):
        index = create_sample_dataset(
            folder, settings.num_samples or SAMPLE_SIZE, seed=settings.seed, exist_ok=settings.num_samples is None
        )
        print(language.say(f"made sample data: {printable(str(index))}"))
    fraction = 1.0 if settings.check else settings.max_skipped_fraction
    source = DataSource(
        folder, settings.image_dir, settings.caption_key, fraction, image_key=settings.image_key,
        captions_from=settings.captions_from, caption_template=settings.caption_template,
    )  # fmt: skip
    pairs = load_pairs(source)
    val = None if settings.val_data is None else separate_validation(source, settings.val_data)
    if settings.check:
        found = check(pairs, val, settings)
        print(language.say_lines("\n".join(map(printable, found.lines))))
        return 1 if found.issues.count else 0
    if settings.to_shards is None:
        facts = describe_data(pairs, split_as_a_run(pairs, val, settings), settings)
        print(language.say_lines("\n".join(map(printable, facts))))
    else:
        chosen = pairs if settings.split == "all" else split_as_a_run(pairs, val, settings)[settings.split]
        line = _write_shards(chosen, Path(settings.to_shards), shard_size=settings.shard_size, seed=settings.seed)
        print(language.say(line))
    return 0


def _write_shards(pairs: Pairs, folder: Path, *, shard_size: int, seed: int) -> str:
    """Write pairs as shards, in an order drawn from the seed, so that each shard is a mixture; say what was written."""
    if not len(pairs):
        raise ValueError("no image in that split; try --split all")
    order = list(range(len(pairs)))
    random.Random(seed).shuffle(order)
    images = ((pairs.paths[index], pairs.captions_of(index)) for index in progress_bar(order, desc="shards"))
    shards, issues = write_shards(images, folder, shard_size=shard_size)
    for issue in issues:
        logger.warning("skipped: %s", issue)
    names = f"{shards.shards[0].url} to {shards.shards[-1].name}" if len(shards.shards) > 1 else shards.shards[0].url
    return f"written: {count(len(shards), 'image')} in {count(len(shards.shards), 'shard')}, {printable(names)}"


if __name__ == "__main__":
    sys.exit(main())
