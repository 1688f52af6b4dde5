"""Texts of figures: letters that no font has, names of any length."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any, Literal

import pytest
from matplotlib import font_manager

from cliptune.report import style
from cliptune.report.bars import evaluation_metrics_figure
from cliptune.report.style import drawable
from cliptune.results import EvaluationResults
from tests.helpers.figures import bars_and_densities, curves, overlaps, title
from tests.helpers.recorded import evaluation_values, training_values
from visualization import draw_figures


def write(folder: Path, results: Any) -> Path:
    path = folder / "results.json"
    path.write_text(json.dumps(results), encoding="utf-8")
    return path


def letters_of(family: str, slant: Literal["normal", "italic"] = "normal") -> set[int]:
    face = font_manager.findfont(font_manager.FontProperties(family=family, style=slant), fallback_to_default=False)
    return set(font_manager.get_font(face).get_charmap())


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
    letter = chr(max(letters_of("STIXNonUnicode") - letters_of("DejaVu Sans")))  # stands for a Chinese one
    monkeypatch.setattr(style, "CJK_FONTS", ("No Such Font", "STIXNonUnicode"))
    monkeypatch.setattr("cliptune.report.bars.shown", lambda text, _: text)
    values = training_values()
    values["run"]["model_name"] = letter
    assert title(bars_and_densities(values)).startswith(f"{letter}: ")
    draw_figures(write(tmp_path, values))
    assert not [each for each in recwarn if "Glyph" in str(each.message)]


def test_a_letter_that_only_another_face_of_a_font_has_is_escaped(monkeypatch: pytest.MonkeyPatch) -> None:
    """Whichever face stands last in matplotlib's list, whose order is the file system's."""
    letter = max(letters_of("STIXNonUnicode", "italic") - letters_of("STIXNonUnicode") - letters_of("DejaVu Sans"))
    monkeypatch.setattr(style, "CJK_FONTS", ("STIXNonUnicode",))
    monkeypatch.setattr(style, "_add_new_fonts", lambda: None)
    for turned in (False, True):
        faces = sorted(font_manager.fontManager.ttflist, key=lambda font: font.style == "italic", reverse=turned)
        monkeypatch.setattr(font_manager.fontManager, "ttflist", faces)
        assert drawable(chr(letter))[0] == ascii(chr(letter))[1:-1]


def test_a_font_that_was_installed_after_matplotlib_made_its_list_is_found_once(
    tmp_path: Path, recwarn: pytest.WarningsRecorder, monkeypatch: pytest.MonkeyPatch
) -> None:
    letter = chr(max(letters_of("STIXNonUnicode") - letters_of("DejaVu Sans")))
    installed = font_manager.findfont("STIXNonUnicode")
    looks: list[str] = []

    def find() -> list[str]:
        looks.append(installed)
        return [installed]

    listed = [font for font in font_manager.fontManager.ttflist if font.name != "STIXNonUnicode"]
    monkeypatch.setattr(font_manager.fontManager, "ttflist", listed)
    monkeypatch.setattr(font_manager, "findSystemFonts", find)
    monkeypatch.setattr(style, "_add_new_fonts", style._add_new_fonts.__wrapped__)
    monkeypatch.setattr(style, "CJK_FONTS", ("STIXNonUnicode",))
    monkeypatch.setattr("cliptune.report.bars.shown", lambda text, _: text)
    assert drawable("é") == ("é", drawable("e")[1])
    assert looks == []
    values = training_values()
    values["run"]["model_name"] = letter
    draw_figures(write(tmp_path, values))
    assert looks == [installed]
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
