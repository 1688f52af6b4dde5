import json
import os
import re
import signal
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from PIL import Image

from clip_model import CLIPModel, MultimodalTrainer
from cliptune.model import weights as pretrained
from cliptune.model.architectures import ARCHITECTURES
from cliptune.model.checkpoint_file import load_checkpoint
from cliptune.model.self_test import TEXTS
from cliptune.results import RECALL_KEYS
from cliptune.training import memory
from cliptune.training.checkpoint import RunFiles
from data_loader import ImageTextDataset
from evaluation import Evaluation, evaluate
from tests.helpers.models import SMALL_VIT
from train import main

FLAGS = ["--model_name", "ViT-Ti/32", "--batch_size", "18", "--learning_rate", "1e-3"]


def flags_for(data_dir: Path, output_dir: Path, *more: str) -> list[str]:
    return ["--data_dir", str(data_dir), "--output_dir", str(output_dir), *FLAGS, *more]


def test_a_run_leaves_what_the_readme_says(trained_dir: Path) -> None:
    for name in (
        "model-checkpoint/best_model.pth", "model-checkpoint/last_model.pth", "results/training_results.json",
        "results/training_curves.png", "results/model_metrics.png", "logs/train.log", "logs/history.jsonl",
    ):  # fmt: skip
        assert (trained_dir / name).stat().st_size > 0, name
    assert list((trained_dir / "logs" / "tensorboard").glob("events*"))
    results = json.loads((trained_dir / "results" / "training_results.json").read_text())
    assert [entry["epoch"] for entry in results["history"]] == [0, 1, 2]
    assert [entry["step"] for entry in results["history"]] == [0, 3, 6]
    keys = {"epoch", "step", "train_loss", "train_accuracy", "val_loss", "learning_rate", "backbone_learning_rate"}
    assert all(keys | {*RECALL_KEYS, "rsum", "i2t_mean_rank"} <= entry.keys() for entry in results["history"])
    best = results["history"][results["best_epoch"]]
    assert results["metrics"]["rsum"] == best["rsum"] == max(entry["rsum"] for entry in results["history"])
    assert results["baseline"]["rsum"] == results["history"][0]["rsum"]
    assert results["config"]["training"]["batch_size"] == 18
    lines = (trained_dir / "logs" / "history.jsonl").read_text().splitlines()
    assert [json.loads(line)["epoch"] for line in lines] == [0, 1, 2]


def test_the_checkpoint_is_used_as_the_spec_says(trained_dir: Path, sample_dir: Path) -> None:
    path = trained_dir / "model-checkpoint" / "best_model.pth"
    model = CLIPModel.from_checkpoint(path)
    checkpoint = torch.load(path)
    assert isinstance(checkpoint["epoch"], int)
    assert isinstance(checkpoint["global_step"], int)
    other, third = CLIPModel("ViT-Ti/32").eval(), CLIPModel("ViT-Ti/32").eval()
    other.load_state_dict(checkpoint["model_state_dict"])
    third.load_checkpoint(path)
    picture = Image.open(sample_dir / "images" / "scene_00000.png")
    with torch.no_grad():
        expected = model.encode_image(picture)
        assert torch.equal(other.encode_image(picture), expected)
        assert torch.equal(third.encode_image(picture), expected)
        assert torch.matmul(expected, model.encode_text(["a circle", "a star"]).T).shape == (1, 2)
    with pytest.raises(ValueError, match=r"from_checkpoint\(path\) builds the right one"):
        CLIPModel("ViT-Ti/32", 64).load_checkpoint(path)
    with pytest.raises(ValueError, match="not a checkpoint of this toolkit"):
        torch.save({"a": 1}, trained_dir / "x.pth")
        model.load_checkpoint(trained_dir / "x.pth")


