"""Runs of the training stage: what they leave, how they are broken off and resumed, what they say."""

import errno
import gc
import json
import math
import multiprocessing
import os
import re
import shutil
import signal
import sys
import time
import urllib.request
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any, NamedTuple

import pytest
import torch
from PIL import Image

from clip_model import CLIPModel, MultimodalTrainer
from cliptune.model.architectures import ARCHITECTURES
from cliptune.model.checkpoint_file import load_checkpoint, save_checkpoint
from cliptune.model.self_test import TEXTS
from cliptune.results import RECALL_KEYS
from cliptune.runs.model import make_model
from cliptune.training import memory
from cliptune.training.average import WeightAverage
from cliptune.training.checkpoint import RunFiles
from data_loader import ImageTextDataset
from evaluation import Evaluation, evaluate
from tests.helpers.models import TRAINED_VIT
from tests.helpers.runs import SMALL, assert_same_runs, lines_of, signal_at, small_runs, work_in_background
from train import main

FLAGS = ["--model_name", TRAINED_VIT.name, "--batch_size", "18", "--learning_rate", "1e-3"]


def flags_for(data_dir: Path, output_dir: Path, *more: str) -> list[str]:
    return ["--data_dir", str(data_dir), "--output_dir", str(output_dir), *FLAGS, *more]


def small_flags(data_dir: Path, output_dir: Path, *more: str) -> list[str]:
    return ["--data_dir", str(data_dir), "--output_dir", str(output_dir), *SMALL, "--num_epochs", "2", *more]


def test_a_run_leaves_what_the_readme_says(trained_dir: Path) -> None:
    for name in (
        "model-checkpoint/best_model.pth", "model-checkpoint/last_model.pth", "results/training_results.json",
        "results/training_curves.png", "results/model_metrics.png", "results/report.html", "logs/train.log",
        "logs/history.jsonl", "logs/steps.jsonl",
    ):  # fmt: skip
        assert (trained_dir / name).stat().st_size > 0, name
    assert list((trained_dir / "logs" / "tensorboard").glob("events*"))
    results = json.loads((trained_dir / "results" / "training_results.json").read_text())
    assert [record["epoch"] for record in results["history"]] == [0, 1, 2]
    assert [record["step"] for record in results["history"]] == [0, 3, 6]
    keys = {"epoch", "step", "train_loss", "train_accuracy", "val_loss", "learning_rate", "backbone_learning_rate"}
    assert all(keys | {*RECALL_KEYS, "rsum", "i2t_mean_rank"} <= record.keys() for record in results["history"])
    best = results["history"][results["best_epoch"]]
    assert results["metrics"]["rsum"] == best["rsum"] == max(record["rsum"] for record in results["history"])
    assert results["baseline"]["rsum"] == results["history"][0]["rsum"]
    assert results["config"]["training"]["batch_size"] == 18
    assert results["chance"]["val_loss"] == pytest.approx(math.log(6))  # 6 images are one batch, though 18 make one
    assert results["run"]["model_name"] == TRAINED_VIT.name
    assert results["run"]["versions"]["torch"] == torch.__version__.partition("+")[0]
    assert results["schedule"][0][:2] == [0, 5e-4]
    assert max(point[1] for point in results["schedule"]) == 1e-3
    assert [record["epoch"] for record in lines_of(trained_dir / "logs" / "history.jsonl")] == [0, 1, 2]


@pytest.mark.slow
def test_every_step_is_recorded_and_every_few_are_told(whole: Callable[[str], Path], sample_dir: Path) -> None:
    folder = whole("many states")  # with --log_interval 3
    steps = lines_of(folder / "logs" / "steps.jsonl")
    assert [(line["step"], line["epoch"]) for line in steps] == [(n, 1 if n <= 6 else 2) for n in range(1, 13)]
    assert steps[0].keys() == {
        "step", "epoch", "loss", "accuracy", "learning_rate", "backbone_learning_rate", "seconds",
    }  # fmt: skip
    history = lines_of(folder / "logs" / "history.jsonl")
    sizes = [10, 10, 10, 10, 10, 4]
    mean = sum(line["loss"] * size for line, size in zip(steps, sizes, strict=False)) / 54
    assert mean == pytest.approx(history[1]["train_loss"])
    log = (folder / "logs" / "train.log").read_text()
    found = re.findall(r"epoch (\d)/2, step (\d+)/12: loss (\d\.\d+), rates projection .*, \d+ pairs/s, .* left", log)
    assert [(epoch, step) for epoch, step, _ in found] == [("1", "3"), ("1", "6"), ("2", "9"), ("2", "12")]
    assert float(found[0][2]) == pytest.approx(sum(line["loss"] for line in steps[:3]) / 3, abs=1e-3)


