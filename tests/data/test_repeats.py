from pathlib import Path

import numpy as np
import pytest
import torch
from torch.nn.functional import normalize

from cliptune.data.repeats import image_kinds, standard_ceiling
from cliptune.data.table import Strings
from cliptune.features.metrics import rank_metrics
from cliptune.features.ranks import retrieval_ranks
from cliptune.results import RECALL_KEYS


def test_files_of_the_same_bytes_are_one_kind(tmp_path: Path) -> None:
    middle = bytes(100_000)
    contents = {
        "a": b"1",
        "b": middle,
        "c": b"1",
        "d": b"2",
        "e": middle[:50_000] + b"x" + middle[50_001:],
        "f": middle,
    }
    for name, content in contents.items():
        (tmp_path / name).write_bytes(content)
    paths = Strings.of([str(tmp_path / name) for name in (*contents, "missing", "gone")])
    assert image_kinds(paths).tolist() == [0, 1, 0, 3, 4, 1, 6, 7]  # e differs from b in the middle alone


def test_no_model_exceeds_the_ceiling_and_one_that_tells_classes_reaches_it() -> None:
    generator = torch.Generator().manual_seed(0)
    owners = torch.arange(120) // 2  # 60 images of two texts
    kinds = torch.randint(0, 25, (120,), generator=generator)
    ceiling = standard_ceiling(owners.numpy(), kinds.numpy(), 60)
    for noise in (0.01, 0.3, 3.0):
        texts = normalize(torch.randn(25, 32, generator=generator), dim=-1)
        images = texts[kinds].view(60, 2, 32).mean(1) + noise * torch.randn(60, 32, generator=generator)
        metrics = rank_metrics(retrieval_ranks(normalize(images, dim=-1), texts[kinds], owners))
        assert all(metrics[key] <= ceiling[key] + 1e-9 for key in (*RECALL_KEYS, "rsum"))
    classes = torch.arange(240) % 4
    texts = torch.eye(4, 8)[classes]
    metrics = rank_metrics(
        retrieval_ranks(texts + 0.01 * torch.randn(240, 8, generator=generator), texts, torch.arange(240))
    )
    ceiling = standard_ceiling(np.arange(240), classes.numpy(), 240)
    assert {key: metrics[key] for key in ceiling} == pytest.approx(ceiling)
    assert ceiling["rsum"] == pytest.approx(100 * (4 + 20 + 40) / 240)
    assert standard_ceiling(np.arange(9), np.arange(9), 12)["rsum"] == 600
