from pathlib import Path

import numpy as np
import pytest
from PIL import Image

import data_loader
from tests.helpers.datasets import make_index
from tests.preprocess.test_depth import png16, ramp


def test_a_check_names_images_of_nearly_one_colour(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    noise = np.random.RandomState(0).randint(0, 256, (80, 90, 3))
    for name, pixels in (("photo", noise), ("grey", noise * 0.01 + 90), ("white", noise * 0 + 255)):
        Image.fromarray(pixels.astype(np.uint8)).save(tmp_path / f"{name}.png")
    (tmp_path / "dark.png").write_bytes(png16(ramp(4095), sbit=b"\x10"))  # 16 bits, as its file says
    (tmp_path / "deep.png").write_bytes(png16(ramp(4095)))
    names = ("photo", "grey", "white", "dark", "deep")
    make_index(tmp_path, [{"image": f"{name}.png", "caption": name} for name in names])
    assert data_loader.main(["--data_dir", str(tmp_path), "--check"]) == 0
    line = next(line for line in capsys.readouterr().out.splitlines() if "nearly of one colour" in line)
    named = [name for name in names if f"{name}.png" in line]
    assert line.startswith("note: 3 images nearly of one colour: ")
    assert named == ["grey", "white", "dark"]


def test_workers_say_once_how_deep_images_are(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    for number in range(8):
        (tmp_path / f"{number}.png").write_bytes(png16(ramp(4095 - number)))
    make_index(tmp_path, [{"image": f"{number}.png", "caption": f"{number}"} for number in range(8)])
    flags = ["--data_dir", str(tmp_path), "--check"]
    assert data_loader.main(flags) == 0
    assert capfd.readouterr().err.count("to 4095, white") <= 1  # of this process another test may have heard it
