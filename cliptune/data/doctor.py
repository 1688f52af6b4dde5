"""What the images and captions of a data set are, looked at one by one: what `data_loader.py --check` goes by."""

from __future__ import annotations

import hashlib
import re
import time
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray
from torch.utils.data import Dataset

from cliptune.data.fingerprints import Fingerprints
from cliptune.data.issues import Issue, Issues, image_issue
from cliptune.data.loaders import caption_id
from cliptune.data.table import BoolArray, IntArray, Strings
from cliptune.data.workers import make_loader
from cliptune.preprocess.decode import read_bytes, size_of
from cliptune.preprocess.fingerprint import FINGERPRINT, fingerprint
from cliptune.preprocess.tokens import count_tokens
from cliptune.preprocess.transforms import clip_transform
from cliptune.runtime.device import num_cores
from cliptune.runtime.logs import progress_bar

PIXELS = 224
"""Of the sides of an image whose colours are looked at."""
ONE_COLOR = 5
"""Levels of 255 by which the pixels of an image that is nearly one colour deviate from their mean."""
FOREIGN = 2.0
"""Tokens a word from which on captions are in a language that the tokenizer was not made for."""
MAX_WORKERS = 16
BATCH = 32
"""Images that a worker hands over at once."""
CHUNK = 1024
"""Captions that a worker looks at in one go."""
MIN_FOR_WORKERS = 20_000
"""Captions from which on workers are worth their start."""
_WORD = re.compile(r"\w+")
_LETTER = re.compile(r"[^\W\d_]")
_OTHER_LETTER = re.compile(r"[^\W\d_\u0000-\u024f\u1e00-\u1eff]")


class ImageFacts(NamedTuple):
    """What the images of a data set are.

    Attributes:
        issues: of the images that cannot be read.
        is_readable: bool `[N]`.
        sizes: width and height in pixels, int32 `[N, 2]`; 0 where it cannot be read.
        is_one_color: bool `[N]`: nearly.
        files: index of the first image whose file is the same, byte by byte, int64 `[N]`; its own where none is.
        per_second: images that all workers together read and decode in a second.
    """

    issues: Issues
    is_readable: BoolArray
    sizes: NDArray[np.int32]
    is_one_color: BoolArray
    files: IntArray
    per_second: float


def look_at_images(
    paths: Strings, *, fingerprints: Fingerprints | None = None, num_workers: int | None = None
) -> ImageFacts:
    """Decode every image once, as training does.

    Args:
        paths: of the images, `[N]`.
        fingerprints: get those that they lack; None: none are taken.
        num_workers: that decode; None: one a core, at most 16.
    """
    issues, sizes, is_one_color = Issues(), np.zeros((len(paths), 2), np.int32), np.zeros(len(paths), dtype=bool)
    files = np.arange(len(paths))
    first_of: dict[bytes, int] = {}
    workers = min(MAX_WORKERS, num_cores()) if num_workers is None else num_workers
    seconds = 0.0
    wanted = np.zeros(len(paths), dtype=bool)
    if fingerprints is not None:
        wanted[fingerprints.missing()] = True
    looks = make_loader(_ImageFiles(paths, wanted), num_workers=workers, batch_size=BATCH, collate_fn=list)
    with progress_bar(total=len(paths), desc="images", unit="image") as bar:
        for start, batch in zip(range(0, len(paths), BATCH), looks, strict=True):
            for index, look in enumerate(batch, start):
                if look.issue is not None:
                    issues.add(look.issue)
                    continue
                sizes[index], is_one_color[index] = look.size, look.is_one_color
                seconds += look.seconds
                files[index] = first_of.setdefault(look.digest, index)
            taken = {index: look.fingerprint for index, look in enumerate(batch, start) if look.fingerprint is not None}
            if fingerprints is not None and taken:
                fingerprints.put(np.array(list(taken)), np.array(list(taken.values()), dtype=FINGERPRINT))
            bar.update(len(batch))
    is_readable = sizes[:, 0] > 0
    # the workers' own time: that of the whole has their start in it, which is most of it where images are few
    per_second = max(workers, 1) * max(int(is_readable.sum()), 1) / max(seconds, 1e-3)
    return ImageFacts(issues, is_readable, sizes, is_one_color, files, per_second)


