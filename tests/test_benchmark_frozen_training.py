import json
from pathlib import Path

import pytest

from benchmarks.frozen_training import ROWS, Epoch, main, summarise


def test_every_row_is_measured_and_the_losses_agree(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    flags = ["--num_images", "20", "--batch_size", "8", "--num_later", "2", "--rounds", "1", "--device", "cpu"]
    assert main([*flags, "--model_name", "ViT-Ti/32", "--precision", "fp32", "--json", str(tmp_path / "x.json")]) == 0
    written = json.loads((tmp_path / "x.json").read_text())
    assert [row["name"] for row in written["rows"]] == list(ROWS)
    assert all(0 < row["min_s"] <= row["median_s"] <= row["max_s"] for row in written["rows"])
    assert written["rows"][1]["ratio"] == 1
    assert written["loss_difference"] < 1e-5
    assert written["num_images"] == 20
    output = capsys.readouterr().out
    assert all(name in output for name in ROWS)


def test_the_ratio_is_against_the_first_epoch() -> None:
    seconds = dict(zip(ROWS, ([9.0], [8.0, 10.0, 30.0], [0.1, 0.2], [0.5]), strict=True))
    rows = summarise({name: [Epoch(value, 1.0) for value in values] for name, values in seconds.items()})
    assert [row["ratio"] for row in rows] == pytest.approx([10 / 9, 1, 10 / 0.15, 20])
    assert (rows[1]["min_s"], rows[1]["median_s"], rows[1]["max_s"]) == (8, 10, 30)


def test_a_wrong_flag_is_an_error(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["--num_image", "3"]) == 2
    assert "did you mean --num_images?" in capsys.readouterr().err
