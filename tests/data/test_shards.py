import io
import json
import logging
import multiprocessing
import os
import signal
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any
from unittest import mock

import numpy as np
import pytest
import torch
from braceexpand import braceexpand
from PIL import Image
from webdataset.tariterators import tarfile_samples

import data_loader
from cliptune.data import shards
from cliptune.data.pairs import DataSource, load_pairs
from cliptune.data.row_store import ImageCache
from cliptune.data.shard_loader import ShardLoader
from cliptune.data.shards import INDEX_NAME, Shards, is_shards, open_shards, write_shards
from cliptune.data.tar_samples import read_samples
from cliptune.preprocess.decode import file_stamp, load_image, part_path, read_bytes
from cliptune.preprocess.transforms import clip_transform
from data_loader import ImageTextDataset
from tests.helpers.datasets import make_images, make_shards, make_tar, png_bytes


def assert_read_as_by_webdataset(url: str) -> None:
    samples = list(tarfile_samples([{"url": url}]))
    assert len(samples) == open_shards(url).shards[0].num_samples
    for own, sample in zip(read_samples(url), samples, strict=True):
        assert own.key == sample["__key__"]
        assert [own.image()] == [sample[ending] for ending in ("png", "jpg") if ending in sample]
        assert own.texts == {ending: sample[ending] for ending in ("json", "txt")}


