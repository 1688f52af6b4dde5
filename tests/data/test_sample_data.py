import json
import multiprocessing
import os
import signal
from collections.abc import Callable
from pathlib import Path
from typing import Any
from unittest import mock

import numpy as np
import pytest
from PIL import Image

import data_loader
from cliptune.data.pairs import holds_only_placeholders, load_pairs
from cliptune.data.sample_data import COLOURS, create_sample_dataset, describe, distinct_scenes, render


def files_of(folder: Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in sorted(folder.rglob("*")) if path.is_file()}


def test_a_thousand_samples_have_distinct_captions() -> None:
    captions = [caption for _, both in distinct_scenes(1000) for caption in both]
    assert len(set(captions)) == 2000


def test_same_seed_same_bytes_and_more_samples_change_none(tmp_path: Path) -> None:
    for name, number, seed in (("a", 6, 0), ("b", 6, 0), ("c", 3, 0), ("d", 6, 1)):
        create_sample_dataset(tmp_path / name, number, seed=seed)
    assert files_of(tmp_path / "a") == files_of(tmp_path / "b") != files_of(tmp_path / "d")
    first = files_of(tmp_path / "c")
    assert all(files_of(tmp_path / "a")[name] == first[name] for name in first if name != "data.json")


def test_index_and_caption_files_agree(sample_dir: Path) -> None:
    rows = json.loads((sample_dir / "data.json").read_text())
    assert len(rows) == 60
    for row in rows:
        text = (sample_dir / "captions" / Path(row["image_path"]).name).with_suffix(".txt")
        assert text.read_text().splitlines() == row["caption"]


def count_regions(mask: np.ndarray) -> list[tuple[float, float]]:
    """Return the middle (x, y) of each connected region of a mask."""
    left = {(int(y), int(x)) for y, x in zip(*np.nonzero(mask), strict=True)}
    middles = []
    while left:
        region, todo = [], [left.pop()]
        while todo:
            y, x = todo.pop()
            region.append((x, y))
            near = {(y + 1, x), (y - 1, x), (y, x + 1), (y, x - 1)} & left
            left -= near
            todo += near
        if len(region) < 20:  # specks of smoothed edges
            continue
        middles.append((float(np.mean([x for x, _ in region])), float(np.mean([y for _, y in region]))))
    return middles


@pytest.mark.slow
def test_captions_are_true_of_the_pixels() -> None:
    for scene, captions in distinct_scenes(40, seed=3):
        pixels = np.asarray(render(scene)).astype(int)
        assert tuple(pixels[1, 1]) == COLOURS[scene.background]
        assert all(f"{scene.background} " in caption for caption in captions)
        for group in scene.groups:
            middles = count_regions(np.abs(pixels - COLOURS[group.colour]).sum(-1) < 12)
            assert len(middles) == group.count
            x, y = np.mean([middle[0] for middle in middles]), np.mean([middle[1] for middle in middles])
            words = {"left": x < 90, "right": x > 134, "top": y < 90, "bottom": y > 134}
            assert all(words[word] for word in group.position.split() if word in words), (group, x, y)
            number = {1: "a ", 2: "two ", 3: "three ", 4: "four "}[group.count]
            assert all(f"{number}{group.size} {group.colour} {group.shape}" in caption for caption in captions)


def test_relations_are_true_of_the_pixels() -> None:
    said = set()
    for scene, (_, caption) in distinct_scenes(60):
        assert describe(scene)[1] == caption
        if len(scene.groups) == 1:
            continue
        pixels = np.asarray(render(scene)).astype(int)
        (ys, xs), (ys2, xs2) = (np.nonzero((pixels == COLOURS[g.colour]).all(-1)) for g in scene.groups[:2])
        holds = {
            " to the left of ": xs.max() < xs2.min(),
            " to the right of ": xs.min() > xs2.max(),
            " above ": ys.max() < ys2.min(),
            " below ": ys.min() > ys2.max(),
        }
        [relation] = [words for words in holds if words in caption]
        assert holds[relation], caption
        said.add(relation)
    assert len(said) == 4


def test_it_refuses_to_overwrite(tmp_path: Path) -> None:
    create_sample_dataset(tmp_path / "a", 2)
    with pytest.raises(FileExistsError, match="is there already"):
        create_sample_dataset(tmp_path / "a", 2)
    (tmp_path / "a" / "data.json").unlink()  # what is left is a data set of the directory form: perhaps someone's own
    with pytest.raises(FileExistsError, match="not ours to replace"):
        create_sample_dataset(tmp_path / "a", 2)
    (tmp_path / "b" / "images").mkdir(parents=True)
    (tmp_path / "b" / "images" / "holiday.jpg").touch()
    with pytest.raises(FileExistsError, match=r"holiday\.jpg is not ours"):
        create_sample_dataset(tmp_path / "b", 2)
    with pytest.raises(ValueError, match="at least 1"):
        create_sample_dataset(tmp_path / "c", 0)


