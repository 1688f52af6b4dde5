"""Bars of recall and similarity distributions: what they show equals what was recorded."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from matplotlib.axes import Axes

from cliptune.report.bars import comparison_figure, evaluation_metrics_figure
from cliptune.results import RECALL_KEYS, EvaluationResults, SeveralEvaluations
from tests.helpers.figures import (
    bars_and_densities,
    heads,
    legend,
    overlaps,
    title,
    vertical_bars,
    with_merged,
    with_verdict,
)
from tests.helpers.recorded import evaluation_values, training_values


def heights(axes: Axes) -> list[float]:
    return [patch.get_height() for patch in axes.patches]  # type: ignore[attr-defined]


def test_intervals_are_bars_from_the_model_as_loaded() -> None:
    values = with_verdict(training_values())
    loaded = values["baseline"]
    bars, _ = bars_and_densities(values).axes
    found = vertical_bars(bars, "95% interval of the gain")
    assert [each[1:] for each in found] == [(loaded[key] + 4, loaded[key] + 15) for key in RECALL_KEYS]
    of_last: list[Any] = bars.patches[len(RECALL_KEYS) :]
    for patch, (place, _, _) in zip(of_last, found, strict=True):
        assert patch.get_x() < place < patch.get_x() + patch.get_width()
    sentence = "Better than before: RSum +60.0 (+30.0 to +90.0) on 1,000 validation images"
    assert sentence in title(bars_and_densities(values))


def test_where_captions_are_classes_bars_are_of_the_merged_numbers() -> None:
    values = with_merged(with_verdict(training_values()))
    bars, _ = bars_and_densities(values).axes
    assert heights(bars) == [values[group][key] + 1 for group in ("baseline", "metrics") for key in RECALL_KEYS]
    assert heads(bars).startswith("Retrieval, duplicates merged: RSum 69.0, as loaded 27.0")
    # a verdict on other numbers is not theirs
    assert not [each for each in bars.collections if str(each.get_label()).startswith("95%")]
    values["verdict"]["merged"] = True
    assert vertical_bars(bars_and_densities(values).axes[0], "95%")[0][1] == values["baseline"]["i2t_r1"] + 1 + 4


def test_a_test_split_is_what_bars_show() -> None:
    values = with_verdict(training_values())
    of_test = {key: values[key] for key in ("num_texts", "chance", "histograms", "baseline")}
    values["test"] = {**of_test, "num_images": 77, "metrics": values["history"][3]}
    values["verdict"] |= {"split": "test", "num_images": 77}
    bars, _ = bars_and_densities(values).axes
    assert "77 images" in heads(bars)
    assert heights(bars)[len(RECALL_KEYS) :] == [values["history"][3][key] for key in RECALL_KEYS]


def test_bars_and_densities_are_the_recorded_numbers() -> None:
    values = training_values()
    bars, densities = bars_and_densities(values).axes
    assert heights(bars) == [values[group][key] for group in ("baseline", "metrics") for key in RECALL_KEYS]
    written = [text.get_text() for text in bars.texts]
    assert written[: len(heights(bars))] == [f"{height:.1f}" for height in heights(bars)]
    assert heads(bars) == "Retrieval: RSum 63.0, as loaded 21.0: percent of queries · 1,000 images, 5,000 texts"
    assert heads(densities).startswith("Similarity: gap 0.030, as loaded 0.010")
    shown = [patch.get_data() for patch in densities.patches]  # type: ignore[attr-defined]
    assert len(shown) == 4
    for data in shown:
        assert (data.values * np.diff(data.edges)).sum() == pytest.approx(1.0)
    counts = np.asarray(values["histograms"]["best"]["positive"])
    counts = counts[np.flatnonzero(counts)[0] : np.flatnonzero(counts)[-1] + 1]
    assert shown[0].values == pytest.approx(counts / counts.sum() / 0.02)
    low, high = densities.get_xlim()
    assert -0.2 < low < 0.1
    assert 0.5 < high < 0.9


def test_the_model_as_loaded_is_drawn_once_where_it_is_the_best() -> None:
    bars, densities = bars_and_densities(training_values(3, 0)).axes
    assert [container.get_label() for container in bars.containers] == ["as loaded"]
    assert len(bars.patches) == len(RECALL_KEYS)
    assert len(densities.patches) == 2
    assert "as loaded" not in heads(bars) + heads(densities)


def test_one_image_has_no_unmatched_pair() -> None:
    values = training_values(3, 0)
    values |= {"num_images": 1, "num_texts": 1}
    values["histograms"]["best"] = {"bin_edges": [-1.0, 0.0, 0.5, 1.0], "positive": [0, 1, 0], "negative": [0, 0, 0]}
    bars, densities = bars_and_densities(values).axes
    assert "1 image, 1 text" in heads(bars)
    assert [list(patch.get_data().values) for patch in densities.patches] == [[2], [0, 0, 0]]  # type: ignore[attr-defined]


def test_baseline_is_drawn_on_its_own_bins() -> None:
    values = training_values()
    values["histograms"]["baseline"] = {"bin_edges": [-1.0, 0.0, 1.0], "positive": [1, 3], "negative": [2, 2]}
    data = bars_and_densities(values).axes[1].patches[1].get_data()  # type: ignore[attr-defined]
    assert list(data.edges) == [-1.0, 0.0, 1.0]
    assert list(data.values) == [0.25, 0.75]


@pytest.mark.parametrize(
    ("height", "chance", "place"), [(100, 98.5, 98.5), (100, 50, 100), (3, 4, 4), (3, 2, 3), (3, 50, 3), (9, 3, 9)]
)
def test_a_number_is_not_written_across_the_chance_level(height: float, chance: float, place: float) -> None:
    values = training_values(3, 0)
    values["baseline"] |= {"i2t_r1": float(height), "t2i_r10": 100.0}
    values["chance"]["i2t_r1"] = float(chance)
    assert bars_and_densities(values).axes[0].texts[0].xy == (0, place)  # type: ignore[attr-defined]


def test_a_gap_of_nothing_has_no_sign() -> None:
    values = training_values()
    values["metrics"]["similarity_gap"] = -1e-5
    assert heads(bars_and_densities(values).axes[1]).startswith("Similarity: gap 0.000,")


def test_evaluation_shows_one_bar_a_recall() -> None:
    values = evaluation_values()
    figure = evaluation_metrics_figure(EvaluationResults.model_validate(values))
    assert heights(figure.axes[0]) == [values["metrics"][key] for key in RECALL_KEYS]
    assert not figure.axes[0].collections or "95% interval" not in legend(figure)
    assert title(figure) == "ViT-B/32, checkpoint best.pt, data data, split test"
    values["intervals"] = {key: [values["metrics"][key] - 1, values["metrics"][key] + 2] for key in RECALL_KEYS}
    figure = evaluation_metrics_figure(EvaluationResults.model_validate(values))
    ends = [tuple(ends) for ends in values["intervals"].values()]
    assert [each[1:] for each in vertical_bars(figure.axes[0], "95% interval")] == ends
    del values["run"]
    assert title(evaluation_metrics_figure(EvaluationResults.model_validate(values))).startswith("checkpoint best.pt")


@pytest.mark.parametrize(("num_pairs", "most", "fewest"), [(40, 12, 4), (5_000, 60, 25), (3_000_000, 400, 80)])
def test_bins_suit_the_number_of_pairs(num_pairs: int, most: int, fewest: int) -> None:
    edges = np.linspace(-1, 1, 401)
    cosines = np.random.default_rng(0).normal(0.4, 0.08, num_pairs)
    values = training_values(3, 0)
    values["histograms"]["best"] = {
        "bin_edges": edges.tolist(), "positive": np.histogram(cosines, edges)[0].tolist(), "negative": [0] * 400,
    }  # fmt: skip
    data = bars_and_densities(values).axes[1].patches[0].get_data()  # type: ignore[attr-defined]
    assert fewest <= len(data.values) <= most
    assert (data.values * np.diff(data.edges)).sum() == pytest.approx(1.0)  # no pair is lost
    middles = (data.edges[1:] + data.edges[:-1]) / 2
    assert np.average(middles, weights=data.values) == pytest.approx(cosines.mean(), abs=0.02)


@pytest.mark.slow
@pytest.mark.parametrize(("num_images", "best"), [(1, 0), (60, 2), (300_000, 2)])
def test_no_text_lies_on_another(num_images: int, best: int) -> None:
    values = with_verdict(training_values(3, best))
    values |= {"num_images": num_images, "num_texts": 5 * num_images}
    for size in (100 / 18, 0.01):  # of the largest recall: up to 100%, and next to nothing
        for each in (values["metrics"], values["baseline"]):
            each |= {key: (index + 1) * 3 * size for index, key in enumerate(RECALL_KEYS)}
        assert overlaps(bars_and_densities(values)) == []


def test_several_checkpoints_are_rows_of_a_panel_for_each_data_set() -> None:
    each = [
        evaluation_values()
        | {"checkpoint": f"{'folder/' * 20}{name}.pth", "data": data, "intervals": {"rsum": [50, 70]}}
        for name in ("a", "b") for data in ("one", "two")
    ]  # fmt: skip
    figure = comparison_figure(SeveralEvaluations.model_validate({"evaluations": each}))
    assert [axes.get_title(loc="left") for axes in figure.axes] == ["one (test)", "two (test)"]
    assert [text.get_text()[-5:] for text in figure.axes[0].get_yticklabels()] == ["b.pth", "a.pth"]
    assert overlaps(figure) == []
