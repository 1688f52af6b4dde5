"""`data_loader.py --check`: what it finds, and the files that it leaves."""

import json
import math
import shutil
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

import data_loader
from cliptune import results
from cliptune.data.diagnosis import leaks, near_copies
from cliptune.data.doctor import look_at_images
from cliptune.data.near_duplicates import NearDuplicates, no_copies
from cliptune.data.pairs import load_pairs
from cliptune.data.suspects import exclude, read_suspects
from cliptune.data.table import Strings
from cliptune.preprocess.transforms import PixelTransform
from tests.helpers.datasets import make_index
from tests.helpers.photos import make_with_copies, photo
from tests.helpers.runs import check_data


def draw(folder: Path, sizes: Sequence[tuple[int, int]]) -> list[str]:
    """Images of noise."""
    folder.mkdir(parents=True, exist_ok=True)
    random = np.random.RandomState(0)
    for number, (width, height) in enumerate(sizes):
        pixels = random.randint(0, 256, (height, width, 3)).astype(np.uint8)
        Image.fromarray(pixels).save(folder / f"{number}.png")
    return [f"{number}.png" for number in range(len(sizes))]


def check(folder: Path, *flags: str, code: int = 0) -> dict[str, Any]:
    """The findings by their kinds."""
    assert check_data(folder / "data", folder, *flags) == code
    path = folder / "results" / "data_check.json"
    found = results.DataCheckResults.model_validate_json(path.read_text())
    return {finding.kind: finding for finding in found.findings}


