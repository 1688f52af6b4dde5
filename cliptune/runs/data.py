"""What a run trains and validates on: read as its settings say, compared with what it had before, opened."""

from __future__ import annotations

import functools
import logging
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, Generic, NamedTuple, TypeVar

import numpy as np
from torch import Tensor

from cliptune.data.cached_loader import CachedLoader
from cliptune.data.findings import data_findings
from cliptune.data.folds import Folds, read_folds
from cliptune.data.identity import Hashes, file_identities
from cliptune.data.issues import Issue
from cliptune.data.kept_workers import KeptWorkers
from cliptune.data.loaders import TrainLoader
from cliptune.data.near_duplicates import no_copies
from cliptune.data.pairs import DataSource, Pairs, holds_only_placeholders
from cliptune.data.sample_data import create_sample_dataset
from cliptune.data.shard_loader import ShardLoader, training_shards
from cliptune.data.shards import Shards, is_shards
from cliptune.data.skipped import SkippedData
from cliptune.data.snapshot import (
    EMPTY,
    Snapshot,
    Snapshots,
    describe_change,
    is_reordered,
    keep_sides,
    restore_sides,
    take_snapshots,
    validates_on_trained,
)
from cliptune.data.splits import training_pairs
from cliptune.data.suspects import exclude, read_suspects
from cliptune.data.table import SPLITS, Strings
from cliptune.data.tar_samples import is_local
from cliptune.data.workers import fitting_workers
from cliptune.features.cache import FeatureCache, FeatureLoader
from cliptune.features.encode import Encoder, PairOutputs
from cliptune.model.checkpoint_file import holds_checkpoint, read_value
from cliptune.model.parallel import is_sharded
from cliptune.preprocess.jpeg_decoder import LeavesJpegs
from cliptune.preprocess.transforms import train_transform
from cliptune.report.live_gallery import LiveGallery
from cliptune.runs.copies import CopyFinder, copy_finder
from cliptune.runs.decoding import gpu_decoder
from cliptune.runtime.device import Precision, default_num_workers
from cliptune.runtime.messages import count, first_few, shown
from cliptune.settings import DEFAULT_DATA_DIR, SAMPLE_SIZE, Config

logger = logging.getLogger(__name__)

AUGMENTED_VIEWS = 4
MAX_FINDINGS = 3
"""About the data, that a run tells."""

Splits = dict[str, Pairs | Shards]
"""What a run trains, validates and tests on."""
E = TypeVar("E")
"""`evaluation.Evaluation`."""


def read_data(
    config: Config, *, given: dict[str, Any], cache_file: Path, find_copies: CopyFinder | None = None
) -> tuple[Splits, Snapshots]:
    """Read what to train and what to validate on; make sample data where the user named none and has none.

    Args:
        config: of the run.
        given: the flags of this start.
        cache_file: remembers identities of files, see `file_identities`.
        find_copies: finds the images that are one image; None: as `copy_finder` does.
    """
    _make_sample_data(config, given)
    if is_shards(config.data.data_dir):
        logger.info("near-duplicate images are not looked for in shards")
    splits = _read_splits(config, given, find_copies=find_copies or copy_finder(config, cache_file))
    return splits, take_snapshots(splits, cache_file=cache_file)


def _make_sample_data(config: Config, given: dict[str, Any]) -> None:
    folder = Path(DEFAULT_DATA_DIR)
    if "data_dir" not in given and config.data.data_dir == DEFAULT_DATA_DIR and holds_only_placeholders(folder):
        index = create_sample_dataset(folder, SAMPLE_SIZE, exist_ok=True)  # another run may have, meanwhile
        logger.info("no --data_dir was given and %s is empty: made %d sample images (%s)", folder, SAMPLE_SIZE, index)


def located(config: Config) -> Config:
    """Return a run's settings with the addresses of its data as they hold in any folder."""

    def from_root(address: str) -> str:
        # {/a,b}/0.tar names files in two folders: braces in front may hide what is relative
        return str(Path.cwd() / address) if is_local(address) and not address.startswith("{") else address

    return _with_addresses(config, from_root)