@pytest.mark.slow
def test_the_checkpoint_is_used_as_the_spec_says(
    trained_dir: Path, sample_dir: Path, small: pytest.MonkeyPatch
) -> None:
    small.setitem(ARCHITECTURES, TRAINED_VIT.name, TRAINED_VIT)
    path = trained_dir / "model-checkpoint" / "best_model.pth"
    model = CLIPModel.from_checkpoint(path)
    checkpoint = torch.load(path)
    assert isinstance(checkpoint["epoch"], int)
    assert isinstance(checkpoint["global_step"], int)
    other, third = CLIPModel(TRAINED_VIT.name).eval(), CLIPModel(TRAINED_VIT.name).eval()
    other.load_state_dict(checkpoint["model_state_dict"])
    third.load_checkpoint(path)
    image = Image.open(sample_dir / "images" / "scene_00000.png")
    with torch.no_grad():
        expected = model.encode_image(image)
        assert torch.equal(other.encode_image(image), expected)
        assert torch.equal(third.encode_image(image), expected)
        assert torch.matmul(expected, model.encode_text(["a circle", "a star"]).T).shape == (1, 2)
    with pytest.raises(ValueError, match=r"from_checkpoint\(path\) builds the right one"):
        CLIPModel(TRAINED_VIT.name, 32).load_checkpoint(path)
    with pytest.raises(ValueError, match="not a checkpoint of this toolkit"):
        torch.save({"a": 1}, trained_dir / "x.pth")
        model.load_checkpoint(trained_dir / "x.pth")


SETTINGS = {
    "augmented": ["--augment", "color", "--micro_batch_size", "4", "--checkpoint_every", "2"],
    "text frozen": ["--freeze_tower", "text", "--augment", "crop", "--num_workers", "2"],
    "image frozen": ["--freeze_tower", "image", "--augment", "color", "--feature_views", "2"],
    "both frozen": ["--freeze_backbone", "--augment", "crop", "--feature_views", "2"],
    "siglip": ["--loss", "siglip", "--positives", "caption"],
    "averaged": ["--ema", "0.5"],
    "many states": ["--checkpoint_every", "4", "--keep_checkpoints", "9", "--profile", "2", "--log_interval", "3"],
}


@pytest.fixture(scope="module")
def whole(sample_dir: Path, tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Path]:
    """Give the output of an unbroken run of two epochs with some of the `SETTINGS`; each is made once."""
    folders: dict[str, Path] = {}

    def folder_of(settings: str) -> Path:
        if settings not in folders:
            folders[settings] = tmp_path_factory.mktemp("whole")
            with small_runs():
                assert main(small_flags(sample_dir, folders[settings], *SETTINGS[settings])) == 0
        return folders[settings]

    return folder_of


class Broken(NamedTuple):
    """A run that a fault is to break off, and that is to be resumed to its end."""

    flags: list[str]
    folder: Path
    whole: Path
    patch: pytest.MonkeyPatch
    capsys: pytest.CaptureFixture[str]

    def start(self) -> int:
        return main([*self.flags, "--output_dir", str(self.folder)])

    def resume(self, *flags: str) -> int:
        return main(["--output_dir", str(self.folder), "--resume", *flags])

    def errors(self) -> str:
        return self.capsys.readouterr().err


def stopped_by_signals(run: Broken) -> None:
    """In the middle of an epoch, in its last step, and in the step after a stop."""
    signal_at(run.patch, {2: signal.SIGTERM, 6: signal.SIGINT, 7: signal.SIGTERM})
    assert run.start() == 143
    for code, step in ((130, 2), (143, 6), (0, 7)):
        epoch = 1 if step < 7 else 2
        assert f"at epoch {epoch}, step {step}, which are saved" in run.errors()
        assert run.resume() == code
        errors = run.errors()
        assert f"resuming at epoch {epoch}, step {step} from {RunFiles(run.folder).last}\n" in errors
        print(errors, file=sys.stderr)


def stopped_in_validation(run: Broken) -> None:
    """The epoch is not trained again; and the folder may be another one's current one."""
    calls = iter(range(9))

    def interrupted(*arguments: Any, **options: Any) -> Evaluation:
        if next(calls) == 1:
            os.kill(os.getpid(), signal.SIGTERM)
            raise AssertionError("went on")
        return evaluate(*arguments, **options)

    run.patch.setattr("train.evaluate", interrupted)
    assert run.start() == 143
    run.patch.chdir(run.folder)
    steps: list[int] = []
    train_step = MultimodalTrainer.train_step

    def noted(self: MultimodalTrainer, *arguments: Any) -> Any:
        steps.append(self.global_step)
        return train_step(self, *arguments)

    run.patch.setattr(MultimodalTrainer, "train_step", noted)
    assert main(["--resume"]) == 0
    assert "resuming at epoch 1, step 6 from model-checkpoint/last_model.pth" in run.errors()
    assert steps == [6, 7, 8, 9, 10, 11]