@pytest.mark.slow
def test_images_that_are_odd_are_found_and_listed(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    data = tmp_path / "data"
    names = draw(data, [(240, 230)] * 6 + [(20, 40), (900, 240), (224, 224)])
    shutil.copy(data / "0.png", data / "5.png")
    shutil.copy(data / "1.png", data / "4.png")
    Image.new("RGB", (300, 300), (9, 9, 9)).save(data / "2.png")
    (data / "3.png").write_bytes(b"broken")
    splits = ["val" if number in {5, 8} else "train" for number in range(9)]
    captions = [[f"=caption {number}", f"another {number}"] for number in range(9)]
    make_index(data, [{"image": n, "caption": c, "split": s} for n, c, s in zip(names, captions, splits, strict=True)])
    found = check(tmp_path, code=1)
    assert {kind: finding.number for kind, finding in found.items() if kind not in {"time", "memory"}} == {
        "identical_images": 2, "one_color": 1, "tiny": 1, "extreme_shape": 1, "small": 1, "half_width": 69.3,
        "false_negatives": 2, "loss_floor": 0.198,
    }  # fmt: skip
    assert found["identical_images"].values == {"across_splits": 1}
    rows = read_suspects(tmp_path / "results" / "suspects.csv")
    assert [(row.image, row.caption) for row in rows if row.image == "3.png"] == [
        ("3.png", "=caption 3"), ("3.png", "another 3")
    ]  # fmt: skip
    assert {(row.image, row.reason.partition(":")[0], row.keep) for row in rows} == {
        ("0.png", "identical", False), ("5.png", "identical", True), ("1.png", "identical", True),
        ("4.png", "identical", False), ("2.png", "one colour", False), ("3.png", "unreadable", False),
        ("6.png", "tiny", True), ("7.png", "extreme shape", True),
    }  # fmt: skip
    left = exclude(load_pairs(data), rows)
    assert (left.num_images, left.num_pairs, left.unmatched) == (4, 8, [])
    out = capsys.readouterr().out
    assert out.splitlines()[-1] == "1 issue; 8 images can be read"
    assert all(finding.text in out and finding.advice in out for finding in found.values())


@pytest.mark.slow
def test_copies_of_other_sizes_and_crops_are_found_across_the_split(tmp_path: Path) -> None:
    data = tmp_path / "data"
    data.mkdir()
    for number in range(8):
        photo(number).save(data / f"{number}.png")
    photo(0).resize((480, 360)).save(data / "large.jpg", quality=80)
    photo(1).crop((6, 4, 234, 176)).save(data / "crop.png")
    shutil.copy(data / "crop.png", data / "again.png")
    names = [*(f"{number}.png" for number in range(8)), "large.jpg", "crop.png", "again.png"]
    rows = [
        {"image": name, "caption": name, "split": "val" if name in {"0.png", "7.png"} else "train"} for name in names
    ]
    make_index(data, rows)
    found = check(tmp_path)
    assert (found["near_duplicates"].number, found["near_duplicates"].values["across_splits"]) == (4, 1)
    listed = read_suspects(tmp_path / "results" / "suspects.csv")
    near = {(row.image, row.keep) for row in listed if row.kind == "near-duplicate"}
    # of three files of one image the first stays; of two across the split the one that validates
    assert near == {("0.png", True), ("large.jpg", False), ("1.png", True), ("crop.png", False), ("again.png", False)}
    assert check(tmp_path)["near_duplicates"] == found["near_duplicates"]  # from the cache


@pytest.mark.slow
def test_fingerprints_are_taken_only_where_they_are_kept_or_needed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    data, asked = make_with_copies(tmp_path / "data"), []

    def look(paths: Strings, **_: Any) -> NearDuplicates:
        asked.append(len(paths))
        return no_copies(paths)

    monkeypatch.setattr("cliptune.runs.check.look_for_near_duplicates", look)
    flags = ["--data_dir", str(data), "--output_dir", str(tmp_path)]
    assert data_loader.main(flags) == 0
    assert data_loader.main([*flags, "--to_shards", str(tmp_path / "all"), "--split", "all"]) == 0
    assert asked == []
    assert data_loader.main([*flags, "--to_shards", str(tmp_path / "train"), "--split", "train"]) == 0
    (tmp_path / "cache").mkdir()
    assert data_loader.main(flags) == 0
    assert asked == [39, 39]


def test_what_is_kept_together_and_what_is_not_is_told(tmp_path: Path) -> None:
    names = draw(tmp_path, [(8, 8)] * 6)
    rows = [{"image": name, "caption": name, "group": group} for name, group in zip(names, "aabbcd", strict=True)]
    pairs = load_pairs(make_index(tmp_path, rows))
    units, sides = np.array([0, 0, 0, 0, 2, 3]), np.array([0, 0, 1, 1, 1, 2], dtype=np.int8)
    found = {each.kind: each.number for each in leaks(pairs, units, sides, num_drawn=2)}
    assert found == {"row_split": 1}  # of two images 4/3 are from the first four
    sides[0] = 1
    found = {each.kind: each.number for each in leaks(pairs, units, sides, num_drawn=0)}
    assert found == {"torn_groups": 2}


def test_look_alikes_are_listed_and_stay(tmp_path: Path) -> None:
    data = tmp_path / "data"
    data.mkdir()
    image = np.asarray(photo(0)).astype(int)
    for number in range(12):
        Image.fromarray((image * (1 - 0.01 * number)).astype(np.uint8)).save(data / f"{number}.png")
    photo(1).save(data / "12.png")
    make_index(data, [{"image": f"{number}.png", "caption": f"number {number}"} for number in range(13)])
    found = check(tmp_path)
    assert found["look_alikes"].number == 12
    assert "near_duplicates" not in found
    rows = read_suspects(tmp_path / "results" / "suspects.csv")
    assert {(row.reason, row.keep) for row in rows} == {("near-duplicate: one of 12 look-alikes", True)}


def test_no_chain_of_copies_leaves_out_what_is_near_none_that_stays() -> None:
    chain = np.array([[0, 1], [1, 2], [2, 3]])
    assert list(near_copies(chain, lambda _: 2)) == [(0, None), (1, 0), (2, None), (3, 2)]
    # 1 and 2 validate, whatever the list says of 2: nothing near them is trained on
    assert dict(near_copies(chain, lambda image: 0 if image in {1, 2} else 2)) == {1: None, 2: 1, 0: 1, 3: 2}


def test_what_a_person_writes_into_the_list_stays(tmp_path: Path) -> None:
    names = draw(tmp_path / "data", [(240, 240)] * 3)
    shutil.copy(tmp_path / "data" / "0.png", tmp_path / "data" / "2.png")
    rows = [{"image": name, "caption": name} for name in names]
    make_index(tmp_path / "data", rows)
    check(tmp_path)
    path = tmp_path / "results" / "suspects.csv"
    text = path.read_text()
    path.write_text(text.replace(",no", ",YES") + "0.png,0.png,by hand: blurred,no\n")
    make_index(tmp_path / "data", rows[::-1])  # another order is the same data
    check(tmp_path)
    kept = {(row.image, row.kind): row.keep for row in read_suspects(path)}
    assert kept[("0.png", "by hand")] is False
    assert [keep for (_, kind), keep in kept.items() if kind == "identical"].count(True) >= 1
    text = path.read_text()
    shutil.rmtree(tmp_path / "data")
    draw(tmp_path / "data" / "others", [(240, 240)] * 2)
    make_index(tmp_path / "data", [{"image": f"others/{number}.png", "caption": "x"} for number in range(2)])
    check(tmp_path)  # another data set
    assert path.with_name("suspects-of-other-data.csv").read_text() == text
    assert not read_suspects(path)
    path.write_text("image,caption,reason,keep\nanother.png,,by hand: odd,no\n")
    check(tmp_path)  # what was set aside before stays
    assert path.with_name("suspects-of-other-data.csv").read_text() == text
    assert "another.png" in path.with_name("suspects-of-other-data-2.csv").read_text()
    path.write_text("image;keep\n0.png;perhaps\n")
    assert check_data(tmp_path / "data", tmp_path) == 2


@pytest.mark.slow
def test_a_list_of_another_folder_with_the_same_names_is_set_aside(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    for name in ("one", "other"):
        names = draw(tmp_path / name, [(20, 40)] * 2)
        make_index(tmp_path / name, [{"image": image, "caption": "x"} for image in names])
    assert check_data(tmp_path / "one", tmp_path) == 0
    path = tmp_path / "results" / "suspects.csv"
    path.write_text(text := path.read_text().replace(",yes,", ",no,"))
    assert check_data(tmp_path / "other", tmp_path) == 0
    aside = path.with_name("suspects-of-other-data.csv")
    assert aside.read_text() == text
    assert f"is about {tmp_path / 'one'}, and is set aside as {aside}" in capsys.readouterr().err
    assert all(row.keep for row in read_suspects(path))
    path.write_text(path.read_text().replace(",yes,", ",no,"))
    assert check_data(tmp_path / "other", tmp_path) == 0  # the same data once more
    assert not any(row.keep for row in read_suspects(path))


def test_copies_are_one_row_and_a_separate_set_is_no_uneven_split(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    names = draw(tmp_path / "data", [(240, 240)] * 4)
    make_index(tmp_path / "data", [{"image": name, "caption": name} for name in names])
    shutil.copytree(tmp_path / "data", tmp_path / "val")
    flags = ["--val_data", str(tmp_path / "val")]
    found = check(tmp_path, *flags)
    assert not {"shared_images", "uneven_split"} & found.keys()
    assert found["identical_images"].values == {"across_splits": 4}
    assert "4 of them in another split" in found["identical_images"].text
    # copies with captions of their own are negatives of each other, too, wherever they are
    shutil.copy(tmp_path / "data" / "0.png", tmp_path / "data" / "1.png")
    found = check(tmp_path, *flags)
    assert found["false_negatives"].values == {"with_copies": 2}
    assert found["loss_floor"].number == round(math.log(2) / 2, 3)  # of the four pairs two
    assert "--positives" not in found["false_negatives"].advice
    capsys.readouterr()
    assert data_loader.main(["--data_dir", str(tmp_path / "data"), *flags, "--output_dir", str(tmp_path)]) == 0
    out = capsys.readouterr().out
    assert "asks for" not in out
    assert "split       train 4, val 4, test 0 images (val: --val_data)" in out
    assert "3 of the 4 validation images are byte-identical" in out


@pytest.mark.slow
def test_few_images_are_not_read_the_slower_for_the_start_of_workers(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    draw(tmp_path, [(16, 16)] * 3)
    paths = Strings.of(str(tmp_path / f"{number}.png") for number in range(3))
    plain = look_at_images(paths, num_workers=0).per_second
    load = PixelTransform.load
    started: list[int] = []

    def slow_at_first(*args: Any) -> Any:
        time.sleep(0 if started else 1)
        started.append(1)
        return load(*args)

    monkeypatch.setattr(PixelTransform, "load", slow_at_first)
    assert look_at_images(paths, num_workers=0).per_second > max(plain / 20, 3.1)


@pytest.mark.slow
def test_captions_of_few_classes_have_a_ceiling_and_a_floor(tmp_path: Path) -> None:
    names = draw(tmp_path / "data", [(30, 30)] * 40)
    rows = [{"image": n, "caption": f"class {k % 4}", "split": "val" if k >= 32 else ""} for k, n in enumerate(names)]
    make_index(tmp_path / "data", rows)
    found = check(tmp_path)
    assert found["repeated_captions"].number == 40
    assert found["loss_floor"].number == round(float(np.log(8)), 3)
    assert found["false_negatives"].number == 32
    # two validation images a class: the captions of both tie, and one of them comes first
    assert found["recall_ceiling"].values == {
        "i2t_r1": 0, "i2t_r5": 100, "i2t_r10": 100, "t2i_r1": 50, "t2i_r5": 100, "t2i_r10": 100, "rsum": 450
    }  # fmt: skip
    assert check(tmp_path, "--batch_size", "8")["loss_floor"].number < 1.2


@pytest.mark.parametrize(
    ("captions", "kind", "number"),
    [
        (["eine Drachenfliegerin über Überlingen"] * 30, "other_language", None),
        (["风筝在天空中飞翔"] * 30, "other_language", None),
        (["a kite in the sky"] * 29 + ["воздушный змей"], "other_script", 1),
        (["a kite in the sky"] * 29 + ["sky " * 90], "truncated", 1),
        (["a kite in the sky"] * 30, "truncated", 30),
    ],
)
def test_what_the_tokenizer_was_not_made_for_is_told(
    captions: list[str], kind: str, number: int | None, tmp_path: Path
) -> None:
    flags = ["--context_length", "5"] if number == 30 else []
    names = draw(tmp_path / "data", [(16, 16)] * len(captions))
    make_index(tmp_path / "data", [{"image": n, "caption": c} for n, c in zip(names, captions, strict=True)])
    found = check(tmp_path, *flags)
    assert {"other_language", "other_script", "truncated"} & found.keys() == {kind}
    assert number is None or found[kind].number == number


@pytest.mark.slow
def test_time_and_memory_are_those_of_the_chosen_model(sample_dir: Path, tmp_path: Path) -> None:
    shutil.copytree(sample_dir, tmp_path / "data")
    small, large = (check(tmp_path, "--model_name", name) for name in ("ViT-Ti/32", "ViT-L/14"))
    assert large["time"].number > small["time"].number
    assert small["memory"].values["parameters"] == pytest.approx(14e6, rel=0.1)
    assert large["memory"].values["parameters"] == pytest.approx(428e6, rel=0.01)
    state, pair = (small["memory"].values[key] for key in ("state_bytes", "bytes_per_pair"))
    assert small["memory"].number == pytest.approx((state + 32 * pair) / 1e9, rel=0.06)  # of two digits
    assert "with gradients and moments" in small["memory"].text
    assert "A run takes more: the program itself" in small["memory"].text
    assert json.loads((tmp_path / "results" / "data_check.json").read_text())["num_images"] == 60
    assert check_data(tmp_path / "data", tmp_path, "--model_name", "ViT-X") == 2


@pytest.mark.slow
def test_the_split_is_the_run_s_and_what_others_would_leak_is_told(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    data = make_with_copies(tmp_path / "data")
    flags = ("--val_split", "0.3", "--split_seed", "5")
    found = check(tmp_path, *flags)
    assert found["near_duplicates"].values["across_splits"] == found["identical_images"].values["across_splits"] == 0
    # 3 units of 4 images: each of the 12 meets another with a probability just below 1, if it is among the 30%
    assert found["row_split"].number == pytest.approx(0.3 * 12, abs=0.6)
    apart = check(tmp_path, *flags, "--near_duplicates", "report")
    assert apart["near_duplicates"].values["across_splits"] > 0
    capsys.readouterr()
    assert data_loader.main(["--data_dir", str(data), "--output_dir", str(tmp_path), *flags]) == 0
    assert "split       train 27, val 12, test 0 images (by group)" in capsys.readouterr().out
    rows = json.loads((data / "data.json").read_text())
    for row, split in zip(rows, ("train", "val"), strict=False):
        row |= {"group": "same", "split": split}
    make_index(data, rows)
    assert check(tmp_path, *flags)["torn_groups"].number == 2
