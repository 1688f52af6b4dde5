"""Small data sets on disk in several forms; several tests share them."""

import base64
import io
import json
import tarfile
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
from PIL import Image

from cliptune.data.pairs import DataSource, load_pairs

ONE_ROW = "image,caption\na.png,x\n"
"""Of an index."""


def make_images(folder: Path, *names: str) -> None:
    for number, name in enumerate(names):
        path = folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.new("RGB", (8, 8), (number % 256, number // 256, 0)).save(path)


def make_index(folder: Path, rows: Sequence[Mapping[str, object]], name: str = "data.json") -> Path:
    path = folder / name
    path.write_text(json.dumps(rows), encoding="utf-8")
    return path


def write_files(folder: Path, *names: str, text: str = ONE_ROW) -> None:
    for name in names:
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_text(text, encoding="utf-8")


def read_rows(folder: Path, **options: Any) -> list[tuple[str, list[str], str | None]]:
    """The images by their place in the folder, with captions and split."""
    pairs = load_pairs(DataSource(folder, **options))
    names = [str(Path(path).relative_to(folder.resolve())) for path in pairs.paths]
    splits = [None if code < 0 else ("train", "val", "test")[code] for code in pairs.splits]
    return sorted(zip(names, map(pairs.captions_of, range(len(pairs))), splits, strict=True))


def png_bytes(number: int) -> bytes:
    file = io.BytesIO()
    Image.new("RGB", (8, 8), (number % 256, number // 256, 0)).save(file, "PNG")
    return file.getvalue()


def make_tar(path: Path, members: Sequence[tuple[str, bytes]]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    with tarfile.open(path, "w") as tar:
        for name, content in members:
            info = tarfile.TarInfo(name)
            info.size = len(content)
            tar.addfile(info, io.BytesIO(content))


def make_shards(folder: Path, *counts: int) -> str:
    """Shards of so many samples; the image and the only caption of each say which sample it is."""
    first = 0
    for shard, count in enumerate(counts):
        members = []
        for number in range(first, first + count):
            members += [(f"{number:04}.png", png_bytes(number)), (f"{number:04}.txt", f"number {number}".encode())]
        make_tar(folder / f"{shard:02}.tar", members)
        first += count
    return f"{folder}/{{00..{len(counts) - 1:02}}}.tar"


def make_parquet(path: Path, count: int, *, first: int = 0, rows_per_group: int = 100) -> Path:
    """Parquet with images inside, as the Hub stores them; the image and the caption of each say which row it is."""
    path.parent.mkdir(parents=True, exist_ok=True)
    numbers = range(first, first + count)
    images = [{"bytes": png_bytes(number), "path": f"{number}.png"} for number in numbers]
    columns = {"image": images, "caption": [f"number {number}" for number in numbers]}
    pq.write_table(pa.table(columns), path, row_group_size=rows_per_group)
    return path


def make_chinese_clip(folder: Path, split: str, count: int, *, first: int = 0) -> Path:
    """Chinese-CLIP's files of a split, with an image a caption; returns the captions' file."""
    folder.mkdir(parents=True, exist_ok=True)
    numbers = range(first, first + count)
    lines = [f"{1000 + number}\t{base64.b64encode(png_bytes(number)).decode()}\n" for number in numbers]
    (folder / f"{split}_imgs.tsv").write_text("".join(lines))
    texts = [{"text_id": number, "text": f"数字 {number}", "image_ids": [1000 + number]} for number in numbers]
    path = folder / f"{split}_texts.jsonl"
    path.write_text("".join(json.dumps(text, ensure_ascii=False) + "\n" for text in texts), encoding="utf-8")
    return path
