import os
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn.functional import normalize

from cliptune.search import lookup
from cliptune.search.lookup import ApproximateLookup, ExactLookup, make_lookup


def features_in_groups(num_features: int, *, size: int = 32, num_groups: int = 40) -> Tensor:
    generator = torch.Generator().manual_seed(0)
    centres = torch.randn(num_groups, size, generator=generator)
    noise = torch.randn(num_features, size, generator=generator)
    return normalize(centres[torch.arange(num_features) % num_groups] + 0.5 * noise, dim=1)


FEATURES = features_in_groups(3000)
QUERIES = normalize(features_in_groups(60) + 0.1, dim=1)


@pytest.mark.parametrize("top", [1, 7, 3000, 5000])
def test_exact_look_up_is_a_sort_of_all_cosines(top: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(lookup, "SLICE", 4 * len(FEATURES))  # four queries at a time
    found = ExactLookup(FEATURES).nearest(QUERIES, top)
    scores = QUERIES.double() @ FEATURES.double().T
    wanted = scores.sort(dim=1, descending=True)
    assert found.scores.shape == (60, min(top, 3000))
    assert torch.allclose(found.scores.double(), wanted.values[:, :top], atol=1e-6)
    assert torch.allclose(scores.gather(1, found.indices), wanted.values[:, :top], atol=1e-6)
    assert all(len(set(row)) == len(row) for row in found.indices.tolist())


def test_of_equal_images_the_first_comes_first() -> None:
    features = FEATURES[[5, 9, 5, 7, 5, 9]]
    (indices,) = ExactLookup(features).nearest(FEATURES[5][None], 3).indices.tolist()
    assert indices == [0, 2, 4]


@pytest.mark.parametrize("top", [1, 7, 12, 500])
def test_equal_features_are_found_in_their_order_with_one_score(top: int) -> None:
    """A matrix product's last bit depends on the row; what is at the end of the best is no exception."""
    features = FEATURES[:500].clone()
    equals = [[3, *range(490, 500)], [7, 40, 41]]
    for first, *others in equals:
        features[others] = features[first].clone()
    found = ExactLookup(features).nearest(torch.cat([QUERIES, features[[3, 7]]]), top)
    for indices, scores in zip(found.indices.tolist(), found.scores.tolist(), strict=True):
        assert scores == sorted(scores, reverse=True)
        assert len(set(indices)) == top
        for rows in equals:
            places = [place for place, index in enumerate(indices) if index in rows]
            assert [indices[place] for place in places] == rows[: len(places)]
            assert len({scores[place] for place in places}) <= 1
    wanted = (torch.cat([QUERIES, features[[3, 7]]]).double() @ features.double().T).sort(dim=1, descending=True)
    assert torch.allclose(found.scores.double(), wanted.values[:, :top], atol=1e-6)


def told_recalls(note: str) -> list[float]:
    return [float(number) for number in re.findall(r"([\d.]+)% for", note)]


def test_an_approximate_look_up_says_its_recall_and_gives_exact_scores() -> None:
    pytest.importorskip("faiss")
    approximate = ApproximateLookup(FEATURES, QUERIES, cache_prefix=None)
    found, exact = approximate.nearest(QUERIES, 10), ExactLookup(FEATURES).nearest(QUERIES, 10)
    hits = [len(set(a) & set(b)) for a, b in zip(found.indices.tolist(), exact.indices.tolist(), strict=True)]
    of_texts, of_images = told_recalls(approximate.note)
    assert of_texts == pytest.approx(100 * sum(hits) / 600, abs=0.06)
    assert min(of_texts, of_images) >= 95
    lists = re.search(r"looks into (\d+) of (\d+) lists", approximate.note)
    assert lists is not None
    assert int(lists[1]) < int(lists[2])  # else nothing is won
    assert torch.allclose(found.scores, (QUERIES[:, None] * FEATURES[found.indices]).sum(2), atol=1e-6)
    assert (found.scores.diff(dim=1) <= 0).all()


def test_lists_are_cached_for_the_very_same_features(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("faiss")
    built, build = [], lookup._build

    def count_and_build(features: Any) -> Any:
        built.append(len(features))
        return build(features)

    monkeypatch.setattr(lookup, "_build", count_and_build)
    first = ApproximateLookup(FEATURES, QUERIES, cache_prefix=tmp_path / "folder")
    again = ApproximateLookup(FEATURES, QUERIES, cache_prefix=tmp_path / "folder")
    assert torch.equal(first.nearest(QUERIES, 10).indices, again.nearest(QUERIES, 10).indices)
    assert built == [3000]
    changed = FEATURES.clone()
    changed[17] = -changed[17]
    ApproximateLookup(changed, QUERIES, cache_prefix=tmp_path / "folder")
    assert built == [3000, 3000]
    (path,) = tmp_path.iterdir()  # the lists of before are of no use any more
    path.write_bytes(path.read_bytes()[:1000])
    ApproximateLookup(changed, QUERIES, cache_prefix=tmp_path / "folder")
    assert built == [3000, 3000, 3000]


def test_few_images_need_no_faiss_and_without_it_many_are_compared_exactly(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setitem(sys.modules, "faiss", None)
    found = make_lookup(FEATURES, sample=lambda: QUERIES, cache_prefix=None)
    assert isinstance(found, ExactLookup)
    assert not caplog.records
    found = make_lookup(FEATURES, sample=lambda: QUERIES, cache_prefix=None, exact_up_to=2999)
    assert isinstance(found, ExactLookup)
    assert "pip install faiss-cpu" in caplog.text


@pytest.mark.slow
@pytest.mark.parametrize("order", [("faiss", "torch"), ("torch", "faiss")])
def test_both_libraries_threads_work_in_one_process(order: tuple[str, str]) -> None:
    """Each brings an OpenMP of its own."""
    pytest.importorskip("faiss")
    code = f"""
import {order[0]}, {order[1]}
from tests.search.test_lookup import *
torch.set_num_threads(2); faiss.omp_set_num_threads(2)
approximate = ApproximateLookup(FEATURES, QUERIES, cache_prefix=None)
for _ in range(20):
    product = torch.randn(300, 300) @ torch.randn(300, 300)
    found = approximate.nearest(QUERIES, 10)
assert found.indices.min() >= 0 and product.isfinite().all()
print("both")
"""
    environment = {name: value for name, value in os.environ.items() if name != "OMP_NUM_THREADS"}
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False, env=environment)
    assert (done.returncode, done.stdout) == (0, "both\n"), done.stderr