class _Look(NamedTuple):
    """What one image turned out to be."""

    issue: Issue | None
    size: tuple[int, int] = (0, 0)
    digest: bytes = b""
    """Of the file."""
    is_one_color: bool = False
    fingerprint: NDArray[Any] | None = None
    seconds: float = 0.0
    """That reading and decoding took, as training does them."""


class _ImageFiles(Dataset[_Look]):
    """The images of a data set, each read as training reads it."""

    def __init__(self, paths: Strings, wanted: BoolArray) -> None:
        self.paths = paths
        self.wanted = wanted
        """Of which images a fingerprint is taken."""
        self.transform = clip_transform(PIXELS)
        self.is_warm = False
        """Whether this worker has read an image: its first one loads what reads images."""

    def __len__(self) -> int:
        return len(self.paths)

    def __getitem__(self, index: int) -> _Look:
        if not self.is_warm:
            self.is_warm = True
            self[index]
        path, begin = self.paths[index], time.perf_counter()
        try:
            content = read_bytes(path)
            image = self.transform.load(content)
            pixels = self.transform(image).float()  # [3, R, R]
        except (OSError, ValueError) as error:
            return _Look(image_issue(path, error))
        seconds = time.perf_counter() - begin
        is_one_color = bool(pixels.std(dim=(1, 2)).max() < ONE_COLOR)
        found = fingerprint(image) if self.wanted[index] else None
        digest = hashlib.blake2b(content, digest_size=16).digest()
        return _Look(None, size_of(image), digest, is_one_color, found, seconds)


class CaptionFacts(NamedTuple):
    """What the captions of a data set are.

    Attributes:
        num_tokens: int64 `[M]`, start and end included.
        num_words: int64 `[M]`.
        is_other_script: bool `[M]`: most letters are not Latin ones.
        wordings: index of the first caption that says the same but for case and white space, int64 `[M]`.
    """

    num_tokens: IntArray
    num_words: IntArray
    is_other_script: BoolArray
    wordings: IntArray

    @property
    def tokens_per_word(self) -> float:
        """Of all captions together: 1.1 to 1.3 in English, 3 in German, 10 and more in Chinese, which has no blanks."""
        return float((self.num_tokens - 2).sum() / max(self.num_words.sum(), 1))

    def take(self, captions: IntArray) -> CaptionFacts:
        """Return what some of the captions are, by their indices."""
        return CaptionFacts(
            self.num_tokens[captions], self.num_words[captions], self.is_other_script[captions], self.wordings[captions]
        )


def look_at_captions(captions: Strings, *, num_workers: int | None = None) -> CaptionFacts:
    """Look at every caption that differs from those before it.

    Args:
        captions: `[M]`.
        num_workers: that tokenise; None: one a core, at most 16.
    """
    first = captions.first_equal()
    distinct = np.flatnonzero(first == np.arange(len(first)))
    workers = min(MAX_WORKERS, num_cores()) if num_workers is None else num_workers
    chunks = make_loader(
        _Texts(captions.take(distinct)), num_workers=workers if len(distinct) >= MIN_FOR_WORKERS else 0
    )
    rows = np.concatenate([np.zeros((0, 4), np.int64), *progress_bar(chunks, desc="captions")])
    columns = np.zeros((len(first), 4), dtype=np.int64)
    columns[distinct] = rows
    num_tokens, num_words, is_other_script, ids = columns[first].T
    _, begins, kinds = np.unique(ids, return_index=True, return_inverse=True)
    return CaptionFacts(num_tokens, num_words, is_other_script.astype(bool), begins[kinds.reshape(-1)])


class _Texts(Dataset[IntArray]):
    """Captions, a chunk an item: tokens, words, script and id of each, `[CHUNK, 4]`."""

    def __init__(self, captions: Strings) -> None:
        self.captions = captions

    def __len__(self) -> int:
        return (len(self.captions) + CHUNK - 1) // CHUNK

    def __getitem__(self, index: int) -> IntArray:
        if not 0 <= index < len(self):
            raise IndexError(index)
        return np.array(list(map(_look_at_text, self.captions[index * CHUNK : (index + 1) * CHUNK])))


def _look_at_text(text: str) -> tuple[int, int, int, int]:
    return count_tokens(text), len(_WORD.findall(text)), is_other_script(text), caption_id(text)


def is_other_script(text: str) -> bool:
    """Tell whether most letters of a text are not Latin ones."""
    return not text.isascii() and 2 * len(_OTHER_LETTER.findall(text)) > len(_LETTER.findall(text))
