import logging
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from PIL import Image

from clip_model import CLIPModel
from cliptune.features.encode import Encoder
from cliptune.search.index import find_images, read_index
from cliptune.search.searcher import encode_image
from data_loader import ImageTextDataset
from tests.helpers.datasets import make_images
from tests.helpers.models import FP32, SMALL_VIT, small_architectures

__all__ = ["small_architectures"]


@pytest.fixture
def encoder() -> Encoder:
    torch.manual_seed(0)
    model = CLIPModel(SMALL_VIT.name, freeze_backbone=True).eval()
    return Encoder(model, ImageTextDataset, precision=FP32, batch_size=4, num_workers=0)


@pytest.fixture
def num_encoded(encoder: Encoder, monkeypatch: pytest.MonkeyPatch) -> Iterator[list[int]]:
    """How many images go through the tower, batch by batch."""
    sizes: list[int] = []
    run = encoder.model.run_image_tower

    def count_and_run(images: torch.Tensor) -> torch.Tensor:
        sizes.append(len(images))
        return run(images)

    monkeypatch.setattr(encoder.model, "run_image_tower", count_and_run)
    yield sizes


def names_in(folder: Path) -> list[str]:
    return [str(Path(path).relative_to(folder)) for path in find_images(folder)]


def test_images_are_found_in_all_folders_but_hidden_ones(tmp_path: Path) -> None:
    make_images(tmp_path, "b.png", "a/z.JPG", "a/b/c.webp", ".hidden/d.png", ".e.png")
    (tmp_path / "a" / "notes.txt").write_text("no image")
    assert names_in(tmp_path) == ["b.png", "a/z.JPG", "a/b/c.webp"]


def test_links_are_followed_once(tmp_path: Path) -> None:
    make_images(tmp_path, "own/a.png")
    make_images(tmp_path / "elsewhere", "b.png")
    (tmp_path / "own" / "loop").symlink_to(tmp_path / "own")
    (tmp_path / "own" / "other").symlink_to(tmp_path / "elsewhere")
    (tmp_path / "own" / "gone.png").symlink_to(tmp_path / "nowhere.png")
    assert names_in(tmp_path / "own") == ["a.png", "gone.png", "other/b.png"]


def test_features_are_those_of_the_model(encoder: Encoder, tmp_path: Path) -> None:
    make_images(tmp_path / "images", *(f"{number}.png" for number in range(7)))
    index = read_index(encoder, tmp_path / "images", cache_dir=tmp_path / "cache")
    assert [index.name_of(number) for number in range(7)] == [f"{number}.png" for number in range(7)]
    wanted = torch.cat([encode_image(encoder, path) for path in index.paths])
    assert torch.allclose(index.features, wanted, atol=1e-6)


def test_only_new_and_changed_images_are_encoded(encoder: Encoder, tmp_path: Path, num_encoded: list[int]) -> None:
    folder = tmp_path / "images"
    make_images(folder, *(f"{number}.bmp" for number in range(6)))
    Image.new("RGB", (64, 64), "white").save(folder / "large.bmp")

    def read() -> dict[str, torch.Tensor]:
        num_encoded.clear()
        index = read_index(encoder, folder, cache_dir=tmp_path / "cache")
        return {index.name_of(row): feature for row, feature in enumerate(index.features)}

    first = read()
    assert sum(num_encoded) == 7
    again = read()
    assert num_encoded == []
    assert all(torch.equal(first[name], again[name]) for name in first)
    # another pixel in the middle: size, first and last kilobytes of the file are what they were
    content = bytearray((folder / "large.bmp").read_bytes())
    content[5000:7000] = bytes(2000)
    (folder / "large.bmp").write_bytes(content)
    (folder / "0.bmp").touch()
    (folder / "1.bmp").unlink()
    make_images(folder, "new.png")
    changed = read()
    assert sum(num_encoded) == 2
    assert changed.keys() == first.keys() - {"1.bmp"} | {"new.png"}
    assert not torch.equal(changed["large.bmp"], first["large.bmp"])
    assert torch.equal(changed["0.bmp"], first["0.bmp"])


def test_other_weights_have_other_features(encoder: Encoder, tmp_path: Path, num_encoded: list[int]) -> None:
    make_images(tmp_path / "images", "a.png", "b.png")
    before = read_index(encoder, tmp_path / "images", cache_dir=tmp_path / "cache").features
    with torch.no_grad():
        encoder.model.image_projection.weight.mul_(-1)  # type: ignore[attr-defined]
    after = read_index(encoder, tmp_path / "images", cache_dir=tmp_path / "cache").features
    assert torch.equal(after, -before)  # the tower's output is cached, which the projection does not change
    assert sum(num_encoded) == 2
    with torch.no_grad():
        encoder.model.backbone.visual.proj.mul_(-1)  # type: ignore[attr-defined]
    read_index(encoder, tmp_path / "images", cache_dir=tmp_path / "cache")
    assert sum(num_encoded) == 4


def test_what_cannot_be_read_is_said_and_left_out(
    encoder: Encoder, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    folder = tmp_path / "images"
    make_images(folder, "a.png", "c.png")
    (folder / "b.png").write_text("no image")
    (folder / "d.png").symlink_to(folder / "gone.png")
    with caplog.at_level(logging.WARNING):
        index = read_index(encoder, folder, cache_dir=tmp_path / "cache")
    assert [Path(path).name for path in index.paths] == ["a.png", "c.png"]
    assert "2 files that cannot be read" in caplog.text
    assert "b.png" in caplog.text
    (folder / "a.png").write_text("")
    (folder / "c.png").unlink()
    with pytest.raises(ValueError, match="none of the 3 images can be read"):
        read_index(encoder, folder, cache_dir=tmp_path / "cache")


def test_a_folder_without_images_is_an_error(encoder: Encoder, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="no image in this folder"):
        read_index(encoder, tmp_path, cache_dir=tmp_path)
    with pytest.raises(FileNotFoundError, match="no such folder"):
        read_index(encoder, tmp_path / "nowhere", cache_dir=tmp_path)