def found_again(config: Config, folder: str) -> Config:
    """Return a stored run's settings with the addresses of its data as they hold now.

    A project that was moved as a whole has its data where it was within it: what lay below the `folder` in which the
    run was started, and is not there any more, is looked for below the current one.
    """

    def here(address: str) -> str:
        if not folder or _is_there(address) or not Path(address).is_relative_to(folder):
            return address
        moved = str(Path.cwd() / Path(address).relative_to(folder))
        return moved if _is_there(moved) else address

    return _with_addresses(config, here)


def folder_of(config: Config, before: str) -> str:
    """Return the folder that a run's data is looked for in once its project has moved: `before`, or the current one."""
    return before if before and Path(located(config).data.data_dir).is_relative_to(before) else str(Path.cwd())


def _is_there(address: str) -> bool:
    path = Path(address)
    return (path.parent if is_shards(address) else path).exists()


def _with_addresses(config: Config, change: Callable[[str], str]) -> Config:
    """Change the addresses of a run's data, each of those that `::` joins by itself."""
    changed: dict[str, Any] = {}
    for name in ("data_dir", "val_data", "image_dir", "exclude"):
        if (address := getattr(config.data, name)) is not None:
            parts = [address] if Path(address).exists() else address.split("::")
            changed[name] = "::".join(map(change, parts))
    changed["watch_data"] = [change(address) for address in config.data.watch_data]
    return config.model_copy(update={"data": config.data.model_copy(update=changed)})


def reread_data(
    config: Config,
    content: dict[str, Any],
    *,
    given: dict[str, Any],
    cache_file: Path,
    find_copies: CopyFinder | None = None,
) -> tuple[Splits, Snapshots]:
    """Read the data of a run that is resumed from a checkpoint of this `content`, and compare it with what the run had.

    Raises:
        ValueError: it is not the same, and that was not allowed.
        FileNotFoundError: it is not there. Sample data is never made for a run that had other data.
    """
    before = _stored(content)
    restored = functools.partial(restore_sides, before=before, cache_file=cache_file)
    excluded = "" if config.data.exclude is None else f" (--exclude {config.data.exclude} the list that it left out)"
    way_out = f"--data_dir, --image_dir and --val_data name where it lies now{excluded}"
    try:
        # the split is the run's, whatever would be drawn today; without a record of it, it is drawn as it was: by group
        splits = _read_splits(config, given, settle=restored, find_copies=no_copies)
    except FileNotFoundError as error:
        raise FileNotFoundError(f"the data of the run that is resumed is not there: {error}; {way_out}") from None
    snapshots = take_snapshots(splits, cache_file=cache_file)
    if not before:
        logger.warning("the checkpoint does not say what data its run had, so nobody knows if it is this")
    elif change := describe_change(before, snapshots):
        if not config.run.allow_data_change:
            raise ValueError(
                f"{config.data.data_dir} is not the data of the run that is resumed: {change}. {way_out}; "
                "--allow_data_change goes on with this data"
            )
        logger.warning("resumed with other data (--allow_data_change): %s", change)
        splits = _read_splits(
            config, given, settle=functools.partial(keep_sides, before=before, cache_file=cache_file),
            find_copies=find_copies or copy_finder(config, cache_file),
        )  # fmt: skip
        snapshots = take_snapshots(splits, cache_file=cache_file)
        if validates_on_trained(snapshots, before):
            raise ValueError(
                f"{config.data.data_dir} has no image that the run validated on, and all others may have been trained "
                "on: name a validation set with --val_data"
            )
    elif is_reordered(before, snapshots):
        logger.warning("the images come in another order than before: this epoch's batches are not the unbroken run's")
    return splits, snapshots


def is_other_data(content: dict[str, Any], now: Snapshots) -> bool:
    """Tell whether the run of a checkpoint of this `content` had other data."""
    before = _stored(content)
    return bool(before) and bool(describe_change(before, now))


