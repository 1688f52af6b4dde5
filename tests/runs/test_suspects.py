"""Training pairs that look mislabelled are listed and left out, and an earlier list is not forgotten."""

from __future__ import annotations

import shutil
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest

import train
import visualization
from cliptune.data.sample_data import create_sample_dataset
from cliptune.data.suspects import Suspect, read_suspects, update_suspects
from cliptune.features.label_noise import Noise
from tests.helpers.runs import SMALL, small_runs


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """A run of one epoch, and its data."""
    folder = tmp_path_factory.mktemp("suspects")
    create_sample_dataset(folder / "data", 40)
    with small_runs():
        flags = ["--data_dir", str(folder / "data"), "--output_dir", str(folder / "run"), "--num_epochs", "1"]
        assert train.main([*SMALL, *flags]) == 0
        yield folder


@pytest.fixture
def results(finished: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Its results, with no list yet; the small model would list nothing, so the first and the fourth pair are."""

    def noise(images: np.ndarray, texts: np.ndarray, owners: np.ndarray) -> Noise:
        assert (len(images), len(texts)) == (owners.max() + 1, len(owners))
        return Noise(np.arange(len(texts), dtype=float), np.array([3, 0]), 0.4, 1.0)

    monkeypatch.setattr("cliptune.runs.suspects.mislabelled", noise)
    (finished / "run/results/suspects.csv").unlink(missing_ok=True)
    return finished / "run/results/training_results.json"


def list_suspects(results: Path) -> list[Suspect]:
    assert visualization.main(["--results", str(results), "--suspects", "train"]) == 0
    return read_suspects(results.with_name("suspects.csv"))


@pytest.mark.slow
def test_they_are_listed_and_left_out(results: Path, finished: Path, capsys: pytest.CaptureFixture[str]) -> None:
    rows = list_suspects(results)
    assert "2 of the 72 training pairs look mislabelled, of which about 0 may be right" in capsys.readouterr().out
    assert [(row.kind, row.keep) for row in rows] == [("mislabelled", False)] * 2
    flags = ["--data_dir", str(finished / "data"), "--output_dir", str(finished / "again"), "--num_epochs", "1"]
    listed = str(results.with_name("suspects.csv"))
    assert train.main([*SMALL, *flags, "--exclude", listed]) == 0
    assert "2 pairs left out of training" in capsys.readouterr().err
    # the next list is of what is left, and the earlier rows stay in it: else they would be trained on again
    again = finished / "again/results/training_results.json"
    shutil.copy(listed, again.parent)
    more = list_suspects(again)
    assert len(more) == 4
    assert {row[:2] for row in rows} < {row[:2] for row in more}


@pytest.mark.slow
def test_other_rows_and_what_a_person_wrote_stay(results: Path) -> None:
    rows = list_suspects(results)
    path = results.with_name("suspects.csv")
    other = Suspect("images/0.png", "", "tiny: 3 by 3 pixels", keep=True)
    update_suspects(path, [other], kinds=["tiny"])
    path.write_text(path.read_text(encoding="utf-8-sig").replace(",no,no", ",yes,no"), encoding="utf-8")
    after = list_suspects(results)
    assert other[:4] in [row[:4] for row in after]
    assert [row.keep for row in after] == [True] * 3
    assert len(rows) == 2


@pytest.mark.slow
def test_a_model_that_cannot_tell_is_told(
    results: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    nothing = Noise(np.zeros(72), np.zeros(0, dtype=np.int64), 0.0, 0.2)
    monkeypatch.setattr("cliptune.runs.suspects.mislabelled", lambda *_: nothing)
    assert list_suspects(results) == []
    assert "the model cannot tell a swapped caption" in capsys.readouterr().out


@pytest.mark.slow
@pytest.mark.parametrize("fault", ["no model", "another run"])
def test_what_is_not_the_runs_is_one_line(
    fault: str, results: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "results").mkdir()
    text = results.read_text()
    moved = tmp_path / "results/training_results.json"
    moved.write_text(text)
    if fault == "another run":
        shutil.copytree(results.parent.parent / "model-checkpoint", tmp_path / "model-checkpoint")
        moved.write_text(text.replace('"run_id": "', '"run_id": "x'))
    assert visualization.main(["--results", str(moved), "--suspects", "train"]) == 2
    said = {"no model": "there is no ", "another run": "is of another run than"}[fault]
    assert said in capsys.readouterr().err
