"""Image files and members of shards that would take any amount of memory: skipped by name, before they are read."""

import io
import json
import os
import struct
import tarfile
import tracemalloc
import zlib
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from cliptune.data.tar_samples import read_samples
from cliptune.preprocess import decode, depth
from cliptune.preprocess.decode import load_image, part_path, read_bytes
from tests.helpers.datasets import make_images, make_index, make_shards, png_bytes
from tests.helpers.runs import SMALL, check_data, small_runs
from train import main

GB = 10**9


@contextmanager
def little_memory(limit: float) -> Iterator[None]:
    """Let Python and NumPy take no more than so many bytes inside."""
    tracemalloc.start()
    try:
        yield
        assert tracemalloc.get_traced_memory()[1] < limit
    finally:
        tracemalloc.stop()


def large_png(size: tuple[int, int], mode: str) -> bytes:
    file = io.BytesIO()
    Image.new(mode, size).save(file, "PNG")
    return file.getvalue()


def sparse_file(path: Path, size: int, head: bytes = b"") -> None:
    with path.open("wb") as file:
        file.write(head)
        file.truncate(size)


def tiff_of_one_tile(side: int) -> bytes:
    """A TIFF of 8 x 8 pixels in a tile of `side` x `side`, in which libtiff would unpack it."""
    data = zlib.compress(bytes(1000))
    fields = {256: 8, 257: 8, 258: 8, 259: 8, 262: 1, 277: 1, 322: side, 323: side, 324: 8, 325: len(data)}
    entries = b"".join(struct.pack("<HHII", tag, 4, 1, value) for tag, value in fields.items())
    head = struct.pack("<2sHI", b"II", 42, 8 + len(data))
    return head + data + struct.pack("<H", len(fields)) + entries + bytes(4)


def webp_of(width: int, height: int) -> bytes:
    """A lossless WebP whose head says so many pixels; of those there are 8 x 8."""
    file = io.BytesIO()
    Image.new("RGB", (8, 8)).save(file, "WEBP", lossless=True)
    content = bytearray(file.getvalue())
    start = content.index(b"VP8L") + 9  # after its length and a byte that says lossless: 14 bits for each side
    fields = int.from_bytes(content[start : start + 4], "little") >> 28 << 28
    content[start : start + 4] = (fields | (height - 1) << 14 | (width - 1)).to_bytes(4, "little")
    return bytes(content)


LARGE: dict[str, tuple[Callable[[Path], object], str]] = {
    "holes.jpg": (lambda path: sparse_file(path, 40 * GB, png_bytes(0)), "a file of 40.0 GB; at most 1 GB are read"),
    "pixels.png": (lambda path: path.write_bytes(large_png((13400, 13400), "1")), "more than 178956970 pixels"),
    "webp.webp": (lambda path: path.write_bytes(webp_of(16000, 8000)), "its pixels would take 1.5 GB; at most 1 GB"),
    "tile.tif": (lambda path: path.write_bytes(tiff_of_one_tile(60_000)), "its pixels would take 3.6 GB; at most 1 GB"),
    "script.jpg": (lambda path: Image.new("RGB", (8, 8)).save(path, "EPS"), "PostScript, which is a program"),
}
"""Files that are not read, and the reason given."""


