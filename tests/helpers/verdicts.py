"""Evaluations of a made-up quality, for runs whose verdict is to be a certain one."""

from collections.abc import Callable
from typing import Any

import numpy as np
import torch

from cliptune.features.metrics import rank_metrics
from cliptune.features.ranks import Ranks
from evaluation import Evaluation, evaluate


def qualities(*values: float) -> Callable[..., Evaluation]:
    """Evaluations whose ranks are drawn: the higher its quality, the lower the ranks of one."""
    left, rng = iter(values), np.random.default_rng(0)

    def drawn(*arguments: Any, **options: Any) -> Evaluation:
        found, quality = evaluate(*arguments, **options), next(left)
        ranks = {
            name: np.floor(np.exp(np.maximum(rng.normal(2, 0.7, len(each)) - quality, 0))).astype(np.float32)
            for name, each in found.ranks.items()
        }
        tensors = Ranks(*(torch.from_numpy(each).double() for each in (ranks["i2t"], ranks["t2i"])))
        return found._replace(metrics={**found.metrics, **rank_metrics(tensors)}, ranks=ranks)

    return drawn
