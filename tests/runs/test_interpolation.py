"""Between the model as loaded and the best one: the averages, the choice among them, what is left of it on disk."""

import json
import math
import os
import signal
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch

from clip_model import CLIPModel
from cliptune.data.sample_data import create_sample_dataset
from cliptune.model.checkpoint_file import load_checkpoint
from cliptune.runs.interpolation import ALPHAS, Ends, Point, choose, estimated_gain
from cliptune.runs.watch import Found, Seen
from cliptune.training.checkpoint import RunFiles
from evaluation import main as evaluate_main
from tests.helpers.launch import run_ranks
from tests.helpers.runs import SMALL, assert_same, small_runs
from train import main
from visualization import draw_figures


@pytest.fixture(scope="module")
def flags(sample_dir: Path, tmp_path_factory: pytest.TempPathFactory) -> list[str]:
    watched = tmp_path_factory.mktemp("watched")
    create_sample_dataset(watched, 10, seed=7)
    data = ["--data_dir", str(sample_dir), "--watch_data", str(watched), "--precision", "fp32"]
    return [*SMALL, *data, "--num_epochs", "2", "--interpolate"]


@pytest.fixture(scope="module")
def files(flags: list[str], tmp_path_factory: pytest.TempPathFactory) -> RunFiles:
    """Of a run that was interpolated."""
    folder = tmp_path_factory.mktemp("interpolated")
    with small_runs():
        assert main([*flags, "--output_dir", str(folder)]) == 0
    return RunFiles(folder)


@pytest.fixture(scope="module")
def ends(files: RunFiles) -> Ends:
    return Ends(files, model_class=CLIPModel, device=torch.device("cpu"))


def results_of(files: RunFiles) -> Any:
    return json.loads(files.results.read_text())


@pytest.mark.slow
def test_the_ends_are_the_two_models_bit_for_bit(files: RunFiles, ends: Ends) -> None:
    for alpha, path in ((0.0, files.loaded), (1.0, files.best), (0.0, files.loaded)):
        ends.model_at(0.5)  # what was looked at before leaves nothing
        assert_same(dict(ends.model_at(alpha).state_dict()), dict(load_checkpoint(path)["model_state_dict"]), path.name)


@pytest.mark.slow
def test_between_them_weights_are_averaged_in_float32(ends: Ends) -> None:
    mixed = ends.weights(0.3)
    assert mixed.keys() == ends.best.keys()
    for name, value in mixed.items():
        if value.is_floating_point():
            wanted = 0.7 * ends.loaded[name].double() + 0.3 * ends.best[name].double()
            torch.testing.assert_close(value.double(), wanted, rtol=1e-5, atol=1e-7)
        else:
            assert torch.equal(value, ends.best[name])


@pytest.mark.slow
def test_what_was_not_trained_is_not_changed_by_averaging(ends: Ends) -> None:
    before, weights = ends.loaded, torch.randn(1000)
    ends.loaded = {**before, "logit_scale": weights}
    best, ends.best = ends.best, {**ends.best, "logit_scale": weights.clone()}
    try:
        assert all(torch.equal(ends.weights(alpha)["logit_scale"], weights) for alpha in ALPHAS)
    finally:
        ends.loaded, ends.best = before, best


def point(alpha: float, rsum: float, **watched: float) -> Point:
    def evaluation(value: float) -> Found:
        ranks = {"i2t": np.ones(4), "t2i": np.ones(4)}
        return Found({}, {"rsum": value}, {}, 4, 4, ranks)

    return Point(alpha, evaluation(rsum), Seen({name: evaluation(value) for name, value in watched.items()}, None))


def test_the_best_is_chosen_that_loses_at_most_a_point_on_each_watched_set() -> None:
    points = [
        point(0.0, 300, a=400, b=100), point(0.3, 320, a=395, b=105), point(0.5, 340, a=394, b=100),
        point(0.7, 350, a=410, b=93.9), point(1.0, 360, a=300, b=120),
    ]  # fmt: skip
    chosen, allowed = choose(points)
    assert chosen.alpha == 0.5  # 6 of RSum are one point of the mean recall
    assert [each.alpha for each in allowed] == [0.0, 0.3, 0.5]
    assert choose(points, max_loss=0.9)[0].alpha == 0.3
    assert choose([points[0], points[4]])[0].alpha == 0.0


