"""Texts of figures: letters that no font has, names of any length."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from matplotlib import font_manager

from cliptune.report import style
from cliptune.report.bars import evaluation_metrics_figure
from cliptune.results import EvaluationResults
from tests.helpers.figures import bars_and_densities, curves, overlaps, title
from tests.helpers.recorded import evaluation_values, training_values
from visualization import draw_figures


def write(folder: Path, results: Any) -> Path:
    path = folder / "results.json"
    path.write_text(json.dumps(results), encoding="utf-8")
    return path


@pytest.mark.slow
def test_letters_that_no_font_has_are_escaped(
    tmp_path: Path, recwarn: pytest.WarningsRecorder, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A box for each letter says nothing, and matplotlib warns of each."""
    monkeypatch.setattr(style, "CJK_FONTS", ())
    values = evaluation_values()
    values["run"]["model_name"] = "模型 \U0001f600\U00020000 é $x_1$"
    drawn = title(evaluation_metrics_figure(EvaluationResults.model_validate(values)))
    assert drawn.startswith(r"\u6a21\u578b")
    assert r"\U00020000 é $x_1$, checkpoint best.pt" in drawn
    draw_figures(write(tmp_path, values))
    assert not [each for each in recwarn if "Glyph" in str(each.message)]


@pytest.mark.slow
def test_letters_of_another_font_are_drawn_with_it(
    tmp_path: Path, recwarn: pytest.WarningsRecorder, monkeypatch: pytest.MonkeyPatch
) -> None:
    paths = {font.name: font.fname for font in font_manager.fontManager.ttflist}
    letters = {
        name: set(font_manager.get_font(paths[name]).get_charmap()) for name in ("DejaVu Sans", "STIXNonUnicode")
    }
    letter = chr(max(letters["STIXNonUnicode"] - letters["DejaVu Sans"]))  # stands for a Chinese one
    monkeypatch.setattr(style, "CJK_FONTS", ("No Such Font", "STIXNonUnicode"))
    monkeypatch.setattr("cliptune.report.bars.shown", lambda text, _: text)
    values = training_values()
    values["run"]["model_name"] = letter
    assert title(bars_and_densities(values)).startswith(f"{letter}: ")
    draw_figures(write(tmp_path, values))
    assert not [each for each in recwarn if "Glyph" in str(each.message)]


@pytest.mark.parametrize("name", ["\x1b[31m\r\n\u202e\u2066\u2028\x9b", "M" * 1_000_000, "模" * 10_000])
def test_names_of_a_file_are_short_printable_and_one_line(name: str) -> None:
    values = training_values()
    values["run"]["model_name"] = name
    for figure in (curves(values), bars_and_densities(values)):
        assert title(figure).isprintable()
        assert len(title(figure)) < 1500
    values = evaluation_values()
    values |= {"checkpoint": name, "data": name, "split": name}
    drawn = title(evaluation_metrics_figure(EvaluationResults.model_validate(values)))
    assert drawn.isprintable()
    assert len(drawn) < 1500


@pytest.mark.slow
@pytest.mark.parametrize("name", ["M" * 200, "ViT-B/32"])
def test_a_long_title_is_smaller_and_stays_in_the_figure(name: str) -> None:
    values = training_values()
    values["run"]["model_name"] = name
    assert overlaps(curves(values)) == overlaps(bars_and_densities(values)) == []
