"""What is said of a run's epochs, by recorded numbers: when it is said, and that it is taken back."""

import math
from collections.abc import Sequence
from typing import Any

import pytest

from cliptune.training.review import Review

LN32 = math.log(32)
CHANCE = {"i2t_r1": 2.0, "i2t_r5": 10.0, "i2t_r10": 20.0, "t2i_r1": 2.0, "t2i_r5": 10.0, "t2i_r10": 20.0, "rsum": 64.0}
CHANCE["val_loss"] = LN32


def history(*epochs: tuple[float, float, float, float]) -> list[dict[str, Any]]:
    """Records of training loss, validation loss, RSum, and the cosine of two images and of two texts."""
    return [
        {
            "epoch": epoch, "step": 10 * epoch, "train_loss": train_loss if epoch else None, "val_loss": val_loss,
            "rsum": rsum, "image_cosine": cosine, "text_cosine": 0.5,
        }
        for epoch, (train_loss, val_loss, rsum, cosine) in enumerate(epochs)
    ]  # fmt: skip


def told(records: Sequence[dict[str, Any]], *, resumed_after: int = 0, **changes: Any) -> dict[int, list[str]]:
    """What is said at which epoch."""
    options: dict[str, Any] = {"warmup_steps": 0, "train_chance": LN32, "is_pretrained": False, **changes}
    past = records[:resumed_after]
    review = Review(**options, past=past, chance=CHANCE, num_images=100)
    said = {
        records[end - 1]["epoch"]: review.news(records[:end], chance=CHANCE, num_images=100)
        for end in range(resumed_after + 1, len(records) + 1)
    }
    return {epoch: lines for epoch, lines in said.items() if lines}


START = (0.0, 3.47, 64.0, 0.6)
COLLAPSED = (3.40, 3.46, 63.0, 0.995)
LEARNING = (3.0, 3.2, 200.0, 0.4)


def test_features_that_are_alike_for_one_epoch_are_not_spoken_of() -> None:
    assert told(history(START, COLLAPSED, LEARNING, LEARNING)) == {}


def test_a_collapse_that_lasts_is_said_with_its_epoch_and_taken_back_when_the_run_recovers() -> None:
    said = told(history(START, COLLAPSED, COLLAPSED, COLLAPSED, LEARNING, LEARNING))
    assert said.keys() == {2, 4}
    (line,) = said[2]
    assert line.startswith("epoch 2: the image features are all alike")
    assert "collapsed" in line
    assert said[4] == ["recovered at epoch 4: the features are told apart again; what was said of epoch 2 has passed"]


def test_features_that_began_all_the_same_are_said_once_they_stay_so() -> None:
    same = (3.47, 3.47, 63.0, 1.0)
    said = told(history(same, same, same, same))
    assert said.keys() == {2}
    assert "were the same before the first step" in said[2][0]
    assert told(history(same, same, LEARNING, LEARNING)) == {}


def test_a_collapse_that_comes_again_is_said_again() -> None:
    records = history(START, COLLAPSED, COLLAPSED, LEARNING, COLLAPSED, COLLAPSED)
    assert [epoch for epoch in told(records) if epoch] == [2, 3, 5]


def test_a_resumed_run_says_nothing_again_and_still_takes_back() -> None:
    records = history(START, COLLAPSED, COLLAPSED, COLLAPSED, LEARNING)
    whole = told(records)
    for done in range(1, len(records)):
        assert told(records, resumed_after=done) == {epoch: lines for epoch, lines in whole.items() if epoch >= done}


def test_a_loss_that_leaves_chance_late_takes_its_warning_back() -> None:
    stuck = (3.46, 3.46, 64.0, 0.6)
    said = told(history(START, stuck, stuck, LEARNING))
    assert said.keys() == {2, 3}
    assert "nothing is learned" in said[2][0]
    assert said[3] == ["recovered at epoch 3: the training loss has left chance; what was said of epoch 2 has passed"]
    # while the rates still rise, a loss at chance is no news
    assert told(history(START, stuck, stuck, LEARNING), warmup_steps=25) == {}


def test_one_lucky_epoch_takes_nothing_back() -> None:
    by_heart = (2.0, 3.47, 64.0, 0.6)
    lucky, risen = (2.0, 3.47, 130.0, 0.6), (2.0, 3.2, 200.0, 0.6)
    said = told(history(START, by_heart, by_heart, lucky, by_heart))
    assert said.keys() == {2}
    assert "nothing of it carries over" in said[2][0]
    said = told(history(START, by_heart, by_heart, risen, risen))
    assert said.keys() == {2, 4}
    assert "the validation has left chance" in said[4][0]


@pytest.mark.parametrize(
    ("epochs", "at"),
    [
        # retrieval rises while the loss goes up
        ([(2.5, 2.9, 150.0, 0.5), (1.5, 3.3, 190.0, 0.4), (0.6, 4.6, 210.0, 0.4), (0.2, 6.0, 215.0, 0.4)], 3),
        # it falls: that is overfitting, and no epoch of it is chosen
        ([(2.5, 2.9, 150.0, 0.5), (0.6, 4.6, 120.0, 0.4), (0.2, 6.0, 110.0, 0.4)], None),
        # at chance there is nothing to go by
        ([(2.5, 3.5, 64.0, 0.5), (2.0, 4.6, 66.0, 0.4)], None),
        # a little above chance
        ([(2.5, 2.9, 150.0, 0.5), (0.6, 3.7, 210.0, 0.4)], None),
    ],
)
def test_an_overfitted_temperature_is_explained_once(
    epochs: list[tuple[float, float, float, float]], at: int | None
) -> None:
    said = told(history(START, *epochs))
    lines = [line for each in said.values() for line in each if "temperature" in line]
    assert len(lines) == (at is not None)
    if at is not None:
        assert said[at] == lines
        assert lines[0].startswith(f"epoch {at}: the validation loss (4.600) is far above chance (3.466)")
        assert "210.0; it was 150.0 at epoch 1" in lines[0]


def test_a_pretrained_model_at_chance_is_said_before_the_first_step() -> None:
    said = told(history(START), is_pretrained=True)
    assert said[0][0].startswith("epoch 0: the pretrained model finds no more than chance")
    assert told(history((0.0, 3.0, 300.0, 0.5)), is_pretrained=True) == {}
