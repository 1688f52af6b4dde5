"""Small data sets on disk in several forms; several tests share them."""

import io
import json
import tarfile
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

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
