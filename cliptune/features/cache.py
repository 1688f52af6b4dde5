"""Frozen towers' outputs, computed once and cached on disk for later epochs and runs."""

from __future__ import annotations

import hashlib
import json
import logging
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict
from functools import cached_property
from pathlib import Path
from typing import NamedTuple

import numpy as np
import PIL
import torch
from torch import Tensor

from cliptune.data.caption_table import caption_table
from cliptune.data.identity import Hashes, file_identities
from cliptune.data.issues import Issue, image_issue
from cliptune.data.loaders import Batch, TrainLoader
from cliptune.data.pairs import Pairs
from cliptune.data.row_store import KEY_BYTES, Keys, RowStore, as_keys, digest
from cliptune.data.table import Strings
from cliptune.features.distinct import tokens_of
from cliptune.features.encode import Encoder
from cliptune.features.needs import EncodingModel
from cliptune.features.tower_outputs import Compute, PairOutputs, TowerOutputs
from cliptune.preprocess.decode import read_ends
from cliptune.preprocess.transforms import VERSION as PREPROCESSING_VERSION
from cliptune.preprocess.transforms import train_transform
from cliptune.runtime.device import Precision, product_precision
from cliptune.runtime.distributed import any_rank, gather_values, main_first, rank_slice
from cliptune.runtime.messages import count
from cliptune.runtime.rng import IntArray

logger = logging.getLogger(__name__)

MAX_EPOCHS_LOOKED_AT = 200


class View(NamedTuple):
    """Which pixels of an image are meant: those of an augmentation, a seed and the view's index."""

    augment: str = "none"
    seed: int = 0
    view_index: int = 0


