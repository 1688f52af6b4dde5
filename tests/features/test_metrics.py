import math

import pytest
import torch

from cliptune.features.metrics import chance_level, compute_retrieval_metrics, rank_metrics


def test_perfect_and_reversed_models() -> None:
    rows = torch.eye(20)
    metrics = compute_retrieval_metrics(rows, rows, torch.arange(20))
    assert metrics["rsum"] == 600
    assert metrics["i2t_mean_rank"] == metrics["t2i_median_rank"] == 1
    assert compute_retrieval_metrics(-rows, rows, torch.arange(20))["i2t_r10"] == 0


def test_recalls_and_medians() -> None:
    ranks = type("R", (), {"i2t": torch.tensor([1.0, 5, 6, 20]).double(), "t2i": torch.tensor([1.5, 2]).double()})
    metrics = rank_metrics(ranks)  # type: ignore[arg-type]
    assert [metrics[f"i2t_r{k}"] for k in (1, 5, 10)] == [25, 50, 75]
    assert [metrics[f"t2i_r{k}"] for k in (1, 5, 10)] == [0, 100, 100]
    assert metrics["rsum"] == 350
    assert (metrics["i2t_mean_rank"], metrics["i2t_median_rank"], metrics["t2i_median_rank"]) == (8, 5, 1)


@pytest.mark.parametrize(
    ("images", "texts", "owners", "message"),
    [
        (torch.ones(2, 4), torch.ones(3, 4), [0, 1, 2], "image row 2, but there are 2 images"),
        (torch.ones(2, 4), torch.ones(3, 4), [0, 1, -1], "image row -1"),
        (torch.ones(2, 4), torch.ones(3, 5), [0, 1, 1], "do not fit"),
        (torch.ones(2, 4), torch.ones(3, 4), [0, 1], "do not fit"),
        (torch.full((2, 4), math.nan), torch.ones(2, 4), [0, 1], "image_features are not finite"),
        (torch.ones(2, 4), torch.full((2, 4), math.inf), [0, 1], "text_features are not finite"),
        (torch.ones(0, 4), torch.ones(0, 4), [], "N > 0"),
        (torch.full((2, 4), 1e30), torch.full((2, 4), 1e30), [0, 1], "overflow float32"),
    ],
)
def test_what_does_not_fit_is_said(images: torch.Tensor, texts: torch.Tensor, owners: list[int], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        compute_retrieval_metrics(images, texts, torch.tensor(owners))


@pytest.mark.slow
def test_chance_is_what_random_ranks_give() -> None:
    generator = torch.Generator().manual_seed(0)
    owners = torch.tensor([0] * 5 + [1] * 2 + list(range(2, 25)))
    chance = chance_level(26, owners)  # the last image has no text
    sums = dict.fromkeys(chance, 0.0)
    for _ in range(300):
        images, texts = torch.randn(26, 64, generator=generator), torch.randn(len(owners), 64, generator=generator)
        metrics = compute_retrieval_metrics(images, texts, owners)
        for key in sums:
            sums[key] += metrics[key] / 300
    assert all(abs(sums[key] - chance[key]) < (8 if key == "rsum" else 2.5) for key in chance), (sums, chance)