def changed_splits(content: dict[str, Any], now: Snapshots) -> set[str]:
    """Return the splits whose data the run of a checkpoint of this `content` had otherwise, or in another order.

    None of them if the data as a whole is the same in whatever order, or if the checkpoint does not say what it was.
    """
    before = _stored(content)
    if not is_other_data(content, now):
        return set()
    pairs = {split: (before.get(split, EMPTY), now.get(split, EMPTY)) for split in SPLITS}
    return {
        split
        for split, (old, new) in pairs.items()
        if describe_change({split: old}, {split: new}) or not np.array_equal(old.files, new.files)
    }


def earlier_data(config: Config, began: dict[str, Any], now: Snapshots) -> list[dict[str, Any]]:
    """Return what a run's weights had been trained on before, as snapshots, so that no evaluation takes it for new.

    That is what the run of a checkpoint named by `pretrained` had, and what a resumed run had before its data changed.

    Args:
        config: of the run.
        began: content of the checkpoint that the run goes on from; empty in a new run.
        now: its data.
    """
    if began:
        changed = [began["data"]["train"]] if is_other_data(began, now) else []
        return [*began.get("earlier_data", []), *changed]
    path = Path(config.model.pretrained)
    if not path.is_file() or not holds_checkpoint(path):
        return []
    data, earlier, step = (
        read_value(path, key, default) for key, default in (("data", {}), ("earlier_data", []), ("global_step", 0))
    )
    try:
        own = [data["train"]] if step and "train" in data else []
        return [Snapshot.from_dict(values).copy().to_dict() for values in (*earlier, *own)]
    except (TypeError, AttributeError):
        raise ValueError(f"{path}: damaged: its record of its data is none") from None


def _stored(content: dict[str, Any]) -> Snapshots:
    return {split: Snapshot.from_dict(values) for split, values in content.get("data", {}).items()}


def _read_splits(config: Config, given: dict[str, Any], **options: Any) -> Splits:
    settings, source = config.data, _data_source(config, given)
    if is_shards(settings.data_dir):
        if settings.exclude is not None:
            raise ValueError(
                f"--exclude {settings.exclude} goes by images of an index, and {settings.data_dir} is shards"
            )
        return training_shards(
            source, val_data=settings.val_data, captions=settings.captions, cache_images=settings.cache_images
        )
    splits = training_pairs(
        source,
        val_data=settings.val_data,
        val_split=settings.val_split,
        seed=config.seed_of_split,
        join=settings.near_duplicates == "join",
        **options,
    )
    if settings.exclude is not None:
        splits["train"] = without_excluded(splits, Path(settings.exclude))
    return {**splits}


def _data_source(config: Config, given: dict[str, Any]) -> DataSource:
    settings = config.data
    return DataSource(
        settings.data_dir, settings.image_dir, settings.caption_key, settings.allowed_skipped_fraction,
        image_key=settings.image_key, captions_from=settings.captions_from, caption_template=settings.caption_template,
        may_run_commands="data_dir" in given,
    )  # fmt: skip


def read_folded(config: Config, *, given: dict[str, Any], cache_file: Path) -> Folds:
    """Read a data set in folds; arguments as `read_data` takes them.

    Raises:
        ValueError: shards, or too few groups for so many folds.
        FileNotFoundError: it is not there.
    """
    settings = config.data
    if is_shards(settings.data_dir):
        raise ValueError(f"--folds goes by images of an index, and {settings.data_dir} is shards: leave --folds away")
    assert settings.folds is not None
    _make_sample_data(config, given)
    return read_folds(
        _data_source(config, given),
        num_folds=settings.folds,
        seed=config.seed_of_split,
        find_copies=copy_finder(config, cache_file),
        join=settings.near_duplicates == "join",
    )


