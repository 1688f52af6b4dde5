"""The page of a run: whole, in order, escaped, small, and true to what was recorded."""

from __future__ import annotations

import json
import logging
import re
import sys
from html.parser import HTMLParser
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest

import visualization
from cliptune.report import charts
from cliptune.report.page import write_report
from cliptune.results import TrainingResults
from cliptune.runs.report import leave_report
from tests.helpers.recorded import evaluation_values, training_values
from tests.helpers.reports import HOSTILE, make_run

SECTIONS = ["numbers", "curves", "time", "queries", "suspects", "similarity", "map", "data", "run"]


@pytest.fixture
def no_figures(monkeypatch: pytest.MonkeyPatch) -> None:
    """They take seconds, and are tested elsewhere."""
    monkeypatch.setattr(visualization, "draw_figures", lambda *_, **__: [])


class Page(HTMLParser):
    """Elements with their attributes, and the text that is seen."""

    def __init__(self, path: Path) -> None:
        super().__init__()
        self.elements: list[tuple[str, dict[str, str | None]]] = []
        self.text, self._hidden = "", 0
        self.feed(path.read_text(encoding="utf-8"))

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.elements.append((tag, dict(attrs)))
        self._hidden += tag in {"script", "style", "title"}
        self.text += "\n" if tag in {"p", "li", "td", "th", "dt", "dd", "h4"} else ""

    def handle_endtag(self, tag: str) -> None:
        self._hidden -= tag in {"script", "style", "title"}

    def handle_data(self, data: str) -> None:
        self.text += "" if self._hidden else data

    def all(self, tag: str, key: str) -> list[str]:
        return [str(attributes[key]) for name, attributes in self.elements if name == tag and key in attributes]


def test_sections_stand_in_their_order_and_links_reach_them(tmp_path: Path) -> None:
    results = make_run(tmp_path)
    values = json.loads(results.read_text())
    values["wall_time"] = {"start": 1, "data": 2, "step": 30, "validation": 4, "saving": 5, "rest": 6}
    results.write_text(json.dumps(values))
    page = Page(write_report(results))
    assert page.all("section", "id") == SECTIONS
    assert page.all("a", "href") == ["#numbers", *(f"#{name}" for name in SECTIONS)]
    assert "The run took 48.0 s." in page.text


def test_words_of_users_are_text(tmp_path: Path) -> None:
    page = Page(write_report(make_run(tmp_path)))
    assert [tag for tag, _ in page.elements].count("script") == 1
    assert not [key for _, attributes in page.elements for key in attributes if key.startswith("on") or key == "src"]
    for caption in HOSTILE[:4] + HOSTILE[5:]:
        assert caption in page.text
    assert HOSTILE[4] not in page.text


def test_nothing_is_loaded_from_elsewhere_and_each_image_is_there_once(tmp_path: Path) -> None:
    path = write_report(make_run(tmp_path))
    page = Page(path)
    sources = page.all("image", "href")
    assert len(sources) == len(set(sources)) == 8
    assert all(source.startswith("data:image/jpeg;base64,") for source in sources)
    uses = page.all("use", "href")
    assert len(uses) > 8
    assert set(uses) <= {f"#{name}" for name in page.all("image", "id")}
    assert {link for link in page.all("link", "href") + page.all("a", "href") if link[0] != "#"} == {"data:,"}
    assert str(tmp_path) not in path.read_text()
    (policy,) = (value for value in page.all("meta", "content") if "default-src" in value)
    assert policy.startswith("default-src 'none'; img-src data:;")
    assert "unsafe" not in policy