class FeatureCache:
    """The outputs of a model's frozen towers, from disk where they are there, else computed and cached.

    They go by all that they depend on: the tower's weights and architecture, the preprocessing, the precision, and for
    each image its path and its file's identity (also seed and indices if augmented), for each caption its text. A
    changed image is computed anew, alone; changed weights have files of their own. All may be deleted.

    Args:
        encoder: its model's towers of `towers` do not change.
        folder: holds two files for each tower, `image-<key>` and `text-<key>`, however many views there are.
        identify: `file_identities`, or what knows some of them already.
        towers: those that do not change as long as this is used; None: the model's frozen ones.
    """

    def __init__(
        self,
        encoder: Encoder,
        folder: Path,
        *,
        identify: Callable[[Strings], Hashes] = file_identities,
        towers: Sequence[str] | None = None,
    ) -> None:
        self.encoder = encoder
        self.identify = identify
        model = encoder.model
        self._stores = {
            tower: RowStore(
                folder / f"{tower}-{tower_key(model, tower, encoder.precision)}",
                np.dtype("<f4").itemsize * model.architecture.embed_dim,
            )
            for tower in (model.frozen_towers if towers is None else towers)
        }

    def of_pairs(self, pairs: Pairs) -> PairOutputs:
        """Return the frozen towers' outputs for every image (as it is, not augmented) and every caption."""
        return PairOutputs(self.images(pairs, View()), self.texts(pairs))

    def images(self, pairs: Pairs, view: View) -> TowerOutputs | None:
        """Return the outputs for one view of every image; None if the image tower is not frozen.

        Raises:
            OSError: not enough space on disk.
        """
        if "image" not in self._stores:
            return None
        keys, issues = _image_keys(pairs, view, self.identify(pairs.paths))
        encoder, model = self.encoder, self.encoder.model
        dataset = encoder.open_dataset(
            pairs, transform=train_transform(model.image_resolution, view.augment), seed=view.seed
        )
        dataset.num_views = view.view_index + 1
        dataset.set_epoch(view.view_index + 1)

        def compute(missing: IntArray) -> Iterator[tuple[IntArray, Tensor]]:
            run, items = model.run_image_tower, torch.from_numpy(missing)
            loop = encoder.run_images(dataset, items, run, across_ranks=False, desc="frozen image tower")
            start = 0
            for batch, outputs in loop:
                ids = batch.image_ids.numpy()
                # a batch names its issues in the order of its items
                asked = missing[start : start + len(ids) + len(batch.issues)]
                issues.update(zip(asked[~np.isin(asked, ids)].tolist(), batch.issues, strict=True))
                start += len(asked)
                if outputs is not None:
                    yield ids, outputs

        wanted = np.setdiff1d(np.arange(len(pairs)), list(issues))
        return self._outputs("image", keys, wanted, compute=compute, issues=issues)

    def texts(self, pairs: Pairs, wanted: IntArray | None = None) -> TowerOutputs | None:
        """Return the outputs for captions (indices `wanted`, sorted; None: all); None if the text tower is not frozen.

        Raises:
            OSError: not enough space on disk.
        """
        if "text" not in self._stores:
            return None
        wanted = np.arange(pairs.num_pairs) if wanted is None else wanted
        keys = np.zeros(pairs.num_pairs, dtype=as_keys([]).dtype)
        keys[wanted] = as_keys(digest(pairs.captions[index]) for index in wanted.tolist())

        def compute(missing: IntArray) -> Iterator[tuple[IntArray, Tensor]]:
            encoder = self.encoder
            tokens = tokens_of(pairs.captions.take(missing), encoder.model.architecture.context_length)
            loop = encoder.run_texts(tokens, encoder.model.run_text_tower, across_ranks=False, desc="frozen text tower")
            for rows, outputs in loop:
                yield missing[rows.numpy()], outputs

        return self._outputs("text", keys, wanted, compute=compute, issues={})

    def _outputs(
        self, tower: str, keys: Keys, wanted: IntArray, *, compute: Compute, issues: dict[int, Issue]
    ) -> TowerOutputs:
        """Return the outputs at `wanted`; compute and store those that are missing, all ranks together.

        Args:
            tower: `image` or `text`.
            keys: of each image or caption, `[N]`.
            wanted: indices, sorted.
            compute: gives outputs, and adds to `issues` why there are none.
            issues: by index; of these none is wanted.
        """
        store = self._stores[tower]
        rows = np.full(len(keys), -1, dtype=np.int64)
        with main_first():
            rows[wanted] = store.announce(
                keys[wanted], what="tower output", way_out="Try another --cache_dir, or --feature_views 0"
            )
        outputs = TowerOutputs(store, rows, keys=keys, issues=issues, compute=compute)
        missing = wanted[~outputs.has(wanted)]
        _, first = np.unique(rows[missing], return_index=True)  # a caption may come several times
        missing = missing[np.sort(first)]
        logger.info(
            "frozen %s tower: %d of %s are cached, %d to compute (%s)",
            tower, len(wanted) - len(missing), count(len(wanted), "output"), len(missing), store.path,
        )  # fmt: skip
        if any_rank(bool(len(missing))):
            # each rank computes its part. Ranks that share no disk still miss the others' parts, and compute them too
            own = missing[rank_slice(len(missing))]
            self._compute(outputs, own)
            others = np.setdiff1d(missing, own)
            self._compute(outputs, others[~outputs.has(others)])
        rows[list(issues)] = -1
        return outputs

    def _compute(self, outputs: TowerOutputs, indices: IntArray) -> None:
        """Compute and store what is missing, then learn from the other ranks what cannot be computed."""
        missing = np.setdiff1d(indices, list(outputs.issues))
        for found, computed in outputs.compute(missing) if len(missing) else ():
            outputs.put(found, computed)
        for issues in gather_values(dict(outputs.issues)):
            outputs.issues.update(issues)
        outputs.store.reopen()


