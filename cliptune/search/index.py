"""The images below a folder and their features, cached so that only new and changed images are encoded."""

from __future__ import annotations

import functools
import logging
import os
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from cliptune.data.folders import list_folder, stem_and_ending
from cliptune.data.identity import file_identities
from cliptune.data.pairs import Pairs
from cliptune.data.row_store import digest
from cliptune.data.table import Strings
from cliptune.features.cache import FeatureCache, View
from cliptune.features.encode import Encoder
from cliptune.preprocess.image_formats import IMAGE_ENDINGS
from cliptune.runtime.messages import count, first_few

logger = logging.getLogger(__name__)


class ImageIndex(NamedTuple):
    """Images that can be found, and their features."""

    root: str
    """Real path of the folder."""
    paths: Strings
    """Of each image, below `root`, `[N]`."""
    features: Tensor
    """Unit-norm float32 `[N, D]`, in main memory."""

    def name_of(self, image: int) -> str:
        """Return an image's path below the folder."""
        return os.path.relpath(self.paths[image], self.root)


def find_images(folder: str | Path) -> Iterator[str]:
    """Yield the paths of all files below a folder that end as images do, folder by folder, sorted; none hidden.

    Links count as what they lead to; a folder that is reached twice is read once.
    """
    waiting, seen = [str(folder)], set()
    while waiting:
        here = waiting.pop()
        real = os.path.realpath(here)
        if real in seen:
            continue
        seen.add(real)
        try:
            listing = list_folder(Path(here))
        except OSError as error:
            logger.warning("skipped: folder %s: %s", here, error.strerror)
            continue
        names = (name for name in listing.files if stem_and_ending(name)[1] in IMAGE_ENDINGS)
        yield from (os.path.join(here, name) for name in names)  # noqa: PTH118  (pathlib is several times as slow)
        waiting += [os.path.join(here, name) for name in reversed(listing.folders)]  # noqa: PTH118


def require_images(folder: Path) -> None:
    """Raise unless a folder, or one below it, holds a file that ends as an image does.

    Raises:
        FileNotFoundError: no such folder.
        ValueError: a file, or no image in the folder.
    """
    if folder.is_file():
        raise ValueError(f"--images {folder}: a file, where a folder of images is looked through")
    if not folder.is_dir():
        raise FileNotFoundError(f"--images {folder}: no such folder")
    if next(find_images(os.path.realpath(folder)), None) is None:
        raise ValueError(
            f"--images {folder}: no image in this folder or below; files count by their endings, and those inside of "
            "shards or Parquet files do not"
        )


def read_index(encoder: Encoder, folder: Path, *, cache_dir: Path) -> ImageIndex:
    """Return the features of all images below a folder; those that the cache lacks are encoded.

    A feature goes by the weights, the preprocessing, the image's path and all bytes of its file. A file that the system
    says was not written to is not read again. What cannot be read is said and left out.

    Args:
        encoder: of the images; the outputs of its model's image tower are what is cached.
        folder: of the images.
        cache_dir: gets the folders features/ and search/; both may be deleted.

    Raises:
        FileNotFoundError: no such folder.
        ValueError: no image in it that can be read, or features that are not finite.
        OSError: not enough space on the disk.
    """
    require_images(folder)
    root = os.path.realpath(folder)
    paths = Strings.of(find_images(root))
    identities = index_file(folder, cache_dir).with_suffix(".npz")
    identify = functools.partial(file_identities, cache_file=identities, whole=True)
    # a model that is in training does not change while this reads, and its next state has files of its own
    cache = FeatureCache(encoder, cache_dir / "features", identify=identify, towers=["image"])
    outputs = cache.images(_as_pairs(paths), View())
    assert outputs is not None
    if outputs.issues:
        issues = list(outputs.issues.values())
        logger.warning("skipped: %s that cannot be read: %s", count(len(issues), "file"), first_few(issues))
    readable = np.flatnonzero(outputs.rows >= 0)
    if not len(readable):
        raise ValueError(f"--images {folder}: none of the {count(len(paths), 'image')} can be read")
    features = encoder.project(outputs, torch.from_numpy(readable), encoder.model.project_image).float().cpu()
    if not features.isfinite().all():
        raise ValueError("the model gives features that are not finite: its weights are damaged")
    return ImageIndex(root, paths.take(readable), features)


def index_file(folder: Path, cache_dir: Path) -> Path:
    """Return what the names of the files begin with in which a folder's index is cached."""
    return cache_dir / "search" / digest(os.path.realpath(folder)).hex()


def _as_pairs(paths: Strings) -> Pairs:
    """Return images as the encoder takes them, each with an empty caption."""
    captions = Strings.of("" for _ in range(len(paths)))
    splits = np.full(len(paths), -1, dtype=np.int8)
    return Pairs(paths=paths, captions=captions, starts=np.arange(len(paths) + 1), groups=paths, splits=splits)
