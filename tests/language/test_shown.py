"""Whatever is shown to a person can be said in Chinese, and no catalogue holds what is shown nowhere.

What stages print is looked at wherever a test runs one: see `tests/conftest.py`.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from functools import cache
from itertools import product
from pathlib import Path
from string import Formatter
from typing import Any

import pytest
from matplotlib.figure import Figure
from matplotlib.text import Text

from cliptune.language.catalogue import language_of
from cliptune.recorded import Verdict, WallTime
from cliptune.report.bars import comparison_figure, evaluation_metrics_figure
from cliptune.report.curves import interpolation_figure
from cliptune.report.page import write_report
from cliptune.report.style import CJK_FONTS, say_figure
from cliptune.results import EvaluationResults, SeveralEvaluations, TrainingResults
from cliptune.runtime.messages import count
from cliptune.search.gallery import render
from tests.helpers.figures import bars_and_densities, curves, with_merged, with_verdict
from tests.helpers.recorded import evaluation_values, metrics, training_values
from tests.helpers.reports import make_run
from tests.helpers.texts import Texts, english

ROOT = Path(__file__).parent.parent.parent
ZH = language_of("zh")
OURS = ("words", "summary", "figures", "report", "search")
WIDEST = 4
"""Words of a part of a key from which on it must stand in the sources as it is; shorter ones may be put together."""


def left_in_english(page: str) -> list[str]:
    return [left for text in Texts(page).found for left in english(text)]


def changed(results: Path, **values: Any) -> Path:
    results.write_text(json.dumps(json.loads(results.read_text()) | values))
    return results


def reports(folder: Path) -> Iterator[str]:
    """Yield pages in Chinese, of runs that show and lack different things."""

    def written(**options: Any) -> str:
        return write_report(results, language="zh", **options).read_text(encoding="utf-8")

    results = make_run(folder / "whole", num_images=16)
    recorded = with_verdict(json.loads(results.read_text()))
    recorded["history"][1]["watched"] = {"my set": {"rsum": 100.0, "num_images": 4}}
    wall_time = {"start": 1, "data": 2, "step": 130, "validation": 4, "saving": 5, "rest": 6}
    changed(results, **recorded, wall_time=wall_time)
    reason = "mislabelled: scores as a caption of another image would (3.1 spreads below what is usual)"
    results.with_name("suspects.csv").write_text(f"image,caption,reason,keep\na.png,one two three,{reason},no\n")
    yield written()
    for path in (folder / "whole" / "data").glob("*1*.png"):
        path.write_bytes(b"x")
    yield written()
    yield written(images=False)
    results.with_name("retrieval.npz").unlink()
    changed(results, run=None, verdict=None, no_verdict="the folds' images are of one group")
    yield written()
    results = changed(make_run(folder / "loaded", num_images=4, best=0), finished_at=None)
    yield written()
    results = make_run(folder / "merged", num_images=4)
    recorded = with_merged(json.loads(results.read_text()))
    recorded["history"][1]["earlier_data"] = True
    changed(results, **recorded, test=None)
    yield written()


@pytest.mark.slow
def test_nothing_of_the_report_is_left_in_english(tmp_path: Path) -> None:
    pages = list(reports(tmp_path))
    assert len(pages) == 6
    assert [left for page in pages for left in left_in_english(page)] == []
    assert all('<html lang="zh-CN">' in page for page in pages)
    assert "标错的图文对" in pages[0]
    assert "my set" in pages[0]


def test_nothing_of_the_search_page_is_left_in_english() -> None:
    note = (
        "approximate: looks into 8 of 100 lists and finds of the best 10 99.1% for texts, 98.7% for images (500 of "
        "each tried)"
    )
    values: dict[str, Any] = {"top": 10, "max_top": 40, "max_query": 100, "note": note, "title": "my images"}
    page = render("page.html", language="zh", images=count(4, "image"), **values)
    assert left_in_english(page) == []
    assert "{0}" in page  # the script fills them in
    card = {"name": "a b c.png", "score": 0.1, "picture": None}
    answers = [{"query": "a red heart here", "picture": None, "num_matches": 5, "cards": [card]}]
    for num_images, num_answers in product((1, 3000), (1, 3)):
        values = {"answers": answers, "num_answers": num_answers, "num_images": num_images}
        page = render("gallery.html", language="zh", folder="my images", heading=ZH.say("Search"), **values)
        assert left_in_english(page) == []
        assert "a red heart here" in page


def figures() -> Iterator[Figure]:
    """Yield figures of all kinds, of runs that draw and name different things."""
    watched = with_verdict(training_values(3, 2))
    watched["history"][1]["watched"] = {f"set {i}": {"rsum": 50.0, "num_images": 4} for i in range(12)}
    sigmoid = training_values(1, 1)
    sigmoid["config"]["training"]["loss"] = "siglip"
    sigmoid["chance"]["t2i_r1"] = 1.5
    small = training_values(2, 1) | {"num_images": 6, "num_texts": 6, "schedule": []}
    small["chance"]["val_loss"] = 1.79
    for values in (watched, sigmoid, small, training_values(0, 0), with_merged(training_values(3, 2))):
        yield curves(values)
        yield bars_and_densities(values)
    evaluation = evaluation_values()
    yield evaluation_metrics_figure(EvaluationResults.model_validate(evaluation))
    several = {"evaluations": [evaluation, {**evaluation, "checkpoint": "my model.pth"}], "comparisons": []}
    yield comparison_figure(SeveralEvaluations.model_validate({**several, "started_at": "", "finished_at": ""}))
    for kinds in ({"watched": {"my set": 50.0}}, {"text_overlap": 90.0, "image_overlap": 80.0}):
        points = [{"alpha": alpha, **metrics(2.0), **kinds} for alpha in (0.0, 0.5, 1.0)]
        values = training_values() | {"interpolation": {"points": points, "chosen": 0.5, "max_loss": 1.0}}
        results = TrainingResults.model_validate(values)
        assert results.interpolation is not None
        yield interpolation_figure(results, results.interpolation)


@pytest.mark.slow
def test_nothing_of_a_figure_is_left_in_english(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("cliptune.report.style._fonts_for", lambda _: (set(), ["DejaVu Sans"]))  # any font will do
    for figure in figures():
        say_figure(figure, ZH)
        texts = [text.get_text() for text in figure.findobj(Text) if isinstance(text, Text)]
        shown = " | ".join(text for text in texts if not text.startswith("$"))
        assert english(shown) == []
        assert re.search("[\u4e00-\u9fff]", shown)


@pytest.mark.slow
def test_without_a_font_for_them_labels_stay_english_and_that_is_said_once(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr("cliptune.report.style.CJK_FONTS", ())
    for _ in range(2):
        figure = curves(training_values(3, 2))
        say_figure(figure, ZH)
        assert "epoch 2 is the best" in figure.get_suptitle()
        assert figure.axes[0].get_xlabel() == "epoch"
    assert CJK_FONTS[0] == "Noto Sans CJK SC"
    assert len([line for line in caplog.messages if "labelled in English" in line and CJK_FONTS[0] in line]) <= 1


VERDICT = {"rsum": [60.0, 30.0, 90.0], "recalls": {}, "epoch": 2.5, "num_groups": 9}


@pytest.mark.parametrize("verdict", ["better", "not distinguishable", "worse"])
def test_every_verdict_is_said(verdict: str) -> None:
    for split, evaluations, merged, earlier in product(("val", "test", "folds"), (1, 3), (False, True), (0, 2)):
        how = {"split": split, "num_evaluations": evaluations, "merged": merged, "num_earlier": earlier}
        sentence = Verdict.model_validate(
            {**VERDICT, **how, "verdict": verdict, "num_images": 1 if merged else 40}
        ).sentence()
        said = ZH.say(sentence)
        assert english(said, num_words=2) == [], sentence
        assert {"+60.0", "+30.0", "+90.0", "2.50"} <= set(re.findall(r"\+?\d+\.\d+", said))


def test_where_the_time_went_is_said() -> None:
    said = ZH.say(WallTime(start=1, step=90).sentence())
    assert said == "总用时：0:01:31（启动 1%，数据 0%，训练步 99%，验证 0%，保存 0%，其余 0%）"


@cache
def code() -> str:
    """The sources of the package and the stages, with texts of several lines in one."""
    paths = [*ROOT.glob("*.py"), *ROOT.glob("cliptune/**/*.py")]
    return re.sub(r'"\s*\n\s*f?"', "", "\n".join(path.read_text(encoding="utf-8") for path in paths))


def sources() -> str:
    """All that is written in the sources, in small letters, and what stands between the tags of pages."""
    found = [code()]
    for path in ROOT.glob("cliptune/*/pages/*"):
        page = re.sub(r"\{[%{].*?[%}]\}", lambda each: " " + " ".join(re.findall('"[^"]*"', each[0])), path.read_text())
        found.append(re.sub(r"<[a-z/!][^>]*>", lambda each: "\n" + "\n".join(re.findall('"[^"]*"', each[0])), page))
    return "\n".join(" ".join(line.split()) for text in found for line in text.split("\n")).lower()


def nouns() -> Iterator[tuple[str, str]]:
    """Singular and plural of whatever `count` is called with."""
    for singular, plural in re.findall(r"""\bcount\([^"'\n]*, ["']([^"'\n]+)["'](?:, ["']([^"'\n]+)["'])?\)""", code()):
        yield singular, plural or f"{singular}s"


