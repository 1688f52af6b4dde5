"""What a run reads: commands are not run unasked, and a resumed run goes on with the data that it had."""

import json
import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from cliptune.data.pairs import load_pairs
from cliptune.data.snapshot import Snapshot
from cliptune.data.table import SPLITS
from cliptune.model.checkpoint_file import load_checkpoint, save_checkpoint
from cliptune.preprocess.decode import read_bytes
from cliptune.runs.data import earlier_data, found_again, located
from cliptune.settings import Config
from data_loader import main as data_loader_main
from evaluation import main as evaluation_main
from tests.helpers.datasets import make_chinese_clip, make_images, make_index, make_parquet
from tests.helpers.photos import make_with_copies
from tests.helpers.runs import SMALL, assert_same, small_runs
from train import main

FLAGS = [*SMALL, "--precision", "fp32"]


@pytest.fixture(scope="module")
def finished(sample_dir: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("finished")
    with small_runs() as patch:
        patch.chdir(folder)
        shutil.copytree(sample_dir, folder / "data")
        assert main(["--data_dir", "data", "--output_dir", "run", "--num_epochs", "1", *FLAGS]) == 0
    return folder


@pytest.fixture
def run(finished: Path, tmp_path: Path, small: pytest.MonkeyPatch) -> Path:
    """A run of one epoch, on data of its own."""
    shutil.copytree(finished, tmp_path, dirs_exist_ok=True)
    for path in (tmp_path / "run" / "model-checkpoint").glob("*.pth"):
        content = load_checkpoint(path)
        content["config"]["data"]["data_dir"] = str(tmp_path / "data")
        save_checkpoint(path, {**content, "folder": str(tmp_path)})
    small.chdir(tmp_path)
    return tmp_path / "run"


def resume(*flags: str) -> int:
    return main(["--resume", "--output_dir", "run", "--num_epochs", "2", *flags])


def stored(run: Path, name: str = "last_model.pth") -> dict[str, Any]:
    return load_checkpoint(run / "model-checkpoint" / name)


def records_of(folder: Path) -> list[dict[str, Any]]:
    records: list[dict[str, Any]] = json.loads((folder / "data.json").read_text())
    return records


def write_records(folder: Path, records: list[dict[str, Any]]) -> None:
    (folder / "data.json").write_text(json.dumps(records))


def cut(folder: Path) -> None:
    write_records(folder, records_of(folder)[:20])


def add(folder: Path) -> None:
    shutil.copytree(folder / "images", folder / "more")
    for path in (folder / "more").iterdir():
        path.write_bytes(path.read_bytes() + b" ")
    records = records_of(folder)
    write_records(folder, records + [{**r, "image_path": "more/" + Path(r["image_path"]).name} for r in records[:9]])


def redraw(folder: Path) -> None:
    images = sorted((folder / "images").iterdir())
    images[0].write_bytes(images[1].read_bytes())


def swap_captions(folder: Path) -> None:
    records = records_of(folder)
    records[0]["caption"], records[1]["caption"] = records[1]["caption"], records[0]["caption"]
    write_records(folder, records)


@pytest.mark.parametrize(
    ("change", "told"),
    [(cut, "40 images gone"), (add, "9 images new"), (redraw, "1 image changed"), (swap_captions, "other captions in")],
)
def test_other_data_is_refused(
    run: Path, change: Callable[[Path], None], told: str, capsys: pytest.CaptureFixture[str]
) -> None:
    before = (run / "model-checkpoint" / "last_model.pth").read_bytes()
    change(run.parent / "data")
    assert resume() == 2
    error = capsys.readouterr().err.splitlines()[-1]
    assert "data is not the data of the run that is resumed: " in error and told in error
    assert "--allow_data_change" in error
    assert (run / "model-checkpoint" / "last_model.pth").read_bytes() == before


@pytest.mark.slow
def test_data_that_moved_is_the_same(run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    shutil.copytree(run, tmp_path / "unmoved")
    assert main(["--resume", "--output_dir", "unmoved", "--num_epochs", "2"]) == 0
    shutil.move(tmp_path / "data", tmp_path / "moved")
    capsys.readouterr()
    assert resume() == 2
    error = capsys.readouterr().err.splitlines()[-1]
    assert f"the data of the run that is resumed is not there: {tmp_path / 'data'} does not exist" in error
    assert "--data_dir, --image_dir and --val_data name where it lies now" in error
    assert not (tmp_path / "data").exists()
    assert resume("--data_dir", "moved") == 0
    assert_same(stored(run)["model_state_dict"], stored(tmp_path / "unmoved")["model_state_dict"])


@pytest.mark.slow
def test_from_another_folder_no_sample_data_is_made(
    run: Path, tmp_path: Path, small: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    state = stored(run)
    state["config"]["data"]["data_dir"] = "./data"
    save_checkpoint(run / "model-checkpoint" / "last_model.pth", state)
    elsewhere = tmp_path / "elsewhere"
    elsewhere.mkdir()
    small.chdir(elsewhere)
    assert main(["--resume", "--output_dir", str(run), "--num_epochs", "2"]) == 2
    assert "is not there" in capsys.readouterr().err
    assert not list(elsewhere.iterdir())
    # another set that lies there
    shutil.copytree(tmp_path / "data", elsewhere / "data")
    cut(elsewhere / "data")
    assert main(["--resume", "--output_dir", str(run), "--num_epochs", "2"]) == 2
    assert "40 images gone" in capsys.readouterr().err


@pytest.mark.slow
def test_edits_of_the_config_file_that_a_resumed_run_ignores_are_named(
    run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "config.json").write_text(json.dumps({"training": {"batch_size": 20, "weight_decay": 0.01}}))
    assert resume() == 0
    error = capsys.readouterr().err
    assert "of the config file it does not use training.batch_size 20 (it is 10). What may change" in error
    # the same file as before is no edit
    assert main(["--data_dir", "data", "--output_dir", "run", "--num_epochs", "1", *FLAGS]) == 0
    capsys.readouterr()
    assert resume() == 0
    assert "config file" not in capsys.readouterr().err


def hostile(run: Path, command: str, key: str) -> None:
    state = stored(run)
    state["config"]["data"][key] = command
    save_checkpoint(run / "model-checkpoint" / "last_model.pth", state)


@pytest.mark.slow
@pytest.mark.parametrize("key", ["data_dir", "val_data"])
@pytest.mark.parametrize("form", ["pipe:{}", "{{data/x.tar,pipe:{}}}", "PIPE:{}"])
def test_no_file_runs_a_command(run: Path, tmp_path: Path, key: str, form: str) -> None:
    command = form.format("touch canary; cat x.tar")
    hostile(run, command, key)
    checkpoint = str(run / "model-checkpoint" / "last_model.pth")
    assert resume() == 2
    assert main(["--resume", checkpoint]) == 2
    assert evaluation_main(["--checkpoint", checkpoint, "--output_dir", "evaluated"]) == 2
    (tmp_path / "config.json").write_text(json.dumps({"data": {"data_dir": "data", key: command}}))
    assert main([*FLAGS, "--output_dir", "new"]) == 2
    assert main([*FLAGS, "--output_dir", "new", "--val_data", command]) == 2
    assert not (tmp_path / "canary").exists()
    if form == "pipe:{}":  # what a person has typed is run
        assert main([*FLAGS, "--output_dir", "new", "--data_dir", command, "--val_data", "data"]) == 2
        assert (tmp_path / "canary").exists()


@pytest.mark.slow
def test_a_run_goes_on_and_is_evaluated_from_any_folder(
    finished: Path, tmp_path: Path, small: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """The run was started with `--data_dir data`; the checkpoint says which folder that was in."""
    small.chdir(tmp_path)
    shutil.copytree(finished / "run", tmp_path / "copy")
    assert evaluation_main(["--checkpoint", str(finished / "run"), "--num_workers", "0"]) == 0
    assert "6 images, 12 texts" in capsys.readouterr().out
    assert main(["--resume", "copy", "--num_epochs", "2"]) == 0
    assert stored(tmp_path / "copy")["epoch"] == 2


@pytest.mark.slow
def test_a_project_that_moved_as_a_whole_goes_on_with_its_own_data(
    finished: Path, tmp_path: Path, small: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    for name in ("before", "after"):
        shutil.copytree(finished, tmp_path / name)
    small.chdir(tmp_path / "before")
    assert main(["--resume", "--output_dir", "run", "--num_epochs", "2", "--data_dir", "data"]) == 0
    shutil.rmtree(tmp_path / "after" / "run")
    shutil.move(tmp_path / "before" / "run", tmp_path / "after" / "run")
    shutil.rmtree(tmp_path / "before")
    small.chdir(tmp_path / "after")
    capsys.readouterr()
    assert main(["--resume", "--output_dir", "run", "--num_epochs", "3"]) == 0
    assert f"data {tmp_path / 'after' / 'data'}" in capsys.readouterr().err
    assert evaluation_main(["--checkpoint", "run", "--num_workers", "0"]) == 0


@pytest.mark.slow
def test_a_run_that_went_on_from_elsewhere_still_finds_its_data_when_its_project_moves(
    finished: Path, tmp_path: Path, small: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    shutil.copytree(finished, tmp_path / "before")
    small.chdir(tmp_path / "before")
    assert main([*FLAGS, "--data_dir", "data", "--output_dir", "run", "--num_epochs", "1"]) == 0
    (tmp_path / "elsewhere").mkdir()
    small.chdir(tmp_path / "elsewhere")
    assert main(["--resume", str(tmp_path / "before" / "run"), "--num_epochs", "2"]) == 0
    shutil.move(tmp_path / "before", tmp_path / "after")
    small.chdir(tmp_path / "after")
    capsys.readouterr()
    assert main(["--resume", "run", "--num_epochs", "3"]) == 0
    assert f"data {tmp_path / 'after' / 'data'}" in capsys.readouterr().err


def test_each_of_the_shards_that_are_joined_is_found_again(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("before", "after"):
        (tmp_path / name / "b").mkdir(parents=True)
        for shard in ("a.tar", "b/00.tar"):
            (tmp_path / name / shard).touch()
    monkeypatch.chdir(tmp_path / "before")
    stored_config = located(Config.model_validate({"data": {"data_dir": "a.tar::b/{00..00}.tar"}}))
    before, after = str(tmp_path / "before"), str(tmp_path / "after")
    assert stored_config.data.data_dir == f"{before}/a.tar::{before}/b/{{00..00}}.tar"
    shutil.rmtree(before)
    monkeypatch.chdir(after)
    assert found_again(stored_config, before).data.data_dir == f"{after}/a.tar::{after}/b/{{00..00}}.tar"


def test_a_folder_without_a_run_is_no_run_to_resume(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["--resume", str(tmp_path)]) == 2
    assert f"--resume: {tmp_path} holds no run's model-checkpoint/last_model.pth" in capsys.readouterr().err


@pytest.mark.slow
@pytest.mark.parametrize("form", ["parquet", "chinese-clip"])
def test_images_inside_other_files_train_as_files_do_and_may_move(
    form: str, tmp_path: Path, small: pytest.MonkeyPatch
) -> None:
    small.chdir(tmp_path)
    for split, first, number in (("train", 0, 30), ("val", 30, 8)):
        if form == "chinese-clip":
            make_chinese_clip(tmp_path / "data", split, number, first=first)
        else:
            make_parquet(tmp_path / "data" / f"{split}.parquet", number, first=first, rows_per_group=7)
    pairs = load_pairs("data")
    rows = []
    for row, path in enumerate(pairs.paths):
        image = tmp_path / "files" / f"{row:03}.png"
        image.parent.mkdir(exist_ok=True)
        image.write_bytes(read_bytes(path))
        rows.append({"image": image.name, "caption": pairs.captions[row], "split": SPLITS[pairs.splits[row]]})
    make_index(tmp_path / "files", rows)
    flags = [*FLAGS, "--num_epochs", "1", "--num_workers", "2"]
    assert main(["--data_dir", "files", "--output_dir", "plain", *flags]) == 0
    assert main(["--data_dir", "data", "--output_dir", "run", "--cache_images", "true", *flags]) == 0
    models = [stored(tmp_path / run)["model_state_dict"] for run in ("plain", "run")]
    assert_same(models[1], models[0])
    shutil.move("data", "moved")
    assert resume() == 2
    assert resume("--data_dir", "moved") == 0
    assert evaluation_main(["--checkpoint", "run/model-checkpoint/last_model.pth", "--output_dir", "run"]) == 0


@pytest.mark.slow
def test_a_run_on_names_of_folders_is_evaluated_and_resumed(
    tmp_path: Path, small: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    small.chdir(tmp_path)
    names = [f"{split}/{kind}/{i}.png" for split in ("train", "dev") for kind in ("kite", "boat") for i in range(10)]
    make_images(tmp_path / "set", *names)
    flags = ["--data_dir", "set", "--output_dir", "run", "--num_epochs", "1", *FLAGS]
    assert main(flags) == 2
    assert "train: 20 images and no captions: " in (error := capsys.readouterr().err)
    assert "--captions_from folder (here 'boat')" in error
    assert main([*flags, "--captions_from", "folder", "--caption_template", "a drawing of a {}"]) == 0
    checkpoint = ["--checkpoint", "run/model-checkpoint/last_model.pth"]
    assert evaluation_main(checkpoint) == 0
    assert evaluation_main([*checkpoint, "--data_dir", "set", "--captions_from", "folder"]) == 0
    assert resume() == 0
    shutil.copytree(tmp_path / "set/dev", tmp_path / "other")
    make_index(tmp_path, [{"image": f"other/kite/{i}.png", "caption": "a kite"} for i in range(10)], "other.json")
    for val_data in ("other", "other.json"):  # names are for folders
        val = ["--val_data", val_data, "--output_dir", val_data.replace(".", "-")]
        assert main([*flags, "--captions_from", "folder", *val]) == 0
        checkpoint = ["--checkpoint", f"{val[-1]}/model-checkpoint/last_model.pth"]
        assert evaluation_main(checkpoint) == 0


def test_wrong_settings_of_names_are_told(
    small: pytest.MonkeyPatch, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    small.chdir(tmp_path)
    make_images(tmp_path / "set", "kite/1.png")
    for flags, message in [
        (["--captions_from", "classes"], "captions_from"),
        (["--captions_from", "folder", "--caption_template", "a photo"], "caption_template 'a photo' has no {}"),
        (["--caption_template", "a {}"], "needs captions_from folder"),
    ]:
        for stage in (main, data_loader_main):
            try:
                assert stage(["--data_dir", "set", *flags]) == 2
            except SystemExit as stopped:
                assert stopped.code == 2
            assert message in capsys.readouterr().err


def val_names(run: Path) -> set[str]:
    return {Path(path).name for path in stored(run)["val_images"]}


def images_without_their_copies(names: set[str]) -> list[int]:
    return [
        i for i in range(3) if len({name in names for name in (f"{i:02}.png", f"crop-{i}.png", f"jpeg-{i}.jpg")}) > 1
    ]


@pytest.mark.slow
def test_a_run_has_the_split_that_it_began_with(
    tmp_path: Path, small: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = make_with_copies(tmp_path / "data")
    small.chdir(tmp_path)
    flags = ["--data_dir", "data", "--num_epochs", "1", "--val_split", "0.3", "--seed", "1", *FLAGS]
    assert main([*flags, "--output_dir", "run"]) == 0
    assert "near-duplicates" in capsys.readouterr().err
    before = val_names(Path("run"))
    assert not images_without_their_copies(before)
    # as of an older version, which split by group alone
    assert main([*flags, "--output_dir", "old", "--near_duplicates", "report"]) == 0
    assert "near-duplicates of train images" in capsys.readouterr().err
    split_by_group = val_names(Path("old"))
    assert images_without_their_copies(split_by_group)
    content = stored(Path("old"))
    for name in ("near_duplicates", "split_seed"):
        del content["config"]["data"][name]
    save_checkpoint(Path("old/model-checkpoint/last_model.pth"), content)
    finder = "cliptune.runs.copies.look_for_near_duplicates"
    small.setattr(finder, lambda *_, **__: pytest.fail("nothing is to be drawn"))
    for run, names in (("run", before), ("old", split_by_group)):
        assert main(["--resume", "--output_dir", run, "--num_epochs", "2"]) == 0
        assert val_names(Path(run)) == names
        assert (
            evaluation_main(["--checkpoint", run, "--data_dir", str(folder), "--split", "val", "--output_dir", run])
            == 0
        )
        evaluated = json.loads(Path(run, "results/evaluation_results.json").read_text())
        assert evaluated["num_images"] == len(names)


@pytest.mark.slow
def test_new_copies_of_what_a_run_has_join_its_sides(tmp_path: Path, small: pytest.MonkeyPatch) -> None:
    folder = make_with_copies(tmp_path / "data")
    small.chdir(tmp_path)
    records = records_of(folder)
    write_records(folder, [record for record in records if not record["image"].startswith(("crop", "jpeg", "same"))])
    assert main(["--data_dir", "data", "--output_dir", "run", "--num_epochs", "1", "--val_split", "0.6", *FLAGS]) == 0
    before = val_names(Path("run"))
    assert before & {"00.png", "01.png", "02.png"}
    write_records(folder, records)
    assert resume("--allow_data_change") == 0
    after = val_names(Path("run"))
    assert before < after and not images_without_their_copies(after)


def test_what_a_run_trained_on_before_its_data_changed_is_remembered(run: Path) -> None:
    content = stored(run)
    now = {split: Snapshot.from_dict(values) for split, values in content["data"].items()}
    assert earlier_data(Config(), content, now) == []
    train = now["train"]
    changed = {**now, "train": replace(train, paths=train.paths[1:], files=train.files[1:])}
    assert earlier_data(Config(), content, changed) == [content["data"]["train"]]
    again = {**content, "earlier_data": [content["data"]["val"]]}
    assert earlier_data(Config(), again, changed) == [content["data"]["val"], content["data"]["train"]]


@pytest.mark.slow
def test_seeds_are_compared_on_one_split(run: Path, tmp_path: Path, small: pytest.MonkeyPatch) -> None:
    def validated(name: str, *flags: str) -> set[str]:
        assert main(["--data_dir", "data", "--output_dir", name, "--num_epochs", "1", *FLAGS, *flags]) == 0
        return val_names(Path(name))

    first = validated("1", "--seed", "1")
    assert validated("2", "--seed", "2", "--split_seed", "1") == first
    assert validated("3", "--seed", "2") != first
