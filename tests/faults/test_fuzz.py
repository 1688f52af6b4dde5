"""Mutations of valid index files, `config.json`, images, shards: read, or refused with a message that names the file.

`CLIP_TOOLKIT_LONG_TESTS=1` tries 10,000 of each instead of 200.
"""

from __future__ import annotations

import ctypes
import gc
import json
import logging
import os
import signal
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from io import BytesIO
from pathlib import Path
from typing import Any

import psutil
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from cliptune.cli import load_config
from cliptune.data.pairs import DataSource, load_pairs
from cliptune.data.shards import open_shards, write_shards
from cliptune.preprocess.decode import load_image
from cliptune.preprocess.transforms import CropTransform
from cliptune.settings import Config
from tests.helpers.datasets import png_bytes
from tests.helpers.launch import ROOT
from tests.helpers.zoo import corners


@pytest.fixture(autouse=True, scope="module")
def unlogged() -> Iterator[None]:
    """What is logged of a spoiled file may hold half characters, which one test process cannot hand to another."""
    logging.disable(logging.CRITICAL)
    yield
    logging.disable(logging.NOTSET)


LONG = os.environ.get("CLIP_TOOLKIT_LONG_TESTS") == "1"
MANY = settings(
    max_examples=10_000 if LONG else 200,
    deadline=None,
    database=None,
    suppress_health_check=list(HealthCheck),
)
HANGS_AFTER = 60
"""Seconds; a file of this size takes milliseconds."""
MAX_GROWTH = 300_000_000
"""Bytes, over all examples of a test, of which Hypothesis itself remembers something."""

ROWS = [
    {"image": f"{name}.jpg", "caption": ["a cat", "ein Kätzchen"], "split": split, "group": group}
    for name, split, group in (("a", "train", 1), ("b", "val", "g"), ("c", None, None), ("a", "train", 1))
]
COCO = {
    "images": [{"id": 1, "file_name": "a.jpg"}, {"id": "x", "file_name": "b.jpg"}],
    "annotations": [{"id": 1, "image_id": 1, "caption": "a cat"}, {"id": 2, "image_id": "x", "caption": "猫"}],
}
KARPATHY = {"images": [{"filename": "a.jpg", "filepath": ".", "split": "test", "sentences": [{"raw": "a cat"}]}]}
TABLES: list[Any] = [
    {"columns": ["image", "caption"], "data": [["a.jpg", "a cat"], ["b.jpg", 7]]},
    {"image": {"0": "a.jpg", "1": "b.jpg"}, "caption": {"0": ["a cat"], "1": "a dog"}},
    {"train": ROWS[:1], "val": {"b.jpg": ["a dog"]}, "info": {}},
    {"data": ROWS},
]
DOCUMENTS: list[Any] = [ROWS, COCO, KARPATHY, {"a.jpg": ["a cat", "猫"], "b.jpg": "a dog"}, ROWS[0], *TABLES]
TEXTS = [
    *(json.dumps(document, ensure_ascii=number % 2 == 0) for number, document in enumerate(DOCUMENTS)),
    "\n".join(map(json.dumps, ROWS)),
    'image,caption,split\na.jpg,"a ""cat"", sitting",train\nb.jpg,a dog,val\n',
    "filepath\ttitle\na.jpg\ta cat\nb.jpg\ta dog\n",
    "a.jpg#0\ta cat .\na.jpg#1\tanother\nb.jpg#0\ta dog\n",
    "sep=;\nImage;Caption 0;caption_1\na.jpg;['a cat', 'it'];\"a\nb\"\nb.jpg;\"tis a dog;x\n",
    'image_name| comment_number| comment\na.jpg| 0| a "cat" .\nb.jpg| 1| a dog\n',
]
IMAGES: list[tuple[str, dict[str, Any]]] = [
    ("JPEG", {}), ("JPEG", {"progressive": True}), ("PNG", {}), ("GIF", {"save_all": True}), ("WEBP", {}),
    ("WEBP", {"lossless": True}), ("TIFF", {}), ("TIFF", {"compression": "tiff_lzw"}), ("BMP", {}), ("PPM", {}),
]  # fmt: skip
CONFIG = json.loads((ROOT / "config.json").read_text(encoding="utf-8"))

PIECES = [
    b"[", b"]", b"{", b"}", b'"', b",", b":", b"\\", b"\n", b"\r", b"\t", b"\0", b"\xff", b"\xc3", b"\xef\xbb\xbf",
    b"null", b"NaN", b"Infinity", b"-1e999", b"true", b"[]", b"{}", b'"image"', b'"caption"', b"\\ud83e", b"\\u0000",
    b"#0", b"9" * 5000, b"[" * 100, b'{"a":' * 100, b"[" * 20_000, b"x" * 3000, "\u2028\u202e".encode(), b"../",
]  # fmt: skip
VALUES: list[Any] = [
    None, True, 0, -1, 1.5, float("nan"), float("inf"), 10**30, "", " ", "a.jpg", "\0", "\ud83e", "x" * 2000, [], {},
    [[]], [None], {"a": 1}, {"raw": "x"}, "none", "train", [1, "x"],
]  # fmt: skip


