"""What is odd about a data set that no number of a run would tell: each finding is a line with its remedy, or None."""

from __future__ import annotations

import hashlib
import math
from collections.abc import Mapping
from itertools import combinations

import numpy as np
import pyarrow.compute as pc

from cliptune.data.doctor import FOREIGN, look_at_captions
from cliptune.data.equal_captions import equal_captions
from cliptune.data.identity import Hashes, file_identities, text_hashes
from cliptune.data.pairs import Pairs
from cliptune.data.shards import Shards
from cliptune.data.splits import num_asked
from cliptune.data.table import SPLITS, IntArray, Strings
from cliptune.preprocess.decode import archive_of, read_bytes
from cliptune.preprocess.tokens import CONTEXT_LENGTH, tokenize
from cliptune.runtime.messages import count, first_few, printable, shorten

FAR_OFF = 0.5
"""Of the validation images that were asked for."""
MEETS_ITS_CAPTION = 0.02
"""Fraction of the pairs from which on captions that other images have, too, are told."""
MAX_READ, COST_OF_A_FILE = 2**28, 2**16
"""Bytes that are read to compare files, and what a small one counts as."""
MAX_TOKENIZED = 2000
"""Captions that are tokenised to compare them; the rest is estimated."""
MAX_LOOKED_AT = 1000
"""Captions that are looked at for their language."""
NO_VALUES = frozenset(("nan", "none", "null", "n/a", "#n/a", "na", "<na>", "undefined"))
"""What programs write where there is no value, in small letters: `nan` is NumPy's, `None` Python's."""
NAMES = {"train": "training", "val": "validation", "test": "test"}


def data_findings(
    splits: Mapping[str, Pairs | Shards],
    files: Mapping[str, Hashes],
    *,
    val_split: float,
    batch_size: int,
    every_pair: bool = False,
    context_length: int = CONTEXT_LENGTH,
) -> dict[str, str | None]:
    """Look at what a run is going to train and validate on; takes seconds for a million images.

    Args:
        splits: by their names.
        files: identity of each image's file, see `file_identities`; of a split that is shards they are not looked at.
        val_split: fraction of the images that was to validate.
        batch_size: pairs a step.
        every_pair: an epoch has every pair, not one of each image.
        context_length: tokens that the model reads of a caption.

    Returns:
        The findings by their kinds, the most harmful first.
    """
    read = [part for part in splits.values() if isinstance(part, Pairs) and len(part)]
    train = splits["train"]
    repeated, same, other, no_values = None, None, None, None
    if read:
        captions = Strings.concatenate([part.captions for part in read])
        other, no_values = other_language(read[0].captions), missing_values(captions)
        same = same_tokens(captions, context_length)
    if isinstance(train, Pairs) and len(train):
        repeated = repeated_captions(train, batch_size=batch_size, every_pair=every_pair)
    return {
        "shared_images": shared_images(splits, files),
        "other_language": other,
        "missing_values": no_values,
        "same_tokens": same,
        "repeated_captions": repeated,
        "uneven_split": uneven_split(splits, val_split=val_split),
    }


def shared_images(splits: Mapping[str, Pairs | Shards], files: Mapping[str, Hashes]) -> str | None:
    """Find files of the same bytes, copies or hard links, in two splits."""
    found = []
    for one, other in combinations(SPLITS, 2):
        ours, theirs = splits.get(one), splits.get(other)
        if not isinstance(theirs, Pairs) or not theirs or not ours:
            continue
        shared, example = (
            _shared_archives(ours, theirs)
            if isinstance(ours, Shards)
            else _identical(ours.paths, theirs.paths, files[one], files[other])
        )
        if not shared:
            continue
        what = f"{shared:,} of the {count(len(theirs), f'{NAMES[other]} image')} {'is' if shared == 1 else 'are'}"
        found.append(f"{what} byte-identical to {NAMES[one]} images ({example})")
    if not found:
        return None
    return (
        f"{'; '.join(found)}: what a model has seen tells nothing of new images. Give copies the same group in the "
        "index, take them out of it, or try another --val_data"
    )


