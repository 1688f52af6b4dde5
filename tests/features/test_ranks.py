from typing import Any

import pytest
import torch
from torch.nn.functional import normalize
from torch.utils._python_dispatch import TorchDispatchMode

from cliptune.features import ranks
from cliptune.features.ranks import retrieval_ranks
from cliptune.features.similarity import similarity_histograms, similarity_means
from tests.helpers.no_float64 import NoFloat64


def oracle_ranks(scores: torch.Tensor, owners: list[int]) -> tuple[list[float], list[float]]:
    """Ranks straight from the definition, score by score."""
    i2t, t2i = [], []
    for image in range(scores.shape[0]):
        own = [text for text, owner in enumerate(owners) if owner == image]
        if own:
            best = max(float(scores[image, text]) for text in own)
            others = [float(scores[image, text]) for text in range(len(owners)) if owners[text] != image]
            i2t.append(1 + sum(s > best for s in others) + sum(s == best for s in others) / 2)
    for text, owner in enumerate(owners):
        own_score = float(scores[owner, text])
        others = [float(scores[image, text]) for image in range(scores.shape[0]) if image != owner]
        t2i.append(1 + sum(s > own_score for s in others) + sum(s == own_score for s in others) / 2)
    return i2t, t2i


def assert_matches_oracle(images: torch.Tensor, texts: torch.Tensor, owners: list[int], **options: Any) -> None:
    found = retrieval_ranks(images, texts, torch.tensor(owners), **options)
    i2t, t2i = oracle_ranks(images @ texts.T, owners)
    assert found.i2t.tolist() == i2t
    assert found.t2i.tolist() == t2i


@pytest.mark.parametrize("options", [{}, {"blocks": (64, 64)}, {"blocks": (64, 128)}, {"counting": "flags"}])
@pytest.mark.parametrize("seed", range(3))
def test_ranks_against_brute_force_with_exact_ties(seed: int, options: dict[str, Any]) -> None:
    """Small integers as features: every product is exact, and ties abound."""
    generator = torch.Generator().manual_seed(seed)
    images = torch.randint(-2, 3, (130, 6), generator=generator).float()
    owners = torch.randint(0, 120, (300,), generator=generator).tolist()  # several captions, some images without
    texts = (images[owners] + torch.randint(-1, 2, (300, 6), generator=generator)).float()
    assert_matches_oracle(images, texts, owners, **options)


