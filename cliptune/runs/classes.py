"""Zero-shot classification in the evaluation stage: its classes, the images' labels, what is printed and written."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Annotated, Any, NamedTuple

import numpy as np
from pydantic import Field

from cliptune.data.caption_files import TEMPLATES
from cliptune.data.issues import Issue
from cliptune.data.pairs import Pairs
from cliptune.data.table import IntArray
from cliptune.features.classify import class_features, classify, summary
from cliptune.features.encode import Encoder
from cliptune.results import Count, Number, Recorded, RunInfo
from cliptune.runs.evaluation import Candidate, Chosen
from cliptune.runtime.messages import count, first_few, printable
from cliptune.stage_settings import EvaluationSettings

MAX_BYTES = 2**26
"""Of a file of classes or templates."""
MAX_LABEL = 30
"""Characters of a class in a table."""
MAX_SHOWN = 10
"""Classes and confusions in a table."""


class ClassResult(Recorded):
    """How the images of one class are classified."""

    label: str
    num_images: Count
    top1: Number
    top5: Number
    interval: tuple[Number, Number]
    """Of `top1`, 95%, images taken as independent."""


class Classification(Recorded):
    """Zero-shot classification of a data set by a checkpoint; accuracies in percent of the images."""

    checkpoint: str
    data: str
    split: str | None = None
    run: RunInfo | None = None
    num_images: Count
    num_classes: Count
    names: dict[str, list[str]]
    """Of each class, by its label."""
    templates: list[str]
    labels_from: str
    """Where the images' labels are from: `folders`, `captions`, or the column."""
    num_trained_on: Count = 0
    num_left_out: Count = 0
    top1: Number
    top5: Number
    mean_per_class: Number
    """Mean of the classes' `top1`: rare ones count as much as frequent ones."""
    mean_probability: Number
    """Mean probability, by the model's own scale, of the class that each image is taken for. Far above `top1`, the
    model is surer than it is right."""
    intervals: dict[str, tuple[Number, Number]] = Field(default_factory=dict)
    """95%, of `top1` and `top5`, by groups; none of a single group."""
    classes: list[ClassResult]
    confusions: list[tuple[str, str, Count]]
    """Label, class that was taken for it, and of how many images; the most frequent first."""


class ClassificationResults(Recorded):
    """`results/classification_results.json`."""

    started_at: str | None = None
    finished_at: str | None = None
    evaluations: Annotated[list[Classification], Field(min_length=1)]


class Classes(NamedTuple):
    """What images are told apart by."""

    names: dict[str, list[str]]
    """Names of each class, by its label."""
    templates: list[str]
    source: str
    """Where they are from."""


class ClassTask(NamedTuple):
    """A data set to be classified."""

    classes: Classes
    labels: IntArray
    """Class of each image, `[N]`."""
    labels_from: str


def class_tasks(settings: EvaluationSettings, sets: Sequence[Pairs]) -> list[ClassTask | None]:
    """Read the classes and the labels of each data set; None for each, unless classes are given.

    Raises:
        FileNotFoundError: no such file.
        ValueError: no classes, or labels that are none of them.
    """
    if settings.classes is None:
        return [None] * len(sets)
    classes = read_classes(settings.classes, settings.templates)
    return [
        ClassTask(
            classes, *find_labels(pairs, classes, label_key=settings.label_key, template=settings.caption_template)
        )
        for pairs in sets
    ]


def read_classes(classes: str, templates: str | None = None) -> Classes:
    """Read classes from a file with one a line, a JSON file `{label: [names]}`, or a folder's folders.

    Args:
        classes: the file or folder.
        templates: file with a text a line in which `{}` stands for a name; None: "a photo of a {}".

    Raises:
        FileNotFoundError: no such file.
        ValueError: fewer than two classes, one that comes twice, or a template without `{}`.
    """
    path = Path(classes)
    if path.is_dir():
        found = sorted(each.name for each in path.iterdir() if each.is_dir() and not each.name.startswith("."))
        names = {label: [_readable(label)] for label in found}
    elif path.suffix.lower() == ".json":
        names = _names_in(path)
    else:
        lines = _lines(path, "--classes")
        if twice := _twice(map(_normal, lines)):
            raise ValueError(f"{classes}: these classes come twice: {twice}")
        names = {label: [_readable(label)] for label in lines}
    if len(names) < 2:
        raise ValueError(f"--classes {classes}: {count(len(names), 'class', 'classes')}, of at least 2")
    if twice := _twice(map(_normal, names)):
        raise ValueError(f"{classes}: these classes come twice: {twice}")
    texts = [TEMPLATES["folder"]] if templates is None else _lines(Path(templates), "--templates")
    for text in texts:
        if "{}" not in text:
            raise ValueError(f"{templates}: {printable(text)!r} has no {{}}, where a class's name is put")
    return Classes(names, texts, printable(classes))


