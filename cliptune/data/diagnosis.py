"""From what images and captions are to what is odd about them: findings, and the list of suspects."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import NamedTuple

import numpy as np

from cliptune.data.doctor import FOREIGN, CaptionFacts, ImageFacts
from cliptune.data.pairs import Pairs
from cliptune.data.repeats import BatchCost, batch_cost, perfect_recalls
from cliptune.data.suspects import Suspect, relative_name
from cliptune.data.table import SPLITS, BoolArray, CodeArray, IntArray
from cliptune.data.units import crossing, row_split_leaks
from cliptune.runtime.messages import count, first_few, shown

IDENTICAL, NEAR, UNREADABLE, ONE_COLOR, TINY, EXTREME_SHAPE, OTHER_SCRIPT = (
    "identical", "near-duplicate", "unreadable", "one colour", "tiny", "extreme shape", "other script",
)  # fmt: skip
KINDS = (IDENTICAL, NEAR, UNREADABLE, ONE_COLOR, TINY, EXTREME_SHAPE, OTHER_SCRIPT)
"""Of the suspects that are looked for here."""
TINY_SIDE = 32
"""Pixels of the shorter side below which an image is a single patch of common models."""
EXTREME_RATIO = 3
"""Of the sides: of such an image the centre crop shows less than a third."""
WIDE_INTERVAL = 5.0
"""Half-width of R@1's 95% interval, in points."""
LIST = "results/suspects.csv"


class Finding(NamedTuple):
    """One thing that was found about a data set.

    Attributes:
        kind: its key in the results file.
        name: of its row in the table.
        number: how many, or how much; None: the text says it.
        text: what it means, without a full stop.
        advice: what to do; empty: nothing.
        values: numbers behind the text, by their names.
    """

    kind: str
    name: str
    number: float | None
    text: str
    advice: str = ""
    values: Mapping[str, float] = {}


class Examined(NamedTuple):
    """A data set that was looked at.

    Attributes:
        pairs: all of it.
        sides: index in `SPLITS` of each image's split, int8 `[N]`; -1: in none.
        images: what the images are.
        captions: what the captions are.
    """

    pairs: Pairs
    sides: CodeArray
    images: ImageFacts
    captions: CaptionFacts
    near: IntArray
    """Pairs of images that are near-duplicates, int64 `[P, 2]`; of identical files each stands for all of them."""
    look_alikes: Sequence[IntArray] = ()
    """Images of each set of near-duplicates too large to be copies of one image; no pair of them is in `near`."""

    def rows_of(self, split: str) -> IntArray:
        """Return the images of a split."""
        return np.flatnonzero(self.sides == SPLITS.index(split))

    def names(self, images: IntArray, limit: int = 3) -> str:
        """Name some of the images."""
        names = [relative_name(self.pairs.paths[image], self.pairs.root) for image in images[:limit].tolist()]
        return first_few(names, limit, total=len(images))

    def part(self, split: str) -> tuple[Pairs, CaptionFacts, IntArray]:
        """Return the pairs of a split with their captions' facts, and which file each image is."""
        rows = self.rows_of(split)
        captions = np.flatnonzero(self.sides[self.pairs.text_to_image.numpy()] == SPLITS.index(split))
        return self.pairs.select(rows), self.captions.take(captions), self.images.files[rows]


def find_all(examined: Examined, *, batch_size: int, context_length: int, resolution: int) -> list[Finding]:
    """Find what is odd about a data set.

    Args:
        examined: the data set.
        batch_size: pairs a step.
        context_length: tokens that the model reads.
        resolution: pixels of the model's sides.
    """
    found = [
        *_images(examined, resolution),
        *_captions(examined.captions, context_length),
        *_repeats(examined, batch_size=batch_size),
        *_validation(examined),
    ]
    return [finding for finding in found if finding is not None]


def _images(examined: Examined, resolution: int) -> Iterator[Finding | None]:
    images, exclude = examined.images, f"train.py --exclude {LIST} leaves them out, unless you write yes there"
    yield _identical(examined)
    yield _near_duplicates(examined)
    yield _look_alikes(examined)
    yield _some(examined, "one_color", "nearly one colour", images.is_one_color, "of nearly one colour", exclude)
    look = f"look at them: {LIST} names them, and what you write there counts for train.py --exclude"
    yield _some(examined, "tiny", "tiny", _is_tiny(images), f"with a side of less than {TINY_SIDE} pixels", look)
    yield _some(
        examined, "extreme_shape", "extreme shape", _is_extreme(images),
        f"more than {EXTREME_RATIO} times as long as wide: models see the centre, less than a third",
        f"crop them, or pad them to squares; {LIST} names them",
    )  # fmt: skip
    small = (images.sizes.min(axis=1) < resolution) & images.is_readable
    yield _some(
        examined, "small", "small", small, f"smaller than the model's {resolution} pixels, and enlarged for it",
        "nothing to do; --image_resolution trains smaller and faster",
    )  # fmt: skip


