"""Small data sets on disk in several forms; several tests share them."""

import io
import json
import tarfile
from collections.abc import Mapping, Sequence
from pathlib import Path

from PIL import Image


def make_images(folder: Path, *names: str) -> None:
    for number, name in enumerate(names):
        path = folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.new("RGB", (8, 8), (number % 256, number // 256, 0)).save(path)


def make_index(folder: Path, rows: Sequence[Mapping[str, object]], name: str = "data.json") -> Path:
    path = folder / name
    path.write_text(json.dumps(rows), encoding="utf-8")
    return path


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
