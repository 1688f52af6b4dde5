import logging
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from benchmarks.near_duplicates import COPIES
from cliptune.data import fingerprints
from cliptune.data.fingerprints import Fingerprints, take_fingerprints
from cliptune.data.near_duplicates import NearDuplicates, find_near_duplicates, look_for_near_duplicates
from cliptune.data.pairs import load_pairs
from cliptune.data.sample_data import create_sample_dataset
from cliptune.data.table import Strings
from cliptune.preprocess.decode import DecodedImage
from tests.helpers.photos import photo


def paths_in(folder: Path) -> Strings:
    return Strings.of(sorted(str(path) for path in folder.rglob("*.*g")))


@pytest.fixture(scope="module")
def planted(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Sixteen images, a copy of each of the first eight, two more of the same file, a broken and two plain ones."""
    folder, rng = tmp_path_factory.mktemp("planted"), np.random.default_rng(0)
    for i in range(16):
        photo(i).save(folder / f"{i:02}.png")
    for i in range(8):
        kind = list(COPIES)[i % len(COPIES)]
        COPIES[kind](photo(i), rng).save(folder / f"copy-{i:02}.jpg", quality=90)
    for name in ("same-a.png", "same-b.png"):
        shutil.copy(folder / "09.png", folder / name)
    (folder / "broken.jpg").write_bytes(b"no image")
    for name, grey in (("plain-a.png", 90), ("plain-b.png", 110)):
        Image.new("RGB", (64, 64), (grey, grey, grey)).save(folder / name)
    return folder


def named(found: NearDuplicates, paths: Strings) -> list[tuple[str, str, bool]]:
    names = [Path(path).stem for path in paths]
    return sorted(
        (names[a], names[b], same) for (a, b), same in zip(found.pairs.tolist(), found.identical.tolist(), strict=True)
    )


def test_planted_copies_are_found_and_nothing_else(planted: Path, tmp_path: Path) -> None:
    paths = paths_in(planted)
    expected = [(f"{i:02}", f"copy-{i:02}", False) for i in range(8)]
    expected += [("09", "same-a", True), ("09", "same-b", True)]
    first = find_near_duplicates(paths, cache_dir=tmp_path, num_workers=0)
    assert named(first, paths) == sorted(expected)
    assert (first.distances[first.identical] == 0).all() and (first.distances[~first.identical] < 12).all()


def test_fingerprints_are_taken_once(planted: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = tmp_path / "data"
    shutil.copytree(planted, folder)
    paths = paths_in(folder)
    first = find_near_duplicates(paths, cache_dir=tmp_path / "cache", num_workers=0)
    decoded: list[str] = []
    plain = fingerprints.decode_image

    def decode(path: str, **options: int) -> DecodedImage:
        decoded.append(path)
        return plain(path, **options)

    monkeypatch.setattr(fingerprints, "decode_image", decode)
    again = find_near_duplicates(paths, cache_dir=tmp_path / "cache", num_workers=0)
    assert decoded == [str(folder / "broken.jpg")]
    assert again.pairs.tolist() == first.pairs.tolist()
    photo(50).save(folder / "00.png")  # another image under the same name
    changed = find_near_duplicates(paths, cache_dir=tmp_path / "cache", num_workers=0)
    assert decoded[1:] == [str(folder / "00.png"), str(folder / "broken.jpg")]
    assert ("00", "copy-00", False) in named(first, paths)
    assert ("00", "copy-00", False) not in named(changed, paths)


@pytest.mark.slow
@pytest.mark.parametrize("num_workers", [0, 2])
def test_a_cache_that_cannot_be_written_costs_time_only(
    planted: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture, num_workers: int
) -> None:
    (tmp_path / "cache").write_text("a file")
    paths = Strings.of([str(planted / f"{i:02}.png") for i in range(16)] * 5)
    found = take_fingerprints(paths, cache_dir=tmp_path / "cache", num_workers=num_workers)
    assert "cannot be cached" in caplog.text
    plain = take_fingerprints(paths, cache_dir=None, num_workers=0)
    rows, taken = found.get(np.arange(80))
    assert taken.all()
    assert (rows == plain.get(np.arange(80))[0]).all()


def test_many_images_are_looked_at_only_once_their_fingerprints_are_cached(
    planted: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.INFO)
    paths = paths_in(planted)
    found = look_for_near_duplicates(paths, cache_dir=tmp_path, num_workers=0, max_images=20)
    assert len(found.pairs) == 2 and found.identical.all()
    assert "near-duplicate images were not looked for" in caplog.text
    take_fingerprints(paths, cache_dir=tmp_path, num_workers=0)
    assert len(Fingerprints(paths, tmp_path).missing()) == 1  # the broken one
    found = look_for_near_duplicates(paths, cache_dir=tmp_path, num_workers=0, max_images=20)
    assert len(found.pairs) == 10


def test_fingerprints_are_counted_without_room_for_them(
    planted: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    paths = paths_in(planted)
    take_fingerprints(paths.take(np.arange(4)), cache_dir=tmp_path, num_workers=0)
    size = (tmp_path / f"fingerprints-{fingerprints.FORMAT}.rows").stat().st_size
    monkeypatch.setattr("cliptune.data.row_store.require_free_space", lambda *_, **__: pytest.fail("asked for room"))
    found = look_for_near_duplicates(paths, cache_dir=tmp_path, num_workers=0, max_images=20)
    assert found.identical.all()
    assert (tmp_path / f"fingerprints-{fingerprints.FORMAT}.rows").stat().st_size == size
    assert "cached" not in caplog.text


@pytest.mark.slow
def test_scenes_of_equal_captions_are_different_images(tmp_path: Path) -> None:
    create_sample_dataset(tmp_path, 300)
    pairs = load_pairs(tmp_path)
    found = find_near_duplicates(pairs.paths, cache_dir=None, num_workers=0).pairs
    captions = [set(map(str, pairs.captions_of(image))) for image in range(len(pairs))]
    assert len(found) <= 1  # a circle and a hexagon of one size in one place
    assert not [(a, b) for a, b in found.tolist() if captions[a] & captions[b]]


@pytest.mark.parametrize("num_workers", [0, 2])
def test_random_numbers_do_not_depend_on_what_is_cached(planted: Path, num_workers: int) -> None:
    before = torch.get_rng_state()
    take_fingerprints(Strings.of(list(paths_in(planted)) * 3), cache_dir=None, num_workers=num_workers)
    assert torch.equal(torch.get_rng_state(), before)


def test_no_images() -> None:
    assert find_near_duplicates(Strings.of([]), cache_dir=None).pairs.shape == (0, 2)