@pytest.mark.parametrize("size", [2, 16, 512])
def test_ranks_of_real_numbers_against_brute_force(size: int) -> None:
    generator = torch.Generator().manual_seed(size)
    images = normalize(torch.randn(90, size, generator=generator), dim=-1)
    owners = [text // 3 for text in range(270)]
    texts = normalize(images[owners] + 0.5 * torch.randn(270, size, generator=generator), dim=-1)
    assert_matches_oracle(images, texts, owners)


@pytest.mark.parametrize("max_cached_bytes", [0, 2**27])
@pytest.mark.parametrize("scores_at_once", [64, 64 * 24, 2**17])
def test_ranks_do_not_depend_on_strips_or_cached_products(scores_at_once: int, max_cached_bytes: int) -> None:
    generator = torch.Generator().manual_seed(3)
    images = torch.randint(-2, 3, (150, 6), generator=generator).float()
    owners = torch.randint(0, 140, (200,), generator=generator).tolist()
    texts = (images[owners] + torch.randint(-1, 2, (200, 6), generator=generator)).float()
    sizes = {"scores_at_once": scores_at_once, "max_cached_bytes": max_cached_bytes}
    assert_matches_oracle(images, texts, owners, blocks=(96, 64), **sizes)


def a_gallery(num_images: int, num_texts: int) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """With ties, and images without a text."""
    generator = torch.Generator().manual_seed(num_texts)
    images = torch.randint(-3, 4, (num_images, 8), generator=generator).float()
    owners = torch.randint(0, num_images, (num_texts,), generator=generator)
    texts = images[owners] + torch.randint(-1, 2, (num_texts, 8), generator=generator)
    return images, texts, owners


@pytest.mark.parametrize(("num_images", "num_texts"), [(1, 1), (257, 300), (700, 2100), (2000, 300)])
@pytest.mark.parametrize("blocks", [(256, 256), (512, 1024), (2048, 4096)])
def test_a_gpus_way_of_counting_gives_the_same_ranks(num_images: int, num_texts: int, blocks: tuple[int, int]) -> None:
    gallery = a_gallery(num_images, num_texts)
    expected = retrieval_ranks(*gallery)
    found = retrieval_ranks(*gallery, blocks=blocks, counting="flags", max_cached_bytes=0)
    assert torch.equal(found.i2t, expected.i2t)
    assert torch.equal(found.t2i, expected.t2i)


@pytest.mark.slow
def test_compiled_counting_gives_the_same_ranks(caplog: pytest.LogCaptureFixture) -> None:
    gallery = a_gallery(700, 2100)
    expected = retrieval_ranks(*gallery)
    with caplog.at_level("INFO"):
        found = retrieval_ranks(*gallery, blocks=(512, 1024), counting="compiled")
    assert "without torch.compile" not in caplog.text
    assert torch.equal(found.i2t, expected.i2t)
    assert torch.equal(found.t2i, expected.t2i)


def test_counting_goes_on_where_nothing_compiles(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    def broken(*_: Any) -> Any:
        raise RuntimeError("no C++ compiler")

    monkeypatch.setattr("torch.compile", lambda function, **options: broken)
    gallery = a_gallery(300, 700)
    with caplog.at_level("INFO"):
        found = retrieval_ranks(*gallery, blocks=(256, 256), counting="compiled")
    assert [record.message for record in caplog.records] == ["counting goes on without torch.compile: no C++ compiler"]
    assert torch.equal(found.t2i, retrieval_ranks(*gallery).t2i)


def test_only_large_galleries_of_a_gpu_are_compiled_for() -> None:
    usual = ranks._usual_counting
    assert usual(10**13, torch.device("cpu")) == "signs"
    assert usual(10**9, torch.device("cuda:1")) == "flags"
    assert usual(10**12, torch.device("cuda")) == "compiled"


def test_features_move_to_a_gpu_as_a_whole_if_they_are_small(monkeypatch: pytest.MonkeyPatch) -> None:
    moved: list[Any] = []

    def to_device(values: torch.Tensor, *where: Any) -> torch.Tensor:
        moved.append(where)
        return values

    monkeypatch.setattr(ranks, "to_device", to_device)
    device, images, texts = torch.device("cuda"), torch.ones(100, 4), torch.ones(200, 4)
    for free, expected in ((4 * 4800, 2), (4 * 4799, 0)):  # a quarter of it is for them
        monkeypatch.setattr("cliptune.features.ranks.free_memory", lambda device, free=free: free)
        ranks._resident(images, texts, device=device)
        assert moved == [(device, torch.float32)] * expected
        moved.clear()
    assert ranks._resident(images, texts, device=torch.device("cpu")) == (images, texts)


def test_counting_by_flags_needs_no_float64() -> None:
    images, texts, owners = a_gallery(300, 700)
    products = ranks._Products(
        images, texts, blocks=None, device=images.device, scores_at_once=1, max_cached_bytes=None, counting="flags"
    )
    best, own = torch.zeros(300), torch.zeros(700)
    with NoFloat64("cpu", but=torch.ops.aten._to_copy.default):
        own_scores = products.own_scores(owners, torch.arange(700))
        halves = products.count_halves(best, own)
    assert torch.equal(own_scores, (images[owners] * texts).sum(1))
    scores = images @ texts.T
    assert torch.equal(halves[0], ((scores > 0).int() + (scores >= 0).int()).sum(1).double())


def test_ranks_of_half_precision_features_are_those_of_their_values() -> None:
    generator = torch.Generator().manual_seed(5)
    images, texts = (torch.randn(40, 16, generator=generator).bfloat16() for _ in range(2))
    half, full = (
        retrieval_ranks(i, t, torch.arange(40)) for i, t in ((images, texts), (images.float(), texts.float()))
    )
    assert torch.equal(half.i2t, full.i2t)
    assert torch.equal(half.t2i, full.t2i)


def test_what_training_allows_does_not_change_the_products() -> None:
    generator = torch.Generator().manual_seed(7)
    images, texts = (normalize(torch.randn(300, 512, generator=generator), dim=-1) for _ in range(2))
    expected = retrieval_ranks(images, texts, torch.arange(300))
    allowed = torch.get_float32_matmul_precision()
    try:
        torch.set_float32_matmul_precision("medium")
        found = retrieval_ranks(images, texts, torch.arange(300))
        assert torch.get_float32_matmul_precision() == "medium"
    finally:
        torch.set_float32_matmul_precision(allowed)
    assert torch.equal(found.i2t, expected.i2t)
    assert torch.equal(found.t2i, expected.t2i)


class LargestTensor(TorchDispatchMode):
    """Watches the size of everything that is computed."""

    numel = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        found = func(*args, **(kwargs or {}))
        for value in found if isinstance(found, (tuple, list)) else [found]:
            if isinstance(value, torch.Tensor):
                self.numel = max(self.numel, value.numel())
        return found


@pytest.mark.slow
def test_memory_is_bounded_by_the_block() -> None:
    owners = torch.arange(5000).repeat_interleave(2)
    images, texts = torch.randn(5000, 8), torch.randn(10000, 8)
    ways: list[dict[str, Any]] = [{}, {"counting": "flags", "blocks": (512, 1024)}]
    for options in ways:
        with LargestTensor() as largest:
            retrieval_ranks(images, texts, owners, **options)
        assert largest.numel <= 1024 * 1024
    with LargestTensor() as largest:
        similarity_means(images, texts, owners)
    assert largest.numel <= texts.numel()
    with LargestTensor() as largest:
        similarity_histograms(images, texts, owners)
    assert largest.numel <= 4096 * 1024


@pytest.mark.parametrize(("num_images", "per_image"), [(1, 1), (3, 1), (101, 5), (1500, 3), (2100, 1)])
def test_a_collapsed_model_is_in_the_middle(num_images: int, per_image: int) -> None:
    feature = normalize(torch.randn(1, 512, generator=torch.Generator().manual_seed(0)), dim=-1)
    owners = torch.arange(num_images).repeat_interleave(per_image)
    images, texts = feature.repeat(num_images, 1), feature.repeat(len(owners), 1)
    shapes: list[dict[str, Any]] = [{}, {"blocks": (256, 512)}, {"counting": "flags"}]
    for blocks in shapes:
        found = retrieval_ranks(images, texts, owners, **blocks)
        assert (found.i2t == 1 + (len(owners) - per_image) / 2).all()
        assert (found.t2i == 1 + (num_images - 1) / 2).all()


def test_order_of_texts_does_not_matter() -> None:
    generator = torch.Generator().manual_seed(1)
    images, texts = torch.randn(30, 8, generator=generator), torch.randn(90, 8, generator=generator)
    owners, order = torch.arange(90) % 30, torch.randperm(90, generator=generator)
    first = retrieval_ranks(images, texts, owners)
    second = retrieval_ranks(images, texts[order], owners[order])
    assert torch.equal(first.i2t, second.i2t)
    assert torch.equal(first.t2i[order], second.t2i)
