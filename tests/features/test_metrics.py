import math

import pytest
import torch

from cliptune.features.metrics import chance_level, merged_ranks, rank_metrics
from cliptune.features.ranks import retrieval_ranks


def test_perfect_and_reversed_models() -> None:
    rows = torch.eye(20)
    metrics = rank_metrics(retrieval_ranks(rows, rows, torch.arange(20)))
    assert metrics["rsum"] == 600
    assert metrics["i2t_mean_rank"] == metrics["t2i_median_rank"] == 1
    assert rank_metrics(retrieval_ranks(-rows, rows, torch.arange(20)))["i2t_r10"] == 0


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
        retrieval_ranks(images, texts, torch.tensor(owners))


@pytest.mark.slow
def test_chance_is_what_random_ranks_give() -> None:
    generator = torch.Generator().manual_seed(0)
    owners = torch.tensor([0] * 5 + [1] * 2 + list(range(2, 25)))
    chance = chance_level(26, owners)  # the last image has no text
    sums = dict.fromkeys(chance, 0.0)
    for _ in range(300):
        images, texts = torch.randn(26, 64, generator=generator), torch.randn(len(owners), 64, generator=generator)
        metrics = rank_metrics(retrieval_ranks(images, texts, owners))
        for key in sums:
            sums[key] += metrics[key] / 300
    assert all(abs(sums[key] - chance[key]) < (8 if key == "rsum" else 2.5) for key in chance), (sums, chance)


def merged_oracle(
    scores: torch.Tensor, owners: list[int], image_kinds: list[int], text_kinds: list[int]
) -> tuple[dict[int, float], dict[int, float]]:
    """Ranks of each kind from the definition."""
    matches = {(image_kinds[image], text_kinds[text]) for text, image in enumerate(owners)}
    images, texts = sorted(set(image_kinds)), sorted(set(text_kinds))
    score = {(image, text): float(scores[image, text]) for image in images for text in texts}

    def rank(own: list[float], others: list[float]) -> float:
        return 1 + sum(s > max(own) for s in others) + sum(s == max(own) for s in others) / 2

    i2t = {
        image: rank(
            [score[image, text] for text in texts if (image, text) in matches],
            [score[image, text] for text in texts if (image, text) not in matches],
        )
        for image in sorted({image for image, _ in matches})
    }
    t2i = {
        text: rank(
            [score[image, text] for image in images if (image, text) in matches],
            [score[image, text] for image in images if (image, text) not in matches],
        )
        for text in texts
    }
    return i2t, t2i


@pytest.mark.parametrize("seed", range(4))
def test_merged_ranks_against_brute_force(seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    first_image = torch.cat([torch.arange(60), torch.randint(0, 60, (20,), generator=generator)])  # 20 copies
    first_text = torch.cat([torch.arange(40), torch.randint(0, 40, (80,), generator=generator)])
    owners = torch.randint(0, 75, (120,), generator=generator)  # some images without a text
    images = torch.randint(-2, 3, (60, 6), generator=generator).float()[first_image]
    texts = torch.randint(-2, 3, (40, 6), generator=generator).float()[first_text]
    standard = retrieval_ranks(images, texts, owners)
    merged = merged_ranks(standard, images, texts, owners, image_kinds=first_image, text_kinds=first_text)
    i2t, t2i = merged_oracle(images @ texts.T, owners.tolist(), first_image.tolist(), first_text.tolist())
    with_text = owners.unique().tolist()
    assert merged.ranks.i2t.tolist() == [i2t[int(first_image[image])] for image in with_text]
    assert merged.ranks.t2i.tolist() == [t2i[int(kind)] for kind in first_text]
    assert (merged.ranks.i2t <= standard.i2t).all()
    assert (merged.ranks.t2i <= standard.t2i).all()
    for k in (1, 5, 10):
        for direction, of_kind in (("i2t", i2t), ("t2i", t2i)):
            expected = 100 * sum(rank <= k for rank in of_kind.values()) / len(of_kind)
            assert merged.metrics[f"merged_{direction}_r{k}"] == pytest.approx(expected)
    missed = sum(float(s) > 1 >= i2t[int(first_image[i])] for i, s in zip(with_text, standard.i2t, strict=True))
    assert merged.metrics["i2t_duplicate_misses"] == missed
    # the queries are the first of each kind
    for ranks, first, of_kind in zip(merged.ranks, merged.is_first, (i2t, t2i), strict=True):
        assert sorted(ranks[first].tolist()) == sorted(of_kind.values())


def test_a_perfect_classifier_of_class_captions_has_600_once_merged() -> None:
    classes = torch.arange(240) % 4
    features = torch.eye(4)[classes]
    standard = retrieval_ranks(features, features, torch.arange(240))
    kinds = classes.clone()  # the first image of each class has its number
    merged = merged_ranks(
        standard, features, features, torch.arange(240), image_kinds=torch.arange(240), text_kinds=kinds
    )
    assert rank_metrics(standard)["rsum"] == 0
    assert merged.metrics["merged_rsum"] == 600
    assert merged.metrics["i2t_duplicate_misses"] == merged.metrics["t2i_duplicate_misses"] == 240
    assert merged.chance["merged_i2t_r1"] == pytest.approx(25)
    assert merged.chance["merged_i2t_r5"] == 100
    assert merged.chance["merged_t2i_r1"] == pytest.approx(25)


def test_where_nothing_repeats_merged_numbers_are_the_standard_ones() -> None:
    generator = torch.Generator().manual_seed(0)
    images, texts = torch.randn(40, 8, generator=generator), torch.randn(80, 8, generator=generator)
    owners = torch.arange(80) // 2
    standard = retrieval_ranks(images, texts, owners)
    merged = merged_ranks(standard, images, texts, owners, image_kinds=torch.arange(40), text_kinds=torch.arange(80))
    metrics, chance = rank_metrics(standard), chance_level(40, owners)
    assert {key: merged.metrics[f"merged_{key}"] for key in chance} == {key: metrics[key] for key in chance}
    assert {key: merged.chance[f"merged_{key}"] for key in chance} == pytest.approx(chance)
    assert merged.metrics["i2t_duplicate_misses"] == 0
