import json
from pathlib import Path

import pytest

from benchmarks import data_pipeline
from benchmarks.timing import compare, print_table


def test_cases_are_run_in_turn() -> None:
    order: list[str] = []
    timings = compare({"a": lambda: order.append("a"), "b": lambda: order.append("b")}, repeats=2)
    assert order == ["a", "b"] * 3  # once to warm up
    assert {name: len(timing.seconds) for name, timing in timings.items()} == {"a": 2, "b": 2}


def test_a_table_is_aligned(capsys: pytest.CaptureFixture[str]) -> None:
    print_table(("", "n"), [("long name", "1"), ("x", "100")])
    assert capsys.readouterr().out.splitlines() == ["             n", "long name    1", "x          100"]


def test_the_data_pipeline(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    flags = ["--quick", "--num_large", "1", "--num_small", "2", "--large_width", "640", "--repeats", "1"]
    assert data_pipeline.main([*flags, "--model_name", "ViT-Ti/32", "--json", str(tmp_path / "x.json")]) == 0
    figures = json.loads((tmp_path / "x.json").read_text())
    assert [part["num_images"] for part in figures["sets"]] == [1, 2]
    for part in figures["sets"]:
        assert part["exact_is_equal"]
        assert part["fast_min_cosine"] > 0.99
        assert all(len(seconds) == 1 for seconds in part["seconds"].values())
    assert "ours, --fast_decode" in capsys.readouterr().out


def test_a_folder_of_ones_own(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    data_pipeline.make_photo(tmp_path / "x.jpg", 300, 200, seed=0)
    flags = ["--images", str(tmp_path), "--repeats", "1", "--model_name", "ViT-Ti/32"]
    assert data_pipeline.main(flags) == 0
    assert "1 JPEG files, the first 300x200" in capsys.readouterr().out
    assert data_pipeline.main(["--images", str(tmp_path / "gone")]) == 2