@pytest.mark.usefixtures("no_figures")
def test_without_images_there_is_no_image(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    results = make_run(tmp_path)
    assert visualization.main(["--results", str(results), "--report", "no-images"]) == 0
    written = results.with_name("report.html")
    assert str(written) in capsys.readouterr().out.splitlines()
    content = written.read_text()
    assert "data:image" not in content
    assert "photo 3.png" in content
    assert "written without images" in content


@pytest.mark.usefixtures("no_figures")
def test_no_report_is_written_unless_asked_for(tmp_path: Path) -> None:
    results = make_run(tmp_path)
    assert visualization.main(["--results", str(results)]) == 0
    assert leave_report(results, "none") is None
    assert not results.with_name("report.html").exists()
    assert visualization.main(["--results", str(results), "--output_dir", str(tmp_path / "new"), "--report"]) == 0
    assert "data:image" in (tmp_path / "new" / "report.html").read_text()


@pytest.mark.slow
def test_galleries_hold_what_moved_and_count_what_they_leave_out(tmp_path: Path) -> None:
    results = make_run(tmp_path, num_images=40)
    with np.load(results.with_name("retrieval.npz")) as file:
        before, after = file["t2i"][0], file["t2i"][2]
    page = Page(write_report(results))
    text = " ".join(page.text.split())
    for title, number in (
        ("Got better", (after < before).sum()),
        ("Got worse", (after > before).sum()),
        ("Still wrong", ((after > 1) & (before > 1)).sum()),
    ):
        assert f"{title} {number} of 80 captions, 12 shown" in text
    moves = re.findall(r"Rank of the right one: (\d+) → (\d+)", text)
    assert moves[0] == ("8", "1")  # the largest move first


def test_images_that_are_gone_are_named(tmp_path: Path) -> None:
    results = make_run(tmp_path)
    (tmp_path / "data" / "photo 3.png").unlink()
    (tmp_path / "data" / "photo 4.png").write_bytes(b"no image")
    page = Page(write_report(results))
    assert "2 of the images to be shown cannot be read" in page.text
    assert "photo 3.png: " in page.text
    assert str(tmp_path) not in page.text
    assert len(page.all("image", "href")) == 6


@pytest.mark.parametrize("lacking", ["file", "damaged", "another run", "captions", "answers"])
def test_what_is_not_recorded_is_said(tmp_path: Path, lacking: str) -> None:
    results = make_run(tmp_path)
    path = results.with_name("retrieval.npz")
    with np.load(path) as file:
        values = dict(file)
    if lacking == "damaged":
        path.write_bytes(path.read_bytes()[:2000])
    elif lacking == "file":
        path.unlink()
    elif lacking == "another run":
        np.savez(path, **(values | {"run_id": "b"}))
    elif lacking == "captions":
        np.savez(path, **{name: value for name, value in values.items() if not name.startswith("captions")})
    else:
        np.savez(path, **{name: each for name, each in values.items() if not name.startswith(("loaded_", "best_"))})
    said = {
        "file": "There is no retrieval.npz",
        "damaged": "retrieval.npz cannot be read",
        "another run": "another run's",
        "captions": "words are not recorded",
        "answers": "Answers are not recorded of so large",
    }
    page = Page(write_report(results))
    assert said[lacking] in page.text
    assert bool(page.all("image", "href")) is (lacking == "captions")


def test_the_verdict_stands_first_with_its_interval_and_the_model_as_loaded(tmp_path: Path) -> None:
    results = make_run(tmp_path)
    values = training_values(3, 2) | {"run_id": "a"}
    recalls = {key: [1.0, 0.5, 1.5] for key in ("i2t_r1", "i2t_r5", "i2t_r10", "t2i_r1", "t2i_r5", "t2i_r10")}
    values["verdict"] = {
        "verdict": "better", "rsum": [6.0, 2.0, 9.0], "recalls": recalls, "split": "val", "epoch": 2,
        "num_evaluations": 3, "num_images": 8, "num_groups": 8,
    }  # fmt: skip
    results.write_text(json.dumps(values))
    text = Page(write_report(results)).text
    places = [
        text.index(words) for words in ("Better than before", "+6.0 (95% interval +2.0 to +9.0)", "21.0", "Curves")
    ]
    assert places == sorted(places)


def test_a_run_whose_best_model_is_the_one_as_loaded(tmp_path: Path) -> None:
    results = make_run(tmp_path, best=0)
    text = Page(write_report(results)).text
    assert "Got better" not in text
    assert "Wrong" in text


def test_evaluations_on_earlier_data_are_marked_and_on_no_curve_of_validation(tmp_path: Path) -> None:
    results = make_run(tmp_path)
    values = json.loads(results.read_text())
    values["history"][1]["earlier_data"] = True
    results.write_text(json.dumps(values))
    assert "1 (earlier data)" in Page(write_report(results)).text
    loss, _, rsum, _ = charts.curves(TrainingResults.model_validate(values))
    read_out = next(text for _, text, _ in json.loads(loss.stops) if text.startswith("epoch 1:"))
    assert "training" in read_out
    assert "validation" not in read_out
    assert "epoch 1:" not in rsum.stops


def test_what_the_check_found_is_repeated(tmp_path: Path) -> None:
    results = make_run(tmp_path)
    found = {
        "started_at": "2026-01-01T10:00:00", "finished_at": "2026-01-01T10:00:09", "data": "./data", "num_images": 8,
        "num_texts": 16, "splits": {}, "num_issues": 1, "issues": [],
        "findings": [
            {"kind": "a", "number": None, "text": "2 images <b>twice</b>", "advice": "drop them"},
            {"kind": "b", "name": "95% half-width", "number": 40, "text": "points to either side", "advice": ""},
        ],
    }  # fmt: skip
    results.with_name("data_check.json").write_text(json.dumps(found))
    text = " ".join(Page(write_report(results)).text.split())
    assert "8 images, 16 captions, 1 issue; looked at on 2026-01-01." in text
    assert "2 images <b>twice</b> drop them" in text
    assert "95% half-width 40 points to either side" in text


def test_what_goes_wrong_is_a_warning_with_the_command(
    tmp_path: Path, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    results = make_run(tmp_path / "a folder")
    monkeypatch.setattr("cliptune.report.page.charts.curves", lambda _: 1 / 0)
    with caplog.at_level(logging.WARNING):
        assert leave_report(results, "no-images") is None
    assert f"visualization.py --report no-images --results '{results}'" in caplog.text


@pytest.mark.usefixtures("no_figures")
def test_an_evaluation_has_no_report(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = tmp_path / "evaluation_results.json"
    path.write_text(json.dumps(evaluation_values()))
    assert visualization.main(["--results", str(path), "--report"]) == 2
    assert "a report is of a training run" in capsys.readouterr().err


def test_the_map_is_by_umap_where_it_is_asked_for(
    no_figures: None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    laid_out = SimpleNamespace(fit_transform=lambda points: points[:, :2])  # UMAP's own is another test's business
    monkeypatch.setitem(sys.modules, "umap", SimpleNamespace(UMAP=lambda **_: laid_out))
    results = make_run(tmp_path, num_images=20)
    assert visualization.main(["--results", str(results), "--report", "--map", "umap"]) == 0
    assert "(UMAP)" in results.with_name("report.html").read_text(encoding="utf-8")


def test_a_map_by_umap_needs_its_package_and_a_report(
    no_figures: None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    results = make_run(tmp_path)
    assert visualization.main(["--results", str(results), "--map", "umap"]) == 2
    assert "map umap is about the report: add --report" in capsys.readouterr().err
    monkeypatch.setitem(sys.modules, "umap", None)
    assert visualization.main(["--results", str(results), "--report", "--map", "umap"]) == 2
    assert "pip install umap-learn" in capsys.readouterr().err
