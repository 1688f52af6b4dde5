import os
import shutil
from pathlib import Path

import numpy as np
import pytest

from cliptune.data import identity
from cliptune.data.identity import file_identities, text_hashes
from cliptune.data.table import Strings
from cliptune.preprocess.decode import part_path


@pytest.fixture
def files(tmp_path: Path) -> list[Path]:
    """Files of many lengths around the 4 KB that are looked at."""
    paths = []
    for size in (0, 1, 4095, 4096, 4097, 6000, 8192, 8193, 20_000):
        paths.append(tmp_path / f"{size}.bin")
        paths[-1].write_bytes(np.random.default_rng(size).bytes(size))
    return paths


def identities(paths: list[Path], cache_file: Path | None = None) -> list[int]:
    found: list[int] = file_identities(Strings.of(map(str, paths)), cache_file=cache_file).tolist()
    return found


def test_equal_content_has_an_equal_identity_wherever_it_lies(files: list[Path], tmp_path: Path) -> None:
    copies = [Path(shutil.copy(path, tmp_path / f"copy of {path.name}")) for path in files]
    found = identities(files)
    assert found == identities(copies)
    assert len(set(found)) == len(files) and 0 not in found


def test_a_changed_byte_near_an_end_or_another_size_is_another_identity(files: list[Path]) -> None:
    before = identities(files)
    for path in files[2:]:
        content = path.read_bytes()
        seen = set()
        near = {0, len(content) - 1, min(4095, len(content) - 1), max(len(content) - 4096, 0)}
        for changed in [
            *(content[:at] + bytes([content[at] ^ 1]) + content[at + 1 :] for at in near),
            content + b"\0",
            content[:-1],
        ]:
            path.write_bytes(changed)
            seen.add(identities([path])[0])
        path.write_bytes(content)
        assert len(seen) == len(near) + 2
        assert not seen & set(before)


def test_what_cannot_be_read_is_zero(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "pipe")
    assert identities([tmp_path / "missing", tmp_path, tmp_path / "pipe"]) == [0, 0, 0]


def test_a_part_of_a_tar_file_is_known_by_its_own_bytes(files: list[Path], tmp_path: Path) -> None:
    archive = tmp_path / "x.tar"
    archive.write_bytes(b"header" + b"".join(path.read_bytes() for path in files))
    parts, start = [], 6
    for path in files:
        size = path.stat().st_size
        parts.append(part_path(str(archive), start, size, path.name))
        start += size
    assert file_identities(Strings.of(parts)).tolist() == identities(files)


def test_cached_identities_are_those_of_the_files(
    files: list[Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    cache = tmp_path / "cache" / "identities.npz"
    fresh = identities(files, cache)
    read: list[str] = []
    monkeypatch.setattr(identity, "read_ends", lambda path, size: read.append(path))
    assert identities(files, cache) == fresh == identities(files[::-1], cache)[::-1]
    assert not read
    monkeypatch.undo()
    # replaced with size and time kept, as by `rsync -t`, and written to in place with its time put back
    for path, replace in ((files[-1], True), (files[-2], False)):
        times = path.stat().st_atime_ns, path.stat().st_mtime_ns
        other = tmp_path / "other"
        other.write_bytes(bytes(path.stat().st_size))
        if replace:
            other.replace(path)
        else:
            path.write_bytes(other.read_bytes())
        os.utime(path, ns=times)
    assert identities(files, cache) == identities(files)
    assert identities(files, cache)[-2:] != fresh[-2:]


@pytest.mark.parametrize("damage", [b"", b"noise", None])
def test_a_damaged_cache_is_made_anew(
    files: list[Path], tmp_path: Path, damage: bytes | None, caplog: pytest.LogCaptureFixture
) -> None:
    cache = tmp_path / "identities.npz"
    fresh = identities(files, cache)
    content = bytearray(cache.read_bytes())
    content[len(content) // 2] ^= 1
    cache.write_bytes(content if damage is None else damage)
    assert identities(files, cache) == fresh
    assert "is made anew" in caplog.text
    assert identities(files, cache) == fresh
    assert caplog.text.count("made anew") == 1


def test_a_cache_that_cannot_be_written_costs_only_time(
    files: list[Path], tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    (tmp_path / "file").touch()
    assert identities(files, tmp_path / "file" / "identities.npz") == identities(files)
    assert "cannot be written" in caplog.text


def test_another_seed_gives_none_of_the_same_hashes() -> None:
    names = Strings.of([f"{number}.png" for number in range(1000)])
    seeds = [text_hashes(names, seed=seed) for seed in range(4)]
    assert len(np.unique(np.concatenate(seeds))) == 4000