@st.composite
def spoiled_bytes(draw: st.DrawFn, contents: list[bytes]) -> bytes:
    """One of the contents after one to four mutations."""
    content = draw(st.sampled_from(contents))
    for _ in range(draw(st.integers(1, 4))):
        content = draw(st.sampled_from(MUTATIONS))(draw, content)
    return content


def flip(draw: st.DrawFn, content: bytes) -> bytes:
    if not content:
        return content
    place = draw(st.integers(0, len(content) - 1))
    return content[:place] + bytes([content[place] ^ (1 << draw(st.integers(0, 7)))]) + content[place + 1 :]


def cut(draw: st.DrawFn, content: bytes) -> bytes:
    return content[: draw(st.integers(0, len(content)))]


def remove(draw: st.DrawFn, content: bytes) -> bytes:
    start, end = part(draw, content)
    return content[:start] + content[end:]


def repeat(draw: st.DrawFn, content: bytes) -> bytes:
    start, end = part(draw, content)
    return content[:end] + content[start:end] * draw(st.sampled_from([1, 2, 50])) + content[end:]


def insert(draw: st.DrawFn, content: bytes) -> bytes:
    place = draw(st.integers(0, len(content)))
    return content[:place] + draw(st.sampled_from(PIECES)) + content[place:]


def double_line(draw: st.DrawFn, content: bytes) -> bytes:
    lines = content.splitlines(keepends=True) or [b""]
    place = draw(st.integers(0, len(lines) - 1))
    return b"".join([*lines[: place + 1], *lines[place:]])


def part(draw: st.DrawFn, content: bytes) -> tuple[int, int]:
    start = draw(st.integers(0, len(content)))
    return start, draw(st.integers(start, min(start + 40, len(content))))


MUTATIONS: list[Callable[[st.DrawFn, bytes], bytes]] = [flip, cut, remove, repeat, insert, double_line]


@st.composite
def swapped_types(draw: st.DrawFn, documents: list[Any]) -> bytes:
    """One of the JSON documents with one to three values of another type, or a key that is gone, doubled or deep."""
    document = json.loads(json.dumps(draw(st.sampled_from(documents))))
    for _ in range(draw(st.integers(1, 3))):
        document = swapped(draw, document)
    return json.dumps(document).encode()


def swapped(draw: st.DrawFn, value: Any) -> Any:
    """The value with one place in it changed, wherever the draws lead."""
    if not isinstance(value, dict | list) or not value or draw(st.integers(0, 5)) == 0:
        return draw(st.sampled_from(VALUES))
    keys = list(value) if isinstance(value, dict) else list(range(len(value)))
    key: Any = draw(st.sampled_from(keys))
    kind = draw(st.sampled_from(["inside", "inside", "inside", "gone", "renamed", "deep"]))
    changed: Any = value.copy()
    if kind == "inside":
        changed[key] = swapped(draw, value[key])
    elif kind == "deep":
        for _ in range(draw(st.sampled_from([1, 100, 500]))):
            changed[key] = [changed[key]]
    else:
        moved = changed.pop(key)
        if kind == "renamed" and isinstance(changed, dict):
            changed[f"{key}x"] = moved
    return changed


@contextmanager
def bounded() -> Iterator[None]:
    """Raise where something hangs, with a traceback that tells where."""

    def stop(*_: object) -> None:
        raise AssertionError(f"hangs: no answer within {HANGS_AFTER} s")

    before = signal.signal(signal.SIGALRM, stop)
    signal.alarm(HANGS_AFTER)
    try:
        yield
    finally:
        signal.alarm(0)
        signal.signal(signal.SIGALRM, before)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    made = tmp_path_factory.mktemp("fuzz")
    for name in ("a", "b", "c"):
        corners().save(made / f"{name}.jpg")
    return made


@pytest.fixture(autouse=True)
def no_growth() -> Iterator[None]:
    before = memory_in_use()
    yield
    assert memory_in_use() - before < MAX_GROWTH


def memory_in_use() -> int:
    """Bytes of this process, without what only waits to be used again."""
    gc.collect()
    if hasattr(libc := ctypes.CDLL(None), "malloc_trim"):
        libc.malloc_trim(0)
    return int(psutil.Process().memory_info().rss)


def read_or_refuse(path: Path, read: Callable[[], Any]) -> Any:
    """What `read` gives, or None where it refuses the file as it should."""
    with bounded():
        try:
            return read()
        except (ValueError, OSError) as error:
            assert path.name in str(error), repr(error)
            assert len(str(error)) < 20_000
            return None


def check_index(folder: Path, content: bytes, *, caption_key: str | None) -> None:
    path = folder / "index.fuzz"
    path.write_bytes(content)
    pairs = read_or_refuse(path, lambda: load_pairs(DataSource(path, None, caption_key, 1.0)))
    if pairs is not None:
        assert {Path(image).name for image in pairs.paths} <= {"a.jpg", "b.jpg", "c.jpg", "index.fuzz"}
        assert len(set(pairs.paths)) == len(pairs)
        assert all(caption.strip() for caption in pairs.captions)
        assert pairs.num_pairs >= len(pairs)
        assert pairs.issues.num_untold == 0
        assert all(str(issue).isprintable() for issue in pairs.issues.first)