def test_every_noun_that_is_counted_has_its_measure_word() -> None:
    found = set(nouns())
    assert len(found) > 30
    missing = [noun for pair in found for number, noun in zip((1, 2), pair, strict=True)
               if not re.search("[\u4e00-\u9fff]", ZH.say(f"{number} {noun}"))]  # fmt: skip
    assert missing == [], "add them to cliptune/language/zh/words.json"


@pytest.mark.slow
def test_no_entry_is_of_a_text_that_is_gone() -> None:
    text = sources()
    text += text.replace("_", " ")  # kinds of findings are shown without
    words = set(re.findall(r"[\w'’@-]+", text)) | {f"{word}s" for word in re.findall(r"\w+", text)}
    folder = ROOT / "cliptune/language/zh"
    keys = [key for subject in OURS for key in json.loads((folder / f"{subject}.json").read_text(encoding="utf-8"))]
    for key in keys:
        literals = " | ".join(literal for literal, *_ in Formatter().parse(key))
        for part in re.split(r"[|,:;.()·“”→]+\s*", literals.lower()):
            own = re.findall(r"[\w'’@-]+", part)
            assert words.issuperset(own), f"{key!r}: nothing says {part!r}"
            assert len(own) < WIDEST or part.strip() in text, f"{key!r}: nothing says {part!r}"
