"""The curves of a run: what they show equals what was recorded."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import pytest

from cliptune.report.curves import interpolation_figure
from cliptune.results import TrainingResults
from tests.helpers.figures import (
    bars_and_densities,
    curves,
    heads,
    legend,
    line,
    overlaps,
    title,
    vertical_bars,
    with_merged,
    with_verdict,
)
from tests.helpers.recorded import STEPS_PER_EPOCH, training_values


def test_curves_are_the_recorded_numbers() -> None:
    values = training_values()
    rsum, recall, loss, accuracy, *_ = curves(values).axes
    history = values["history"]
    for axes, label, key in (
        (loss, "training", "train_loss"),
        (loss, "validation", "val_loss"),
        (recall, "image→text, among 5,000 texts", "i2t_r1"),
        (recall, "text→image, among 1,000 images", "t2i_r1"),
        (accuracy, "training, in batches of 32", "train_accuracy"),
        (rsum, "validation", "rsum"),
    ):
        known = [record for record in history if record[key] is not None]
        assert line(axes, label) == ([record["epoch"] for record in known], [record[key] for record in known])
    assert line(rsum, "best epoch: 2, RSum 63.0") == ([2], [history[2]["rsum"]])
    assert set(line(rsum, "as loaded: RSum 21.0")[1]) == {21.0}


def test_the_star_is_on_what_the_best_epoch_was_chosen_by_and_nowhere_else() -> None:
    for axes in curves(training_values()).axes:
        stars = [each for each in axes.get_lines() if each.get_marker() == "*"]
        assert len(stars) == (axes.get_title(loc="left") == "RSum")


def test_evaluations_on_earlier_data_are_on_no_curve_of_validation() -> None:
    values = training_values()
    values["history"][1]["earlier_data"] = True
    rsum, _, loss, *_ = curves(values).axes
    assert 1 not in line(rsum, "validation")[0]
    assert 1 not in line(loss, "validation")[0]
    assert 1 in line(loss, "training, in batches of 32")[0]


def test_where_captions_are_classes_the_merged_numbers_are_drawn() -> None:
    values = with_merged(training_values())
    rsum, recall, *_ = curves(values).axes
    assert heads(rsum).startswith("RSum, duplicates merged: ")
    assert line(rsum, "best epoch: 2, RSum 69.0") == ([2], [69.0])
    assert line(rsum, "as loaded")[1][0] == 27.0
    assert line(recall, "image→text")[1] == [record["i2t_r1"] + 1 for record in values["history"]]
    assert "chance 1.5%" in heads(recall)


def test_intervals_are_bars_from_the_model_as_loaded() -> None:
    values = with_verdict(training_values())
    loaded = values["baseline"]
    rsum, recall, *_ = curves(values).axes
    low, high = loaded["rsum"] + 30, loaded["rsum"] + 90
    assert vertical_bars(rsum, "95% interval") == [(epoch, low, high) for epoch in (1, 2, 3)]
    ends = max(loaded["i2t_r1"] - 4, 0), loaded["i2t_r1"] + 15
    assert [each.get_segments()[0][:, 1].tolist() for each in recall.collections] == [  # type: ignore[attr-defined]
        list(ends), [loaded["t2i_r1"] + 4, loaded["t2i_r1"] + 15],
    ]  # fmt: skip
    assert "Better than before: RSum +60.0 (+30.0 to +90.0) on 1,000 validation images" in title(curves(values))


def test_many_intervals_are_an_area() -> None:
    rsum = curves(with_verdict(training_values(60, 2))).axes[0]
    assert not [each for each in rsum.collections if hasattr(each, "get_segments")]
    assert len(rsum.collections) == 1


def test_rates_are_drawn_by_step() -> None:
    """One epoch has as many points as steps, not two."""
    for epochs in (1, 3):
        values = training_values(epochs, 1)
        axes = curves(values).axes[4]
        steps, projection, backbone = (list(column) for column in zip(*values["schedule"], strict=True))
        assert len(steps) == epochs * STEPS_PER_EPOCH + 1
        at = [step / STEPS_PER_EPOCH for step in steps]
        assert line(axes, "projection") == (pytest.approx(at), projection)
        assert line(axes, "backbone") == (pytest.approx(at), backbone)


@pytest.mark.slow
def test_rates_of_a_stopped_run_end_where_it_ended() -> None:
    values = training_values(10, 2)
    values["history"] = values["history"][:4]
    epochs, rates = line(curves(values).axes[4], "projection")
    assert epochs[-1] == 3
    assert rates[-1] > 0


def test_the_zero_at_the_end_is_shown_and_is_no_early_drop() -> None:
    axes = curves(training_values()).axes[4]
    for drawn in (each for each in axes.get_lines() if each.get_label() in {"projection layers", "backbone"}):
        x, y = drawn.get_xydata().T  # type: ignore[union-attr]
        assert (x[-1], y[-1]) == (3, 0)
        shown = axes.transAxes.inverted().transform(axes.transData.transform(drawn.get_xydata()))
        assert shown[:, 1] == pytest.approx(np.clip(shown[:, 1], 0, 1))  # all in sight, the 0 on the axis
        assert shown[-1, 1] == pytest.approx(0)
        assert drawn.get_drawstyle() == "steps-post"  # the last rate holds until the last step ends


def test_a_file_without_a_schedule_shows_the_epochs_rates() -> None:
    values = training_values()
    del values["schedule"]
    recorded = [record["learning_rate"] for record in values["history"]]
    assert line(curves(values).axes[4], "projection") == ([0, 1, 2, 3], recorded)


def test_rates_of_one_kind_are_on_a_linear_scale() -> None:
    equal, frozen = training_values(), training_values()
    for point in equal["schedule"]:
        point[2] = point[1]
    for point in frozen["schedule"]:
        point[2] = 0.0
    axes = curves(equal).axes[4]
    assert axes.get_yscale() == "linear"
    assert line(axes, "projection layers and backbone")[1] == [point[1] for point in equal["schedule"]]
    axes = curves(frozen).axes[4]
    assert (axes.get_yscale(), len(axes.get_lines())) == ("linear", 2)  # and the best epoch
    assert curves(training_values()).axes[4].get_yscale() == "symlog"


def lossy(values: dict[str, Any]) -> dict[str, Any]:
    """Losses of up to 6 nats: a chance of ln 32 is among them."""
    for record in values["history"]:
        record["train_loss"] = record["train_loss"] and 2 * record["train_loss"]
        record["val_loss"] *= 2
    return values


def test_chance_of_a_validation_set_smaller_than_a_batch_is_its_own() -> None:
    values = lossy(training_values())
    values["config"]["training"]["batch_size"] = 18
    values["chance"]["val_loss"] = math.log(6)
    loss = curves(values).axes[2]
    assert set(line(loss, "chance, training")[1]) == {math.log(18)}
    assert set(line(loss, "chance, validation")[1]) == {math.log(6)}
    assert heads(loss) == "Contrastive loss: nats · chance training ln 18 = 2.89, validation ln 6 = 1.79"
    del values["chance"]["val_loss"]  # a file of before it was recorded
    values["num_images"] = 6
    assert heads(curves(values).axes[2]) == heads(loss)


def test_equal_chances_are_one_line() -> None:
    figure = curves(lossy(training_values()))
    _, recall, loss, *_ = figure.axes
    assert set(line(loss, "chance")[1]) == {math.log(32)}
    assert set(line(recall, "chance")[1]) == {0.5}
    assert heads(loss) == "Contrastive loss: nats · chance ln 32 = 3.47"
    assert heads(recall) == "R@1 on validation: percent of queries · chance 0.5%"
    assert legend(figure).count("chance") == 1


def test_chance_far_from_the_curves_does_not_flatten_them() -> None:
    values = training_values()
    for number, record in enumerate(values["history"]):
        record |= {"rsum": 500.0 + number, "val_loss": 0.1, "train_loss": 0.1}
    values["baseline"]["rsum"] = 500.0
    rsum, _, loss, *_ = curves(values).axes
    assert rsum.get_ylim()[0] > 490
    assert "chance 3 ↓" in heads(rsum)
    assert "chance ln 32 = 3.47 ↑" in heads(loss)
    values["chance"]["rsum"] = 500.5
    assert set(line(curves(values).axes[0], "chance")[1]) == {500.5}


def test_an_interval_ends_where_the_metric_does() -> None:
    values = with_verdict(training_values())
    for gain in values["gains"]:
        gain |= {key: [0.0, -900.0, 900.0] for key in ("i2t_r1", "t2i_r1", "rsum")}
    rsum, recall, *_ = curves(values).axes
    assert vertical_bars(rsum, "95%")[0][1:] == (0, 600)
    assert {tuple(segment[:, 1]) for bars in recall.collections for segment in bars.get_segments()} == {(0, 100)}  # type: ignore[attr-defined]


def test_chance_levels_that_read_alike_are_one() -> None:
    values = training_values()
    values["chance"] |= {"i2t_r1": 16.66, "t2i_r1": 16.67}
    recall = curves(values).axes[1]
    assert "chance 16.7%" in heads(recall)
    assert set(line(recall, "chance")[1]) == {16.66}


def test_chance_of_both_directions_is_shown() -> None:
    values = training_values()
    values["chance"] |= {"i2t_r1": 0.25, "t2i_r1": 100.0}
    recall = curves(values).axes[1]
    assert set(line(recall, "chance, image→text")[1]) == {0.25}
    assert set(line(recall, "chance, text→image")[1]) == {100.0}
    assert "chance 0.25% image→text, 100% text→image" in heads(recall)
    assert recall.get_ylim()[1] > 100


def test_epochs_are_whole_numbers_on_the_axis() -> None:
    for epochs, ticks in ((0, [0]), (1, [0, 1]), (3, [0, 1, 2, 3])):
        for axes in curves(training_values(epochs, 0)).axes[:5]:
            low, high = axes.get_xlim()
            assert [tick for tick in axes.get_xticks() if low <= tick <= high] == ticks


def test_parts_of_an_epoch_are_on_the_axis_where_there_are_few_epochs() -> None:
    values = training_values(1, 1)
    values["history"].insert(1, values["history"][1] | {"epoch": 0.5, "step": 5})
    figure = curves(values)
    assert line(figure.axes[0], "validation")[0] == [0, 0.5, 1]
    assert [tick for tick in figure.axes[0].get_xticks() if tick % 1]


@pytest.mark.parametrize("epochs", [0, 3])
def test_highest_accuracy_is_below_the_edge(epochs: int) -> None:
    axes = curves(training_values(epochs, 0)).axes[1]
    highest = max(line(axes, "image→text")[1] + line(axes, "text→image")[1])
    assert axes.get_ylim()[1] >= 1.03 * highest


@pytest.mark.slow
def test_titles_say_when_no_epoch_was_better() -> None:
    for draw in (curves, bars_and_densities):
        assert "no epoch beat the model as loaded" in title(draw(training_values(best=0)))
        assert "epoch 2 is the best" in title(draw(training_values(best=2)))
    assert title(curves(training_values(1, 1))) == "ViT-B/32, 1 epoch: epoch 1 is the best"


@pytest.mark.slow
def test_titles_name_the_model_that_was_trained_as_it_is() -> None:
    values = training_values()
    values["run"]["model_name"] = "my $x_1$\nmodel"  # no formula, no second line
    for draw in (curves, bars_and_densities):
        assert title(draw(values)).startswith(r"my $x_1$\nmodel")
        draw(values).canvas.draw()


@pytest.mark.slow
@pytest.mark.parametrize(("epochs", "num_images"), [(0, 1), (1, 300_000), (3, 60), (200, 300_000)])
def test_no_text_lies_on_another(epochs: int, num_images: int) -> None:
    values = with_verdict(training_values(epochs, epochs // 2))
    values |= {"num_images": num_images, "num_texts": 5 * num_images}
    values["verdict"]["num_images"] = num_images
    assert overlaps(curves(values)) == []


@pytest.mark.slow
def test_many_watched_sets_leave_room_for_each_other() -> None:
    values = training_values()
    for record in values["history"]:
        record["watched"] = {f"set {index} {'m' * 90}": {"rsum": 60.0 + index, "num_images": 5} for index in range(30)}
    figure = curves(values)
    assert overlaps(figure) == []
    assert [label for label in legend(figure) if label.startswith("watched")][-1] == "watched: 23 more"


def test_interpolation_is_the_recorded_numbers() -> None:
    values = training_values()
    points = [{"alpha": alpha, "rsum": 20 + alpha, "watched": {"old": 50 - alpha}} for alpha in (0.0, 0.5, 1.0)]
    values["interpolation"] = {"points": points, "chosen": 0.5, "max_loss": 1.0}
    results = TrainingResults.model_validate(values)
    assert results.interpolation is not None
    figure = interpolation_figure(results, results.interpolation)
    gained, watched = figure.axes
    assert line(gained, "validation") == ([0, 0.5, 1], [20, 20.5, 21])
    assert line(watched, "watched: old") == ([0, 0.5, 1], [0, -0.5, -1])
    assert set(line(watched, "may be lost: -6")[1]) == {-6}
    assert legend(figure).count("chosen: 0.5") == 1
    assert overlaps(figure) == []
