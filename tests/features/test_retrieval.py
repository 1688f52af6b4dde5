"""What an evaluation found is kept query by query, comes back as it was, and is cut back to what a run has had."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F

from cliptune.data.pairs import Pairs
from cliptune.data.table import Strings
from cliptune.features.encode import Encoded
from cliptune.features.retrieval import NUM_ANSWERS, Retrieval, best_answers, duplicate_errors

CPU = torch.device("cpu")
PLACES = [(0, 0), (0.5, 4), (1, 8)]


def pairs_of(captions: list[int], groups: list[str] | None = None) -> Pairs:
    """Images with so many captions each."""
    paths = Strings.of(f"/data/{index}é.png" for index in range(len(captions)))
    texts = Strings.of(f"描述 {index}" for index in range(sum(captions)))
    starts = np.concatenate([[0], np.cumsum(captions)])
    splits = np.full(len(captions), -1, dtype=np.int8)
    return Pairs(paths, texts, starts, paths if groups is None else Strings.of(groups), splits)


def encoded_of(pairs: Pairs, seed: int, *, unreadable: int | None = None, levels: int | None = None) -> Encoded:
    """Random features; rounded to a few levels, many scores are equal."""
    generator = torch.Generator().manual_seed(seed)
    readable = torch.tensor([index for index in range(len(pairs)) if index != unreadable])
    texts = torch.isin(pairs.text_to_image, readable).nonzero().squeeze(1)
    features = [F.normalize(torch.randn(len(rows), 8, generator=generator), dim=1) for rows in (readable, texts)]
    if levels is not None:
        features = [(each * levels).round() / levels for each in features]
    owners = torch.searchsorted(readable, pairs.text_to_image[texts])
    return Encoded(features[0], features[1], owners, readable, texts, readable, texts, 1.0, 1.0)


def ranks_of(pairs: Pairs, seed: int) -> dict[str, Any]:
    rng = np.random.default_rng(seed)
    return {name: rng.integers(1, 20, size) / 2 for name, size in (("i2t", len(pairs)), ("t2i", pairs.num_pairs))}


def filled(path: Path, pairs: Pairs, places: list[tuple[float, int]] = PLACES, run_id: str = "a") -> Retrieval:
    retrieval = Retrieval(path, pairs, run_id=run_id)
    for epoch, step in places:
        retrieval.add(ranks_of(pairs, step), epoch=epoch, step=step)
        retrieval.keep_answers("best" if step else "loaded", encoded_of(pairs, step), step=step, device=CPU)
    retrieval.write()
    return retrieval


@pytest.mark.parametrize("levels", [None, 2])
def test_answers_are_those_of_a_sort_of_all_scores(levels: int | None) -> None:
    pairs = pairs_of([3, 0, 1, 5, 2, 1, 1, 1, 1, 4, 1, 2])
    encoded = encoded_of(pairs, 1, unreadable=4, levels=levels)
    found = best_answers(encoded, num_images=len(pairs), num_texts=pairs.num_pairs, device=CPU)
    scores = encoded.image_features @ encoded.text_features.T
    for direction, matrix, rows, others in (
        ("i2t", scores, encoded.image_indices, encoded.text_indices),
        ("t2i", scores.T, encoded.text_indices, encoded.image_indices),
    ):
        highest, order = torch.sort(matrix, dim=1, descending=True, stable=True)  # of equal ones the lower row is first
        assert found[f"{direction}_ids"][rows].tolist() == others[order[:, :NUM_ANSWERS]].tolist()
        assert found[f"{direction}_scores"][rows] == pytest.approx(highest[:, :NUM_ANSWERS].numpy(), abs=1e-6)
    assert found["t2i_own"][encoded.text_indices] == pytest.approx(
        scores[encoded.text_to_image, torch.arange(len(encoded.text_to_image))].numpy(), abs=1e-6
    )
    best = [scores[row, encoded.text_to_image == row].max().item() for row in (0, 2)]
    assert found["i2t_own"][[0, 2]] == pytest.approx(best, abs=1e-6)
    assert np.isnan(found["i2t_own"][[1, 4]]).all()  # without a caption, and not readable
    assert (found["i2t_ids"][4] == -1).all()
    assert np.isnan(found["image_features"][4]).all()
    assert found["text_features"].dtype == np.float16


def test_queries_that_a_duplicate_alone_has_beaten() -> None:
    ranks, merged = np.array([1, 1.5, 3, 2, 2, np.nan]), np.array([1, 1, 1, 2, np.nan, np.nan])
    assert duplicate_errors(ranks, merged).tolist() == [1, 2]


def test_a_small_gallery_has_fewer_answers() -> None:
    pairs = pairs_of([1, 1, 1])
    found = best_answers(encoded_of(pairs, 0), num_images=3, num_texts=3, device=CPU)
    assert (found["t2i_ids"][:, :3] >= 0).all()
    assert (found["t2i_ids"][:, 3:] == -1).all()
    assert np.isnan(found["t2i_scores"][:, 3:]).all()


def test_the_file_is_plain_arrays_that_name_their_queries(tmp_path: Path) -> None:
    pairs = pairs_of([2, 1, 3], groups=["a", "b", "a"])
    filled(tmp_path / "r.npz", pairs)
    found = np.load(tmp_path / "r.npz", allow_pickle=False)
    assert found["i2t"].shape == (3, 3)
    assert found["t2i"].shape == (3, 6)
    assert found["t2i"].dtype == np.float32
    assert found["t2i"][1].tolist() == ranks_of(pairs, 4)["t2i"].tolist()
    assert found["groups"].tolist() == [0, 1, 0]
    assert found["text_to_image"].tolist() == [0, 0, 1, 2, 2, 2]
    ends = found["image_path_ends"]
    assert bytes(found["image_paths"][ends[0] : ends[1]]).decode() == "/data/1é.png"
    ends = found["caption_ends"]
    assert bytes(found["captions"][ends[3] : ends[4]]).decode() == pairs.captions[4]
    assert (found["loaded_step"], found["best_step"], str(found["run_id"])) == (0, 8, "a")


def test_a_file_of_before_captions_were_kept_is_gone_on_with(tmp_path: Path) -> None:
    pairs, path = pairs_of([2, 1, 3]), tmp_path / "r.npz"
    filled(path, pairs)
    with np.load(path) as file:
        older = {name: file[name] for name in file.files if name not in {"captions", "caption_ends"}}
    np.savez(path, **older)
    retrieval = Retrieval(path, pairs, run_id="a")
    retrieval.resume(path, PLACES, best_step=8)
    assert (retrieval.places, retrieval.lacks) == (PLACES, "")
    retrieval.write()
    assert "captions" in np.load(path)


@pytest.mark.parametrize("had", [3, 2])
def test_a_run_goes_on_with_the_evaluations_that_it_has_had(had: int, tmp_path: Path) -> None:
    pairs = pairs_of([2, 1, 3])
    before = filled(tmp_path / "r.npz", pairs)
    after = Retrieval(tmp_path / "r.npz", pairs, run_id="a")
    after.resume(tmp_path / "r.npz", PLACES[:had], best_step=PLACES[had - 1][1])
    assert (after.places, after.lacks, after.begun_at) == (PLACES[:had], "", 0)
    for got, want in zip(after.ranks, before.ranks, strict=False):
        assert all(np.array_equal(got[name], want[name]) for name in want)
    assert set(after.answers) == ({"loaded", "best"} if had == 3 else {"loaded"})  # those of a later best are dropped
    after.write()
    again = Retrieval(tmp_path / "r.npz", pairs, run_id="a")
    again.resume(tmp_path / "r.npz", PLACES[:had], best_step=PLACES[had - 1][1])
    assert again.places == PLACES[:had]


def test_a_record_that_was_begun_again_goes_on(tmp_path: Path) -> None:
    """On other data the model as loaded and the best are evaluated anew: what the run has had since then counts."""
    pairs, path = pairs_of([2, 1, 3]), tmp_path / "r.npz"
    begun = filled(path, pairs, [(0, 0), (0.5, 4)])
    begun.begun_at = 3
    begun.add(ranks_of(pairs, 12), epoch=2, step=12)
    begun.write()
    for had in (3, 4):
        after = Retrieval(path, pairs, run_id="a")
        after.resume(path, [*PLACES, (2, 12)][:had], best_step=4)
        assert (after.places, after.lacks) == ([(0, 0), (0.5, 4), (2, 12)][: had - 1], "")


def test_a_moved_data_set_is_the_same(tmp_path: Path) -> None:
    pairs = pairs_of([2, 1, 3])
    filled(tmp_path / "r.npz", pairs)
    moved = Strings.of(f"/elsewhere/{index}.png" for index in range(3))
    other = Pairs(moved, pairs.captions, pairs.starts, moved, pairs.splits)
    retrieval = Retrieval(tmp_path / "r.npz", other, run_id="a")
    retrieval.resume(tmp_path / "r.npz", PLACES, best_step=8)
    assert not retrieval.lacks


@pytest.mark.parametrize("fault", ["gone", "cut", "flipped", "another run", "other captions", "other steps", "fewer"])
def test_what_is_lost_is_told_and_stays_told(fault: str, tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    pairs, path = pairs_of([2, 1, 3]), tmp_path / "r.npz"
    filled(path, pairs, PLACES[:2] if fault == "fewer" else PLACES, run_id="b" if fault == "another run" else "a")
    content = bytearray(path.read_bytes())
    if fault == "gone":
        path.unlink()
    elif fault == "cut":
        path.write_bytes(content[:-100])
    elif fault == "flipped":
        content[len(content) // 2] ^= 4
        path.write_bytes(content)
    places = [(0, 0), (0.5, 5), (1, 8)] if fault == "other steps" else PLACES
    other = pairs_of([1, 1, 3]) if fault == "other captions" else pairs
    for _ in range(2):
        retrieval = Retrieval(path, other, run_id="a")
        retrieval.resume(path, places, best_step=8)
        assert retrieval.lacks == "what the first 3 evaluations found, query by query, is lost"
        retrieval.add(ranks_of(other, 9), epoch=2, step=9)
        retrieval.write()
        places = [*places, (2, 9)] if len(places) == 3 else places
    assert caplog.text.count("is lost") == 1
    assert retrieval.places == [(2, 9), (2, 9)]


def test_large_sets_are_thinned_with_their_captions(tmp_path: Path) -> None:
    pairs = pairs_of([2] * 10)
    retrieval = Retrieval(tmp_path / "r.npz", pairs, run_id="a", max_queries=12)
    ranks = {"i2t": np.arange(10.0), "t2i": np.arange(20.0)}
    retrieval.add(ranks, epoch=0, step=0)
    retrieval.keep_answers("loaded", encoded_of(pairs, 0), step=0, device=CPU)
    assert retrieval.ranks[0]["i2t"].tolist() == [0, 3, 6, 9]
    assert retrieval.ranks[0]["t2i"].tolist() == [0, 1, 6, 7, 12, 13, 18, 19]
    assert retrieval.query_groups["t2i"].tolist() == [0, 0, 3, 3, 6, 6, 9, 9]
    assert not retrieval.answers