class FeatureLoader:
    """The batches of a `TrainLoader`, with frozen towers' outputs in place of their pixels or tokens.

    Order, captions and skipped images are the same; with a frozen image tower no image is decoded after the first
    epoch that sees a view.

    Args:
        loader: gives the order, and pixels if the image tower moves; its `dataset.num_views` says how many views are
            cached (0 counts as 1, which is right without augmentation).
        cache: of the model that is trained.
        augment: what the data set's transform does, see `train_transform`.
        num_epochs: captions that no epoch up to this one uses are not encoded.
    """

    def __init__(self, loader: TrainLoader, cache: FeatureCache, *, augment: str, num_epochs: int) -> None:
        self.dataset = loader.dataset
        self._loader = loader
        self._cache = cache
        self._augment = augment
        self._num_epochs = num_epochs
        self._views: dict[int, TowerOutputs | None] = {}
        # a step on cached outputs is so short that hashing its captions anew each epoch would show
        self._captions = caption_table(self.dataset.pairs, self.dataset.context_length)

    def __len__(self) -> int:
        return len(self._loader)

    def epoch(self, epoch: int, *, start: int = 0) -> Iterator[Batch]:
        """Yield the batches of one epoch from index `start` on.

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

    def _batch(self, items: IntArray, images: TowerOutputs, texts: TowerOutputs | None) -> Batch:
        image_ids, caption_indices = self.dataset.choose(items)
        readable = images.rows[image_ids] >= 0
        issues = [images.issues[index] for index in image_ids[~readable].tolist()]
        image_ids, caption_indices = image_ids[readable], caption_indices[readable]
        return Batch(
            images=images[image_ids],
            tokens=self._captions.tokens(caption_indices) if texts is None else texts[caption_indices],
            image_ids=torch.from_numpy(image_ids),
            issues=issues,
            caption_ids=self._captions.ids(caption_indices),
            caption_indices=torch.from_numpy(caption_indices),
        )

    def _images_of_view(self, index: int) -> TowerOutputs | None:
        if index not in self._views:
            view = View(self._augment, self.dataset.seed, index)
            self._views[index] = self._cache.images(self.dataset.pairs, view)
        return self._views[index]

    @cached_property
    def _texts(self) -> TowerOutputs | None:
        # many epochs use nearly every caption; looking through a million of them would take hours
        wanted = np.full(self.dataset.pairs.num_pairs, self._num_epochs > MAX_EPOCHS_LOOKED_AT)
        for epoch in range(1, self._num_epochs + 1):
            if wanted.all():
                break
            self.dataset.set_epoch(epoch)
            wanted[self.dataset.choose(np.arange(len(self.dataset)))[1]] = True
        return self._cache.texts(self.dataset.pairs, np.flatnonzero(wanted))


def tower_key(model: EncodingModel, tower: str, precision: Precision) -> str:
    """Return a hexadecimal digest of all that a tower's output depends on, but for the image or text itself."""
    found = hashlib.sha256()
    architecture = {key: value for key, value in asdict(model.architecture).items() if key != "name"}
    computed = [precision.name, model.device.type, product_precision()]
    prepared = [PREPROCESSING_VERSION, PIL.__version__ if tower == "image" else None]
    found.update(json.dumps([tower, architecture, computed, prepared], sort_keys=True).encode())
    for name, value in sorted(model.tower_state(tower).items()):
        array = value.detach().cpu().contiguous().numpy()
        found.update(f"{name} {array.dtype} {array.shape}".encode())
        found.update(array.reshape(-1).data)
    return found.hexdigest()[: 2 * KEY_BYTES]


def _image_keys(pairs: Pairs, view: View, identities: Hashes) -> tuple[Keys, dict[int, Issue]]:
    """Return a key for each image file as it is now, `[N]`, and why some cannot be read."""
    digests: list[bytes] = []
    issues: dict[int, Issue] = {}
    for index, (path, identity) in enumerate(zip(pairs.paths, identities.tolist(), strict=True)):
        content = identity
        if not identity:
            try:
                content = read_ends(path, KEY_BYTES)
            except (OSError, ValueError) as error:
                issues[index] = image_issue(path, error)
        digests.append(digest(path, content) if view.augment == "none" else digest(path, content, *view, index))
    return as_keys(digests), issues
