"""What frozen towers give, computed once and kept on disk for later epochs and runs."""

from __future__ import annotations

import hashlib
import json
import logging
import os
import shutil
import time
import uuid
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import asdict
from functools import cached_property
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import PIL
import torch
from torch import Tensor
from torch.utils.data import Subset

from clip_model import CLIPModel
from cliptune.data.issues import Issue, image_issue
from cliptune.data.loaders import Batch, TrainLoader, caption_id, make_loader
from cliptune.data.pairs import Pairs
from cliptune.preprocess.decode import file_stamp
from cliptune.preprocess.tokens import tokenize
from cliptune.preprocess.transforms import VERSION as PREPROCESSING_VERSION
from cliptune.preprocess.transforms import train_transform
from cliptune.runtime.device import Precision, autocast
from cliptune.runtime.distributed import any_rank, barrier, gather_values, rank_slice
from cliptune.runtime.logs import progress_bar
from cliptune.runtime.rng import IntArray
from data_loader import ImageTextDataset

logger = logging.getLogger(__name__)

KEY_BYTES = 16
COMMIT_SECONDS = 5.0
TEXT_CHUNK = 16384

Keys = np.ndarray[Any, np.dtype[np.uint64]]
Rows = np.ndarray[Any, np.dtype[np.float32]]