def _some(examined: Examined, kind: str, name: str, which: BoolArray, text: str, advice: str) -> Finding | None:
    """Make a finding of images, with the first of them named."""
    rows = np.flatnonzero(which)
    if not len(rows):
        return None
    text = f"{_noun(len(rows), 'image')} {text} ({examined.names(rows)})"
    return Finding(kind, name, len(rows), text, advice)


def _is_tiny(images: ImageFacts) -> BoolArray:
    found: BoolArray = images.is_readable & (images.sizes.min(axis=1) < TINY_SIDE)
    return found


def _is_extreme(images: ImageFacts) -> BoolArray:
    found: BoolArray = images.sizes.max(axis=1) > EXTREME_RATIO * images.sizes.min(axis=1)
    return found


def _identical(examined: Examined) -> Finding | None:
    files = examined.images.files
    copies = np.flatnonzero(files != np.arange(len(files)))
    if not len(copies):
        return None
    sets = np.unique(files[copies])
    crossing = num_crossing(examined.sides, np.stack([files[copies], copies], axis=1))
    first = copies[:1]
    example = f"{examined.names(first)} is the same file as {examined.names(files[first])}"
    text = f"{_noun(len(copies), 'image')} byte-identical to an earlier one, in {count(len(sets), 'set')} ({example})"
    if crossing:
        text += f"; {crossing:,} of them in another split: what a model has seen tells nothing of new images"
    advice = f"train.py --exclude {LIST} keeps one of each set, the validation image first"
    return Finding("identical_images", "identical images", len(copies), text, advice, {"across_splits": crossing})


def _near_duplicates(examined: Examined) -> Finding | None:
    near = examined.near
    if not len(near):
        return None
    number = len(np.unique(near))
    crossing = num_crossing(examined.sides, near)
    text = (
        f"{_noun(number, 'image')} that look like copies of one another: resized, re-encoded, slightly cropped or "
        f"brightened ({examined.names(near[0, 1:])} is a copy of {examined.names(near[0, :1])})"
    )
    text += f"; {crossing:,} of them with a copy in another split" if crossing else ""
    advice = f"look at them in {LIST}; train.py --exclude {LIST} keeps one of each"
    return Finding("near_duplicates", "near-duplicates", number, text, advice, {"across_splits": crossing})


def _look_alikes(examined: Examined) -> Finding | None:
    sets = examined.look_alikes
    if not sets:
        return None
    return Finding(
        "look_alikes", "look-alikes", sum(map(len, sets)),
        f"images in {count(len(sets), 'set')} of near-duplicates that are too large to be copies of one image "
        f"({examined.names(sets[0])}): they are not kept on one side of the split",
        f"look at them in {LIST}; where they are copies, give them one group in the index",
    )  # fmt: skip


def num_crossing(sides: CodeArray, pairs: IntArray) -> int:
    """Count the images that have a copy on another side of the split, of each pair the second one, `[P, 2]`."""
    ours, theirs = sides[pairs].T
    return len(np.unique(pairs[(ours != theirs) & (ours >= 0) & (theirs >= 0), 1]))


def leaks(pairs: Pairs, units: IntArray, sides: CodeArray, *, num_drawn: int) -> Iterator[Finding]:
    """Yield what the split keeps together, and what it does not.

    Args:
        pairs: the data set that is split.
        units: of its images, int64 `[N]`.
        sides: index in `SPLITS` of each image's split, or -1.
        num_drawn: validation images that were drawn; 0: they are declared.
    """
    leaked = row_split_leaks(units, num_drawn) if num_drawn else 0
    if leaked >= 0.5:
        yield Finding(
            "row_split", "kept together", round(leaked),
            f"of {num_drawn:,} validation images would have a copy, or another image of their group, in training if "
            "rows were drawn one by one",
            "nothing to do: groups and copies stay on one side",
        )  # fmt: skip
    torn = crossing(pairs.groups.first_equal(), sides)
    if len(torn):
        yield Finding(
            "torn_groups", "torn groups", len(torn),
            f"images whose group is in more than one split ({shown(pairs.groups[int(torn[0])], 60)}): what a model has "
            "seen of a group tells nothing of new ones",
            "declare one split for each group in the index, or none",
        )  # fmt: skip