def _identical(ours: Strings, theirs: Strings, our_files: Hashes, their_files: Hashes) -> tuple[int, str]:
    """Count how many of their files are also ours, and show one; compares what has the same identity byte by byte.

    Once 256 MB are read, the rest is estimated from what was compared.
    """
    suspects = np.flatnonzero(np.isin(their_files, our_files) & (their_files != 0))
    if not len(suspects):
        return 0, ""
    suspects = np.random.RandomState(0).permutation(suspects)  # a part of them stands for all
    by_file = np.argsort(our_files, kind="stable")
    ends = [np.searchsorted(our_files[by_file], their_files[suspects], side) for side in ("left", "right")]
    compared = shared = num_read = 0
    example = ""
    contents: dict[int, dict[bytes, str]] = {}
    """Our files by their content, for each identity."""
    for index, start, end in zip(suspects.tolist(), *ends, strict=True):
        if num_read > MAX_READ:
            break
        same = contents.get(start)
        if same is None:
            same = contents[start] = {}
            for row in by_file[start:end].tolist():
                digest, size = _digest(ours[row])
                num_read += size
                same.setdefault(digest, ours[row])
                if num_read > MAX_READ:
                    break
        digest, size = _digest(theirs[index])
        num_read += size
        compared += 1
        if digest and digest in same:
            shared += 1
            example = example or f"{theirs[index]} is the same file as {same[digest]}"
    return round(shared * len(suspects) / max(compared, 1)), printable(example)


def _digest(path: str) -> tuple[bytes, int]:
    """Return a hash of a file's content, empty if it cannot be read; and what reading it counts as."""
    try:
        content = read_bytes(path)
    except (OSError, ValueError):
        return b"", COST_OF_A_FILE
    return hashlib.blake2b(content, digest_size=16).digest(), max(len(content), COST_OF_A_FILE)


def _shared_archives(train: Shards, held: Pairs) -> tuple[int, str]:
    """Count the images that lie in shards that are trained on, or in copies of them."""
    archives = [archive_of(path) or "" for path in held.paths]
    known = sorted(set(archives) - {""})
    ours = file_identities(Strings.of(shard.url for shard in train.shards if shard.num_bytes))
    theirs = file_identities(Strings.of(known))
    shared = {path for path, file in zip(known, theirs.tolist(), strict=True) if file and file in ours}
    num_shared = sum(archive in shared for archive in archives)
    return num_shared, f"{first_few(sorted(shared), 1)}" if shared else ""


def uneven_split(splits: Mapping[str, Pairs | Shards], *, val_split: float) -> str | None:
    """Find a validation set that is much larger or smaller than asked for, as whole groups make it."""
    train, val = splits["train"], splits["val"]
    was_drawn = isinstance(train, Pairs) and isinstance(val, Pairs) and (val.splits != SPLITS.index("val")).all()
    asked = num_asked(len(train) + len(val), val_split)
    if not was_drawn or not len(val) or abs(len(val) - asked) <= FAR_OFF * asked:
        return None
    return (
        f"{count(len(val), 'image validates', 'images validate')} where --val_split {val_split:g} asks for "
        f"{asked:,}: no group is split, and no groups come nearer. Try smaller groups in the index, another "
        "--val_split, or --val_data"
    )


def same_tokens(captions: Strings, context_length: int = CONTEXT_LENGTH) -> str | None:
    """Find captions that are the same to the model though they differ, behind the last token that it reads.

    Each token is a byte or more, so such captions begin with the same bytes: only those that do are tokenised, at most
    2,000 of them, and of more the rest is estimated.
    """
    lengths = pc.binary_length(captions.column()).to_numpy()  # short ones are most, and need not be looked at
    min_bytes = context_length - 2  # of a caption that fills the context beside the start and the end
    captions = captions.take(np.flatnonzero(lengths > min_bytes))
    heads = Strings.of(_head(caption, min_bytes) for caption in captions)
    _, kinds, num_of_kind = np.unique(text_hashes(heads), return_inverse=True, return_counts=True)
    alike = np.flatnonzero((num_of_kind[kinds] > 1) & ~heads.empty)
    alike = alike[np.argsort(kinds[alike], kind="stable")]  # so that a part of them holds whole kinds
    texts = Strings.of(map(_plain, captions.take(alike)))
    different = texts.take(np.flatnonzero(texts.first_equal() == np.arange(len(texts))))  # of equal ones the first
    sample = different[:MAX_TOKENIZED]
    if not sample:
        return None
    tokens, _ = tokenize(sample, context_length)
    _, kinds, num_of_kind = np.unique(tokens.numpy(), axis=0, return_inverse=True, return_counts=True)
    is_same = num_of_kind[kinds.reshape(-1)] > 1
    if not is_same.any():
        return None
    number = round(int(is_same.sum()) * len(different) / len(sample))
    example = shorten(printable(sample[int(is_same.argmax())]), 60)
    return (
        f"{number:,} different captions are the same to the model, which reads {context_length} tokens and no more: "
        f"they differ behind ({example!r}). Put what differs first, or shorten them"
    )