def without_excluded(splits: dict[str, Pairs], path: Path) -> Pairs:
    """Return what is trained on without the rows of a list that are not to be kept; say how many they are.

    Raises:
        FileNotFoundError, ValueError: the list cannot be read, or leaves fewer than two images.
    """
    found = exclude(splits["train"], read_suspects(path))
    pairs = count(found.num_pairs, "pair")
    logger.info(
        "--exclude %s: %s left out of training, and with them %s", path, pairs, count(found.num_images, "image")
    )
    unmatched = found.unmatched
    for split in ("val", "test"):
        still_unmatched = exclude(splits[split], unmatched).unmatched
        if num_found := len(unmatched) - len(still_unmatched):
            rows = count(num_found, "row names", "rows name")
            logger.info("--exclude %s: %s pairs of %s, which is not changed", path, rows, split)
        unmatched = still_unmatched
    if unmatched:
        names = first_few([f"{shown(row.image)}: {shown(row.caption or 'all captions', 60)!r}" for row in unmatched])
        logger.warning(
            "--exclude %s: %s no pair of this data: %s", path, count(len(unmatched), "row names", "rows name"), names
        )
    if len(found.pairs) < 2:
        raise ValueError(
            f"--exclude {path} leaves {count(len(found.pairs), 'image')} to train on; at least 2 are needed"
        )
    return found.pairs


def odd_data(
    config: Config, splits: Splits, snapshots: Snapshots, *, context_length: int, positives: str
) -> dict[str, str | None]:
    """Find what is most odd about the data; `data_loader.py --check` tells all of it."""
    found = data_findings(
        splits,
        {split: snapshot.files for split, snapshot in snapshots.items()},
        val_split=config.data.val_split,
        batch_size=config.training.batch_size,
        every_pair=config.data.captions == "all",
        context_length=context_length,
    )
    if positives == "caption":
        found.pop("repeated_captions", None)  # they do no harm
    return dict([(kind, finding) for kind, finding in found.items() if finding is not None][:MAX_FINDINGS])


class TestSplit(NamedTuple, Generic[E]):
    """What a run is judged by in the end."""

    pairs: Pairs
    evaluate: Callable[[Any], E]
    """Evaluates a model."""


class RunData(NamedTuple, Generic[E]):
    """What a run trains and validates on."""

    loader: TrainLoader | FeatureLoader | ShardLoader
    train: Pairs | Shards
    val: Pairs
    validate: Callable[..., E]
    """Evaluates the model, or another one that it is given."""
    test: TestSplit[E] | None
    """The test split that the data declares; None: it declares none."""
    skipped: SkippedData
    num_workers: int
    encoder: Encoder
    outputs_of: Callable[[Pairs], PairOutputs | None]
    """Frozen towers' outputs for a data set, cached; None: they are not."""
    gallery: LiveGallery | None = None
    """Draws what a few captions find; None: images are not to travel."""
    watch: Any = None
    """A `watch.Watch` over the sets that are evaluated beside."""

    def note_issues(self, issues: Sequence[Issue]) -> None:
        """Take in samples that are missing from a batch."""
        for issue in issues:
            self.skipped.note(issue)

    def name_samples(self, image_ids: Tensor) -> list[str]:
        """Return what a message calls images of the training data."""
        name = self.train.describe if isinstance(self.train, Shards) else self.train.paths.__getitem__
        return [name(index) for index in image_ids.tolist()]