def test_without_a_watched_set_the_best_is_chosen_and_of_a_tie_the_nearest_to_the_start() -> None:
    points = [point(0.0, 300), point(0.4, 350), point(0.5, 350 + 1e-10), point(1.0, 340)]
    assert choose(points)[0].alpha == 0.4


GROUPS: Any = SimpleNamespace(val=SimpleNamespace(query_groups={"i2t": np.arange(60), "t2i": np.arange(60)}))


def noise(rng: np.random.Generator) -> dict[str, Any]:
    return {key: rng.integers(1, 12, 60).astype(float) for key in ("i2t", "t2i")}


def rsum_of(ranks: dict[str, Any]) -> float:
    return float(sum(100 * (ranks[key] <= k).mean() for key in ranks for k in (1, 5, 10)))


def point_of(alpha: float, ranks: dict[str, Any]) -> Point:
    return Point(alpha, Found({}, {"rsum": rsum_of(ranks)}, {}, 60, 60, ranks), Seen({}, None))


@pytest.mark.slow
def test_the_estimate_takes_the_luck_of_both_choices_away() -> None:
    """Ranks that are all noise: the best of 20 epochs, and of eleven averages, looks better, and is not."""
    rng = np.random.default_rng(0)
    gains: list[float] = []
    estimates: dict[str, list[float]] = {"all": [], "some": []}
    for _ in range(25):
        evaluations = [noise(rng) for _ in range(21)]
        loaded, best = evaluations[0], max(evaluations[1:], key=rsum_of)
        mixed = [
            {key: np.where(rng.random(60) < alpha, best[key], loaded[key]) for key in loaded} for alpha in ALPHAS[1:-1]
        ]
        points = [point_of(alpha, ranks) for alpha, ranks in zip(ALPHAS, [loaded, *mixed, best], strict=True)]
        chosen, allowed = choose(points)
        gains.append(chosen.validation.recalls["rsum"] - rsum_of(loaded))
        # with the best epoch itself, and where it loses too much of what is watched: its luck is in the others too
        for name, left in (("all", allowed), ("some", allowed[:8])):
            verdict = estimated_gain(GROUPS, left, evaluations=evaluations)
            assert verdict is not None
            estimates[name].append(verdict.gain)
            # what the epoch was chosen among is lost, and with it what its luck was
            assert estimated_gain(GROUPS, left, evaluations=[]) is None
    assert np.mean(gains) > 25
    for name, found in estimates.items():
        assert abs(np.mean(found)) < 2.5 * np.std(found) / math.sqrt(len(found)) < 12, name


