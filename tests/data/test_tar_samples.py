import gzip
import json
import random
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

import data_loader
from cliptune.data.pairs import DataSource, load_pairs
from cliptune.data.shard_loader import ShardLoader, training_shards
from cliptune.data.shards import is_shards, open_shards
from cliptune.data.tar_samples import MAX_FILES, count_samples, read_samples
from cliptune.language.catalogue import language_of
from cliptune.preprocess.transforms import clip_transform
from tests.helpers.datasets import make_tar, png_bytes
from tests.helpers.runs import check_data

Members = list[tuple[str, bytes]]
OPTIONS: dict[str, Any] = {"transform": clip_transform(8), "batch_size": 8, "device": torch.device("cpu"), "seed": 0}


def of_each(*members: tuple[str, bytes], count: int = 9) -> Members:
    return [(name.format(n), content or png_bytes(n)) for n in range(count) for name, content in members]


def pairs_of(image: str, text: str, count: int = 20, content: str = "number {}") -> Members:
    members = []
    for n in range(count):
        members += [(image.format(n), png_bytes(n)), (text.format(n), content.format(n).encode())]
    return members


def assert_counts_agree(url: str) -> int:
    """However a shard is read, it has the same samples."""
    whole = list(read_samples(url))
    by_path = list(read_samples(url, by_path=True))
    streamed = list(read_samples(f"pipe:cat {url}"))
    assert count_samples(url) == len(whole)
    assert [sample.key for sample in by_path] == [sample.key for sample in whole]
    assert streamed == whole
    for start in range(len(whole) + 1):
        for end in {start, start + 1, start + 3, len(whole)}:
            assert list(read_samples(url, start, end)) == whole[start:end]
    return len(whole)


READ = {
    "dots": pairs_of("photo_{0}_jpg.rf.{0:08}.jpg", "photo_{0}_jpg.rf.{0:08}.txt"),
    "two of a key": [
        member
        for n in range(20)
        for member in (
            (f"p{n // 2}.rf.{n}.jpg", png_bytes(n)),
            (f"p{n // 2}.rf.{n}.txt", f"number {n}".encode()),
        )
    ],
    "version": pairs_of("v1.{:04}.jpg", "v1.{:04}.txt"),
    "version with JSON": pairs_of("v1.{:04}.jpg", "v1.{:04}.json", content='{{"caption": "number {}"}}'),
    "name and name.1": pairs_of("photo.{}.jpg", "photo.{}.txt", 19)
    + pairs_of("photo.jpg", "photo.txt", 1, "number 19"),
    "named": pairs_of("s{:04}.input.jpg", "s{:04}.outputs.txt"),
    "img and cap": pairs_of("{:04}.img", "{:04}.cap"),
    "caption": pairs_of("{:04}.jpg", "{:04}.caption"),
    "captions": pairs_of("{:04}.PNG", "{:04}.captions"),
    "text under another key": pairs_of("{:04}.jpg", "{:04}.json", content='{{"TEXT": "number {}", "caption": ""}}'),
    "JSON that is the text": pairs_of("{:04}.jpg", "{:04}.json", content='["number {}"]'),
    "number": pairs_of("{:04}.jpg", "{:04}.json", content='{{"caption": {}}}'),
    "another spelling": pairs_of("{:04}.jpg", "{:04}.json", content='{{"Alt-Text": "number {}", "url": "x"}}'),
    "folders": pairs_of("v1.0/{:04}.jpg", "v1.0/{:04}.txt"),
}


@pytest.mark.parametrize("members", READ.values(), ids=list(READ))
def test_other_names_are_read(members: Members, tmp_path: Path) -> None:
    make_tar(tmp_path / "x.tar", members)
    url = str(tmp_path / "x.tar")
    assert assert_counts_agree(url) == 20
    found = {int(caption.split()[-1]) for caption in load_pairs(url).captions}
    assert found == set(range(20))
    loader = ShardLoader(open_shards(url), num_workers=0, **OPTIONS)
    batches = list(loader.epoch(1))
    assert sum(len(batch.image_ids) for batch in batches) == 20
    assert not [issue for batch in batches for issue in batch.issues]