def other_language(captions: Strings) -> str | None:
    """Find captions in a language that the tokenizer was not made for, by the tokens of their words: a thousand do."""
    chosen = np.sort(np.random.RandomState(0).permutation(len(captions))[:MAX_LOOKED_AT])
    per_word = look_at_captions(captions.take(chosen), num_workers=0).tokens_per_word
    if per_word <= FOREIGN:
        return None
    return (
        f"the captions have {per_word:.1f} tokens a word, where English has 1.1 to 1.3: the tokenizer was not made for "
        "their language, and published weights hardly know it. Translate them to English, if you can"
    )


def missing_values(captions: Strings) -> str | None:
    """Find captions that are no words of anybody, but what programs write where there is no value."""
    lengths = pc.binary_length(captions.column()).to_numpy()  # only short ones need to be looked at
    short = captions.take(np.flatnonzero(lengths <= max(map(len, NO_VALUES))))
    found = [caption for caption in short if caption.lower() in NO_VALUES]
    if not found:
        return None
    number = count(len(found), "caption is", "captions are")
    return (
        f"{number} what programs write where a value is missing ({found[0]!r}): "
        "there is nothing to learn from them. Write captions in their place, or take these records out of the index"
    )


def _head(caption: str, min_bytes: int) -> str:
    """Return what two captions of the same tokens have in common; nothing for one so short that all of it is read."""
    text = _plain(caption).encode("utf-8", "surrogatepass")
    return str(text[:min_bytes], "latin-1") if len(text) > min_bytes else ""


def _plain(caption: str) -> str:
    return " ".join(caption.lower().split())


def repeated_captions(pairs: Pairs, *, batch_size: int, every_pair: bool) -> str | None:
    """Find captions of so many images that a batch has them twice: each then counts as wrong for the other's image.

    Captions are equal as for the positives of the loss, by `caption_id`: "A Dog" and "a dog" are one.

    An image with c captions brings each with the weight 1 / c, or 1 if every pair is an item. With w_ik the weight that
    image i brings of caption k, and N that of all, a pair meets sum_k ((sum_i w_ik)^2 - sum_i w_ik^2) / N of the others
    in an epoch, and (B - 1) / (N - 1) of them in its batch.
    """
    owners = pairs.text_to_image.numpy()
    weights = np.ones(len(owners)) if every_pair else 1 / np.diff(pairs.starts)[owners]
    kinds = equal_captions(pairs)
    total = weights.sum()
    met = (_sums(kinds, weights) ** 2).sum() - (_sums(kinds * len(pairs) + owners, weights) ** 2).sum()
    batch = min(batch_size, total)
    expected = met / total * (batch - 1) / max(total - 1, 1)
    meets = -math.expm1(-expected)
    if meets < MEETS_ITS_CAPTION:
        return None
    return (
        f"{batch * meets:.1f} of the {batch:.0f} pairs of a batch can be expected to meet their own caption with "
        "another image. --positives auto, the default, makes them positives of each other; with pair or image they "
        "count as wrong. Captions that tell their images apart are better still"
    )


def _sums(keys: IntArray, weights: np.ndarray) -> np.ndarray:
    """Add up the weights of equal keys."""
    return np.bincount(np.unique(keys, return_inverse=True)[1], weights)