@pytest.fixture
def small(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Flags of a run that takes a second, if it draws no figures."""
    monkeypatch.setitem(ARCHITECTURES, SMALL_VIT.name, SMALL_VIT)
    monkeypatch.setattr("train.draw_figures", lambda _: [])
    return ["--model_name", SMALL_VIT.name, "--batch_size", "10", "--num_workers", "0"]


def signal_at(patch: pytest.MonkeyPatch, signals: dict[int, signal.Signals]) -> None:
    """Let signals arrive in the middle of steps, by their numbers."""
    train_step = MultimodalTrainer.train_step

    def step(self: MultimodalTrainer, *arguments: Any) -> Any:
        if self.global_step + 1 in signals:
            os.kill(os.getpid(), signals.pop(self.global_step + 1))
        return train_step(self, *arguments)

    patch.setattr(MultimodalTrainer, "train_step", step)


def assert_same(got: Any, want: Any, place: str = "state") -> None:
    """Compare states bit by bit, but for what differs between two runs of the same settings."""
    if isinstance(want, torch.Tensor):
        assert torch.equal(got, want), place
    elif isinstance(want, dict):
        assert got.keys() == want.keys(), place
        for key in want.keys() - {"started_at", "output_dir", "resume", "throughput"}:
            assert_same(got[key], want[key], f"{place}.{key}")
    else:
        assert got == want, place


def assert_same_runs(got: Path, want: Path) -> None:
    for name in ("model-checkpoint/last_model.pth", "model-checkpoint/best_model.pth"):
        assert_same(load_checkpoint(got / name), load_checkpoint(want / name), name)
    assert (got / "logs/history.jsonl").read_text() == (want / "logs/history.jsonl").read_text()
    histories = [
        json.loads((folder / "results/training_results.json").read_text())["history"] for folder in (got, want)
    ]
    assert histories[0] == histories[1]


@pytest.mark.parametrize(
    "more",
    [
        ["--augment", "color", "--num_workers", "0", "--micro_batch_size", "4"],
        ["--freeze_tower", "text", "--augment", "crop", "--num_workers", "2"],
        ["--freeze_tower", "image", "--augment", "color", "--feature_views", "2"],
        ["--freeze_backbone", "--augment", "crop", "--feature_views", "2"],
    ],
    ids=lambda more: " ".join(more).replace("--", ""),
)
def test_a_run_that_is_stopped_and_resumed_is_an_unbroken_one(
    sample_dir: Path,
    tmp_path: Path,
    small: list[str],
    more: list[str],
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    flags = [*small, "--num_epochs", "2", "--log_interval", "2", *more]
    assert main(flags_for(sample_dir, tmp_path / "whole", *flags)) == 0
    capsys.readouterr()
    broken = tmp_path / "broken"
    # in the middle of an epoch, in its last step, and in the step after a stop
    signal_at(monkeypatch, {2: signal.SIGTERM, 6: signal.SIGINT, 7: signal.SIGTERM})
    assert main(flags_for(sample_dir, broken, *flags)) == 143
    for code, step in ((130, 2), (143, 6), (0, 7)):
        assert f"at epoch {1 if step < 7 else 2}, step {step}, which are saved" in capsys.readouterr().err
        assert main(["--output_dir", str(broken), "--resume"]) == code
        output = capsys.readouterr()
        file = broken / "model-checkpoint" / "last_model.pth"
        assert f"resuming at epoch {1 if step < 7 else 2}, step {step} from {file}\n" in output.err
        print(output.err, file=sys.stderr)
    assert_same_runs(broken, tmp_path / "whole")


def test_every_epoch_and_every_so_many_steps_are_saved(sample_dir: Path, tmp_path: Path, small: list[str]) -> None:
    flags = [*small, "--num_epochs", "2", "--checkpoint_every", "4", "--keep_checkpoints", "9"]
    assert main(flags_for(sample_dir, tmp_path, *flags)) == 0
    files = RunFiles(tmp_path)
    states = [load_checkpoint(path) for path in reversed(files.states())]
    assert [(state["epoch"], state["global_step"]) for state in states] == [(0, 0), (1, 4), (1, 6), (2, 8), (2, 12)]
    (tmp_path / "copy.pth").write_bytes(files.earlier(4).read_bytes())
    assert main(["--resume", str(tmp_path / "copy.pth"), "--output_dir", str(tmp_path / "again")]) == 0
    assert_same_runs(tmp_path / "again", tmp_path)


def test_a_run_goes_on_from_the_newest_state_that_is_intact(
    sample_dir: Path,
    tmp_path: Path,
    small: list[str],
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    flags = [*small, "--num_epochs", "2", "--checkpoint_every", "2"]
    assert main(flags_for(sample_dir, tmp_path / "whole", *flags)) == 0
    signal_at(monkeypatch, {5: signal.SIGTERM})
    broken = tmp_path / "broken"
    assert main(flags_for(sample_dir, broken, *flags)) == 143
    files = RunFiles(broken)
    with files.last.open("r+b") as file:
        file.seek(-1000, os.SEEK_END)
        byte = file.read(1)[0]
        file.seek(-1000, os.SEEK_END)
        file.write(bytes([byte ^ 4]))
    capsys.readouterr()
    assert main(["--resume", str(files.last)]) == 2
    assert "last_model.pth: damaged" in capsys.readouterr().err
    assert main(flags_for(sample_dir, tmp_path / "other", *flags, "--pretrained", str(files.last))) == 2
    assert "last_model.pth: damaged" in capsys.readouterr().err
    assert main(["--resume", "--output_dir", str(broken)]) == 0
    error = capsys.readouterr().err
    assert "last_model.pth: damaged: its content is not what was written" in error
    assert f"resuming at epoch 1, step 4 from {files.earlier(4)}\n" in error
    assert_same_runs(broken, tmp_path / "whole")


def test_nothing_to_resume_is_a_run_from_the_beginning(
    sample_dir: Path,
    tmp_path: Path,
    small: list[str],
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    flags = flags_for(sample_dir, tmp_path, *small, "--num_epochs", "1", "--resume")
    patched = pytest.MonkeyPatch()
    patched.setattr("train.evaluate", lambda *_, **__: os.kill(os.getpid(), signal.SIGINT))
    assert main(flags) == 130
    patched.undo()
    error = capsys.readouterr().err
    assert f"nothing to resume in {tmp_path}: starting from the beginning" in error
    assert "stopped by SIGINT before anything was trained" in error
    assert main(flags) == 0
    assert "starting from the beginning" in capsys.readouterr().err


def test_a_signal_during_validation_keeps_the_epoch(
    sample_dir: Path,
    tmp_path: Path,
    small: list[str],
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    flags = [*small, "--num_epochs", "2"]
    assert main(flags_for(sample_dir, tmp_path / "whole", *flags)) == 0
    calls = iter(range(9))

    def interrupted(*arguments: Any, **options: Any) -> Evaluation:
        if next(calls) == 1:
            os.kill(os.getpid(), signal.SIGTERM)
            raise AssertionError("went on")
        return evaluate(*arguments, **options)

    monkeypatch.setattr("train.evaluate", interrupted)
    broken = tmp_path / "broken"
    assert main(flags_for(sample_dir, broken, *flags)) == 143
    monkeypatch.chdir(broken)  # the folder may be another one's current one
    steps: list[int] = []
    train_step = MultimodalTrainer.train_step

    def noted(self: MultimodalTrainer, *arguments: Any) -> Any:
        steps.append(self.global_step)
        return train_step(self, *arguments)

    monkeypatch.setattr(MultimodalTrainer, "train_step", noted)
    assert main(["--resume"]) == 0
    assert "resuming at epoch 1, step 6 from model-checkpoint/last_model.pth" in capsys.readouterr().err
    assert steps == [6, 7, 8, 9, 10, 11]
    assert_same_runs(broken, tmp_path / "whole")


def test_a_resumed_run_has_its_own_settings_and_says_which_changed(
    sample_dir: Path, tmp_path: Path, small: list[str], capsys: pytest.CaptureFixture[str]
) -> None:
    flags = [*small, "--num_epochs", "1", "--precision", "fp32", "--device", "cpu"]
    assert main(flags_for(sample_dir, tmp_path, *flags)) == 0
    capsys.readouterr()
    assert main(["--output_dir", str(tmp_path), "--resume", "--num_epochs", "2", "--checkpoint_every", "3"]) == 0
    error = capsys.readouterr().err
    assert "device cpu, precision fp32" in error
    assert "resumed with --num_epochs 2\n" in error
    assert "resumed with --checkpoint_every 3\n" in error
    assert "resumed with --output_dir" not in error
    assert load_checkpoint(RunFiles(tmp_path).last)["epoch"] == 2


def test_a_full_disk_ends_a_run_that_can_go_on(
    sample_dir: Path,
    tmp_path: Path,
    small: list[str],
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    flags = [*small, "--num_epochs", "2", "--checkpoint_every", "2"]
    assert main(flags_for(sample_dir, tmp_path / "whole", *flags)) == 0
    broken = tmp_path / "broken"
    room = iter([2**40] * 4)  # best and last of epoch 0, steps 2 and 4
    with monkeypatch.context() as patch:
        patch.setattr(
            "cliptune.model.checkpoint_file.shutil.disk_usage", lambda _: SimpleNamespace(free=next(room, 1000))
        )
        capsys.readouterr()
        assert main(flags_for(sample_dir, broken, *flags)) == 2
    last_line = capsys.readouterr().err.splitlines()[-1]
    assert last_line.startswith(f"train.py: error: no room for {broken}/model-checkpoint/")
    assert "0.00 GB are free" in last_line
    assert [load_checkpoint(path)["global_step"] for path in RunFiles(broken).states()] == [4, 4, 2]  # a second name
    assert not list((broken / "model-checkpoint").glob(".*"))
    assert main(["--resume", "--output_dir", str(broken)]) == 0
    assert_same_runs(broken, tmp_path / "whole")


def test_a_second_run_in_a_folder_is_refused_before_it_changes_anything(
    trained_dir: Path, sample_dir: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    names = sorted(trained_dir.rglob("*"))
    with RunFiles(trained_dir).locked():
        for flags in ([], ["--resume"], ["--resume", str(RunFiles(trained_dir).last)]):
            assert main(flags_for(sample_dir, trained_dir, *flags)) == 2
            assert f"train.py: error: another run is writing to {trained_dir}" in capsys.readouterr().err
    assert sorted(trained_dir.rglob("*")) == names


def test_a_state_that_is_not_finite_is_not_saved(
    sample_dir: Path,
    tmp_path: Path,
    small: list[str],
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    train_step = MultimodalTrainer.train_step

    def diverging(self: MultimodalTrainer, *arguments: Any) -> Any:
        if self.global_step == 2:
            with torch.no_grad():
                next(self.model.parameters()).fill_(float("nan"))
        return train_step(self, *arguments)

    monkeypatch.setattr(MultimodalTrainer, "train_step", diverging)
    assert main(flags_for(sample_dir, tmp_path, *small, "--num_epochs", "1", "--checkpoint_every", "1")) == 1
    assert "step 3 has a loss of nan" in capsys.readouterr().err
    assert load_checkpoint(RunFiles(tmp_path).last)["global_step"] == 2


def test_a_later_run_with_frozen_towers_runs_no_tower(
    sample_dir: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    flags = ["--freeze_backbone", "--num_epochs", "2", "--precision", "fp32"]
    shared = ["--cache_dir", str(tmp_path / "kept")]
    assert main(flags_for(sample_dir, tmp_path / "plain", *flags, "--feature_views", "0")) == 0
    assert not (tmp_path / "plain" / "cache").exists()
    assert main(flags_for(sample_dir, tmp_path / "first", *flags, *shared)) == 0

    for name in ("run_image_tower", "run_text_tower"):
        run_tower = getattr(CLIPModel, name)

        def for_the_proof_alone(self: CLIPModel, inputs: torch.Tensor, run_tower: Any = run_tower) -> Any:
            assert len(inputs) == len(TEXTS), "a tower ran"
            return run_tower(self, inputs)

        monkeypatch.setattr(CLIPModel, name, for_the_proof_alone)
    assert main(flags_for(sample_dir, tmp_path / "second", *flags, *shared)) == 0
    plain, first, second = (
        [json.loads(line) for line in (tmp_path / name / "logs/history.jsonl").read_text().splitlines()]
        for name in ("plain", "first", "second")
    )
    assert first == second
    assert "towers 0.001 (image and text frozen)" in (tmp_path / "first" / "logs" / "train.log").read_text()
    assert len(first) == len(plain) == 3
    for entry, expected in zip(first[1:], plain[1:], strict=True):
        for key in ("train_loss", "val_loss", "positive_similarity", "learning_rate"):
            assert entry[key] == pytest.approx(expected[key], rel=1e-4), key


def test_resume_refuses_what_may_not_change_and_misses_nothing(
    trained_dir: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    last = str(trained_dir / "model-checkpoint" / "last_model.pth")
    assert main(["--resume", last, "--batch_size", "7", "--output_dir", str(tmp_path)]) == 2
    assert "--batch_size cannot change when a run is resumed" in capsys.readouterr().err
    assert main(["--resume", "gone.pth"]) == 2
    assert "no such checkpoint: gone.pth" in capsys.readouterr().err


def test_an_earlier_run_is_set_aside(
    trained_dir: Path, sample_dir: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    flags = flags_for(sample_dir, tmp_path, "--num_epochs", "1", "--freeze_backbone")
    assert main(flags) == 0
    started = json.loads((tmp_path / "results/training_results.json").read_text())["started_at"].replace(":", "-")
    (tmp_path / "results" / "mine.txt").touch()
    capsys.readouterr()
    assert main([*flags, "--resume"]) == 0  # a finished run that is resumed moves nothing
    assert not (tmp_path / "previous").exists()
    assert main(flags) == 0
    assert f"previous/{started}" in capsys.readouterr().err
    assert (tmp_path / "previous" / started / "model-checkpoint" / "best_model.pth").exists()
    assert (tmp_path / "results" / "mine.txt").exists()


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--batch_sz", "3"], "did you mean --batch_size?"),
        (["--data_dir", "gone"], "`python data_loader.py` makes sample data"),
        (["--device", "cuda:7"], "CUDA device(s); use --device cpu"),
        (["--device", "toaster"], "no such device: toaster"),
        (["--config", "gone.json"], "no such file: gone.json"),
        (["--precision", "fp16", "--device", "cpu"], "--precision fp16 needs a CUDA device"),
    ],
)
def test_errors_are_one_line_and_code_2(
    flags: list[str], message: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    assert main(flags) == 2
    error = capsys.readouterr().err
    assert message in error
    assert len(error.splitlines()) == 1


def test_wrong_model_names_and_missing_weights(
    sample_dir: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    assert main(["--data_dir", str(sample_dir), "--model_name", "ViTB32"]) == 2
    assert "did you mean ViT-B/32?" in capsys.readouterr().err
    monkeypatch.setattr(pretrained, "published_url", lambda name: "http://127.0.0.1:9/" + "0" * 64 + "/x.pt")
    monkeypatch.setattr(pretrained, "HUB_REPOS", {})
    monkeypatch.setenv("HOME", str(tmp_path))
    assert main(["--data_dir", str(sample_dir)]) == 2
    error = capsys.readouterr().err.splitlines()[-1]
    assert "/x.pt cannot be had (Connection refused). Put x.pt" in error
    assert "--pretrained none" in error


def test_sample_data_is_made_only_where_no_folder_was_named(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "data").mkdir()
    (tmp_path / "data" / ".gitkeep").touch()
    assert main(["--data_dir", "./data", *FLAGS]) == 2
    assert "holds no data" in capsys.readouterr().err
    monkeypatch.setattr("train.SAMPLE_SIZE", 40)
    assert main([*FLAGS, "--num_epochs", "1"]) == 0
    assert "made 40 sample images" in capsys.readouterr().err
    assert len(json.loads((tmp_path / "data" / "data.json").read_text())) == 40


def test_a_worse_fine_tuning_is_seen_and_not_kept(
    trained_dir: Path,
    sample_dir: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    drop = iter((0.0, 50.0))

    def worse_each_time(*args: Any, **kwargs: Any) -> Evaluation:
        outcome = evaluate(*args, **kwargs)
        return outcome._replace(metrics={**outcome.metrics, "rsum": 300 - next(drop)})

    monkeypatch.setattr("train.evaluate", worse_each_time)
    start = str(trained_dir / "model-checkpoint" / "best_model.pth")
    flags = ["--pretrained", start, "--backbone_lr_scale", "1", "--learning_rate", "1e-3", "--num_epochs", "1"]
    assert main(["--data_dir", str(sample_dir), "--output_dir", str(tmp_path), *flags]) == 0
    captured = capsys.readouterr()
    assert "no epoch beat the model as loaded" in captured.out
    assert "change --backbone_lr_scale" in captured.err
    assert load_checkpoint(tmp_path / "model-checkpoint" / "best_model.pth")["epoch"] == 0


def test_cached_images_give_the_same_run_and_its_log_says_how_long_it_waited(sample_dir: Path, tmp_path: Path) -> None:
    histories = []
    for name, flags in (("plain", []), ("kept", ["--cache_images"]), ("fast", ["--fast_decode"])):
        assert main([*flags_for(sample_dir, tmp_path / name, "--num_epochs", "1"), *flags]) == 0
        histories.append((tmp_path / name / "logs" / "history.jsonl").read_text())
        log = (tmp_path / name / "logs" / "train.log").read_text()
        assert re.search(r"epoch 1: .* s, \d+\.\d pairs/s, waited \d+% for data", log)
    assert histories[0] == histories[1] == histories[2]  # the sample pictures are PNG files
    kept = list((tmp_path / "kept" / "cache" / "images").iterdir())
    assert {path.suffix for path in kept} == {".keys", ".rows"}
    assert not (tmp_path / "plain" / "cache").exists()


def test_the_share_of_an_epoch_that_was_waited_for(
    sample_dir: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
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

    monkeypatch.setattr("train.time.perf_counter", clock)
    monkeypatch.setattr("train.time.monotonic", clock)
    monkeypatch.setattr(ImageTextDataset, "__getitem__", takes(1, ImageTextDataset.__getitem__))
    monkeypatch.setattr(MultimodalTrainer, "train_step", takes(54, MultimodalTrainer.train_step))
    assert main([*flags_for(sample_dir, tmp_path), "--num_epochs", "2", "--num_workers", "0"]) == 0
    first, second = re.findall("epoch [12]: .*", (tmp_path / "logs" / "train.log").read_text())
    assert first.endswith(", 216 s, 0.2 pairs/s, waited 25% for data, 0:03:42 left")  # 54 pictures; 6 validate
    assert second.endswith(", 216 s, 0.2 pairs/s, waited 25% for data")


def test_a_profile_and_the_peak_memory(sample_dir: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main([*flags_for(sample_dir, tmp_path), "--num_epochs", "2", "--profile", "2"]) == 0
    assert re.search(r"peak memory: \d+\.\d GB \(process\)", capsys.readouterr().out)
    assert "profile of 2 step(s): " in (tmp_path / "logs" / "train.log").read_text()
    trace = json.loads((tmp_path / "logs" / "profile.json").read_text())
    assert any(event.get("name") == "aten::mm" for event in trace["traceEvents"])
    results = json.loads((tmp_path / "results" / "training_results.json").read_text())
    assert results["peak_memory_gb"]["process"] > 0.1


def test_a_batch_that_does_not_fit_is_trained_in_micro_batches(
    sample_dir: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    flags = ["--num_epochs", "1", "--precision", "fp32", "--gradient_checkpointing"]
    losses = []
    for name in ("whole", "parts"):
        if name == "parts":
            monkeypatch.setattr(memory, "free_memory", lambda device: int(3.1e8))
        assert main(flags_for(sample_dir, tmp_path / name, *flags)) == 0
        lines = (tmp_path / name / "logs" / "history.jsonl").read_text().splitlines()
        losses.append(json.loads(lines[1])["train_loss"])
    assert losses[0] == pytest.approx(losses[1], rel=1e-5)
    log = (tmp_path / "parts" / "logs" / "train.log").read_text()
    assert re.search(r"micro-batches of [1-8] of 18 pairs: a pair takes up to \d+\.\d MB", log)
    state = load_checkpoint(tmp_path / "parts" / "model-checkpoint" / "last_model.pth")
    assert state["micro_batch_size"] in {1, 2, 4, 8}


@pytest.mark.parametrize("skip", ["0", "1"])
def test_a_picture_without_numbers_stops_the_run_or_is_left_out(
    skip: str, sample_dir: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    train_step = MultimodalTrainer.train_step

    def spoil_step_5(self: MultimodalTrainer, images: torch.Tensor, *batch: Any) -> Any:
        images = images.float() * torch.nan if self.global_step == 4 else images
        return train_step(self, images, *batch)

    monkeypatch.setattr(MultimodalTrainer, "train_step", spoil_step_5)
    code = main(flags_for(sample_dir, tmp_path, "--num_epochs", "2", "--skip_nonfinite", skip))
    error = capsys.readouterr().err
    assert "step 5 has a loss of nan" in error
    assert re.search(r"samples: .*/images/scene_000\d\d\.png, .* and 15 more\) and changed no weight", error)
    last = load_checkpoint(tmp_path / "model-checkpoint" / "last_model.pth")
    assert all(value.isfinite().all() for value in last["model_state_dict"].values())
    if skip == "0":
        assert (code, last["epoch"]) == (1, 1)
        assert len(error.splitlines()[-1]) > 100  # one line that holds all of it
    else:
        assert (code, last["epoch"]) == (0, 2)
        assert "left out (1 in a row)" in error