def _captions(captions: CaptionFacts, context_length: int) -> Iterator[Finding | None]:
    per_word = captions.tokens_per_word
    if per_word > FOREIGN:
        yield Finding(
            "other_language", "tokens a word", round(per_word, 2),
            "tokens a word, where English has 1.1 to 1.3: the tokenizer was not made for this language",
            "translate the captions to English, which published weights know best",
        )  # fmt: skip
    elif num_other := int(captions.is_other_script.sum()):
        yield Finding(
            "other_script", "other script", num_other,
            f"{_noun(num_other, 'caption')} not in Latin letters, as the others are",
            f"look at them: {LIST} names them",
        )  # fmt: skip
    num_cut = int((captions.num_tokens > context_length).sum())
    if num_cut:
        yield Finding(
            "truncated", "truncated", num_cut,
            f"{_noun(num_cut, 'caption')} longer than {context_length} tokens, of which the model reads the beginning "
            f"(the longest has {captions.num_tokens.max()})",
            "put first what matters, shorten them, or try --context_length",
        )  # fmt: skip


def _repeats(examined: Examined, *, batch_size: int) -> Iterator[Finding | None]:
    owners, captions = examined.pairs.text_to_image.numpy(), examined.captions
    shared = is_shared(captions.wordings, owners)
    num_shared = int(shared.sum())
    if num_shared:
        num_texts = len(np.unique(captions.wordings[shared]))
        yield Finding(
            "repeated_captions", "repeated captions", num_shared,
            f"captions ({100 * num_shared / len(owners):.1f}%) that another image has, too: "
            f"{count(num_texts, 'different text')}",
            "write captions that tell their images apart; where they are class names, go by evaluation.py --classes",
        )  # fmt: skip
    train, of_train, files = examined.part("train")
    if len(train) > 1:
        cost = batch_cost(train, of_train.wordings, files, batch_size=batch_size)
        size, floor = cost.batch_size, cost.loss_floor
        if cost.num_false >= 0.05:
            yield Finding(
                "false_negatives", "false negatives", round(cost.num_false, 2),
                f"of the {size} pairs of a batch, on average, have the caption of another one, or a copy of its image",
                _against_false_negatives(cost),
                {"with_copies": round(cost.num_copies, 2)},
            )  # fmt: skip
        if floor >= 0.005:
            yield Finding(
                "loss_floor", "floor of the loss", round(floor, 3),
                f"nats: no model gets below this in batches of {size}, as captions or images repeat (chance "
                f"{math.log(size):.3f})",
                "compare the training loss with this, not with 0",
            )  # fmt: skip


def _against_false_negatives(cost: BatchCost) -> str:
    """Say what to do; training takes a copy for another image, but equal captions for the positives that they are."""
    advice = []
    if cost.num_false > cost.num_copies:
        advice.append("equal captions: nothing, --positives auto (the default) makes them positives of each other")
    if cost.num_copies:
        advice.append(f"copies stay negatives: train.py --exclude {LIST} leaves them out")
    return "; ".join(advice)


def is_shared(wordings: IntArray, owners: IntArray) -> BoolArray:
    """Tell which captions another image has, too, `[M]`."""
    least, most = np.full(len(wordings), len(wordings)), np.full(len(wordings), -1)
    np.minimum.at(least, wordings, owners)
    np.maximum.at(most, wordings, owners)
    shared: BoolArray = least[wordings] != most[wordings]
    return shared


def _validation(examined: Examined) -> Iterator[Finding | None]:
    val, captions, files = examined.part("val")
    if not len(val):
        return
    recalls = perfect_recalls(captions.wordings, val.text_to_image.numpy(), files)
    if recalls["rsum"] < 599.5:
        yield Finding(
            "recall_ceiling", "highest RSum", round(recalls["rsum"], 1),
            f"of 600: on these validation images no model can have more than R@1 {recalls['i2t_r1']:.1f} (image to "
            f"text) and {recalls['t2i_r1']:.1f} (text to image), since captions or images repeat",
            "compare with this, not with 600, or go by the numbers with repeats merged, which every table has", recalls,
        )  # fmt: skip
    num_groups = len(np.unique(val.groups.first_equal()))
    half_width = 100 * 1.96 * math.sqrt(0.25 / num_groups)
    what = "validation image" if num_groups == len(val) else "group of validation images"
    plural = "groups of validation images" if num_groups != len(val) else None
    yield Finding(
        "half_width", "95% half-width", round(half_width, 1),
        f"points to either side of an R@1 of 50%, on {count(num_groups, what, plural)}",
        "smaller differences may be chance: validate on more (--val_split, --val_data)"
        if half_width > WIDE_INTERVAL
        else "",
    )  # fmt: skip


