"""Odd images are read right; broken ones, and broken indexes, cost one line with their name."""

import json
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

import data_loader
import train
from cliptune.data.issues import Issue, Issues
from cliptune.data.pairs import Pairs, load_pairs
from cliptune.data.sample_data import create_sample_dataset
from cliptune.data.shards import write_shards
from cliptune.data.skipped import SkippedData
from cliptune.preprocess.decode import decode_image, load_image, size_of
from data_loader import ImageTextDataset
from tests.helpers.launch import ROOT, environment, run_ranks
from tests.helpers.models import SMALL_VIT
from tests.helpers.photos import photo
from tests.helpers.runs import check_data
from tests.helpers.zoo import ABSENT, BAD, CAPTIONS, CORNERS, GOOD, corners, index_bytes

pytestmark = pytest.mark.usefixtures("small")

TINY = ["--model_name", SMALL_VIT.name, "--batch_size", "16", "--num_epochs", "1", "--num_workers", "0"]


def write_index(folder: Path, rows: list[dict[str, Any]]) -> Path:
    path = folder / "data.json"
    path.write_text(json.dumps(rows), encoding="utf-8")
    return path


def one_line(text: str) -> str:
    """The only line on stderr; a traceback would be more."""
    lines = text.strip().splitlines()
    assert len(lines) == 1, text[-3000:]
    return lines[0]