def stopped_while_the_average_is_put_in_and_taken_out(run: Broken) -> None:
    """Half of the weights are the average then, and the others are not."""

    class Average(dict[str, torch.Tensor]):
        swaps = 0.0
        """Still to be seen before the signal."""

        def __setitem__(self, name: str, tensor: torch.Tensor) -> None:
            super().__setitem__(name, tensor)
            before, Average.swaps = Average.swaps, Average.swaps - 1 / len(self)
            if Average.swaps <= 0 < before:
                os.kill(os.getpid(), signal.SIGTERM)

    made = WeightAverage.__init__

    def make(self: WeightAverage, *arguments: Any) -> None:
        made(self, *arguments)
        self.tensors = Average(self.tensors)

    run.patch.setattr(WeightAverage, "__init__", make)
    # in and out to evaluate the model as loaded, in and out to save it, then in to evaluate epoch 1
    Average.swaps = 4.5
    assert run.start() == 143
    Average.swaps = 1.5  # the evaluation comes again, and then out
    assert run.resume() == 143
    assert run.resume() == 0


def last_file_damaged(run: Broken) -> None:
    """The newest state that is intact is taken, and nothing else reads the damaged one."""
    signal_at(run.patch, {5: signal.SIGTERM})
    assert run.start() == 143
    files = RunFiles(run.folder)
    content = bytearray(files.last.read_bytes())
    content[len(content) // 2] ^= 4
    files.last.write_bytes(content)
    run.errors()
    assert main(["--resume", str(files.last)]) == 2
    assert "last_model.pth: damaged" in run.errors()
    other = [*run.flags, "--output_dir", str(run.folder / "other"), "--pretrained", str(files.last)]
    assert main(other) == 2
    assert "last_model.pth: damaged" in run.errors()
    assert run.resume() == 0
    errors = run.errors()
    assert "last_model.pth: damaged" in errors
    assert "taking the state before it" in errors
    assert f"resuming at epoch 1, step 4 from {files.earlier(4)}\n" in errors


def disk_full(run: Broken) -> None:
    # fingerprints of images, the model as loaded, the last of epoch 0, steps 2 and 4; the last of epoch 1 finds none
    room = iter([2**40] * 5)
    with run.patch.context() as patch:
        patch.setattr("cliptune.runtime.files.shutil.disk_usage", lambda _: SimpleNamespace(free=next(room, 1000)))
        assert run.start() == 2
    last_line = run.errors().splitlines()[-1]
    assert last_line.startswith(f"train.py: error: no room for {run.folder}/model-checkpoint/")
    assert "0.00 GB are free" in last_line
    states = [load_checkpoint(path)["global_step"] for path in RunFiles(run.folder).states()]
    assert states == [4, 4, 2]  # the last one has a second name
    assert not list((run.folder / "model-checkpoint").glob(".*"))
    assert run.resume() == 0


def stopped_by_signals_in_background(run: Broken) -> None:
    """As on a GPU."""
    work_in_background(run.patch)
    stopped_by_signals(run)


def disk_full_in_background(run: Broken) -> None:
    work_in_background(run.patch)
    disk_full(run)


def resumed_from_a_copy(run: Broken) -> None:
    """Every epoch's end and every fourth step was saved; one of the states goes on in another folder."""
    files = RunFiles(run.whole)
    states = [load_checkpoint(path) for path in reversed(files.states())]
    assert [(state["epoch"], state["global_step"]) for state in states] == [(0, 0), (1, 4), (1, 6), (2, 8), (2, 12)]
    run.folder.parent.joinpath("copy.pth").write_bytes(files.earlier(4).read_bytes())
    assert main(["--resume", str(run.folder.parent / "copy.pth"), "--output_dir", str(run.folder)]) == 0


@pytest.mark.slow
@pytest.mark.parametrize(
    ("settings", "fault"),
    [
        ("augmented", stopped_by_signals),
        pytest.param("text frozen", stopped_by_signals, marks=pytest.mark.slow),
        pytest.param("image frozen", stopped_by_signals, marks=pytest.mark.slow),
        ("both frozen", stopped_by_signals),
        ("augmented", stopped_in_validation),
        ("siglip", stopped_by_signals),
        ("averaged", stopped_while_the_average_is_put_in_and_taken_out),
        ("augmented", last_file_damaged),
        ("augmented", disk_full),
        ("augmented", stopped_by_signals_in_background),
        ("both frozen", stopped_by_signals_in_background),
        ("augmented", disk_full_in_background),
        ("many states", resumed_from_a_copy),
    ],
    ids=lambda value: value if isinstance(value, str) else value.__name__,
)
def test_a_run_that_is_broken_off_and_resumed_is_the_unbroken_one(
    settings: str,
    fault: Callable[[Broken], None],
    whole: Callable[[str], Path],
    sample_dir: Path,
    tmp_path: Path,
    small: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    unbroken = whole(settings)
    capsys.readouterr()
    flags = small_flags(sample_dir, tmp_path, *SETTINGS[settings])
    folder = tmp_path / ("again" if fault is resumed_from_a_copy else "broken")
    fault(Broken(flags, folder, unbroken, small, capsys))
    assert_same_runs(folder, unbroken)


@pytest.mark.slow
def test_the_wall_time_of_a_run_with_threads_adds_up(
    sample_dir: Path, tmp_path: Path, small: pytest.MonkeyPatch
) -> None:
    work_in_background(small)
    start = time.monotonic()
    assert main(small_flags(sample_dir, tmp_path)) == 0
    elapsed = time.monotonic() - start
    spent = json.loads(RunFiles(tmp_path).results.read_text())["wall_time"]
    assert 0.7 * elapsed < sum(spent.values()) <= elapsed + 0.01  # the rest comes after the results
    assert spent["saving"] > 0


@pytest.mark.slow
def test_a_changed_bit_of_a_run_would_be_seen(whole: Callable[[str], Path], tmp_path: Path) -> None:
    shutil.copytree(whole("augmented"), tmp_path / "other")
    assert_same_runs(tmp_path / "other", whole("augmented"))
    last = RunFiles(tmp_path / "other").last
    state = load_checkpoint(last)
    moment = next(iter(state["optimizer_state_dict"]["state"].values()))["exp_avg"].view(-1)
    moment[0] = torch.nextafter(moment[0], torch.tensor(1.0))
    torch.save(state, last)
    with pytest.raises(AssertionError, match="exp_avg"):
        assert_same_runs(tmp_path / "other", whole("augmented"))


@pytest.mark.slow
def test_nothing_to_resume_is_a_run_from_the_beginning(
    sample_dir: Path, tmp_path: Path, small: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    flags = small_flags(sample_dir, tmp_path, "--num_epochs", "1", "--resume")
    with small.context() as patch:
        patch.setattr("train.evaluate", lambda *_, **__: os.kill(os.getpid(), signal.SIGINT))
        assert main(flags) == 130
    error = capsys.readouterr().err
    assert f"nothing to resume in {tmp_path}: starting from the beginning" in error
    assert "stopped by SIGINT before anything was trained" in error
    assert main(flags) == 0
    assert "starting from the beginning" in capsys.readouterr().err


@pytest.mark.slow
def test_a_resumed_run_has_its_own_settings_and_says_which_changed(
    whole: Callable[[str], Path], tmp_path: Path, small: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = tmp_path / "run"
    shutil.copytree(whole("augmented"), folder)
    capsys.readouterr()
    assert main(["--output_dir", str(folder), "--resume", "--num_epochs", "3", "--checkpoint_every", "3"]) == 0
    error = capsys.readouterr().err
    assert "device cpu, precision " in error
    assert "resumed with --num_epochs 3\n" in error
    assert "resumed with --checkpoint_every 3\n" in error
    assert "the next step's rates change: projection 0 to " in error
    assert "micro-batches of" not in error
    last = load_checkpoint(RunFiles(folder).last)
    assert (last["epoch"], last["config"]["training"]["micro_batch_size"]) == (3, 4)
    assert last["config"]["data"]["augment"] == "color"
    assert not (folder / "previous").exists()


@pytest.mark.slow
def test_resume_refuses_what_may_not_change_and_misses_nothing(
    trained_dir: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    files = RunFiles(trained_dir)
    assert main(["--resume", str(files.last), "--batch_size", "7", "--output_dir", str(tmp_path)]) == 2
    assert "--batch_size cannot change when a run is resumed" in capsys.readouterr().err
    assert main(["--resume", "gone.pth"]) == 2
    assert "no such checkpoint: gone.pth" in capsys.readouterr().err
    assert main(["--resume", str(files.best), "--output_dir", str(tmp_path)]) == 2
    assert "best_model.pth holds no training state to resume from; use last_model.pth" in capsys.readouterr().err


def test_a_second_run_in_a_folder_is_refused_before_it_changes_anything(
    trained_dir: Path, sample_dir: Path, small: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    small.setitem(ARCHITECTURES, TRAINED_VIT.name, TRAINED_VIT)
    names = sorted(trained_dir.rglob("*"))
    with RunFiles(trained_dir).locked():
        for flags in ([], ["--resume"], ["--resume", str(RunFiles(trained_dir).last)]):
            assert main(flags_for(sample_dir, trained_dir, *flags)) == 2
            assert f"train.py: error: another run is writing to {trained_dir}" in capsys.readouterr().err
    assert sorted(trained_dir.rglob("*")) == names


@pytest.mark.slow
def test_an_earlier_run_is_set_aside(
    sample_dir: Path, tmp_path: Path, small: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    flags = small_flags(sample_dir, tmp_path, "--num_epochs", "1", "--freeze_backbone")
    assert main(flags) == 0
    started = json.loads((tmp_path / "results/training_results.json").read_text())["started_at"].replace(":", "-")
    (tmp_path / "results" / "mine.txt").touch()
    capsys.readouterr()
    assert main([*flags, "--resume"]) == 0  # a finished run that is resumed moves nothing
    assert not (tmp_path / "previous").exists()
    assert "nothing is left to train: the run has had its 1 epoch (--num_epochs)" in capsys.readouterr().err
    assert main(flags) == 0
    assert f"previous/{started}" in capsys.readouterr().err
    for name in ("model-checkpoint/best_model.pth", "logs/steps.jsonl", "logs/train.log"):
        assert (tmp_path / "previous" / started / name).exists()
    assert (tmp_path / "results" / "mine.txt").exists()


@pytest.mark.slow
@pytest.mark.parametrize("removed", ["logs", "results", "logs/train.log", ""])
def test_what_is_removed_while_a_run_goes_on_is_made_again(
    removed: str, sample_dir: Path, tmp_path: Path, small: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    train_step, files = MultimodalTrainer.train_step, RunFiles(tmp_path / "out")

    def removing(self: MultimodalTrainer, *arguments: Any) -> Any:
        if self.global_step == 7:  # in the second epoch
            path = files.root / removed
            shutil.rmtree(path) if path.is_dir() else path.unlink()
        return train_step(self, *arguments)

    small.setattr(MultimodalTrainer, "train_step", removing)
    assert main(small_flags(sample_dir, files.root, "--log_interval", "1")) == 0
    error = capsys.readouterr().err
    assert error.count("removed while the run goes on") == 1
    assert "Traceback" not in error
    assert load_checkpoint(files.last)["epoch"] == 2
    assert [record["epoch"] for record in lines_of(files.history)] == [0, 1, 2]
    assert len(json.loads(files.results.read_text())["history"]) == 3
    assert "epoch 2: loss" in files.log.read_text()
    assert list(files.events.glob("events*"))
    assert main(["--output_dir", str(files.root), "--resume", "--num_epochs", "3"]) == 0


@pytest.mark.slow
def test_a_second_run_leaves_the_first_ones_files_on_their_disk(
    sample_dir: Path, tmp_path: Path, small: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    files = RunFiles(tmp_path / "out")
    files.root.mkdir()
    (tmp_path / "disk").mkdir()
    files.last.parent.symlink_to(tmp_path / "disk")
    flags = small_flags(sample_dir, files.root, "--num_epochs", "1", "--freeze_backbone")
    assert main(flags) == 0
    first = files.last.read_bytes()
    assert main(flags) == 0
    assert re.search(
        r"the earlier run's files are now in .*/out/previous/\S+ \(\d+\.\d [MG]B\)", capsys.readouterr().err
    )
    assert next((files.root / "previous").glob("*/model-checkpoint/last_model.pth")).read_bytes() == first
    assert files.last.parent.is_symlink()


@pytest.mark.slow
def test_a_run_goes_on_without_locks_and_warns_once(
    sample_dir: Path, tmp_path: Path, small: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def refuse(*_: object) -> None:
        raise OSError(errno.ENOLCK, os.strerror(errno.ENOLCK))

    small.setattr("fcntl.flock", refuse)
    assert main(small_flags(sample_dir, tmp_path, "--num_epochs", "1")) == 0
    assert main(["--output_dir", str(tmp_path), "--resume"]) == 0
    assert capsys.readouterr().err.count("has no locks (No locks available)") == 2  # a warning a run
    with RunFiles(tmp_path).locked():
        assert main(["--output_dir", str(tmp_path), "--resume"]) == 2
    assert "another run is writing to" in capsys.readouterr().err.splitlines()[-1]


@pytest.mark.slow
def test_a_state_that_is_not_finite_is_not_saved(
    sample_dir: Path, tmp_path: Path, small: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    train_step = MultimodalTrainer.train_step

    def diverging(self: MultimodalTrainer, *arguments: Any) -> Any:
        if self.global_step == 2:
            with torch.no_grad():
                next(self.model.parameters()).fill_(float("nan"))
        return train_step(self, *arguments)

    small.setattr(MultimodalTrainer, "train_step", diverging)
    assert main(small_flags(sample_dir, tmp_path, "--checkpoint_every", "1")) == 1
    error = capsys.readouterr().err
    assert error.splitlines()[-1].startswith("train.py: error: step 3 has a loss of nan")
    assert load_checkpoint(RunFiles(tmp_path).last)["global_step"] == 2
    assert [line["loss"] is None for line in lines_of(RunFiles(tmp_path).steps)] == [False, False, True]


@pytest.mark.parametrize("skip", ["0", pytest.param("1", marks=pytest.mark.slow)])
def test_an_image_without_numbers_stops_the_run_or_is_skipped(
    skip: str, sample_dir: Path, tmp_path: Path, small: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    train_step = MultimodalTrainer.train_step

    def spoil_step_5(self: MultimodalTrainer, images: torch.Tensor, *batch: Any) -> Any:
        images = images.float() * torch.nan if self.global_step == 4 else images
        return train_step(self, images, *batch)

    small.setattr(MultimodalTrainer, "train_step", spoil_step_5)
    code = main(small_flags(sample_dir, tmp_path, "--num_epochs", "1", "--skip_nonfinite", skip))
    out, error = capsys.readouterr()
    assert "step 5 has a loss of nan" in error
    assert [line.get("skipped", False) for line in lines_of(RunFiles(tmp_path).steps)][:5] == [False] * 4 + [True]
    assert re.search(r"samples: .*/images/scene_000\d\d\.png, .* and 7 more\) and changed no weight", error)
    last = load_checkpoint(RunFiles(tmp_path).last)
    assert all(value.isfinite().all() for value in last["model_state_dict"].values())
    if skip == "0":
        assert (code, last["epoch"]) == (1, 0)
        assert len(error.splitlines()[-1]) > 100  # one line that holds all of it
    else:
        assert (code, last["epoch"]) == (0, 1)
        assert "skipped (1 in a row)" in error
        assert "\nskipped steps: 1 of 6, whose loss or gradient was not finite\n" in out
        assert json.loads(RunFiles(tmp_path).results.read_text())["num_skipped_steps"] == 1


def cached_files(output_dir: Path) -> list[str]:
    """Return what a run has cached of its images, without the fingerprints that its split is made by."""
    names = sorted(path.name for path in (output_dir / "cache").iterdir())
    return [name for name in names if not name.startswith("fingerprints")]


@pytest.mark.slow
def test_a_later_run_with_frozen_towers_runs_no_tower(
    sample_dir: Path, tmp_path: Path, small: pytest.MonkeyPatch
) -> None:
    flags = ["--freeze_backbone", "--precision", "fp32"]
    shared = ["--cache_dir", str(tmp_path / "cached")]
    assert main(small_flags(sample_dir, tmp_path / "plain", *flags, "--feature_views", "0")) == 0
    assert cached_files(tmp_path / "plain") == ["identities.npz"]
    assert main(small_flags(sample_dir, tmp_path / "first", *flags, *shared)) == 0

    for name in ("run_image_tower", "run_text_tower"):
        run_tower = getattr(CLIPModel, name)

        def for_the_self_test_alone(self: CLIPModel, inputs: torch.Tensor, run_tower: Any = run_tower) -> Any:
            assert len(inputs) == len(TEXTS), "a tower ran"
            return run_tower(self, inputs)

        small.setattr(CLIPModel, name, for_the_self_test_alone)
    assert main(small_flags(sample_dir, tmp_path / "second", *flags, *shared)) == 0
    plain, first, second = (lines_of(tmp_path / name / "logs/history.jsonl") for name in ("plain", "first", "second"))
    assert first == second
    assert "projection layers 0.001 (image and text frozen)" in (tmp_path / "first" / "logs" / "train.log").read_text()
    assert len(first) == len(plain) == 3
    for record, expected in zip(first[1:], plain[1:], strict=True):
        for key in ("train_loss", "val_loss", "positive_similarity", "learning_rate"):
            assert record[key] == pytest.approx(expected[key], rel=1e-4), key


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--batch_sz", "3"], "unknown flag --batch_sz"),
        (["--data_dir", "gone"], "`python data_loader.py` makes sample data"),
        (["--device", "cuda:7"], "; try --device cpu"),
        (["--device", "toaster"], "no such device: toaster"),
        (["--config", "gone.json"], "no such file: gone.json"),
        (["--precision", "fp16", "--device", "cpu"], "--precision fp16 needs a CUDA device"),
        # before any data is read
        (["--model_name", "ViTB32", "--data_dir", "gone"], "unknown model name 'ViTB32'"),
        (["--pretrained", "gone.pt", "--data_dir", "gone"], "gone.pt"),
        (["--pretrained", "notes.txt", "--data_dir", "gone"], "notes.txt"),
    ],
)
def test_errors_are_one_line_and_code_2(
    flags: list[str], message: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "notes.txt").write_text("no weights")
    assert main(flags) == 2
    error = capsys.readouterr().err
    assert message in error
    assert len(error.splitlines()) == 1


def test_missing_weights(
    sample_dir: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("HTTPS_PROXY", "http://127.0.0.1:9")  # nobody there
    urllib.request.install_opener(None)  # the next one reads the environment
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path))
    monkeypatch.setenv("HOME", str(tmp_path))
    assert main(["--data_dir", str(sample_dir)]) == 2
    error = capsys.readouterr().err.splitlines()[-1]
    assert "/ViT-B-32.pt cannot be had (Connection refused)" in error
    assert "--pretrained none" in error


@pytest.mark.slow
def test_sample_data_is_made_only_where_no_folder_was_named(
    tmp_path: Path, small: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    small.chdir(tmp_path)
    (tmp_path / "data").mkdir()
    (tmp_path / "data" / ".gitkeep").touch()
    assert main(["--data_dir", "./data", *SMALL]) == 2
    assert "holds no data" in capsys.readouterr().err
    small.setattr("cliptune.runs.data.SAMPLE_SIZE", 40)
    assert main([*SMALL, "--num_epochs", "1"]) == 0
    assert "made 40 sample images" in capsys.readouterr().err
    assert len(json.loads((tmp_path / "data" / "data.json").read_text())) == 40


@pytest.mark.slow
def test_a_worse_fine_tuning_is_seen_and_not_kept(
    trained_dir: Path, sample_dir: Path, tmp_path: Path, small: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    drop = iter((0.0, 50.0))

    def worse_each_time(*args: Any, **kwargs: Any) -> Evaluation:
        evaluation = evaluate(*args, **kwargs)
        return evaluation._replace(metrics={**evaluation.metrics, "rsum": 300 - next(drop)})

    small.setattr("train.evaluate", worse_each_time)
    start = str(trained_dir / "model-checkpoint" / "best_model.pth")
    flags = ["--pretrained", start, "--backbone_lr_scale", "1", "--learning_rate", "1e-3", "--num_epochs", "1"]
    assert main(["--data_dir", str(sample_dir), "--output_dir", str(tmp_path), *flags]) == 0
    captured = capsys.readouterr()
    assert "no epoch beat the model as loaded" in captured.out
    assert "change --backbone_lr_scale" in captured.err
    assert load_checkpoint(tmp_path / "model-checkpoint" / "best_model.pth")["epoch"] == 0
    results = json.loads((tmp_path / "results" / "training_results.json").read_text())
    assert results["config"]["model"]["name"] == "ViT-B/32"  # which nobody chose, and which was not trained
    assert results["run"]["model_name"] == TRAINED_VIT.name


@pytest.mark.slow
def test_cached_images_give_the_same_run_and_its_log_says_how_long_it_waited(
    sample_dir: Path, tmp_path: Path, small: pytest.MonkeyPatch
) -> None:
    histories = []
    for name, flags in (("plain", []), ("cached", ["--cache_images"]), ("fast", ["--fast_decode"])):
        assert main(small_flags(sample_dir, tmp_path / name, "--num_epochs", "1", *flags)) == 0
        histories.append((tmp_path / name / "logs" / "history.jsonl").read_text())
        log = (tmp_path / name / "logs" / "train.log").read_text()
        assert re.search(r"epoch 1: .* s, \d+\.\d pairs/s, waited \d+% for data", log)
    assert histories[0] == histories[1] == histories[2]  # the sample images are PNG files
    cached = list((tmp_path / "cached" / "cache" / "images").iterdir())
    assert {path.suffix for path in cached} == {".keys", ".rows"}
    assert cached_files(tmp_path / "plain") == ["identities.npz"]


@pytest.mark.slow
def test_how_much_of_an_epoch_was_waited_for(
    sample_dir: Path, tmp_path: Path, small: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    now = [0.0]

    def clock() -> float:
        now[0] += 1e-6
        return now[0]

    def takes(seconds: float, function: Any) -> Any:
        def slow(*args: Any, **kwargs: Any) -> Any:
            now[0] += seconds
            return function(*args, **kwargs)

        return slow

    rsums = iter((100.0, 200.0, 150.0))  # one epoch is better than before: its model is saved beside its state

    def made_up(*args: Any, **kwargs: Any) -> Evaluation:
        evaluation = evaluate(*args, **kwargs)
        return evaluation._replace(metrics={**evaluation.metrics, "rsum": next(rsums)})

    small.setattr("train.evaluate", made_up)
    small.setattr("time.perf_counter", clock)
    small.setattr("time.monotonic", clock)
    small.setattr(ImageTextDataset, "__getitem__", takes(1, ImageTextDataset.__getitem__))
    small.setattr(MultimodalTrainer, "train_step", takes(54, MultimodalTrainer.train_step))
    small.setattr("train.make_model", takes(3, make_model))
    small.setattr("cliptune.training.checkpoint.save_checkpoint", takes(4, save_checkpoint))
    assert main(small_flags(sample_dir, tmp_path, "--batch_size", "18", "--log_interval", "1")) == 0
    log = (tmp_path / "logs" / "train.log").read_text()
    first, second = re.findall("epoch [12]: .*", log)
    assert first.endswith(", 216 s, 0.2 pairs/s, waited 25% for data, 0:03:50 left")  # 54 images; 6 validate
    assert second.endswith(", 216 s, 0.2 pairs/s, waited 25% for data")
    assert "step 1/6: " in log
    assert re.search(r"step 1/6: .*, 0 pairs/s, 0:06:28 left", log)  # 5 steps of 72 s, 2 validations of 6 s and 8
    assert [round(line["seconds"]) for line in lines_of(tmp_path / "logs" / "steps.jsonl")] == [72] * 6
    results = json.loads((tmp_path / "results" / "training_results.json").read_text())
    spent = {phase: round(seconds) for phase, seconds in results["wall_time"].items()}
    assert spent == {"start": 3, "data": 108, "step": 324, "validation": 18, "saving": 20, "rest": 0}
    assert re.search(
        r"^wall time: 0:07:53 \(start 1%, data 23%, step 68%, validation 4%, saving 4%, rest 0%\)$",
        capsys.readouterr().out,
        re.M,
    )


@pytest.mark.slow
def test_a_run_leaves_no_workers_to_the_garbage_collector(
    sample_dir: Path, tmp_path: Path, small: pytest.MonkeyPatch
) -> None:
    before = {child.pid for child in multiprocessing.active_children()}
    gc.disable()
    try:
        flags = ["--num_epochs", "1", "--num_workers", "2"]
        assert main(small_flags(sample_dir, tmp_path, *flags)) == 0
        assert {child.pid for child in multiprocessing.active_children()} <= before
    finally:
        gc.enable()


@pytest.mark.slow
def test_a_profile_and_the_peak_memory(whole: Callable[[str], Path]) -> None:
    folder = whole("many states")
    assert "profile of 2 steps: " in (folder / "logs" / "train.log").read_text()
    trace = json.loads((folder / "logs" / "profile.json").read_text())
    assert any(event.get("name") == "aten::mm" for event in trace["traceEvents"])
    results = json.loads((folder / "results" / "training_results.json").read_text())
    assert results["peak_memory_gb"]["process"] > 0.1


@pytest.mark.slow
def test_a_batch_that_does_not_fit_is_trained_in_micro_batches(
    sample_dir: Path, tmp_path: Path, small: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    flags = ["--num_epochs", "1", "--precision", "fp32", "--gradient_checkpointing"]
    losses = []
    for name in ("whole", "parts"):
        if name == "parts":
            small.setattr(memory, "free_memory", lambda device: int(2.4e7))
        assert main(small_flags(sample_dir, tmp_path / name, *flags)) == 0
        losses.append(lines_of(tmp_path / name / "logs" / "history.jsonl")[1]["train_loss"])
        assert re.search(r"peak memory: \d+\.\d GB \(process\)", capsys.readouterr().out)
    assert losses[0] == pytest.approx(losses[1], rel=1e-5)
    log = (tmp_path / "parts" / "logs" / "train.log").read_text()
    assert re.search(r"micro-batches of [1-8] of 10 pairs: a pair takes up to \d+\.\d MB", log)
    assert load_checkpoint(RunFiles(tmp_path / "parts").last)["micro_batch_size"] in {1, 2, 4, 8}


@pytest.mark.slow
def test_one_validation_image_is_said_to_say_nothing(
    tmp_path: Path, sample_dir: Path, small: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    index = json.loads((sample_dir / "data.json").read_text())[:12]
    for row in index:
        row["image_path"] = str(sample_dir / row["image_path"])
    (tmp_path / "data.json").write_text(json.dumps(index))
    flags = small_flags(tmp_path / "data.json", tmp_path / "run", "--val_split", "0.01", "--num_epochs", "1")
    assert main(flags) == 0
    captured = capsys.readouterr()
    assert "1 validation image says nothing: its recall is 100%" in captured.err
    assert "1 validation image cannot tell epochs apart" in captured.out
    assert "lower --learning_rate" not in captured.out