def suspects(examined: Examined) -> list[Suspect]:
    """List the pairs that a person may want to leave out; of identical images one is kept, of validation if it can be.

    What is left out unless a person says otherwise: copies, images that cannot be read, images of nearly one colour.
    """
    images, captions = examined.images, examined.captions
    width, height = images.sizes.T
    found = list(_copies(examined))
    for members in examined.look_alikes:
        for row in members.tolist():
            reason = f"{NEAR}: one of {len(members):,} look-alikes"
            found += _of_image(examined.pairs, row, reason, keep=True)
    for row in np.flatnonzero(~images.is_readable).tolist():
        found += _of_image(examined.pairs, row, f"{UNREADABLE}: not an image that can be read", keep=False)
    for row in np.flatnonzero(images.is_one_color).tolist():
        found += _of_image(examined.pairs, row, f"{ONE_COLOR}: nearly", keep=False)
    for kind, which in ((TINY, _is_tiny(images)), (EXTREME_SHAPE, _is_extreme(images))):
        for row in np.flatnonzero(which).tolist():
            found += _of_image(examined.pairs, row, f"{kind}: {width[row]} x {height[row]} pixels", keep=True)
    if captions.tokens_per_word <= FOREIGN:
        owners = examined.pairs.text_to_image.numpy()
        for row in np.flatnonzero(captions.is_other_script).tolist():
            name = relative_name(examined.pairs.paths[int(owners[row])], examined.pairs.root)
            found.append(Suspect(name, examined.pairs.captions[row], f"{OTHER_SCRIPT}: not Latin letters", keep=True))
    return list(dict.fromkeys(found))


def _of_image(pairs: Pairs, image: int, reason: str, *, keep: bool) -> Iterator[Suspect]:
    name = relative_name(pairs.paths[image], pairs.root)
    for caption in pairs.captions_of(image):
        yield Suspect(name, caption, reason, keep)


KEPT = "the one of its copies that is kept"


def _copies(examined: Examined) -> Iterator[Suspect]:
    """List copies; training gives way to what validates or tests, since that stays where it is."""
    files, pairs = examined.images.files, examined.pairs
    preference = np.array([2, 0, 1, 3], dtype=np.int8)[examined.sides]
    sets: dict[int, list[int]] = {}
    for row in np.flatnonzero(files != np.arange(len(files))).tolist():
        sets.setdefault(int(files[row]), [int(files[row])]).append(row)
    kept_of = {head: min(rows, key=lambda row: (preference[row], row)) for head, rows in sets.items()}
    for head, rows in sets.items():
        name = relative_name(pairs.paths[kept_of[head]], pairs.root)
        for row in rows:
            is_kept = row == kept_of[head]
            what = KEPT if is_kept else f"the same file as {name}"
            yield from _of_image(pairs, row, f"{IDENTICAL}: {what}", keep=is_kept)
    for head, other in near_copies(files[examined.near], lambda head: int(preference[kept_of.get(head, head)])):
        if other is None:
            yield from _of_image(pairs, kept_of.get(head, head), f"{NEAR}: {KEPT}", keep=True)
            continue
        name = relative_name(pairs.paths[kept_of.get(other, other)], pairs.root)
        for row in sets.get(head, [head]):
            yield from _of_image(pairs, row, f"{NEAR}: a copy of {name}", keep=False)


def near_copies(near: IntArray, preference: Callable[[int], int]) -> Iterator[tuple[int, int | None]]:
    """Yield each image of some pairs, and whose copy it is; None: it is kept.

    What is near one that is left out may stay: there is no chain of copies from a cat to a dog. But what validates or
    tests is there in any case, so nothing near it is trained on.

    Args:
        near: int64 `[P, 2]`.
        preference: of an image: 0 or 1 for one that validates or tests, else more; the lowest is kept.
    """
    others: dict[int, list[int]] = {}
    for one, other in near.tolist():
        others.setdefault(one, []).append(other)
        others.setdefault(other, []).append(one)
    held = {image for image in others if preference(image) < 2}
    kept: set[int] = set()
    for image in sorted(others, key=lambda image: (preference(image), image)):
        found = (other for other in others[image] if other in kept or (other in held and image not in held))
        copy_of = next(found, None)
        if copy_of is None:
            kept.add(image)
        yield image, copy_of


def table(findings: Sequence[Finding]) -> Iterator[str]:
    """Lay findings out for reading: the number, what it is, and what to do."""
    for finding in findings:
        yield f"{finding.name:18}{number_of(finding.number):>10}  {finding.text}"
        if finding.advice:
            yield f"{'':30}-> {finding.advice}"


def number_of(number: float | None) -> str:
    """Show the number of a finding; nothing where its text says it."""
    return "" if number is None else f"{number:,.0f}" if number >= 100 else f"{number:g}"


def _noun(number: int, singular: str) -> str:
    return singular if number == 1 else f"{singular}s"