def begin_samples(folder: Path, stop: Callable[[], None]) -> None:
    """Begin 8 samples, and stop where the fifth is saved."""
    num_saved = 0
    save = Image.Image.save

    def save_or_stop(*arguments: Any) -> None:
        nonlocal num_saved
        num_saved += 1
        if num_saved == 5:
            stop()
        save(*arguments)

    with mock.patch.object(Image.Image, "save", save_or_stop):
        create_sample_dataset(folder, 8)


def kill_self() -> None:
    os.kill(os.getpid(), signal.SIGKILL)


def press_ctrl_c() -> None:
    raise KeyboardInterrupt


def test_a_killed_creation_is_no_data_set_and_is_begun_afresh(tmp_path: Path) -> None:
    process = multiprocessing.get_context("fork").Process(target=begin_samples, args=(tmp_path / "a", kill_self))
    process.start()
    process.join()
    assert process.exitcode == -signal.SIGKILL
    assert len(list((tmp_path / "a" / "images").iterdir())) == 4
    with pytest.raises(FileNotFoundError, match="holds no data"):
        load_pairs(tmp_path / "a")
    assert holds_only_placeholders(tmp_path / "a")  # so that the stages begin it afresh by themselves
    create_sample_dataset(tmp_path / "a", 2)
    create_sample_dataset(tmp_path / "b", 2)
    assert files_of(tmp_path / "a") == files_of(tmp_path / "b")


def test_ctrl_c_leaves_nothing_but_what_was_there(tmp_path: Path) -> None:
    for name in ("images", "captions"):
        (tmp_path / name).mkdir()
        (tmp_path / name / ".gitkeep").touch()
    before = files_of(tmp_path)
    with pytest.raises(KeyboardInterrupt):
        begin_samples(tmp_path, press_ctrl_c)
    assert files_of(tmp_path) == before
    create_sample_dataset(tmp_path, 2)
    assert len(files_of(tmp_path)) == len(before) + 5


def test_a_signal_leaves_nothing_either(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    begin = create_sample_dataset

    def begin_and_stop(*_: Any, **__: Any) -> Path:
        with mock.patch("data_loader.create_sample_dataset", begin):
            begin_samples(tmp_path, lambda: signal.raise_signal(signal.SIGTERM))
        raise AssertionError

    with mock.patch("data_loader.create_sample_dataset", begin_and_stop):
        assert data_loader.main(["--data_dir", str(tmp_path), "--num_samples", "8"]) == 143
    assert capsys.readouterr().err == "data_loader.py: stopped by SIGTERM\n"
    assert not files_of(tmp_path)


def make_or_take(folder: Path, exist_ok: bool, results: Any) -> None:
    try:
        results.put(str(create_sample_dataset(folder, 8, exist_ok=exist_ok)))
    except FileExistsError as error:
        results.put(str(error))


@pytest.mark.slow
@pytest.mark.parametrize("exist_ok", [True, False])
def test_of_several_processes_one_makes_the_data(exist_ok: bool, tmp_path: Path) -> None:
    context = multiprocessing.get_context("fork")
    results = context.Queue()
    processes = [context.Process(target=make_or_take, args=(tmp_path / "a", exist_ok, results)) for _ in range(4)]
    for process in processes:
        process.start()
    found = sorted(results.get(timeout=60) for _ in processes)
    for process in processes:
        process.join()
    path = str(tmp_path / "a" / "data.json")
    refused = f"{path} is there already; choose an empty folder for the sample data"
    assert found == ([path] * 4 if exist_ok else [path, *[refused] * 3])
    create_sample_dataset(tmp_path / "b", 8)
    assert files_of(tmp_path / "a") == files_of(tmp_path / "b")


@pytest.mark.parametrize("error", [OSError(38, "Function not implemented"), NotImplementedError()])
def test_a_file_system_without_locks_is_no_hindrance(
    error: Exception, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def acquire(*_: Any, **__: Any) -> None:
        raise error

    monkeypatch.setattr("cliptune.data.sample_data.FileLock.acquire", acquire)
    assert create_sample_dataset(tmp_path, 2).exists()


def test_a_linked_folder_is_no_placeholder(sample_dir: Path, tmp_path: Path) -> None:
    """Sample data would be made beside it."""
    for name in ("images", "captions"):
        (tmp_path / name).symlink_to(sample_dir / name)
    assert not holds_only_placeholders(tmp_path)
    assert data_loader.main(["--data_dir", str(tmp_path)]) == 0
