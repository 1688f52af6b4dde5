from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from cliptune.data.doctor import is_other_script, look_at_captions, look_at_images
from cliptune.data.loaders import caption_id
from cliptune.data.table import Strings
from cliptune.preprocess.tokens import count_tokens
from tests.preprocess.test_depth import png16, ramp


def test_images_are_what_their_files_hold(tmp_path: Path) -> None:
    noise = np.random.RandomState(0).randint(0, 256, (80, 90, 3))
    for name, pixels in (("photo", noise), ("grey", noise * 0.01 + 90), ("white", noise * 0 + 255), ("copy", noise)):
        Image.fromarray(pixels.astype(np.uint8)).save(tmp_path / f"{name}.png")
    (tmp_path / "dark.png").write_bytes(png16(ramp(4095), sbit=b"\x10"))  # 16 bits, as its file says
    (tmp_path / "deep.png").write_bytes(png16(ramp(4095)))
    (tmp_path / "broken.png").write_bytes(b"broken")
    names = ("photo", "grey", "white", "copy", "dark", "deep", "broken", "gone")
    found = look_at_images(Strings.of(str(tmp_path / f"{name}.png") for name in names), num_workers=0)
    assert [name for name, is_plain in zip(names, found.is_one_color, strict=True) if is_plain] == [
        "grey", "white", "dark"
    ]  # fmt: skip
    assert found.files.tolist() == [0, 1, 2, 0, 4, 5, 6, 7]
    assert found.is_readable.tolist() == [True] * 6 + [False] * 2
    assert found.sizes[:2].tolist() == [[90, 80], [90, 80]]
    assert [Path(issue.image).name for issue in found.issues.first] == ["broken.png", "gone.png"]


def test_workers_say_once_how_deep_images_are(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    for number in range(8):
        (tmp_path / f"{number}.png").write_bytes(png16(ramp(4095 - number)))
    found = look_at_images(Strings.of(str(tmp_path / f"{number}.png") for number in range(8)), num_workers=2)
    assert found.is_readable.all()
    assert capfd.readouterr().err.count("to 4095, white") <= 1  # of this process another test may have heard it


@pytest.mark.slow
def test_captions_are_counted_whatever_the_workers(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("cliptune.data.doctor.MIN_FOR_WORKERS", 1)
    texts = [
        "A red kite.",
        "zwei Drachensegler",
        "红色的风筝",
        "a  RED kite.",
        *map(str, range(1100)),
        "red",
    ]
    alone, together = (look_at_captions(Strings.of(texts), num_workers=workers) for workers in (0, 2))
    assert alone.num_tokens.tolist() == list(map(count_tokens, texts))
    assert alone.num_words[:4].tolist() == [3, 2, 1, 3]
    assert np.flatnonzero(alone.is_other_script).tolist() == [2]
    ids = list(map(caption_id, texts))
    assert alone.wordings.tolist() == [ids.index(each) for each in ids]
    for one, other in zip(alone, together, strict=True):
        np.testing.assert_array_equal(one, other)
    assert len(look_at_captions(Strings.of([])).wordings) == 0


@pytest.mark.parametrize(
    ("text", "is_other"),
    [("Überraschungsfrühstück, Đà Nẵng", False), ("кот", True), ("قط", True), ("犬 dog dog", False), ("12 + 3", False)],
)
def test_a_script_is_other_than_latin(text: str, is_other: bool) -> None:
    assert is_other_script(text) == is_other