def find_labels(
    pairs: Pairs, classes: Classes, *, label_key: str | None = None, template: str | None = None
) -> tuple[IntArray, str]:
    """Return the class of each image, int64 `[N]`, and where that is from: `folders`, `captions` or the column.

    Without a column it is the folder that the image lies in, or a caption that is a class's name, alone or in a
    template: whichever names more of the images' classes.

    Args:
        pairs: the images; their captions are the labels where `label_key` names their column.
        classes: the classes.
        label_key: column that the captions were read from.
        template: of the captions, beside those of the classes.

    Raises:
        ValueError: labels that are no class, or an image of two.
    """
    of_label = {_normal(label): index for index, label in enumerate(classes.names)}
    templates = {"{}", TEMPLATES["folder"], *classes.templates} | ({template} if template else set())
    named: dict[str, set[int]] = {}
    for index, (label, names) in enumerate(classes.names.items()):
        for text in (frame.replace("{}", name) for name in (label, *names) for frame in templates):
            named.setdefault(_normal(text), set()).add(index)
    # a name of two classes tells neither (a crane lifts, or flies), unless it is the label of one
    of_text = {text: found.pop() for text, found in named.items() if len(found) == 1} | of_label
    captions = [pairs.captions_of(image) for image in range(len(pairs))]
    by_caption = [{of_text[text] for text in map(_normal, own) if text in of_text} for own in captions]
    for own, found in zip(captions, by_caption, strict=True):
        if len(found) > 1:
            raise ValueError(f"an image has captions of {len(found)} classes: {first_few([printable(c) for c in own])}")
    if label_key is not None:
        return _all_of(by_caption, [own[0] for own in captions], classes), f"column {label_key}"
    folders = [_folder_of(path) for path in pairs.paths]
    by_folder = [{of_label[_normal(folder)]} if _normal(folder) in of_label else set() for folder in folders]
    if sum(map(bool, by_folder)) >= max(sum(map(bool, by_caption)), 1):
        return _all_of(by_folder, folders, classes), "folders"
    if any(by_caption):
        return _all_of(by_caption, [own[0] for own in captions], classes), "captions"
    raise ValueError(
        f"no image's class is known: neither its folder ({printable(folders[0])!r}) nor its caption "
        f"({printable(captions[0][0])!r}) is a class of {classes.source}; name the labels' column with --label_key"
    )


def _all_of(found: Sequence[set[int]], labels: Sequence[str], classes: Classes) -> IntArray:
    """Return the one class of each image; labels that are none are counted in an error."""
    unknown = Counter(label for label, own in zip(labels, found, strict=True) if not own)
    if unknown:
        shown = [f"{printable(label)!r} ({number:,})" for label, number in unknown.most_common()]
        raise ValueError(
            f"{unknown.total():,} of the {count(len(labels), 'image')} have a label that is no class of "
            f"{classes.source}: {first_few(shown, MAX_SHOWN)}; add them there, or try another --label_key"
        )
    return np.array([next(iter(own)) for own in found], dtype=np.int64)


def classify_set(
    encoder: Encoder,
    chosen: Chosen,
    task: ClassTask,
    model: tuple[Candidate, RunInfo],
    *,
    note: Callable[[Issue], None],
) -> Classification:
    """Classify a data set's images with a model.

    Args:
        encoder: with the model.
        chosen: the images.
        task: classes and labels.
        model: which it is, and what it runs on.
        note: called with each image that cannot be read.
    """
    candidate, run = model
    classes, pairs = task.classes, chosen.pairs
    of_classes = class_features(encoder, classes.names, classes.templates)
    found = classify(encoder, pairs, task.labels, of_classes, on_unreadable_image=note)
    values: dict[str, Any] = {
        "checkpoint": candidate.path,
        "data": chosen.data_dir,
        "split": chosen.split,
        "run": run,
        "num_classes": len(classes.names),
        "names": classes.names,
        "templates": classes.templates,
        "labels_from": task.labels_from,
        "num_trained_on": chosen.trained[candidate.path],
        "num_left_out": chosen.num_left_out,
        **summary(found, task.labels, list(classes.names), pairs.query_groups["i2t"]),
    }
    return Classification.model_validate(values)