@pytest.mark.slow
@MANY
@given(
    content=spoiled_bytes([text.encode() for text in TEXTS]), caption_key=st.sampled_from([None, "caption", "split"])
)
def test_a_spoiled_index(folder: Path, content: bytes, caption_key: str | None) -> None:
    check_index(folder, content, caption_key=caption_key)


@pytest.mark.slow
@MANY
@given(content=swapped_types(DOCUMENTS))
def test_an_index_of_swapped_types(folder: Path, content: bytes) -> None:
    check_index(folder, content, caption_key=None)


def parquet_bytes() -> list[bytes]:
    columns = {"image": ["a.jpg", "b.jpg", "c.jpg"], "split": ["train", None, "val"], "group": [1, None, 2]}
    contents = []
    for captions in (["a cat", "", "猫"], [["a cat", "x"], None, ["a dog"]]):
        for options in ({}, {"compression": "none", "row_group_size": 2}, {"use_dictionary": False}):
            buffer = BytesIO()
            pq.write_table(pa.table({**columns, "caption": captions}), buffer, **options)
            contents.append(buffer.getvalue())
    return contents


@pytest.mark.slow
@MANY
@given(content=spoiled_bytes(parquet_bytes()))
def test_a_spoiled_parquet_index(folder: Path, content: bytes) -> None:
    check_index(folder, content, caption_key=None)


def held_images_bytes() -> list[bytes]:
    columns = {"image": [{"bytes": png_bytes(n), "path": f"{n // 2}.png"} for n in range(6)], "caption": list("abcdef")}
    contents = []
    for options in ({}, {"compression": "none", "row_group_size": 2}, {"use_dictionary": False}):
        buffer = BytesIO()
        pq.write_table(pa.table(columns), buffer, **options)
        contents.append(buffer.getvalue())
    return contents


@pytest.mark.slow
@MANY
@given(content=spoiled_bytes(held_images_bytes()))
def test_spoiled_images_in_parquet(folder: Path, content: bytes) -> None:
    path = folder / "spoiled.parquet"
    path.write_bytes(content)
    pairs = read_or_refuse(path, lambda: load_pairs(DataSource(path, max_skipped_fraction=1)))
    for image in pairs.paths if pairs is not None else ():
        read_or_refuse(path, partial(load_image, image))


def check_config(folder: Path, content: bytes) -> None:
    path = folder / "config.fuzz"
    path.write_bytes(content)
    found = read_or_refuse(path, lambda: load_config(["--config", str(path)], description=""))
    if found is not None:
        assert not found.given
        assert Config.model_validate(found.config.model_dump()) == found.config


@pytest.mark.slow
@MANY
@given(content=spoiled_bytes([json.dumps(CONFIG, indent=2).encode(), b'{"training": {"seed": 1}}']))
def test_a_spoiled_config(folder: Path, content: bytes) -> None:
    check_config(folder, content)


@pytest.mark.slow
@MANY
@given(content=swapped_types([CONFIG]))
def test_a_config_of_swapped_types(folder: Path, content: bytes) -> None:
    check_config(folder, content)


def picture_bytes() -> list[bytes]:
    contents = []
    for form, options in IMAGES:
        buffer = BytesIO()
        corners().save(buffer, form, **options)
        contents.append(buffer.getvalue())
    return contents


@pytest.mark.slow
@MANY
@given(content=spoiled_bytes(picture_bytes()))
def test_a_spoiled_image(folder: Path, content: bytes, capfd: pytest.CaptureFixture[str]) -> None:
    capfd.readouterr()
    path = folder / "picture.fuzz"
    path.write_bytes(content)
    transform = CropTransform(32, fast_decode=True)
    with bounded():
        read_or_refuse(path, lambda: transform(transform.load(path)))
        image = read_or_refuse(path, lambda: load_image(path))
    assert image is None or image.mode == "RGB"
    if not content.startswith((b"II", b"MM")):  # libtiff writes there itself
        assert capfd.readouterr().err == ""


@pytest.fixture(scope="module")
def shard(folder: Path) -> bytes:
    images = [(str(folder / f"{name}.jpg"), ["a cat", f"picture {name}"]) for name in ("a", "b", "c")]
    write_shards(images, folder / "shards", shard_size=3)
    return (folder / "shards" / "00000.tar").read_bytes()


@pytest.mark.slow
@MANY
@given(data=st.data())
def test_a_spoiled_shard(folder: Path, shard: bytes, data: st.DataObject) -> None:
    """Mutations fall on the heads and the captions, too, although most of a tar file is padding."""
    content = data.draw(spoiled_bytes([shard]))
    path = folder / "fuzz.tar"
    path.write_bytes(content)
    pairs = read_or_refuse(path, lambda: load_pairs(DataSource(path, max_skipped_fraction=1.0)))
    assert pairs is None or all(caption.strip() for caption in pairs.captions)
    counted = read_or_refuse(path, lambda: open_shards(str(path)))
    assert counted is None or pairs is None or len(counted) >= len(pairs)