def test_lists_that_are_written_as_texts_are_captions(tmp_path: Path) -> None:
    content = json.dumps({"caption": "['one, two', 'three']"}).encode()
    make_tar(tmp_path / "x.tar", [("0.jpg", png_bytes(0)), ("0.json", content)])
    assert next(read_samples(str(tmp_path / "x.tar"))).captions() == ("one, two", "three")


@pytest.mark.slow
def test_more_files_of_a_sample_change_nothing(tmp_path: Path) -> None:
    more = [
        lambda key, n: [(f"{key}.seg.png", b"a mask")],
        lambda key, n: [(f"{key}.depth.png", b"a mask"), (f"{key}.depth.json", b"{}")],
        lambda key, n: [(f"{key}.psd", b"the source")],
        lambda key, n: [(f"{key}.json", b'[1, 2, {"box": 3}]'), (f"{key}.npy", b"")],
        lambda key, n: [(f"{key}.de.txt", b"another"), (f"{key}.caption", b"another")],
        lambda key, n: [(f"{key}.m{i}.png", b"a mask") for i in range(2 * MAX_FILES)],
    ]
    members: Members = []
    for n, make in enumerate(more):
        key = f"{n:04}"
        own = [(f"{key}.png", png_bytes(n)), *make(key, n), (f"{key}.txt", f"number {n}".encode())]
        members += own if n % 2 else sorted(own)
    make_tar(tmp_path / "x.tar", members)
    url = str(tmp_path / "x.tar")
    assert assert_counts_agree(url) == len(more)
    assert [sample.key for sample in read_samples(url)] == [f"{n:04}" for n in range(len(more))]
    assert [sample.image() for sample in read_samples(url)] == [png_bytes(n) for n in range(len(more))]
    assert [sample.captions() for sample in read_samples(url)] == [(f"number {n}",) for n in range(len(more))]


def test_hidden_files_are_none_of_a_sample(tmp_path: Path) -> None:
    """A tar file of macOS has d/._0.jpg before d/0.jpg, and d/._0.txt before d/0.txt."""
    members = of_each(("d/._{}.jpg", b"x"), ("d/{}.jpg", b""), ("d/._{}.txt", b"x"), ("d/{}.txt", b"number 1"))
    make_tar(tmp_path / "x.tar", [("./._0.jpg", b"x"), *members, ("__MACOSX/._d", b"x"), (".DS_Store", b"x")])
    assert assert_counts_agree(str(tmp_path / "x.tar")) == 9
    assert len(load_pairs(tmp_path / "x.tar")) == 9


SAID: dict[str, tuple[Members, str, int]] = {
    "apart": ([(f"{n}.jpg", b"x") for n in range(9)] + [(f"{n}.txt", b"x") for n in range(9)], "stand next to", 18),
    "apart in folders": (
        [(f"images/{n}.jpg", b"x") for n in range(9)] + [(f"captions/{n}.txt", b"x") for n in range(9)],
        "with --to_shards", 18,
    ),
    "classes": (pairs_of("{}.jpg", "{}.cls", 9), "no caption among .jpg, .cls; .cls is a class", 9),
    "pairs of images": (
        of_each(("{}.input.jpg", b""), ("{}.output.jpg", b""), ("{}.txt", b"x")),
        "2 images among .input.jpg, .output.jpg, .txt", 9,
    ),
    "two texts": (
        of_each(("{}.jpg", b""), ("{}.de.txt", b"x"), ("{}.en.txt", b"x")),
        "2 texts among .jpg, .de.txt, .en.txt: name one with --caption_key de.txt", 9,
    ),
    "another key": (
        pairs_of("{}.jpg", "{}.json", 9, '{{"prompt_en": "number {}", "url": 3}}'),
        "no caption among .jpg, .json; its JSON has prompt_en, url: name the one to take with --caption_key", 9,
    ),
    "another text": (
        pairs_of("{}.jpg", "{}.tags", 9),
        "no caption among .jpg, .tags; texts are .txt, .caption, .captions, .cap, .text, or what --caption_key names",
        9,
    ),
    "no text": ([(f"{n}.jpg", b"x") for n in range(9)], "no caption among .jpg; the files of a sample", 9),
    "no text, dots": ([(f"v1.{n}.jpg", b"x") for n in range(9)], "no caption among .jpg; the files of a sample", 9),
}  # fmt: skip