@pytest.fixture(scope="module")
def large(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Twenty good images, and one that is too large in each of the ways."""
    folder = tmp_path_factory.mktemp("large")
    names = [f"{number}.png" for number in range(20)]
    make_images(folder, *names)
    for name, (make, _) in LARGE.items():
        make(folder / name)
    make_index(folder, [{"image": name, "caption": f"a {name}"} for name in [*names, *LARGE]])
    return folder


@pytest.mark.parametrize("name", LARGE)
def test_a_large_image_is_refused_before_it_is_read(name: str, large: Path) -> None:
    with little_memory(50e6), pytest.raises((ValueError, OSError), match=rf"{name}.*{LARGE[name][1]}"):
        load_image(large / name)


@pytest.mark.slow
def test_check_lists_all_of_them(large: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with little_memory(200e6):
        assert check_data(large, tmp_path) == 1
    lines = capsys.readouterr().out.splitlines()
    for name, (_, reason) in LARGE.items():
        assert any(name in line and reason in line for line in lines), name


@pytest.mark.slow
@pytest.mark.parametrize("limit", ["0.5", "0.1"])
def test_a_run_skips_them_or_ends_in_one_line(
    limit: str, large: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    flags = [*SMALL, "--data_dir", str(large), "--output_dir", str(tmp_path), "--num_epochs", "1"]
    with small_runs():
        code = main([*flags, "--val_split", "0.3", "--max_skipped_fraction", limit])
    assert code == (0 if limit == "0.5" else 2)
    skipped = json.loads((tmp_path / "results" / "skipped.json").read_text()) if code == 0 else None
    error = capsys.readouterr().err
    if skipped is None:
        assert "Traceback" not in error
        assert error.count("error:") == 1
    else:
        assert all(name in json.dumps(skipped) for name in LARGE)


@pytest.mark.slow
@pytest.mark.parametrize("mode", ["I;16", "F", "LA", "RGBA", "P"])
def test_peak_memory_is_a_little_more_than_the_decoded_image(mode: str, tmp_path: Path) -> None:
    """In a process of its own, whose peak the system counts."""
    path = tmp_path / ("x.tif" if mode == "F" else "x.png")
    options = {"compression": "tiff_adobe_deflate"} if mode == "F" else {"transparency": 0} if mode == "P" else {}
    Image.new(mode, (8000, 8000)).save(path, **options)
    reader, writer = os.pipe()
    if (child := os.fork()) == 0:
        code = 1
        try:
            before = peak_bytes()
            load_image(path)
            os.write(writer, str(peak_bytes() - before).encode())
            code = 0
        finally:
            os._exit(code)
    assert os.waitpid(child, 0)[1] == 0
    used = int(os.read(reader, 100))
    os.close(reader)
    os.close(writer)
    assert used < 64e6 * (4 + 4) * 1.5  # the image as it is, and as RGB; all at once it was 25 bytes a pixel


def peak_bytes() -> int:
    lines = Path("/proc/self/status").read_text().splitlines()
    return 1024 * int(next(line for line in lines if line.startswith("VmHWM")).split()[1])


@pytest.mark.parametrize("mode", ["I;16", "I", "F", "LA", "RGBA", "P"])
def test_strips_give_the_pixels_of_the_whole(mode: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    values = np.random.default_rng(0).integers(0, 65536, (50, 40, 4))
    if mode in {"I;16", "I", "F"}:
        kind = {"I;16": np.uint16, "I": np.int32, "F": np.float32}[mode]
        image = Image.fromarray((values[..., 0] / (65536 if mode == "F" else 1)).astype(kind))
    else:
        image = Image.fromarray((values % 256).astype(np.uint8), "RGBA").convert(mode)
    if mode == "P":
        image.info["transparency"] = 3
    whole = decode.to_rgb(image)
    monkeypatch.setattr(depth, "STRIP_PIXELS", 300)
    assert np.array_equal(np.asarray(decode.to_rgb(image)), np.asarray(whole))


def test_a_part_of_a_tar_file_is_not_longer_than_an_image_may_be(tmp_path: Path) -> None:
    """An index may name any part."""
    (tmp_path / "x.tar").write_bytes(bytes(1000))
    with little_memory(50e6), pytest.raises(OSError, match=r"a file of 99\.0 GB; at most 1 GB"):
        read_bytes(part_path(str(tmp_path / "x.tar"), 0, 99 * GB, "a.jpg"))


def add(tar: tarfile.TarFile, name: str, content: bytes, **fields: object) -> None:
    info = tarfile.TarInfo(name)
    info.size = len(content)
    for key, value in fields.items():
        setattr(info, key, value)
    tar.addfile(info, io.BytesIO(content))


def gnu_sparse(tar: tarfile.TarFile) -> None:
    """A member of 5 GB, of which one block is there, as GNU tar writes it with --sparse in its own format."""
    info = tarfile.TarInfo("0003.png")
    header = bytearray(info.tobuf(tarfile.GNU_FORMAT))
    header[156:157] = tarfile.GNUTYPE_SPARSE
    header[124:136] = b"%011o\0" % 512
    header[257:265] = b"ustar  \0"
    header[386:410] = b"%011o\0" % 0 + b"%011o\0" % 512
    header[483:495] = b"\x80" + (5 * GB).to_bytes(11, "big")
    header[148:156] = b" " * 8
    header[148:156] = b"%06o\0 " % sum(header)
    tar.fileobj.write(bytes(header) + bytes(512))
    tar.offset += 1024


def pax_sparse(tar: tarfile.TarFile) -> None:
    headers = {"GNU.sparse.major": "1", "GNU.sparse.minor": "0", "GNU.sparse.realsize": str(5 * GB)}
    content = b"1\n0\n512\n".ljust(512, b"\0") + bytes(512)
    add(tar, "0003.png", content, pax_headers=headers)


def old_pax_sparse(tar: tarfile.TarFile) -> None:
    headers = {"GNU.sparse.size": str(5 * GB), "GNU.sparse.numblocks": "1", "GNU.sparse.map": "0,512"}
    add(tar, "0003.png", bytes(512), pax_headers=headers)


def claimed_size(tar: tarfile.TarFile) -> None:
    add(tar, "0003.png", bytes(512), pax_headers={"GNU.sparse.realsize": str(5 * GB)})


def sparse_caption(tar: tarfile.TarFile) -> None:
    headers = {"GNU.sparse.size": str(5 * GB), "GNU.sparse.numblocks": "1", "GNU.sparse.map": "0,512"}
    add(tar, "0003.json", bytes(512), pax_headers=headers)


def long_caption(tar: tarfile.TarFile) -> None:
    add(tar, "0003.txt", b"a word " * 3_000_000)


MEMBERS = [gnu_sparse, pax_sparse, old_pax_sparse, claimed_size, sparse_caption, long_caption]


def shard_with(make: Callable[[tarfile.TarFile], None], folder: Path) -> str:
    """Four good samples, and one in their middle that is not."""
    folder.mkdir(exist_ok=True)
    with tarfile.open(folder / "x.tar", "w", format=tarfile.PAX_FORMAT) as tar:
        for number in range(6):
            if number == 3:
                make(tar)
                add(tar, "0003.alt", b"no image and no caption")
            else:
                add(tar, f"{number:04}.png", png_bytes(number))
                add(tar, f"{number:04}.txt", b"a caption")
    return str(folder / "x.tar")


@pytest.mark.parametrize("make", MEMBERS, ids=lambda make: make.__name__)
@pytest.mark.parametrize("remote", [False, True])
def test_a_large_member_is_an_issue_by_name(
    remote: bool, make: Callable[[tarfile.TarFile], None], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    url = shard_with(make, tmp_path)
    with little_memory(100e6):
        samples = list(read_samples(f"pipe:cat {url}" if remote else url))
        assert [sample.key for sample in samples] == [f"000{number}" for number in range(6)]
        for sample in samples:
            if sample.key != "0003":
                assert load_image(sample.image()).size == (8, 8)
                continue
            for read in (sample.image, sample.captions):
                with pytest.raises(ValueError, match=r"is a (sparse file, which unfolds to|file of) [0-9,]+ bytes"):
                    read()
        assert check_data(url, tmp_path) == 1
    assert "x.tar/0003: " in capsys.readouterr().out


@pytest.mark.slow
def test_a_run_on_shards_skips_it(tmp_path: Path, sample_dir: Path) -> None:
    url = shard_with(pax_sparse, tmp_path)
    flags = [*SMALL, "--data_dir", url, "--val_data", str(sample_dir), "--output_dir", str(tmp_path / "out")]
    with small_runs():
        assert main([*flags, "--num_epochs", "1", "--max_skipped_fraction", "0.5"]) == 0
    assert "which unfolds to 5,000,000,000 bytes" in (tmp_path / "out" / "results" / "skipped.json").read_text()


@pytest.mark.parametrize("kind", [tarfile.XHDTYPE, tarfile.GNUTYPE_LONGNAME, tarfile.XGLTYPE])
def test_a_header_of_5_gb_is_refused(kind: bytes, tmp_path: Path) -> None:
    """The shard is a sparse file on the disk."""
    data = Path(make_shards(tmp_path, 2).replace("{00..00}", "00")).read_bytes()
    info = tarfile.TarInfo("././@PaxHeader")
    info.type, info.size = kind, 5 * GB
    sparse_file(tmp_path / "x.tar", 6 * GB, info.tobuf(tarfile.GNU_FORMAT) + data)
    for url in (str(tmp_path / "x.tar"), f"pipe:head -c 2000000 {tmp_path / 'x.tar'}"):
        with little_memory(50e6), pytest.raises(OSError, match=r"x\.tar.*a header of 5,000,000,\d+ bytes"):
            list(read_samples(url))


@pytest.mark.parametrize("size", [-512, -1024, -(2**40)])
def test_a_member_that_leads_back_ends_the_shard(size: int, tmp_path: Path) -> None:
    data = Path(make_shards(tmp_path, 3).replace("{00..00}", "00")).read_bytes()
    header = bytearray(data[2048:2560])
    header[124:136] = (2**96 + size).to_bytes(12, "big")
    header[124] = 0xFF
    header[148:156] = b" " * 8
    header[148:156] = b"%06o\0 " % sum(header)
    (tmp_path / "x.tar").write_bytes(data[:2048] + bytes(header) + data[2560:])
    with pytest.raises(OSError, match=r"x\.tar: cannot be read as a tar file"):
        list(read_samples(str(tmp_path / "x.tar")))
