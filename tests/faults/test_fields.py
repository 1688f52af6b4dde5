"""Checkpoints whose checksums and self-test are right but whose values are not: one line, and nothing is changed."""

import copy
import math
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

import evaluation
from cliptune.model.checkpoint_file import load_checkpoint, save_checkpoint
from tests.helpers.runs import SMALL, small_runs
from train import main

Edit = Callable[[dict[str, Any]], object]
ABSENT = object()


@pytest.fixture(scope="module", autouse=True)
def patched() -> Iterator[None]:
    with small_runs():
        yield


@pytest.fixture(scope="module")
def content(sample_dir: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    folder = tmp_path_factory.mktemp("run")
    assert main([*SMALL, "--data_dir", str(sample_dir), "--output_dir", str(folder), "--num_epochs", "2"]) == 0
    return load_checkpoint(folder / "model-checkpoint" / "last_model.pth")


def put(value: Any, *keys: Any) -> Edit:
    """Set what is under some keys."""

    def edit(content: dict[str, Any]) -> None:
        *path, last = keys
        inner: Any = content
        for key in path:
            inner = inner[key]
        if value is ABSENT:
            del inner[last]
        else:
            inner[last] = value

    return edit


def resume(content: dict[str, Any], edit: Edit, folder: Path) -> tuple[int, list[str]]:
    """Change a checkpoint, write it with the project's own writer, resume it; what it leaves must be nothing."""
    changed = copy.deepcopy({key: value for key, value in content.items() if key != "format_version"})
    edit(changed)
    path = folder / "model-checkpoint" / "last_model.pth"
    save_checkpoint(path, changed)
    return main(["--resume", str(path), "--output_dir", str(folder), "--num_epochs", "3"]), [
        str(each.relative_to(folder)) for each in folder.rglob("*.json*")
    ]


NEEDED = (
    "model_state_dict", "architecture", "self_test", "epoch", "global_step", "config", "val_images", "run_state",
    "optimizer_state_dict", "scheduler_state_dict", "scaler_state_dict", "micro_batch_size", "starts_random",
    "holds_batchnorm",
)  # fmt: skip
STATE = ("started_at", "epoch", "step", "history", "baseline", "best", "best_epoch", "epochs_since_best", "totals")
EDITS: dict[str, Edit] = {
    **{f"no {key}": put(ABSENT, key) for key in NEEDED},
    **{f"{key} is a text": put("3", key) for key in NEEDED},
    **{f"{key} is a list": put([1], key) for key in NEEDED},
    **{f"no run_state.{key}": put(ABSENT, "run_state", key) for key in STATE},
    **{f"run_state.{key} is a list of lists": put([[1]], "run_state", key) for key in STATE},
    "epoch is NaN": put(math.nan, "epoch"),
    "epoch is true": put(True, "epoch"),
    "epoch is negative": put(-1, "epoch"),
    "epoch is another": put(7, "epoch"),
    "step is another": put(9999, "global_step"),
    "both epochs are later": lambda content: [put(9, "epoch")(content), put(9, "run_state", "epoch")(content)],
    "steps of 10**30": put(10**30, "global_step"),
    "micro batch is negative": put(-1, "micro_batch_size"),
    "micro batch is 0": put(0, "micro_batch_size"),
    "micro batch is NaN": put(math.nan, "micro_batch_size"),
    "unknown key of run_state": put(1, "run_state", "x\x1b[31m"),
    "best epoch that is not there": put(5, "run_state", "best_epoch"),
    "empty history": put([], "run_state", "history"),
    "history without a metric": put(ABSENT, "run_state", "history", 0, "rsum"),
    "history of NaN": put(math.nan, "run_state", "history", 1, "rsum"),
    "best without metrics": put(ABSENT, "run_state", "best", "metrics"),
    "histogram of no edges": put([], "run_state", "best", "histograms", "bin_edges"),
    "totals of two sums": put({"sums": [1.0, 2.0], "num_pairs": 1, "num_batches": 1}, "run_state", "totals"),
    "totals with a key more": put(
        {"sums": [1.0] * 3, "num_pairs": 1, "num_batches": 1, "add": 1}, "run_state", "totals"
    ),
    "config is empty of a type": put({"model": []}, "config"),
    "config with an unknown key": put(1, "config", "training", "x"),
    "config of a negative rate": put(-1.0, "config", "training", "learning_rate"),
    "config of a text of 10 MB": put("x" * 10**7, "config", "data", "data_dir"),
    "run's id is a number": put(7, "run_id"),
    "run's id has 10 MB": put("x" * 10**7, "run_id"),
    "config file is a list": put([1], "config_file"),
    "config file of numbers": put({"training": 1}, "config_file"),
    "data is a list": put([1], "data"),
    "earlier data of a number": put([1], "earlier_data"),
    "data of a number": put({"train": 1}, "data"),
    "data of nothing": put({"train": {}}, "data"),
    "data of texts": put({"train": {"paths": "x", "files": "x", "captions": 1}}, "data"),
    "architecture's name is a number": put(7, "architecture", "name"),
    "architecture's name has 10 MB": put("x" * 10**7, "architecture", "name"),
    "architecture's key has 10 MB": put(1, "architecture", "x" * 10**7),
    "heads of 0": put(0, "architecture", "vision_heads"),
    "images that are numbers": put([1, 2], "val_images"),
    "an image of 10 MB": put(["x" * 10**7], "val_images"),
    "no groups": put([], "optimizer_state_dict", "param_groups"),
    "no moments": put({0: {}}, "optimizer_state_dict", "state"),
    "negative rate": put(-1.0, "optimizer_state_dict", "param_groups", 0, "lr"),
    "rate is NaN": put(math.nan, "optimizer_state_dict", "param_groups", 0, "lr"),
    "decay is a text": put("x", "optimizer_state_dict", "param_groups", 0, "weight_decay"),
    "moments of another shape": put(torch.zeros(7), "optimizer_state_dict", "state", 0, "exp_avg"),
    "moments that are not finite": put(torch.tensor(math.nan), "optimizer_state_dict", "state", 0, "step"),
    "a moment too few": put(ABSENT, "optimizer_state_dict", "state", 0, "exp_avg_sq"),
    "scheduler of another step": put(3, "scheduler_state_dict", "last_epoch"),
    "scheduler without rates": put(ABSENT, "scheduler_state_dict", "base_lrs"),
    "scheduler of NaN": put([math.nan] * 2, "scheduler_state_dict", "base_lrs"),
    "no scheduler": put(None, "scheduler_state_dict"),
    "no number of layers": put(ABSENT, "architecture", "vision_layers"),
    "weights are texts": put("x", "model_state_dict", "logit_scale"),
    "no self-test's images": put(ABSENT, "self_test", "pixels"),
    "self-test's texts are numbers": put([1, 2], "self_test", "texts"),
    "self-test's images are numbers": put(torch.zeros(3), "self_test", "pixels"),
}


@pytest.mark.slow
@pytest.mark.parametrize("name", EDITS)
def test_a_wrong_value_ends_a_resume_in_one_line(
    name: str, content: dict[str, Any], tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    code, left = resume(content, EDITS[name], tmp_path)
    lines = capfd.readouterr().err.splitlines()
    assert code == 2
    assert left == []  # nothing is written
    assert "Traceback" not in "".join(lines)
    assert [line for line in lines if "error:" in line] == lines[-1:]
    assert "last_model.pth" in lines[-1] or "the checkpoint's record" in lines[-1]
    assert len(lines[-1]) < 1000
    assert "\x1b" not in lines[-1]


@pytest.mark.parametrize(
    "name", [name for name in EDITS if "config" in name or "val_images" in name or "epoch" in name]
)
def test_an_evaluation_needs_fewer_keys_and_checks_those(
    name: str, content: dict[str, Any], tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    changed = copy.deepcopy({key: value for key, value in content.items() if key != "format_version"})
    EDITS[name](changed)
    save_checkpoint(tmp_path / "x.pth", changed)
    code = evaluation.main(
        ["--checkpoint", str(tmp_path / "x.pth"), "--output_dir", str(tmp_path), "--num_workers", "0"]
    )
    lines = capfd.readouterr().err.splitlines()
    assert "Traceback" not in "".join(lines)
    if "epoch" in name:  # of the run, which is not looked at
        assert code in {0, 2}
        return
    assert code == 2
    assert len(lines) == 1
    assert "x.pth" in lines[0]
    assert len(lines[0]) < 1000


@pytest.mark.slow
def test_what_is_not_read_is_ignored(content: dict[str, Any], tmp_path: Path) -> None:
    """Keys of other versions; settings of an optimiser that the run's settings decide; attributes smuggled in."""

    def edit(content: dict[str, Any]) -> None:
        content["of_a_later_version"] = {"x": 1}
        content["optimizer_state_dict"]["param_groups"][0]["maximize"] = True
        content["scheduler_state_dict"]["step"] = 3
        content["scheduler_state_dict"]["optimizer"] = None

    code, _ = resume(content, edit, tmp_path)
    assert code == 0
    state = load_checkpoint(tmp_path / "model-checkpoint" / "last_model.pth")
    assert state["epoch"] == 3
    assert not state["optimizer_state_dict"]["param_groups"][0]["maximize"]