@pytest.mark.parametrize(("members", "said", "lost"), SAID.values(), ids=list(SAID))
def test_what_a_sample_has_and_what_to_do_is_said(members: Members, said: str, lost: int, tmp_path: Path) -> None:
    make_tar(tmp_path / "x.tar", members)
    url = str(tmp_path / "x.tar")
    assert assert_counts_agree(url) == lost
    with pytest.raises(ValueError, match=f"{lost} of {lost} records cannot be used") as error:
        load_pairs(url)
    assert said in str(error.value)
    with pytest.raises(ValueError, match="is usable") as error:
        training_shards(DataSource(url), val_data=url)
    assert said in str(error.value)


def test_shards_of_no_usable_sample_are_refused_though_all_may_be_skipped(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    make_tar(tmp_path / "x.tar", [(f"{n}.jpg", b"x") for n in range(9)])
    flags = ["--data_dir", str(tmp_path / "x.tar"), "--output_dir", str(tmp_path)]
    assert data_loader.main([*flags, "--check"]) == 2
    said = capsys.readouterr().err
    assert f"{tmp_path / 'x.tar'}: none of its 9 records can be used: x.tar/0: no caption among .jpg; the files" in said
    assert "none of its" not in language_of("zh").say(said.partition("error: ")[2].strip())


def test_a_way_out_that_many_samples_share_is_said_once(tmp_path: Path) -> None:
    members = [("0.txt", b"x"), *((f"{n}.jpg", b"x") for n in range(1, 30)), ("0.jpg", b"x")]
    make_tar(tmp_path / "x.tar", members)
    url = str(tmp_path / "x.tar")
    for read in (load_pairs, lambda url: training_shards(DataSource(url), val_data=url)):
        with pytest.raises(ValueError, match=r"\.txt; the files of a sample share") as error:
            read(url)
        said = str(error.value)
        assert said.count("stand next to each other") == 1
        assert "x.tar/1: no caption among .jpg; x.tar/2: no caption among .jpg; " in said
        in_chinese = language_of("zh").say(said)
        assert in_chinese.count("并且彼此相邻") == 1
        assert "no caption" not in in_chinese


@pytest.mark.parametrize(("key", "members"), [
    ("cls", pairs_of("{}.jpg", "{}.cls", 9)),
    ("en.txt", of_each(("{}.jpg", b""), ("{}.de.txt", b"x"), ("{}.en.txt", b"number 1"))),
    ("en,de", of_each(("{}.jpg", b""), ("{}.json", b'{"en": "number 1", "de": "number 2", "x": "x"}'))),
    ("de.txt,en.txt", of_each(("{}.jpg", b""), ("{}.de.txt", b"number 1"), ("{}.en.txt", b"number 2"))),
    ("prompt_en", pairs_of("{}.jpg", "{}.json", 9, '{{"prompt_en": "number {}", "caption": "x"}}')),
])  # fmt: skip
def test_the_caption_key_names_a_file_or_a_key(key: str, members: Members, tmp_path: Path) -> None:
    make_tar(tmp_path / "x.tar", members)
    pairs = load_pairs(DataSource(tmp_path / "x.tar", caption_key=key))
    assert len(pairs) == 9
    assert all(caption.startswith("number") for caption in pairs.captions)
    loader = ShardLoader(open_shards(str(tmp_path / "x.tar")), num_workers=0, caption_key=key, **OPTIONS)
    assert not [issue for batch in loader.epoch(1) for issue in batch.issues]


@pytest.mark.slow
@pytest.mark.parametrize("hidden", [lambda n: f"v1.{n:04}.jpg", lambda n: f"v1.{n:04}.cls"])
def test_hidden_samples_count_one_by_one(hidden: Callable[[int], str], tmp_path: Path) -> None:
    """100 of 300 are not usable, though they share what is before the first dot."""
    lost = [(hidden(n), png_bytes(n)) for n in range(100)]
    make_tar(tmp_path / "x.tar", pairs_of("a{:04}.jpg", "a{:04}.txt", 200) + lost)
    url = str(tmp_path / "x.tar")
    with pytest.raises(ValueError, match="100 of 300 records cannot be used"):
        load_pairs(url)
    shards = open_shards(url)
    assert len(shards) == 300
    batches = list(ShardLoader(shards, num_workers=0, **OPTIONS).epoch(1))
    assert len({issue.image for batch in batches for issue in batch.issues}) == 100


@pytest.mark.slow
def test_counting_agrees_with_reading_whatever_the_names(tmp_path: Path) -> None:
    """Also where the text is far behind, and where more wait for it than may."""
    chance = random.Random(0)
    for number in range(60):
        members: Members = []
        for _ in range(chance.randint(1, 30)):
            key = chance.choice(["a", "b", "dir/c", "c.d", "__x__", ""])
            name = chance.choice(["", "", ".1", ".2", ".3", ".x.y"])
            ending = chance.choice([".jpg", ".txt", ".json", ".npy", ".psd", ".cls", ""])
            members.append((f"{key}{name}{ending}", b"{}"))
        if number % 10 == 0:
            members += [(f"v1.{n}.jpg", b"x") for n in range(MAX_FILES + 5)] + [("v1.0.txt", b"x")]
        members = [member for member in members if member[0]]
        make_tar(tmp_path / "x.tar", members)
        assert_counts_agree(str(tmp_path / "x.tar"))


def test_a_key_of_many_images_takes_no_memory(tmp_path: Path) -> None:
    """They are told apart after a few, so that not all of them wait in memory for a text."""
    make_tar(tmp_path / "x.tar", [(f"v1.{n:05}.jpg", b"x") for n in range(3 * MAX_FILES)])
    read = read_samples(f"pipe:cat {tmp_path}/x.tar; echo stopped >&2")
    assert next(read).key == "v1.00000"
    assert count_samples(str(tmp_path / "x.tar")) == 3 * MAX_FILES


@pytest.mark.parametrize("name", ["x.tar", "x.tar.gz", "x.tgz"])
def test_packed_shards_are_refused_with_the_way_out(
    name: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    make_tar(tmp_path / "plain.tar", pairs_of("{}.jpg", "{}.txt", 9))
    (tmp_path / name).write_bytes(gzip.compress((tmp_path / "plain.tar").read_bytes()))
    assert is_shards(tmp_path / name)
    assert check_data(tmp_path / name, tmp_path / "out") == 2
    assert "gunzip < " in capsys.readouterr().err
    with pytest.raises(OSError, match="gunzip"):
        open_shards(str(tmp_path / name))


def test_an_index_that_was_counted_another_way_is_counted_again(tmp_path: Path) -> None:
    make_tar(tmp_path / "x.tar", pairs_of("v1.{}.jpg", "v1.{}.txt", 9))
    url = str(tmp_path / "x.tar")
    assert len(open_shards(url)) == 9
    index = json.loads((tmp_path / "shardindex.json").read_text())
    del index["shardlist"][0]["counted_by"]  # as before keys with dots were told apart
    index["shardlist"][0]["nsamples"] = 1
    (tmp_path / "shardindex.json").write_text(json.dumps(index))
    assert len(open_shards(url)) == 9
