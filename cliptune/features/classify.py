"""Zero-shot classification: an image is of the class whose texts are nearest to it."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from torch.nn.functional import normalize

from cliptune.data.issues import Issue
from cliptune.data.pairs import Pairs
from cliptune.data.table import IntArray, Strings
from cliptune.features.distinct import tokens_of
from cliptune.features.encode import Encoder, encode_images, log_issue
from cliptune.features.ranks import retrieval_ranks, slices
from cliptune.features.verdict import recall_intervals
from cliptune.model.mode import evaluating
from cliptune.runtime.device import exact_products

BLOCK = 4096  # images that are scored at once
TOP = 5
FloatArray = NDArray[np.float32]


class Classified(NamedTuple):
    """What a model says of each image of a data set; NaN and -1 where it could not be read."""

    ranks: FloatArray
    """Rank of the image's own class, 1 is best, half for ties; `[N]`."""
    predicted: IntArray
    """The class that it is taken for, `[N]`."""
    probabilities: FloatArray
    """Of that class, by the model's own scale, `[N]`."""


@torch.no_grad()
def class_features(encoder: Encoder, classes: Mapping[str, Sequence[str]], templates: Sequence[str]) -> Tensor:
    """Return a unit-norm feature of each class, float32 `[C, D]`.

    It is the mean of the unit-norm features of all its names in all templates, brought to norm 1 again (Radford et al.
    2021, section 3.1.4).

    Args:
        encoder: its model comes back in the mode it came in.
        classes: names of each class, by its label.
        templates: texts in which `{}` stands for a name.
    """
    texts, class_of = [], []
    for index, names in enumerate(classes.values()):
        texts += [template.replace("{}", name) for name in names for template in templates]
        class_of += [index] * (len(names) * len(templates))
    model, owners = encoder.model, torch.tensor(class_of)
    tokens = tokens_of(Strings.of(texts), model.architecture.context_length)
    sums = torch.zeros(len(classes), model.projection_dim)
    with evaluating(model):
        for rows, found in encoder.run_texts(tokens, model.encode_text, across_ranks=False, desc="encode classes"):
            sums.index_add_(0, owners[rows], found.float().cpu())
    return normalize(sums, dim=1)


@torch.no_grad()
def classify(
    encoder: Encoder,
    pairs: Pairs,
    labels: IntArray,
    of_classes: Tensor,
    *,
    on_unreadable_image: Callable[[Issue], None] = log_issue,
) -> Classified:
    """Classify each image.

    Args:
        encoder: its model comes back in the mode it came in.
        pairs: the images.
        labels: class of each, int64 `[N]`.
        of_classes: what `class_features` returned.
        on_unreadable_image: called with each image that cannot be read, in the rank that met it.

    Raises:
        ValueError: features that are not finite, or no image could be read.
    """
    with evaluating(encoder.model):
        features, readable = encode_images(encoder, pairs, on_unreadable_image=on_unreadable_image)
    own = torch.from_numpy(labels)[readable]
    matches = torch.stack([torch.arange(len(own)), own])  # a class is a text that many images have
    ranks = retrieval_ranks(features.cpu(), of_classes, matches).i2t
    found = Classified(
        np.full(len(pairs), math.nan, dtype=np.float32),
        np.full(len(pairs), -1),
        np.full(len(pairs), math.nan, dtype=np.float32),
    )
    found.ranks[readable.numpy()] = ranks.numpy()
    scale = encoder.model.logit_scale.exp().item()
    with exact_products():
        for rows in slices(len(features), BLOCK):
            scores = features[rows].cpu() @ of_classes.T  # [B, C]
            best, predicted = scores.max(1)
            images = readable[rows].numpy()
            found.predicted[images] = predicted.numpy()
            # of the class with the highest score: e^0 / sum of e^(scale (score - best))
            found.probabilities[images] = 1 / (scale * (scores - best[:, None])).exp().sum(1).numpy()
    return found


def summary(found: Classified, labels: IntArray, names: Sequence[str], groups: IntArray) -> dict[str, Any]:
    """Return accuracies with their 95% intervals, in percent, and the confusions; keys of its results.

    Of the whole set the interval is that of `recall_intervals`, by groups; of a class, whose images are few, Wilson's
    for independent ones.

    Args:
        found: what `classify` returned.
        labels: class of each image, int64 `[N]`.
        names: labels of the classes, `[C]`.
        groups: group of each image, `[N]`.
    """
    known = np.flatnonzero(found.predicted >= 0)
    ranks, labels, predicted = found.ranks[known], labels[known], found.predicted[known]
    sizes, correct, in_five = (
        np.bincount(labels, weights, minlength=len(names)) for weights in (None, ranks <= 1, ranks <= TOP)
    )
    intervals = {}
    if len(np.unique(groups[known])) > 1:
        # both directions are the same queries here
        both = dict.fromkeys(("i2t", "t2i"), ranks)
        bounds = recall_intervals(both, dict.fromkeys(both, groups[known]))
        intervals = {"top1": bounds["i2t_r1"], "top5": bounds["i2t_r5"]}
    wrong, times = np.unique(
        np.stack([labels, predicted])[:, labels != predicted], axis=1, return_counts=True
    )  # [2, K], [K]
    order = np.argsort(-times, kind="stable")
    return {
        "num_images": len(known),
        "top1": 100 * float((ranks <= 1).mean()),
        "top5": 100 * float((ranks <= TOP).mean()),
        "mean_per_class": 100 * float((correct[sizes > 0] / sizes[sizes > 0]).mean()),
        "mean_probability": 100 * float(found.probabilities[known].mean()),
        "intervals": intervals,
        "classes": [
            {
                "label": names[index],
                "num_images": int(sizes[index]),
                "top1": 100 * correct[index] / sizes[index],
                "top5": 100 * in_five[index] / sizes[index],
                "interval": wilson_interval(correct[index], sizes[index]),
            }
            for index in np.flatnonzero(sizes).tolist()
        ],
        "confusions": [(names[wrong[0, index]], names[wrong[1, index]], int(times[index])) for index in order.tolist()],
    }


def wilson_interval(hits: float, total: float, *, z: float = 1.959964) -> tuple[float, float]:
    """Return a 95% interval of a percentage of independent cases (Wilson, JASA 22, 1927)."""
    center, width = (hits + z * z / 2) / (total + z * z), z / (total + z * z)
    error = width * math.sqrt(hits * (total - hits) / total + z * z / 4)
    return max(100 * (center - error), 0.0), min(100 * (center + error), 100.0)  # rounding goes beyond by 1e-15