def test_what_is_written_is_what_there_was(
    sample_dir: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    flags = ["--data_dir", str(sample_dir), "--shard_size", "25", "--split", "all"]
    assert data_loader.main([*flags, "--to_shards", str(tmp_path / "a")]) == 0
    assert "written: 60 images in 3 shards" in capsys.readouterr().out
    data_dir = f"{tmp_path}/a/{{00000..00002}}.tar"
    assert [shard.num_samples for shard in open_shards(data_dir).shards] == [25, 25, 10]
    pairs, again = load_pairs(sample_dir), load_pairs(data_dir)
    content = {read_bytes(path): pairs.captions_of(index) for index, path in enumerate(pairs.paths)}
    assert {read_bytes(path): again.captions_of(index) for index, path in enumerate(again.paths)} == content
    order = [list(content).index(read_bytes(path)) for path in again.paths]
    assert sorted(order) == list(range(60)) != order
    assert_read_as_by_webdataset(f"{tmp_path}/a/00002.tar")
    # a caption a line, for other tools
    sample = next(read_samples(f"{tmp_path}/a/00000.tar"))
    assert isinstance(sample.image(), bytes)
    assert tuple(sample.texts["txt"].decode().split("\n")) == sample.captions()

    assert data_loader.main([*flags, "--to_shards", str(tmp_path / "b")]) == 0
    assert data_loader.main([*flags, "--to_shards", str(tmp_path / "c"), "--seed", "3"]) == 0
    a, b, c = ((tmp_path / name / "00001.tar").read_bytes() for name in "abc")
    assert a == b
    assert a != c
    # shards are a data set like any other: to describe, or to write anew
    assert data_loader.main(["--data_dir", data_dir]) == 0
    assert "images      60, 120 pairs" in capsys.readouterr().out
    assert data_loader.main(["--data_dir", data_dir, "--to_shards", str(tmp_path / "d"), "--split", "all"]) == 0
    assert set(map(read_bytes, load_pairs(tmp_path / "d" / "00000.tar").paths)) == set(content)


def test_only_the_chosen_split_is_written(sample_dir: Path, tmp_path: Path) -> None:
    for split, expected in (("train", 54), ("val", 6)):
        folder = tmp_path / split
        assert data_loader.main(["--data_dir", str(sample_dir), "--to_shards", str(folder), "--split", split]) == 0
        assert len(open_shards(f"{folder}/00000.tar")) == expected


def test_an_unreadable_image_is_not_written_and_told(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    make_images(tmp_path, *(f"{n}.png" for n in range(3)))
    (tmp_path / "1.png").write_text("no image")
    (tmp_path / "2.png").rename(tmp_path / "two")  # no ending to go by
    images = [(str(tmp_path / name), ["one\ntwo", "three"]) for name in ("0.png", "1.png", "two", "gone.png")]
    shards, issues = write_shards(images, tmp_path / "out", shard_size=9)
    assert len(shards) == 2
    assert [issue.image for issue in issues] == [str(tmp_path / "1.png"), str(tmp_path / "gone.png")]
    first, second = read_samples(shards.shards[0].url)
    assert first.captions() == ("one\ntwo", "three")
    assert first.texts["txt"] == b"one two\nthree"
    assert second.image() == (tmp_path / "two").read_bytes()
    with pytest.raises(ValueError, match="holds tar files already"):
        write_shards(images, tmp_path / "out", shard_size=9)
    with pytest.raises(ValueError, match=r"no image can be read: .*1\.png: cannot be read as an image"):
        write_shards(images[1:2], tmp_path / "none", shard_size=9)


def test_the_form_of_img2dataset_is_read(tmp_path: Path) -> None:
    members: list[tuple[str, bytes]] = [("__index__/x.json", b"{}")]
    for number in range(3):
        facts = {"caption": f"number {number}" if number else None, "alt": [f"alt {number}", " "], "key": number}
        key = f"00000{number:04}"
        texts = [(f"{key}.json", json.dumps(facts).encode()), (f"{key}.txt", f"text {number}".encode())]
        members += [(f"{key}.JPG", png_bytes(number)), *texts, (f"{key}.seg.png", b"")]
    make_tar(tmp_path / "00000.tar", members)
    data_dir = f"{tmp_path}/00000.tar"
    assert_read_as_by_webdataset(data_dir)
    assert [sample.captions() for sample in read_samples(data_dir)] == [("text 0",), ("number 1",), ("number 2",)]
    assert [sample.captions("alt") for sample in read_samples(data_dir, 1, 2)] == [("alt 1",)]
    assert list(load_pairs(DataSource(data_dir, caption_key="alt")).captions) == ["alt 0", "alt 1", "alt 2"]
    with pytest.raises(ValueError, match="no caption under 'prompt'"):
        load_pairs(DataSource(data_dir, caption_key="prompt"))


def test_samples_are_counted_once_and_again_when_a_shard_changes(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.INFO)
    data_dir = make_shards(tmp_path, 3, 4)
    counts = [[shard.num_samples for shard in open_shards(data_dir).shards] for _ in range(2)]
    assert counts == [[3, 4], [3, 4]]
    assert [record.getMessage() for record in caplog.records] == [f"{tmp_path}: counted the samples of 2 shards"]
    index = json.loads((tmp_path / INDEX_NAME).read_text())
    assert [(record["url"], record["nsamples"]) for record in index["shardlist"]] == [("00.tar", 3), ("01.tar", 4)]

    size = (tmp_path / "01.tar").stat().st_size
    make_shards(tmp_path / "other", 0, 2)
    (tmp_path / "other" / "01.tar").replace(tmp_path / "01.tar")
    assert (tmp_path / "01.tar").stat().st_size == size  # the time of change tells
    os.utime(tmp_path / "01.tar", ns=(0, 0))
    assert [shard.num_samples for shard in open_shards(data_dir).shards] == [3, 2]
    assert caplog.messages[-1] == f"{tmp_path}: counted the samples of 1 shard"
    make_shards(tmp_path, 3, 5, 2)
    (tmp_path / INDEX_NAME).write_text('{"shards": 3}')
    with pytest.raises(ValueError, match="delete it, and the samples are counted again"):
        open_shards(data_dir)


def test_a_damaged_shard_is_told_before_the_run(tmp_path: Path) -> None:
    data_dir = make_shards(tmp_path, 5, 5)
    content = (tmp_path / "01.tar").read_bytes()
    (tmp_path / "01.tar").write_bytes(content[:700])
    with pytest.raises(OSError, match=r"01\.tar: cannot be read as a tar file"):
        open_shards(data_dir)
    (tmp_path / "01.tar").unlink()
    with pytest.raises(FileNotFoundError, match=r"missing 1 of 2 shards \(first: .*01.tar\)"):
        open_shards(data_dir)


def test_shards_elsewhere_go_by_the_index_beside_them(tmp_path: Path) -> None:
    make_shards(tmp_path, 9, 8)
    data_dir = f"pipe:cat {tmp_path}/{{00..01}}.tar"
    with pytest.raises(ValueError, match=f"read from {INDEX_NAME} beside them"):
        open_shards(data_dir, may_run_commands=True)
    open_shards(f"{tmp_path}/00.tar")
    with pytest.raises(ValueError, match="lists 1 of 2 shards"):
        open_shards(data_dir, may_run_commands=True)
    open_shards(f"{tmp_path}/{{00..01}}.tar")
    assert [shard.num_samples for shard in open_shards(data_dir, may_run_commands=True).shards] == [9, 8]
    assert [sample.key for sample in read_samples(f"pipe:cat {tmp_path}/01.tar", 6, 8)] == ["0015", "0016"]
    with pytest.raises(ValueError, match="remote shards are only for training"):
        load_pairs("https://host/{00..01}.tar")


@pytest.mark.parametrize(
    "address",
    [
        "pipe:{} #.tar",
        " pipe:{} #.tar",
        "PIPE:{} #.tar",
        "{{a.tar,pipe:{} #.tar}}",
        "{{p,q}}ipe:{} #.tar",
        "http://h/';{};'/x.tar",
    ],
)
def test_a_command_is_never_run_unasked(tmp_path: Path, address: str) -> None:
    canary = tmp_path / "canary"
    data_dir = address.format(f"touch {canary}")
    for read in (open_shards, load_pairs):
        with pytest.raises(ValueError, match=r"would run a command|holds no spaces, quotes"):
            read(data_dir)
    assert not canary.exists()
    with pytest.raises(ValueError, match="webdataset cannot open s3: URLs"):
        open_shards("s3://bucket/00.tar")


def test_what_names_shards(tmp_path: Path) -> None:
    (tmp_path / "folder.tar").mkdir()
    assert [
        is_shards(text)
        for text in ("a/{0..3}.tar", "a b/x y.tar", "http://h/{a,b}.tar", "pipe:get 'x/0.tar' -", "{a.tar,b.tar}")
    ] == [True] * 5
    assert [is_shards(text) for text in ("data", "a.tar.json", "{a", "a.target", tmp_path / "folder.tar")] == [
        False
    ] * 5
    with pytest.raises(ValueError, match=r"a\.tar is named twice"):
        open_shards("{a,a}.tar")


def test_an_image_in_a_tar_file_is_read_like_a_file(sample_dir: Path, tmp_path: Path) -> None:
    assert data_loader.main(["--data_dir", str(sample_dir), "--to_shards", str(tmp_path), "--split", "all"]) == 0
    pairs = load_pairs(tmp_path / "00000.tar")
    path = pairs.paths[0]
    size, changed, *_ = file_stamp(path)
    assert (size, changed) == (len(read_bytes(path)), (tmp_path / "00000.tar").stat().st_mtime_ns)
    expected = np.asarray(Image.open(io.BytesIO(read_bytes(path))).convert("RGB"))
    assert np.array_equal(np.asarray(load_image(path)), expected)
    sample = ImageTextDataset(pairs)[0].image
    assert sample is not None
    cached, _ = ImageCache(tmp_path / "cache", pairs.paths, clip_transform(224)).load(path)
    assert torch.equal(sample, torch.tensor(cached).permute(2, 0, 1))
    with pytest.raises(ValueError, match=r"00000.tar@1\+5/x.png: cannot be read as an image"):
        clip_transform(8).load(part_path(f"{tmp_path}/00000.tar", 1, 5, "x.png"))


def test_a_sample_is_found_by_its_index() -> None:
    shards = Shards(["a/0.tar", "a/1.tar", "a/2.tar"], [3, 0, 2])
    assert [shards.describe(index) for index in (0, 2, 3, 4)] == [
        "0.tar (sample 0)", "0.tar (sample 2)", "2.tar (sample 0)", "2.tar (sample 1)",
    ]  # fmt: skip


@pytest.mark.parametrize(
    "braces",
    [
        "a", "{a,b}", "{0..9}", "{a,b{0..9}}", "x{0..9}{a,b}", "{x}", "{a..e}", "{9..0..3}", "{a,{b,c}{0..1},}",
        r"\{a,b\}", "{00..10}y{1,2}{z}", "{{1..3}..5}", "{,a}", "{3..-3}", "{{0..2},{1..4}{a,b}}", "{a,b,c}{{d}}",
    ],
)  # fmt: skip
def test_braces_are_counted_as_they_are_expanded(braces: str, monkeypatch: pytest.MonkeyPatch) -> None:
    number = len(list(braceexpand(f"{braces}.tar")))
    monkeypatch.setattr(shards, "MAX_SHARDS", number)
    assert is_shards(f"{braces}.tar")
    if number > 1:
        monkeypatch.setattr(shards, "MAX_SHARDS", number - 1)
        with pytest.raises(ValueError, match=f"more than {number - 1} shards"):
            is_shards(f"{braces}.tar")


@pytest.mark.parametrize(
    "braces",
    [
        "{00000..9999999999}", "{-9999999999..0}", "{0..99}" * 6, "{a,b}" * 100, "{{0..999}{0..999}{0..999},x}",
        "{" * 30 + "a,b" + "}" * 30, f"{{0..{'9' * 5000}}}", "{" * 50_000 + "a,b" + "}" * 50_000,
        "{0..999999}{0..999999}" * 1000,
    ],
)  # fmt: skip
def test_braces_without_end_are_refused_at_once(braces: str, capsys: pytest.CaptureFixture[str]) -> None:
    start = time.monotonic()
    assert data_loader.main(["--data_dir", f"x/{braces}.tar"]) == 2
    assert time.monotonic() - start < 2
    error = capsys.readouterr().err
    assert error.count("\n") == 1
    assert "1,000,000 shards, which is the limit" in error or "nested more than 20 deep" in error
    assert len(error) < 1000


@pytest.mark.slow
def test_a_shard_that_is_named_twice_is_found_among_many(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"99999\.tar is named twice"):
        open_shards(f"{tmp_path}/{{{{00000..99999}},99999}}.tar")


def write_until(stop: Callable[[], Any], sample_dir: Path, folder: Path) -> int:
    """Write shards of two, and stop in the third."""
    num_read = 0

    def read(path: str) -> bytes:
        nonlocal num_read
        num_read += 1
        if num_read == 6:
            stop()
        return read_bytes(path)

    with mock.patch.object(shards, "read_bytes", read):
        return data_loader.main(["--data_dir", str(sample_dir), "--to_shards", str(folder), "--shard_size", "2"])


@pytest.mark.slow
@pytest.mark.parametrize("exists", [False, True])
def test_shards_that_are_stopped_are_not_there(exists: bool, sample_dir: Path, tmp_path: Path) -> None:
    folder = tmp_path / "shards"
    if exists:
        folder.mkdir()
        (folder / "notes.txt").touch()
    assert write_until(lambda: signal.raise_signal(signal.SIGTERM), sample_dir, folder) == 143
    assert list(tmp_path.rglob("*")) == ([folder, folder / "notes.txt"] if exists else [])
    assert data_loader.main(["--data_dir", str(sample_dir), "--to_shards", str(folder), "--shard_size", "20"]) == 0
    assert sorted(path.name for path in folder.glob("*.tar")) == ["00000.tar", "00001.tar", "00002.tar"]


def test_a_full_disk_leaves_no_shards(sample_dir: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    def full() -> None:
        raise OSError(28, "No space left on device")

    with mock.patch.object(shards, "_write_index", lambda *_: full()):
        assert data_loader.main(["--data_dir", str(sample_dir), "--to_shards", str(tmp_path / "shards")]) == 2
    assert "No space left on device" in capsys.readouterr().err
    assert not (tmp_path / "shards").exists()


@pytest.mark.slow
def test_shards_of_a_killed_process_are_refused_by_name(
    sample_dir: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    kill = multiprocessing.get_context("fork").Process(
        target=write_until, args=(lambda: os.kill(os.getpid(), signal.SIGKILL), sample_dir, tmp_path / "s")
    )
    kill.start()
    kill.join()
    assert kill.exitcode == -signal.SIGKILL
    assert (tmp_path / "s" / "00001.tar").exists()
    for flags in (
        ["--data_dir", f"{tmp_path}/s/{{00000..00001}}.tar"],
        ["--data_dir", f"{tmp_path}/s/00000.tar"],
        ["--data_dir", str(sample_dir), "--to_shards", f"{tmp_path}/s"],
    ):
        assert data_loader.main(flags) == 2
        assert f"{tmp_path}/s holds shards that are being written, or were not finished" in capsys.readouterr().err
    with pytest.raises(ValueError, match="not finished"):
        open_shards(f"{tmp_path}/s/{{00000..00001}}.tar")


def test_a_shard_that_becomes_a_pipe_is_an_error(tmp_path: Path) -> None:
    make_shards(tmp_path, 2)
    (tmp_path / "00.tar").unlink()
    os.mkfifo(tmp_path / "00.tar")
    with pytest.raises(OSError, match=r"00\.tar"):
        list(read_samples(str(tmp_path / "00.tar")))


def test_sources_are_joined(tmp_path: Path) -> None:
    one, other = make_shards(tmp_path / "a", 3, 4), make_shards(tmp_path / "b", 2)
    joined = f"{one}::{other}"
    assert is_shards(joined)
    assert [shard.num_samples for shard in open_shards(joined).shards] == [3, 4, 2]
    pairs = load_pairs(joined)
    assert len(pairs) == 9
    assert (pairs.root, load_pairs(one).root) == (str(tmp_path), str(tmp_path / "a"))  # which paths are relative to
    assert {Path(path.split("@")[0]).parent.name for path in pairs.paths} == {"a", "b"}
    # of one name, so it takes the whole to tell them apart
    assert open_shards(joined).describe(0) == f"{tmp_path}/a/00.tar (sample 0)"
    assert open_shards(joined).describe(3) == "01.tar (sample 0)"
    with pytest.raises(ValueError, match="is named twice"):
        open_shards(f"{one}::{tmp_path}/a/01.tar")
    with pytest.raises(FileNotFoundError, match="missing 1 of 3 shards"):
        load_pairs(f"{tmp_path}/b::{one}")
    make_tar(tmp_path / "c::d.tar", [])  # a file is itself
    assert [shard.url for shard in open_shards(f"{tmp_path}/c::d.tar").shards] == [f"{tmp_path}/c::d.tar"]


@pytest.mark.parametrize("hidden", ["pipe:touch hacked .tar", "{x.tar,pipe:touch hacked}"])
def test_no_joined_source_is_a_command_unasked(hidden: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    one = make_shards(tmp_path / "a", 3)
    for joined in (f"{one}::{hidden}", f"{hidden}::{one}"):
        for read in (open_shards, load_pairs):
            with pytest.raises(ValueError, match="would run a command"):
                read(joined)
    assert not (tmp_path / "hacked").exists()


def test_joined_sources_are_counted_before_they_are_expanded(capsys: pytest.CaptureFixture[str]) -> None:
    half = "x{000000..600000}.tar"
    assert data_loader.main(["--data_dir", f"{half}::y{half}"]) == 2
    assert "1,000,000 shards, which is the limit" in capsys.readouterr().err


def test_unusable_samples_of_shards_of_one_name_count_each(tmp_path: Path) -> None:
    for folder in "ab":
        make_tar(tmp_path / folder / "0.tar", [("0.jpg", b"no image"), ("0.txt", b"x")])
    joined = f"{tmp_path}/a/0.tar::{tmp_path}/b/0.tar"
    shards = open_shards(joined)
    options = {"transform": clip_transform(8), "batch_size": 2, "device": torch.device("cpu"), "seed": 0}
    batches = ShardLoader(shards, num_workers=0, **options).epoch(1)  # type: ignore[arg-type]
    assert len({issue.image for batch in batches for issue in batch.issues}) == 2
