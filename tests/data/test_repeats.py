import math
from itertools import permutations
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F

from cliptune.data.pairs import load_pairs
from cliptune.data.repeats import KS, batch_cost, image_kinds, perfect_recalls
from cliptune.data.table import IntArray, Strings
from cliptune.training.loss import ContrastiveLoss
from tests.helpers.datasets import make_images, make_index


def best_of_all(wordings: IntArray, owners: IntArray, files: IntArray, direction: str) -> Any:
    """Try every ranking that each kind of query can have; recalls in percent by the standard protocol."""
    queries, targets = (files, wordings) if direction == "i2t" else (wordings, files)
    is_own = owners[None] == np.arange(len(files))[:, None]  # [N, M]
    is_own = is_own if direction == "i2t" else is_own.T
    total = np.zeros(3)
    for query in np.unique(queries):
        found = []
        for order in permutations(range(targets.max() + 1)):
            scores = np.array(order)[targets]  # equal targets have equal scores
            ranks = []
            for own in is_own[queries == query]:
                best, negatives = scores[own].max(), scores[~own]
                ranks.append(1 + (negatives > best).sum() + (negatives == best).sum() / 2)
            found.append([np.sum(np.array(ranks) <= k) for k in KS])
        total += np.max(found, axis=0)
    return 100 * total / len(queries)


@pytest.mark.parametrize("seed", range(30))
def test_no_ranking_has_a_higher_recall_than_the_perfect_one(seed: int) -> None:
    random = np.random.RandomState(seed)
    num_images = random.randint(2, 7)
    owners = np.sort(np.concatenate([np.arange(num_images), random.randint(0, num_images, 3)]))
    wordings, files = random.randint(0, 4, len(owners)), random.randint(0, 5, num_images)
    if seed % 2:
        files = np.arange(num_images)
    found = perfect_recalls(wordings, owners, files)
    for direction in ("i2t", "t2i"):
        best = best_of_all(wordings, owners, files, direction)
        ours = np.array([found[f"{direction}_r{k}"] for k in KS])
        assert (ours <= best + 1e-9).all()
        assert math.isclose(ours[0], best[0])
        if seed % 2:
            np.testing.assert_allclose(ours, best)


def test_four_class_captions_leave_little_to_reach() -> None:
    owners = np.arange(240)
    found = perfect_recalls(owners % 4, owners, owners)
    reached = [found[key] for key in ("i2t_r10", "t2i_r1", "t2i_r10")]
    assert reached == pytest.approx([0, 100 / 60, 1000 / 60])
    assert perfect_recalls(owners, owners, owners)["rsum"] == 600


def test_the_floor_of_the_loss_is_that_of_the_batches(tmp_path: Path) -> None:
    names = [f"{number}.png" for number in range(32)]
    make_images(tmp_path, *names)
    make_index(tmp_path, [{"image": name, "caption": f"class {at % 4}"} for at, name in enumerate(names)])
    pairs = load_pairs(tmp_path)
    wordings, files = pairs.captions.first_equal(), np.arange(32)
    found = batch_cost(pairs, wordings, files, batch_size=32)
    assert (found.loss_floor, found.num_false) == (pytest.approx(math.log(8)), 32)
    found = batch_cost(pairs, np.arange(32), files // 2, batch_size=64)
    # of two copies with captions of their own a text may be either's
    assert (found.batch_size, found.loss_floor, found.num_false) == (32, pytest.approx(math.log(2)), 32)
    # one number for all draws: with batches of 2 an image meets its copy once in 31
    found = batch_cost(pairs, np.arange(32), files // 2, batch_size=2)
    assert found.num_false == pytest.approx(2 / 31, rel=0.25)
    assert found.loss_floor == pytest.approx(math.log(2) / 31, rel=0.25)


@pytest.mark.slow
@pytest.mark.parametrize("positives", ["image", "caption"])
@pytest.mark.parametrize("seed", range(4))
def test_no_features_have_a_lower_loss_than_the_floor(positives: str, seed: int, tmp_path: Path) -> None:
    names = [f"{number}.png" for number in range(8)]
    make_images(tmp_path, *names)
    random = np.random.RandomState(seed)
    wordings, files = random.randint(0, 4, 8), random.randint(0, 4, 8)
    make_index(tmp_path, [{"image": name, "caption": str(text)} for name, text in zip(names, wordings, strict=True)])
    floor = batch_cost(load_pairs(tmp_path), wordings, files, batch_size=8).loss_floor
    # features of 4 files and 4 texts are free to fall where they like, and equal ones are equal
    torch.manual_seed(0)
    of_files, of_texts = (torch.randn(4, 8, requires_grad=True) for _ in range(2))
    loss = ContrastiveLoss(positives=positives)
    optimizer = torch.optim.Adam([of_files, of_texts], lr=0.05)
    values = []
    for _ in range(300):
        images, texts = (F.normalize(each, dim=1) for each in (of_files[files], of_texts[wordings]))
        values.append(loss(images, texts, torch.tensor(math.log(20.0)), caption_ids=torch.from_numpy(wordings)))
        optimizer.zero_grad()
        values[-1].backward()
        optimizer.step()
    assert floor - 1e-5 <= float(min(values).detach()) < floor + 0.05


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