@pytest.mark.slow
def test_where_the_model_as_loaded_is_chosen_no_gain_is_told(
    flags: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    with small_runs() as patch:
        patch.setattr("cliptune.runs.interpolation.choose", lambda points: (points[0], list(points)))
        assert main([*flags, "--output_dir", str(tmp_path)]) == 0
    found = results_of(RunFiles(tmp_path))["interpolation"]
    assert (found["chosen"], found["verdict"]) == (0, None)
    line = next(line for line in capsys.readouterr().out.splitlines() if line.startswith("alpha 0.0, the model"))
    assert "95%" not in line and "nothing is gained" in line


@pytest.mark.slow
def test_the_chosen_one_is_a_checkpoint_like_the_best(files: RunFiles, tmp_path: Path) -> None:
    found = results_of(files)["interpolation"]
    assert [each["alpha"] for each in found["points"]] == list(ALPHAS)
    chosen = next(each for each in found["points"] if each["alpha"] == found["chosen"])
    best = results_of(files)["metrics"]["rsum"]
    assert found["points"][-1]["rsum"] == pytest.approx(best)
    assert found["points"][0]["rsum"] == pytest.approx(results_of(files)["baseline"]["rsum"])
    content = load_checkpoint(files.interpolated)
    assert content["alpha"] == found["chosen"]
    assert content["metrics"]["rsum"] == chosen["rsum"]
    flags = ["--checkpoint", str(files.interpolated), "--output_dir", str(tmp_path), "--num_workers", "0"]
    assert evaluate_main(flags) == 0  # which checks the self test
    evaluated = json.loads((tmp_path / "results/evaluation_results.json").read_text())
    assert evaluated["metrics"]["rsum"] == pytest.approx(chosen["rsum"])


@pytest.mark.slow
def test_the_curve_is_drawn_from_the_results(files: RunFiles, tmp_path: Path) -> None:
    assert tmp_path / "interpolation.png" in draw_figures(files.results, tmp_path)
    assert (tmp_path / "interpolation.png").stat().st_size > 10_000


@pytest.mark.slow
def test_a_later_resume_keeps_the_average_while_the_best_model_is_the_same(
    flags: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    files, output = RunFiles(tmp_path), ["--output_dir", str(tmp_path)]
    plain = [flag for flag in flags if flag != "--interpolate"]
    with small_runs():
        assert main([*plain, *output]) == 0
        assert main([*output, "--resume", "--interpolate"]) == 0
        found, content = results_of(files)["interpolation"], files.interpolated.read_bytes()
        assert main([*output, "--resume"]) == 0
        assert results_of(files)["interpolation"] == found
        assert files.interpolated.read_bytes() == content
        assert f"as it was chosen before (alpha {found['chosen']:.1f})" in capsys.readouterr().out
    with small_runs() as patch:
        patch.setattr("cliptune.training.state.TIE", -0.9)  # one more epoch, which is then the best one
        assert main([*output, "--resume", "--num_epochs", "3"]) == 0
    assert results_of(files)["best_epoch"] == 3
    assert "interpolation" not in results_of(files)
    aside = files.interpolated.with_name("interpolated_model.aside.pth")
    assert aside.read_bytes() == content and not files.interpolated.exists()
    assert f"it is now {aside}" in capsys.readouterr().out


@pytest.mark.slow
def test_a_run_that_was_killed_in_the_middle_of_it_does_it_again(
    flags: list[str], files: RunFiles, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    model_at, output = Ends.model_at, ["--output_dir", str(tmp_path)]

    def killed(self: Ends, alpha: float) -> Any:
        if alpha == 0.6:
            os.kill(os.getpid(), signal.SIGTERM)
        return model_at(self, alpha)

    with small_runs() as patch:
        patch.setattr(Ends, "model_at", killed)
        assert main([*flags, *output]) == 143
    assert not RunFiles(tmp_path).interpolated.exists()
    with small_runs():
        assert main([*output, "--resume"]) == 0
    assert results_of(RunFiles(tmp_path))["interpolation"] == results_of(files)["interpolation"]
    weights = [load_checkpoint(each.interpolated)["model_state_dict"] for each in (RunFiles(tmp_path), files)]
    assert_same(*weights)
    out = capsys.readouterr().out
    assert "(chosen)" in out
    assert "over the model as loaded" in out


@pytest.mark.slow
def test_where_no_epoch_is_better_nothing_lies_between(
    flags: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    with small_runs():
        still = ["--learning_rate", "1e-12", "--num_epochs", "1", "--output_dir", str(tmp_path)]
        assert main([*flags, *still]) == 0
    assert "the best model is the one as loaded: nothing is forgotten, and nothing lies" in capsys.readouterr().out
    assert "interpolation" not in results_of(RunFiles(tmp_path))
    assert not RunFiles(tmp_path).interpolated.exists()


@pytest.mark.slow
def test_models_of_different_runs_are_not_averaged(files: RunFiles, tmp_path: Path, trained_dir: Path) -> None:
    mixed = RunFiles(tmp_path)
    mixed.best.parent.mkdir(parents=True)
    os.link(files.loaded, mixed.loaded)
    os.link(RunFiles(trained_dir).best, mixed.best)
    with pytest.raises(ValueError, match="of different runs"):
        Ends(mixed, model_class=CLIPModel, device=torch.device("cpu"))


@pytest.mark.slow
@pytest.mark.parametrize("parallel", ["ddp", "fsdp"])
def test_several_ranks_look_back_together(parallel: str, sample_dir: Path, tmp_path: Path) -> None:
    watched = tmp_path / "watched"
    create_sample_dataset(watched, 9, seed=7)
    data = ["--data_dir", str(sample_dir), "--watch_data", str(watched), "--output_dir", str(tmp_path)]
    more = ["--num_epochs", "2", "--precision", "fp32", "--interpolate", "--parallel", parallel]
    done = run_ranks(2, "tests/helpers/small_train.py", *data, *SMALL, *more)
    assert done.returncode == 0, done.stderr
    found = results_of(RunFiles(tmp_path))
    points = found["interpolation"]["points"]
    assert (points[0]["rsum"], points[-1]["rsum"]) == pytest.approx(
        (found["baseline"]["rsum"], found["metrics"]["rsum"])
    )
    assert done.stdout.count("(chosen)") == 1
    assert RunFiles(tmp_path).interpolated.exists()