def open_data(
    config: Config,
    model: Any,
    splits: Splits,
    dataset_class: Any,
    evaluate: Callable[..., E],
    *,
    skipped_path: Path,
    cache_dir: Path,
    precision: Precision,
) -> RunData[E]:
    """Open the loader of the training, and the caches of images and of frozen towers' outputs.

    Args:
        config: of the run.
        model: on its device.
        splits: what `read_data` returned.
        dataset_class: `data_loader.ImageTextDataset`.
        evaluate: `evaluation.evaluate`.
        skipped_path: where skipped samples are listed.
        cache_dir: of images and outputs.
        precision: that the towers run in.
    """
    settings, training = config.data, config.training
    train, val = splits["train"], splits["val"]
    assert isinstance(val, Pairs)  # shards validate as pairs, too
    workers = default_num_workers(model.device) if settings.num_workers is None else settings.num_workers
    workers = fitting_workers(workers)
    image_cache_dir = cache_dir / "images" if settings.cache_images else None
    encoder = Encoder(
        model, dataset_class, precision=precision, batch_size=min(max(training.batch_size, 64), 256),
        num_workers=workers, image_cache_dir=image_cache_dir, kept=KeptWorkers(),
    )  # fmt: skip
    cache = None
    if _caches_features(config, model):
        identify = _identify_within(splits, cache_file=cache_dir / "identities.npz")
        cache = FeatureCache(encoder, cache_dir / "features", identify=identify)

    transform = train_transform(model.image_resolution, settings.augment, fast_decode=settings.fast_decode)
    decoder = gpu_decoder(config, model.device, reads_images=cache is None or "image" not in model.frozen_towers)
    transform = transform if decoder is None else LeavesJpegs(transform)
    context_length = model.architecture.context_length
    options: Any = {
        "batch_size": training.batch_size, "num_workers": workers, "device": model.device, "decoder": decoder,
    }  # fmt: skip
    loader: TrainLoader | FeatureLoader | ShardLoader
    if isinstance(train, Shards):
        loader = ShardLoader(
            train, transform=transform, seed=training.seed, caption_key=settings.caption_key,
            context_length=context_length, **options,
        )  # fmt: skip
    else:
        dataset = dataset_class(
            train, transform=transform, captions=settings.captions, seed=training.seed, context_length=context_length
        )
        if image_cache_dir is not None:
            dataset.cache_images(image_cache_dir)
        loader = (TrainLoader if image_cache_dir is None else CachedLoader)(dataset, **options)
        if cache is not None:
            # pixels of a tower that moves are augmented anew in every epoch
            dataset.num_views = num_views(config) if "image" in model.frozen_towers else 0
            loader = FeatureLoader(loader, cache, augment=settings.augment, num_epochs=training.num_epochs)

    indexes = [pairs for pairs in (train, val) if isinstance(pairs, Pairs)]
    allowed, num_images = settings.allowed_skipped_fraction, len(train) + len(val)
    skipped = SkippedData(indexes, num_images=num_images, max_fraction=allowed, path=skipped_path)
    # computed or read when they are first wanted: the model as loaded gives what every epoch's would
    outputs_of = functools.cache(lambda pairs: None if cache is None else cache.of_pairs(pairs))

    def validate(other: Any = None, *, keep_features: bool = False) -> E:
        return evaluate(
            encoder if other is None else replace(encoder, model=other), val,
            loss_batch_size=training.batch_size, cached=outputs_of(val), on_unreadable_image=skipped.note,
            keep_features=keep_features or other is None,
        )  # fmt: skip

    def evaluate_test(other: Any) -> E:
        return evaluate(replace(encoder, model=other), held_out, cached=outputs_of(held_out))

    held_out = splits.get("test")
    test = TestSplit(held_out, evaluate_test) if isinstance(held_out, Pairs) and len(held_out) else None
    gallery = LiveGallery(val) if config.run.report == "full" else None
    return RunData(loader, train, val, validate, test, skipped, workers, encoder, outputs_of, gallery)


def _identify_within(splits: Splits, *, cache_file: Path) -> Callable[[Strings], Hashes]:
    """Return `file_identities` of some of a run's images; the cache is always asked for, and holds, all of them."""
    all_paths = Strings.concatenate([data.paths for data in splits.values() if isinstance(data, Pairs)])

    def identify(paths: Strings) -> Hashes:
        rows = all_paths.find(paths)
        if (rows < 0).any():  # of a data set that is watched
            return file_identities(paths)
        return file_identities(all_paths, cache_file=cache_file)[rows]

    return identify


def num_views(config: Config) -> int:
    """Return how many views of an image a frozen tower's outputs are cached for; none of shards."""
    if is_shards(config.data.data_dir):
        return 0
    views = config.data.feature_views
    return (1 if config.data.augment == "none" else AUGMENTED_VIEWS) if views is None else views


def _caches_features(config: Config, model: Any) -> bool:
    """Tell whether outputs of frozen towers are cached; say why not, where they could be expected to be."""
    if model.frozen_towers and is_shards(config.data.data_dir):
        logger.info("outputs of frozen towers are not cached for shards: as with --feature_views 0")
    wanted = bool(model.frozen_towers) and num_views(config) > 0
    if wanted and is_sharded(model):
        logger.info("outputs of frozen towers are not cached with --parallel fsdp: they run in every epoch")
    return wanted and not is_sharded(model)