@pytest.fixture(scope="module")
def zoo(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """All images of the zoo in one index."""
    folder = tmp_path_factory.mktemp("zoo")
    for name, good in GOOD.items():
        good.write(folder / name)
    for name, write in {**BAD, **ABSENT}.items():
        write(folder / name)
    names = [*GOOD, *BAD, *ABSENT]
    write_index(folder, [{"image": name, "caption": f"picture {number}"} for number, name in enumerate(names)])
    return folder


@pytest.mark.parametrize(
    "name", [pytest.param(name, marks=[pytest.mark.slow] if name == "between-the-limits.png" else []) for name in GOOD]
)
def test_an_odd_image_is_read_right(name: str, zoo: Path) -> None:
    size, shows_corners = GOOD[name].size, GOOD[name].shows_corners
    image = load_image(zoo / name)
    assert (image.mode, image.size) == ("RGB", size)
    assert size_of(decode_image(zoo / name)) == size
    pairs = load_pairs(write_index(zoo, [{"image": name, "caption": "x"}]).rename(zoo / "one.json"))
    sample = ImageTextDataset(pairs)[0]
    assert sample.image is not None
    assert sample.image.shape == (3, 224, 224)
    if shows_corners:
        width, height = size
        places = ((width // 8, height // 8), (width * 7 // 8, height // 8),
                  (width // 8, height * 7 // 8), (width * 7 // 8, height * 7 // 8))  # fmt: skip
        for place, color in zip(places, CORNERS.values(), strict=True):
            assert np.abs(np.asarray(image)[place[1], place[0]].astype(int) - color).max() < 20, place


@pytest.mark.parametrize("name", BAD)
def test_a_broken_image_is_an_issue_with_its_name(name: str, tmp_path: Path) -> None:
    BAD[name](tmp_path / name)
    (issue,) = [sample.issue for sample in [ImageTextDataset(one_image(tmp_path, name))[0]]]
    assert issue is not None
    assert issue.image == str(tmp_path.resolve() / name)
    assert issue.reason.startswith("cannot be read as an image: ")
    assert len(str(issue).splitlines()) == 1
    with pytest.raises(ValueError, match="cannot be read as an image"):
        load_image(tmp_path / name)


def one_image(folder: Path, name: str) -> Pairs:
    return load_pairs(write_index(folder, [{"image": name, "caption": "x"}]))


def test_the_limit_of_pixels_holds_before_anything_is_decoded(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    corners().save(tmp_path / "x.jpg")

    def no_decoding(*_: object, **__: object) -> None:
        raise AssertionError("decoded")

    monkeypatch.setattr("simplejpeg.decode_jpeg", no_decoding)
    monkeypatch.setattr("PIL.ImageFile.ImageFile.load", no_decoding)
    for read in (load_image, decode_image):
        with pytest.raises(ValueError, match=r"x.jpg: cannot be read as an image: more than 3071 pixels"):
            read(tmp_path / "x.jpg", max_pixels=64 * 48 - 1)


@pytest.mark.slow
def test_check_lists_all_that_is_wrong_at_once_and_nothing_else(zoo: Path, tmp_path: Path) -> None:
    names = [*GOOD, *BAD, *ABSENT]
    write_index(zoo, [{"image": name, "caption": f"picture {number}"} for number, name in enumerate(names)])
    command = [sys.executable, str(ROOT / "data_loader.py"), "--check", "--num_workers", "2"]
    command += ["--output_dir", str(tmp_path), "--data_dir"]
    done = subprocess.run(
        [*command, str(zoo / "data.json")], env=environment(), capture_output=True, text=True, check=False, timeout=120
    )
    assert done.returncode == 1, done.stderr
    *lines, last = done.stdout.splitlines()
    issues = [line for line in lines if "cannot be read as an image" in line or ": image " in line]
    assert len(issues) == len(BAD) + len(ABSENT)
    for name in [*BAD, *(name[:60] for name in ABSENT)]:
        assert sum(f"/{name}: " in line or f"image {name}" in line for line in issues) == 1, name
    assert last == f"{len(BAD) + len(ABSENT)} issues; {len(GOOD)} images can be read"
    # the log names what the index lacks; nothing comes from Pillow, libjpeg or Python's warnings
    assert one_line(done.stderr).startswith(str(zoo)), done.stderr


def untouched(output: Path) -> bool:
    """Tell whether a run has left nothing but its lock."""
    return {path.name for path in output.rglob("*")} <= {".lock"}


@pytest.mark.slow
def test_the_whole_zoo_is_trained_on(zoo: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    names = [*GOOD, *BAD, *ABSENT]
    index = write_index(zoo, [{"image": name, "caption": f"picture {n}"} for n, name in enumerate(names)])
    output = tmp_path / "output"
    flags = ["--data_dir", str(index), "--output_dir", str(output), *TINY, "--augment", "color", "--fast_decode"]
    assert train.main(flags) == 2
    assert one_line(capsys.readouterr().err).startswith(f"train.py: error: {index}: {len(ABSENT)} of ")
    assert untouched(output)
    assert train.main([*flags, "--max_skipped_fraction", "1"]) == 0
    listed = json.loads((output / "results" / "skipped.json").read_text())
    assert sorted(Path(each["image"]).name[:200] for each in listed) == sorted(name[:200] for name in (*BAD, *ABSENT))


@pytest.mark.slow
def test_check_of_good_data_and_of_shards(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    create_sample_dataset(tmp_path / "data", 12)
    assert check_data(tmp_path / "data", tmp_path) == 0
    assert capsys.readouterr().out.splitlines()[-1] == "no issues; all 12 images can be read"
    pairs = load_pairs(tmp_path / "data")
    images = [(pairs.paths[number], pairs.captions_of(number)) for number in range(12)]
    write_shards([*images, (images[0][0], ["sky " * 100, "sky"])], tmp_path / "shards", shard_size=20)
    shard = tmp_path / "shards" / "00000.tar"
    assert check_data(shard, tmp_path) == 0
    out = capsys.readouterr().out
    assert "1  caption longer than 77 tokens" in out
    assert "1  image byte-identical to an earlier one" in out
    content = shard.read_bytes().replace(Path(images[3][0]).read_bytes()[:40], bytes(40))
    shard.write_bytes(content)
    assert check_data(shard, tmp_path) == 1
    assert "000000003.png: cannot be read as an image" in capsys.readouterr().out


@pytest.mark.parametrize("kind", CAPTIONS)
def test_a_caption_is_used_or_told(kind: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    caption, usable = CAPTIONS[kind]
    corners().save(tmp_path / "plain.jpg")
    corners().save(tmp_path / "other.jpg", quality=50)
    write_index(tmp_path, [{"image": "other.jpg", "caption": "x"}, {"image": "plain.jpg", "caption": caption}])
    assert data_loader.main(["--data_dir", str(tmp_path), "--max_skipped_fraction", "0.1"]) == (0 if usable else 2)
    if not usable:
        assert "data.json: row 2: " in one_line(capsys.readouterr().err)
        return
    samples = ImageTextDataset(load_pairs(tmp_path))
    assert samples[1].tokens.shape == (77,)
    assert samples[1].tokens.max() == samples[1].tokens[samples[1].tokens != 0][-1]  # the end of the text is kept


@pytest.mark.parametrize("kind", [kind for kind, _ in index_bytes()])
def test_a_broken_index_costs_one_line(kind: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    corners().save(tmp_path / "plain.jpg")
    path = tmp_path / "index.json"
    path.write_bytes(dict(index_bytes())[kind])
    output = tmp_path / "output"
    flags = ["--data_dir", str(path)]
    for stage, more in (
        (data_loader.main, []), (data_loader.main, ["--check"]), (train.main, ["--output_dir", str(output), *TINY]),
    ):  # fmt: skip
        assert stage([*flags, *more]) == 2
        error = one_line(capsys.readouterr().err)
        assert "index.json" in error
        assert len(error) < 3000
    assert untouched(output)


@pytest.mark.slow
def test_names_of_any_bytes_and_clashing_stems(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    data = tmp_path / os.fsdecode(b"caf\xe9 \xf0\x9f\xa6\x8a")
    for folder in ("images", "captions"):
        (data / folder).mkdir(parents=True)
    for stem in ("a b", "tab\there", "emoji 🦊", "Clash", "clash", os.fsdecode(b"latin-\xe9")):
        photo(len(stem)).save(data / "images" / f"{stem}.png")
        (data / "captions" / f"{stem}.txt").write_text(f"a picture of {len(stem)}")
    flags = ["--data_dir", str(data), "--num_workers", "0"]
    assert data_loader.main([*flags, "--max_skipped_fraction", "0.9"]) == 0
    assert data_loader.main([*flags, "--check", "--output_dir", str(tmp_path)]) == 1
    out = capsys.readouterr().out
    assert "images/Clash.png: clashes with images/clash.png" in out
    assert "images/latin-\\udce9.png: " in out
    assert out.splitlines()[-1].endswith("3 images can be read")
    output = tmp_path / "output"
    assert train.main([*flags[:2], "--output_dir", str(output), *TINY, "--max_skipped_fraction", "0.9"]) == 0
    assert "Traceback" not in capsys.readouterr().err
    assert len(json.loads((output / "results" / "skipped.json").read_text())) == 3


@pytest.mark.skipif(os.geteuid() == 0, reason="root reads every file")
def test_a_file_that_may_not_be_read(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    corners().save(tmp_path / "x.jpg")
    (tmp_path / "x.jpg").chmod(0)
    assert "Permission denied" in str(ImageTextDataset(one_image(tmp_path, "x.jpg"))[0].issue)
    (tmp_path / "data.json").chmod(0)
    assert data_loader.main(["--data_dir", str(tmp_path)]) == 2
    assert "Permission denied" in one_line(capsys.readouterr().err)


@pytest.fixture
def spoiled(sample_dir: Path, tmp_path: Path) -> Callable[[int], Path]:
    """The sample data, some of whose images are spoiled."""

    def spoil(number: int) -> Path:
        index = json.loads((sample_dir / "data.json").read_text())
        rows = [{**row, "image_path": str(sample_dir / row["image_path"])} for row in index]
        for row in rows[:number]:
            broken = tmp_path / Path(row["image_path"]).name
            broken.write_bytes(b"broken")
            row["image_path"] = str(broken)
        return write_index(tmp_path, rows)

    return spoil


@pytest.mark.slow
def test_a_run_skips_unreadable_images_and_lists_them(
    spoiled: Callable[[int], Path], tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    index = spoiled(3)
    rows = [*json.loads(index.read_text()), {"image_path": "gone.png", "caption": "x"}]
    write_index(tmp_path, rows)
    output = tmp_path / "output"
    assert (
        train.main(["--data_dir", str(index), "--output_dir", str(output), *TINY, "--max_skipped_fraction", "0.1"]) == 0
    )
    listed = json.loads((output / "results" / "skipped.json").read_text())
    assert listed[0] == {
        "image": "gone.png", "reason": "image gone.png: No such file or directory",
        "location": f"data.json: row {len(rows)}",
    }  # fmt: skip
    assert sorted(each["image"] for each in listed[1:]) == sorted(row["image_path"] for row in rows[:3])
    assert {each["reason"] for each in listed[1:]} == {"cannot be read as an image: of no known format"}
    log = (output / "logs" / "train.log").read_text()
    assert log.count(" skipped: ") == 3
    assert "skipped 3 images and 1 record, see " in log


@pytest.mark.slow
@pytest.mark.parametrize("flags", [["--max_skipped_fraction", "0.03"], ["--on_unreadable_image", "fail"]])
def test_a_run_stops_at_too_many_unreadable_images(
    flags: list[str], spoiled: Callable[[int], Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    output = tmp_path / "output"
    assert train.main(["--data_dir", str(spoiled(3)), "--output_dir", str(output), *TINY, *flags]) == 2
    error = capsys.readouterr().err.splitlines()[-1]
    assert f"train.py: error: {2 if 'fail' not in flags else 1} of 60 images and records cannot be used: " in error
    path = output / "results" / "skipped.json"
    assert f"listed in {path}" in error
    listed = json.loads(path.read_text())
    assert len(listed) == (2 if "fail" not in flags else 1)
    assert f"{listed[0]['image']}: {listed[0]['reason']}" in error
    # the last checkpoint is there to go on from, once the data is mended or more is allowed
    assert (
        train.main(
            ["--output_dir", str(output), "--resume", "--on_unreadable_image", "skip", "--max_skipped_fraction", "1"]
        )
        == 0
    )
    assert len(json.loads(path.read_text())) == 3


def test_stop_and_the_share_hold_for_the_index(
    sample_dir: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    index = json.loads((sample_dir / "data.json").read_text())
    rows = [{**row, "image_path": str(sample_dir / row["image_path"])} for row in index] * 3
    path = write_index(tmp_path, [*rows, {"image_path": "gone.png", "caption": "x"}])
    flags = ["--data_dir", str(path), "--output_dir", str(tmp_path / "output"), *TINY]
    for more in (["--on_unreadable_image", "fail", "--max_skipped_fraction", "1"], ["--max_skipped_fraction", "0.001"]):
        assert train.main([*flags, *more]) == 2
        assert "data.json: row 181: image gone.png: No such file" in one_line(capsys.readouterr().err)


@pytest.mark.slow
def test_one_process_that_finds_too_many_stops_all(spoiled: Callable[[int], Path], tmp_path: Path) -> None:
    output = tmp_path / "output"
    flags = ["--data_dir", str(spoiled(3)), "--output_dir", str(output), *TINY, "--max_skipped_fraction", "0.01"]
    done = run_ranks(2, "tests/helpers/small_train.py", *flags)
    assert done.returncode != 0
    assert "of 60 images and records cannot be used: " in done.stderr
    assert json.loads((output / "results" / "skipped.json").read_text())


def test_what_is_skipped_is_counted_once(tmp_path: Path) -> None:
    create_sample_dataset(tmp_path / "data", 8)
    pairs = load_pairs(tmp_path / "data")
    pairs.issues.extend(Issues([Issue("empty caption", location="data.json: row 9")], 1))
    path = tmp_path / "bad.json"
    parts = [pairs.select([0, 1]), pairs.select([2])]
    found = SkippedData(parts, num_images=9, max_fraction=0.3, path=path, max_logged=2)
    for name in ("a.jpg", "a.jpg", "b.jpg"):
        found.note(Issue("broken", image=name))
    found.agree()
    assert len(found) == 3
    assert [entry.get("image") for entry in json.loads(path.read_text())] == [None, "a.jpg", "b.jpg"]
    with pytest.raises(ValueError, match=r"4 of 10 images and records cannot be used: a.jpg: broken; b.jpg: broken"):
        found.note(Issue("broken", image="c.jpg"))
    assert len(json.loads(path.read_text())) == 4
    SkippedData([], num_images=9, max_fraction=0.3, path=path).agree()
    assert not path.exists()


@pytest.mark.slow
@pytest.mark.parametrize("num_images", [1, 2, 3])
def test_the_smallest_data_sets(num_images: int, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for number in range(num_images):
        Image.new("RGB", (32, 32), (number * 80, 0, 0)).save(tmp_path / f"{number}.png")
    path = write_index(tmp_path, [{"image": f"{n}.png", "caption": f"picture {n}"} for n in range(num_images)])
    assert check_data(path, tmp_path) == 0
    assert data_loader.main(["--data_dir", str(path)]) == 0
    capsys.readouterr()
    code = train.main(["--data_dir", str(path), "--output_dir", str(tmp_path / "output"), *TINY])
    if num_images < 3:
        assert code == 2
        assert "at least 2 and 1 are needed" in one_line(capsys.readouterr().err)
    else:  # two to train on, one in the validation set
        assert code == 0