class FeatureStore:
    """Vectors on disk under 128-bit keys; memory-mapped to read, only ever added to.

    Each writer has a part of its own: `<part>.rows` holds vectors, `<part>.keys` one key a vector, written after it has
    reached the disk. So a vector without its key is not there, whatever ended the writer, and several runs can share a
    folder without a lock.

    Args:
        folder: where the parts are; made by the first writer.
        width: numbers a vector.
    """

    def __init__(self, folder: Path, width: int) -> None:
        self.folder = folder
        self.width = width
        self._names: list[str] = []
        self._parts: list[Rows] = []
        self._keys: list[Keys] = []
        self.take_in()

    def __len__(self) -> int:
        return int(self._starts[-1])

    def find(self, keys: Keys) -> IntArray:
        """Return the row of each key, int64 `[N]`, -1 where there is none; `keys` is `[N, 2]`."""
        found = np.full(len(keys), -1, dtype=np.int64)
        place = np.searchsorted(self._sorted[:, 0], keys[:, 0])
        open_ones = np.flatnonzero(place < len(self))
        while len(open_ones):  # again only where two keys have the same first half
            candidates = self._sorted[place[open_ones]]
            wanted = keys[open_ones]
            hits = (candidates == wanted).all(1)
            found[open_ones[hits]] = self._order[place[open_ones[hits]]]
            place[open_ones] += 1
            more = ~hits & (candidates[:, 0] == wanted[:, 0]) & (place[open_ones] < len(self))
            open_ones = open_ones[more]
        return found

    def gather(self, rows: IntArray) -> Rows:
        """Copy rows into memory: float32 `[len(rows), width]`."""
        if len(self._parts) == 1:
            return np.take(self._parts[0], rows, axis=0)
        gathered = np.empty((len(rows), self.width), dtype=np.float32)
        part_of = np.searchsorted(self._starts, rows, side="right") - 1
        for part in np.unique(part_of).tolist():
            here = part_of == part
            gathered[here] = self._parts[part][rows[here] - self._starts[part]]
        return gathered

    @contextmanager
    def writing(self, num_rows: int) -> Iterator[Callable[[Keys, Rows], None]]:
        """Give a function that adds vectors; what it was given is there afterwards, also if the block was left early.

        Raises:
            OSError: not enough space for `num_rows` of them; says how much is needed and what to do.
        """
        self.folder.mkdir(parents=True, exist_ok=True)
        self._check_space(num_rows)
        part = self.folder / uuid.uuid4().hex
        pending: list[bytes] = []
        last_commit = time.monotonic()
        with part.with_suffix(".rows").open("wb") as rows_file, part.with_suffix(".keys").open("wb") as keys_file:

            def commit() -> None:
                _to_disk(rows_file)
                keys_file.write(b"".join(pending))
                _to_disk(keys_file)
                pending.clear()

            def write(keys: Keys, rows: Rows) -> None:
                nonlocal last_commit
                rows_file.write(np.ascontiguousarray(rows, dtype="<f4").tobytes())
                pending.append(np.ascontiguousarray(keys, dtype="<u8").tobytes())
                if time.monotonic() - last_commit > COMMIT_SECONDS:
                    commit()
                    last_commit = time.monotonic()

            try:
                yield write
            finally:
                commit()
        self._take_in([part.with_suffix(".keys")])

    def take_in(self) -> None:
        """Take in what others have written; rows that have been given out keep their numbers."""
        self._take_in(sorted(self.folder.glob("*.keys")))

    def _take_in(self, paths: list[Path]) -> None:
        for path in paths:
            rows_path = path.with_suffix(".rows")
            num_rows = min(path.stat().st_size // KEY_BYTES, _size(rows_path) // (4 * self.width))
            if num_rows and path.stem not in self._names:
                mapped = np.memmap(rows_path, dtype="<f4", mode="r", shape=(num_rows, self.width))
                self._names.append(path.stem)
                self._parts.append(np.asarray(mapped))
                self._keys.append(np.fromfile(path, dtype="<u8", count=2 * num_rows).reshape(-1, 2))
        self._starts = np.cumsum([0, *(len(part) for part in self._parts)], dtype=np.int64)
        keys = np.concatenate([np.empty((0, 2), dtype=np.uint64), *self._keys])
        self._order = np.argsort(keys[:, 0], kind="stable")
        self._sorted = keys[self._order]

    def _check_space(self, num_rows: int) -> None:
        needed = num_rows * (4 * self.width + KEY_BYTES)
        free = shutil.disk_usage(self.folder).free
        if needed > free:
            raise OSError(
                f"{num_rows} kept features need {needed / 1e9:.2f} GB, but {self.folder} has {free / 1e9:.2f} GB left: "
                "name another --cache_dir, or keep none with --feature_views 0"
            )


class Features:
    """A frozen tower's output for numbered pictures or captions.

    Attributes:
        rows: int64 `[N]`: where the output of each is in the store, -1 where there is none.
        errors: why there is none, by number.
    """

    def __init__(self, store: FeatureStore, rows: IntArray, errors: dict[int, Issue]) -> None:
        self.store = store
        self.rows = rows
        self.errors = errors

    def __len__(self) -> int:
        return len(self.rows)

    def __getitem__(self, numbers: IntArray) -> Tensor:
        """Return the outputs of some, float32 `[len(numbers), embed_dim]`.

        Raises:
            IndexError: one of them has none.
        """
        rows = self.rows[numbers]
        if (rows < 0).any():
            raise IndexError(f"nothing is kept for number {int(np.asarray(numbers)[rows < 0][0])}")
        return torch.from_numpy(self.store.gather(rows))


class PairFeatures(NamedTuple):
    """What frozen towers give for all pictures and captions of a data set; None for a tower that moves."""

    images: Features | None
    texts: Features | None


class View(NamedTuple):
    """Which pixels of a picture are meant: those of an augmentation, a seed and the view's number."""

    augment: str = "none"
    seed: int = 0
    number: int = 0


class FeatureCache:
    """The outputs of a model's frozen towers, from disk where they are there, else computed and kept.

    They go by all that they depend on: the tower's weights and architecture, the preprocessing, the precision, and for
    each picture its path, size and time of change (also seed and numbers if augmented), for each caption its text. A
    changed picture is computed anew, alone; changed weights are another folder. The folder may be deleted at any time.

    Args:
        model: on its device, its frozen towers never to change again.
        folder: holds a folder for each tower, `image-<key>` and `text-<key>`.
        precision: of the forward passes.
        batch_size: pictures or captions computed at once.
        num_workers: loading processes.
    """

    def __init__(
        self, model: CLIPModel, folder: Path, *, precision: Precision, batch_size: int, num_workers: int
    ) -> None:
        self.model = model
        self.precision = precision
        self.batch_size = batch_size
        self.num_workers = num_workers
        self._stores = {
            tower: FeatureStore(folder / f"{tower}-{tower_key(model, tower, precision)}", model.architecture.embed_dim)
            for tower in model.frozen_towers
        }

    def of_pairs(self, pairs: Pairs) -> PairFeatures:
        """Return what the frozen towers give for every picture (as it is, not augmented) and every caption."""
        return PairFeatures(self.images(pairs, View()), self.texts(pairs))

    def images(self, pairs: Pairs, view: View) -> Features | None:
        """Return one view of every picture; None if the image tower is not frozen.

        Raises:
            OSError: not enough space on disk.
        """
        store = self._stores.get("image")
        if store is None:
            return None
        keys, errors = _picture_keys(pairs, view)
        rows = store.find(keys)
        rows[list(errors)] = -1
        missing = np.flatnonzero(rows < 0)
        missing = missing[~np.isin(missing, list(errors))]
        self._log("image", num_missing=len(missing), num_all=len(rows), store=store)
        if any_rank(bool(len(missing))):
            own = missing[rank_slice(len(missing))]
            for found in gather_values(self._encode_images(pairs, view, own, keys=keys, store=store)):
                errors |= found
            store.take_in()
            rows = store.find(keys)
            rows[list(errors)] = -1
            # of processes that share no disk, each computes all that is missing on its own
            missing = np.setdiff1d(np.flatnonzero(rows < 0), list(errors))
            self._encode_images(pairs, view, missing, keys=keys, store=store)
            rows[missing] = store.find(keys[missing])
        return Features(store, rows, errors)

    def texts(self, pairs: Pairs, wanted: IntArray | None = None) -> Features | None:
        """Return the captions `wanted` (int64, sorted; None: all) of a data set; None if the text tower is not frozen.

        Raises:
            OSError: not enough space on disk.
        """
        store = self._stores.get("text")
        if store is None:
            return None
        wanted = np.arange(pairs.num_pairs) if wanted is None else wanted
        keys = _as_keys(_digest(pairs.captions[number]) for number in wanted.tolist())
        found = store.find(keys)
        _, first = np.unique(keys[found < 0], axis=0, return_index=True)
        missing = np.flatnonzero(found < 0)[np.sort(first)]
        self._log("text", num_missing=len(missing), num_all=len(wanted), store=store)
        if any_rank(bool(len(missing))):
            for part in (missing[rank_slice(len(missing))], missing):
                own = part[store.find(keys[part]) < 0]
                captions = (pairs.captions[number] for number in wanted[own].tolist())
                self._encode_texts(captions, keys[own], store)
                barrier()
                store.take_in()
            found = store.find(keys)
        rows = np.full(pairs.num_pairs, -1, dtype=np.int64)
        rows[wanted] = found
        return Features(store, rows, {})

    def _encode_images(
        self, pairs: Pairs, view: View, missing: IntArray, *, keys: Keys, store: FeatureStore
    ) -> dict[int, Issue]:
        """Add the pictures `missing` to the store; return why some of them have no output."""
        if not len(missing):
            return {}
        model = self.model
        transform = train_transform(model.image_resolution, view.augment)
        dataset = ImageTextDataset(pairs, transform=transform, seed=view.seed)
        dataset.num_views = view.number + 1
        dataset.set_epoch(view.number + 1)
        loader = make_loader(
            Subset(dataset, missing.tolist()),
            batch_size=self.batch_size,
            num_workers=self.num_workers,
            device=model.device,
        )
        errors: dict[int, Issue] = {}
        bar = progress_bar(total=len(missing), unit="picture", desc="frozen image tower")
        with store.writing(len(missing)) as write, bar, torch.no_grad():
            for number, batch in enumerate(loader):
                items = missing[number * self.batch_size : (number + 1) * self.batch_size]
                ids = batch.image_ids.numpy()
                if len(ids):
                    with autocast(model.device, self.precision):
                        outputs = model.run_image_tower(batch.images)
                    write(keys[ids], outputs.float().cpu().numpy())
                failed = items[~np.isin(items, ids)].tolist()
                errors.update(zip(failed, batch.issues, strict=True))
                bar.update(len(items))
        return errors

    def _encode_texts(self, captions: Iterator[str], keys: Keys, store: FeatureStore) -> None:
        """Add captions to the store, in batches of similar length, since a batch costs as much as its longest text."""
        if not len(keys):
            return
        model = self.model
        bar = progress_bar(total=len(keys), unit="caption", desc="frozen text tower")
        with store.writing(len(keys)) as write, bar, torch.no_grad():
            for start in range(0, len(keys), TEXT_CHUNK):
                chunk = keys[start : start + TEXT_CHUNK]
                tokens, _ = tokenize([next(captions) for _ in chunk], model.architecture.context_length)
                for rows in torch.argsort(tokens.argmax(1), stable=True).split(self.batch_size):
                    with autocast(model.device, self.precision):
                        outputs = model.run_text_tower(tokens[rows])
                    write(chunk[rows.numpy()], outputs.float().cpu().numpy())
                    bar.update(len(rows))

    @staticmethod
    def _log(tower: str, *, num_missing: int, num_all: int, store: FeatureStore) -> None:
        logger.info(
            "frozen %s tower: %d of %d features are kept, %d to compute (%s)",
            tower, num_all - num_missing, num_all, num_missing, store.folder,
        )  # fmt: skip


class FeatureLoader:
    """The batches of a `TrainLoader`, with frozen towers' outputs in place of their pixels or tokens.

    Order, captions and left-out pictures are the same; with a frozen image tower no picture is decoded after the first
    epoch that sees a view.

    Args:
        loader: gives the order, and pixels if the image tower moves; its `dataset.num_views` says how many views are
            kept (0 counts as 1, which is right without augmentation).
        cache: of the model that is trained.
        augment: what the data set's transform does, see `train_transform`.
        num_epochs: the captions that no epoch up to this one uses are left out.
    """

    def __init__(self, loader: TrainLoader, cache: FeatureCache, *, augment: str, num_epochs: int) -> None:
        self.dataset = loader.dataset
        self._loader = loader
        self._cache = cache
        self._augment = augment
        self._num_epochs = num_epochs
        self._views: dict[int, Features | None] = {}

    def __len__(self) -> int:
        return len(self._loader)

    def epoch(self, epoch: int, *, start: int = 0) -> Iterator[Batch]:
        """Yield the batches of one epoch from number `start` on.

        Their `images` and `tokens` are float32 `[B, embed_dim]` for a frozen tower.
        """
        texts = self._texts
        self.dataset.set_epoch(epoch)
        images = self._images_of_view(self.dataset.view if self.dataset.num_views else 0)
        if images is not None:
            self._loader.batches.epoch, self._loader.batches.start = epoch, start
            for items in self._loader.batches:
                yield self._batch(np.array(items[rank_slice(len(items))], dtype=np.int64), images, texts)
        elif texts is not None:
            for batch in self._loader.epoch(epoch, start=start):
                yield batch._replace(tokens=texts[batch.caption_indices.numpy()])
        else:
            yield from self._loader.epoch(epoch, start=start)

    def _batch(self, items: IntArray, images: Features, texts: Features | None) -> Batch:
        image_ids, caption_indices = self.dataset.choose(items)
        readable = images.rows[image_ids] >= 0
        issues = [images.errors[index] for index in image_ids[~readable].tolist()]
        image_ids, caption_indices = image_ids[readable], caption_indices[readable]
        captions = [self.dataset.pairs.captions[index] for index in caption_indices.tolist()]
        return Batch(
            images=images[image_ids],
            tokens=tokenize(captions)[0] if texts is None else texts[caption_indices],
            image_ids=torch.from_numpy(image_ids),
            issues=issues,
            caption_ids=torch.tensor([caption_id(caption) for caption in captions], dtype=torch.int64),
            caption_indices=torch.from_numpy(caption_indices),
        )

    def _images_of_view(self, number: int) -> Features | None:
        if number not in self._views:
            view = View(self._augment, self.dataset.seed, number)
            self._views[number] = self._cache.images(self.dataset.pairs, view)
        return self._views[number]

    @cached_property
    def _texts(self) -> Features | None:
        wanted = np.zeros(self.dataset.pairs.num_pairs, dtype=bool)
        for epoch in range(1, self._num_epochs + 1):
            self.dataset.set_epoch(epoch)
            wanted[self.dataset.choose(np.arange(len(self.dataset)))[1]] = True
        return self._cache.texts(self.dataset.pairs, np.flatnonzero(wanted))


def tower_key(model: CLIPModel, tower: str, precision: Precision) -> str:
    """Return a hexadecimal digest of all that a tower's output depends on, but for the picture or text itself."""
    digest = hashlib.sha256()
    architecture = {key: value for key, value in asdict(model.architecture).items() if key != "name"}
    computed = [precision.name, model.device.type, torch.get_float32_matmul_precision()]
    prepared = [PREPROCESSING_VERSION, PIL.__version__ if tower == "image" else None]
    digest.update(json.dumps([tower, architecture, computed, prepared], sort_keys=True).encode())
    for name, value in sorted(model.tower_state(tower).items()):
        array = value.detach().cpu().contiguous().numpy()
        digest.update(f"{name} {array.dtype} {array.shape}".encode())
        digest.update(array.reshape(-1).data)
    return digest.hexdigest()[: 2 * KEY_BYTES]


def _picture_keys(pairs: Pairs, view: View) -> tuple[Keys, dict[int, Issue]]:
    """Return a key for each picture file as it is now, `[N, 2]`, and why some cannot be read."""
    digests: list[bytes] = []
    errors: dict[int, Issue] = {}
    for number, path in enumerate(pairs.paths):
        try:
            stamp: tuple[Any, ...] = (path, *file_stamp(path))
        except (OSError, ValueError) as error:
            errors[number] = image_issue(path, error)
            digests.append(bytes(KEY_BYTES))
            continue
        digests.append(_digest(*stamp) if view.augment == "none" else _digest(*stamp, *view, number))
    return _as_keys(iter(digests)), errors


def _digest(*parts: Any) -> bytes:
    content = "\0".join(map(str, parts)).encode("utf-8", "surrogateescape")
    return hashlib.blake2b(content, digest_size=KEY_BYTES).digest()


def _as_keys(digests: Iterator[bytes]) -> Keys:
    return np.frombuffer(b"".join(digests), dtype="<u8").reshape(-1, 2)


def _to_disk(file: Any) -> None:
    file.flush()
    os.fsync(file.fileno())


def _size(path: Path) -> int:
    return path.stat().st_size if path.exists() else 0
