"""What a few captions find, as TensorBoard shows it: read from the event file."""

import io
import re
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from cliptune.data.pairs import Pairs, load_pairs
from cliptune.features.encode import Encoded
from cliptune.report import live_gallery
from cliptune.report.live_gallery import MAX_BYTES, Answer, Gallery, LiveGallery
from cliptune.runtime.files import write_json
from tests.helpers.runs import SMALL, small_runs, work_in_background
from train import main

CAPTIONS = ["a red heart", "一颗红心", "a red heart", "![x](http://example.invalid/x.png)", "a star", "<b>", "7", "8"]


@pytest.fixture
def pairs(tmp_path: Path) -> Pairs:
    records = []
    for number, caption in enumerate(CAPTIONS):
        noise = np.random.default_rng(number).integers(0, 256, (200, 300, 3), dtype=np.uint8)
        Image.fromarray(noise).save(tmp_path / f"{number}.png")
        records.append({"image_path": f"{number}.png", "caption": caption})
    write_json(tmp_path / "data.json", records)
    return load_pairs(tmp_path)


def encoded_of(pairs: Pairs, image_features: torch.Tensor) -> Encoded:
    """Caption i asks for the image whose feature is the i-th unit vector."""
    rows = torch.arange(len(pairs))
    kinds = torch.tensor([pairs.captions[:].index(caption) for caption in pairs.captions])
    return Encoded(image_features, torch.eye(len(pairs)), rows, rows, rows, rows, kinds, 1.0, 1.0)


def answers_of(pairs: Pairs, encoded: Encoded) -> dict[str, list[Answer]]:
    texts, answers = LiveGallery(pairs)._answers(encoded)
    return dict(zip((Path(pairs.paths[text]).stem for text in texts), answers, strict=True))


def drawn(gallery: LiveGallery, encoded: Encoded) -> Gallery | None:
    found = gallery.find(encoded)
    return None if found is None else gallery.draw(found)


def test_the_best_images_are_marked_right_the_same_or_wrong(pairs: Pairs) -> None:
    features = torch.eye(8)
    features[2, 0], features[1, 0] = 0.5, 0.25  # image 2 has the caption of image 0
    found = answers_of(pairs, encoded_of(pairs, features))["0"]
    names = [(Path(answer.path).stem, round(answer.score, 2), answer.mark) for answer in found]
    assert names == [("0", 1.0, "right"), ("2", 0.5, "same"), ("1", 0.25, "wrong")]


def test_the_captions_are_the_same_every_time_and_those_not_encoded_are_left_out(pairs: Pairs) -> None:
    whole = encoded_of(pairs, torch.eye(8))
    assert list(answers_of(pairs, whole)) == ["0", "1", "2", "4", "5", "7"]
    rows = torch.tensor([0, 2, 3, 4, 5, 6, 7])
    part = whole._replace(
        text_features=whole.text_features[rows], text_indices=rows, text_to_image=torch.arange(7),
        image_features=whole.image_features[rows], image_indices=rows, image_kinds=torch.arange(7),
        text_kinds=whole.text_kinds[rows],
    )  # fmt: skip
    found = answers_of(pairs, part)
    assert list(found) == ["0", "2", "4", "5", "7"]
    assert all(Path(answers[0].path).stem == name for name, answers in found.items())


def test_the_image_is_small_and_its_text_is_not_read_as_markdown(pairs: Pairs) -> None:
    (Path(pairs.paths[4])).unlink()
    gallery = drawn(LiveGallery(pairs), encoded_of(pairs, torch.eye(8)))
    assert gallery is not None
    assert len(gallery.jpeg) <= MAX_BYTES
    with Image.open(io.BytesIO(gallery.jpeg)) as image:
        assert (image.format, image.size) == ("JPEG", (gallery.width, gallery.height))
    assert "    2. 一颗红心" in gallery.description
    assert all(re.match(r" {4}\d", line) for line in gallery.description.split("\n\n")[1].splitlines())


def test_only_so_many_are_drawn(pairs: Pairs) -> None:
    gallery, encoded = LiveGallery(pairs, max_galleries=2), encoded_of(pairs, torch.eye(8))
    assert [drawn(gallery, encoded) is None for _ in range(4)] == [False, False, True, True]


def test_what_goes_wrong_is_said_once_and_ends_nothing(
    pairs: Pairs, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(live_gallery, "drawable", lambda _: 1 / 0)
    gallery, encoded = LiveGallery(pairs), encoded_of(pairs, torch.eye(8))
    assert drawn(gallery, encoded) is drawn(gallery, encoded) is None
    assert caplog.text.count("no more retrievals are drawn") == 1


@pytest.mark.parametrize(
    ("report", "steps", "how"),
    [
        ("full", [0, 6], "in place"),
        pytest.param("no-images", [], "in place", marks=pytest.mark.slow),
        pytest.param("full", [0, 6], "background", marks=pytest.mark.slow),
    ],
)
def test_a_run_shows_each_evaluation_unless_images_must_not_travel(
    report: str, steps: list[int], how: str, sample_dir: Path, tmp_path: Path
) -> None:
    with small_runs() as patch:
        if how == "background":
            work_in_background(patch)
        patch.setattr("cliptune.runs.data.LiveGallery", LiveGallery)
        flags = ["--data_dir", str(sample_dir), "--output_dir", str(tmp_path), *SMALL, "--num_epochs", "1"]
        assert main([*flags, "--report", report]) == 0
    accumulator = EventAccumulator(str(tmp_path / "logs" / "tensorboard"))
    accumulator.Reload()
    images = accumulator.Images("retrieval") if "retrieval" in accumulator.Tags()["images"] else []
    assert [image.step for image in images] == steps
    assert all(0 < len(image.encoded_image_string) <= MAX_BYTES for image in images)