def of_classes(found: Sequence[Classification], times: Mapping[str, str]) -> ClassificationResults:
    """Put classifications into the form of their file, with `started_at` and `finished_at`."""
    return ClassificationResults.model_validate({**times, "evaluations": list(found)})


def class_report(found: Sequence[Classification]) -> str:
    """Lay classifications out for reading: accuracies, the classes that come out worst, the largest confusions."""
    return "\n\n".join(map(_table, found))


def _table(found: Classification) -> str:
    size = (
        f"{count(found.num_images, 'image')}, {count(found.num_classes, 'class', 'classes')} (by {found.labels_from})"
    )
    lines = [f"{printable(found.checkpoint)} on {printable(found.data)} ({found.split}): {size}", ""]
    for key, k in (("top1", 1), ("top5", 5)):
        low, high = found.intervals.get(key, (None, None))
        interval = "" if low is None else f"95% interval {low:.1f} to {high:.1f}, "
        chance = 100 * min(k / found.num_classes, 1)
        lines.append(f"{f'top-{k}':22}{getattr(found, key):8.1f}   ({interval}chance {chance:.1f})")
    lines += [
        f"{'mean per class':22}{found.mean_per_class:8.1f}",
        f"{'probability given':22}{found.mean_probability:8.1f}",
        "",
        f"{'class':32}{'images':>8}{'top-1':>8}   95% interval",
    ]
    worst = sorted(found.classes, key=lambda each: each.top1)
    for each in worst[:MAX_SHOWN]:
        low, high = each.interval
        lines.append(
            f"{_shown(each.label, found.names):32}{each.num_images:8,}{each.top1:8.1f}   {low:.0f} to {high:.0f}"
        )
    if len(worst) > MAX_SHOWN:
        lines.append(f"... {len(worst) - MAX_SHOWN:,} that come out better")
    if found.confusions:
        sizes = {each.label: each.num_images for each in found.classes}
        lines += ["", "largest confusions"]
        for label, taken_for, number in found.confusions[:MAX_SHOWN]:
            one, other = _shown(label, found.names), _shown(taken_for, found.names)
            lines.append(f"{number:6,} of {sizes[label]:,} {one} taken for {other}")
    return "\n".join(lines)


def _shown(label: str, names: Mapping[str, list[str]]) -> str:
    """Return a label for a table, with its first name where that says more: `n01440764 (tench)`."""
    first = names[label][0]
    shown = printable(label if _normal(first) == _normal(label) else f"{label} ({first})")
    return shown if len(shown) <= MAX_LABEL else f"{shown[: MAX_LABEL - 3]}..."


def _names_in(path: Path) -> dict[str, list[str]]:
    text = _text(path, "--classes")
    try:
        values = json.loads(text)
    except json.JSONDecodeError as error:
        raise ValueError(f"{path}: not JSON: {error}") from None
    if isinstance(values, list) and all(isinstance(label, str) for label in values):
        values = {label: _readable(label) for label in values} if len(set(values)) == len(values) else None
    values = values if isinstance(values, dict) else {}
    names = {label: [own] if isinstance(own, str) else own for label, own in values.items()}
    if not names or not all(
        isinstance(own, list) and own and all(isinstance(name, str) and name.strip() for name in own)
        for own in names.values()
    ):
        raise ValueError(f"{path}: expected {{label: [names]}}, or a list of different labels")
    return names


def _lines(path: Path, flag: str) -> list[str]:
    lines = [line.strip() for line in _text(path, flag).splitlines()]
    found = [line for line in lines if line]
    if not found:
        raise ValueError(f"{flag} {path}: the file is empty")
    return found


def _text(path: Path, flag: str) -> str:
    if not path.is_file():
        raise FileNotFoundError(f"{flag}: no such file: {path}")
    if path.stat().st_size > MAX_BYTES:
        raise ValueError(f"{flag} {path}: too large for a list of names")
    try:
        return path.read_text(encoding="utf-8-sig")
    except UnicodeDecodeError:
        raise ValueError(f"{flag} {path}: not UTF-8 text") from None


def _folder_of(path: str) -> str:
    return Path(path).parent.name


def _readable(label: str) -> str:
    """Return a label as it is said: `golden_retriever` is a golden retriever."""
    return " ".join(label.replace("_", " ").split())


def _normal(text: str) -> str:
    """Return what labels are compared by: "Golden_Retriever." is "golden retriever"."""
    return _readable(text).casefold().rstrip(" .")


def _twice(labels: Any) -> str:
    return first_few([printable(label) for label, number in Counter(labels).items() if number > 1])
