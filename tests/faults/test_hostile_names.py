"""Names, keys and captions from files are data: no terminal, log or list takes orders from them."""

import copy
import json
from collections.abc import Callable
from functools import cache
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import pytest
from PIL import Image

import data_loader
import evaluation
import train
from cliptune.model.checkpoint_file import load_checkpoint, save_checkpoint
from tests.helpers.datasets import make_tar, png_bytes
from tests.helpers.runs import SMALL, small_runs

FORGED = "2026-01-01 00:00:00,000 INFO train: forged"
NAMES = {
    "escapes": f"a\x1b[2J\x1b]0;x\x07\x9b31m\n{FORGED}\r\x85{FORGED}\u2028\u2029\x00"[:-1],
    "direction": "a\u202egpj.exe\u2066\u2069\u200f",
    "long": "n" * 300_000,
}
MAX_PRINTED = 40_000

Case = Callable[[Path, Path, str], tuple[Callable[[list[str]], int], list[str]]]


def rows(sample_dir: Path) -> list[dict[str, Any]]:
    found = json.loads((sample_dir / "data.json").read_text())
    return [{**row, "image_path": str(sample_dir / row["image_path"])} for row in found]


def index(folder: Path, values: Any) -> str:
    (folder / "hostile.json").write_text(json.dumps(values))
    return str(folder / "hostile.json")


def column(folder: Path, sample: Path, name: str) -> Any:
    return data_loader.main, ["--data_dir", index(folder, [{**row, name: 1} for row in rows(sample)])]


def missing_images(folder: Path, sample: Path, name: str) -> Any:
    bad = [{"image_path": f"{name}{number}.jpg", "caption": name} for number in range(12)]
    return data_loader.main, ["--data_dir", index(folder, [*rows(sample), *bad])]


def check_missing_images(folder: Path, sample: Path, name: str) -> Any:
    main, flags = missing_images(folder, sample, name)
    return main, [*flags, "--check", "--output_dir", str(folder), "--num_workers", "0"]


def check_present_images(folder: Path, sample: Path, name: str) -> Any:
    name = name.replace("/", "")[:60]
    Image.new("RGB", (8, 8)).save(folder / f"{name}.png")
    Image.new("RGB", (8, 8)).save(folder / f"{name}2.png")
    (folder / f"{name}3.png").write_bytes(b"no image")
    bad = [{"image_path": f"{name}{number}.png", "caption": "a"} for number in ("", 2, 3)]
    flags = ["--check", "--output_dir", str(folder), "--num_workers", "0"]
    return data_loader.main, ["--data_dir", index(folder, [*rows(sample), *bad]), *flags]


def split_and_group(folder: Path, sample: Path, name: str) -> Any:
    first = rows(sample)[0]
    bad = [{**first, "split": name}, {**first, "split": "train", "group": name}, {**first, "group": "b"}]
    flags = ["--check", "--output_dir", str(folder), "--num_workers", "0"]
    return data_loader.main, ["--data_dir", index(folder, [*rows(sample), *bad]), *flags]


def no_known_key(folder: Path, sample: Path, name: str) -> Any:
    return data_loader.main, ["--data_dir", index(folder, [{name: name, "b": 1}])]


def caption_key(folder: Path, sample: Path, name: str) -> Any:
    return data_loader.main, ["--data_dir", index(folder, [{"image": "a", name: "b"}]), "--caption_key", name]


def data_dir(folder: Path, sample: Path, name: str) -> Any:
    return data_loader.main, ["--data_dir", name[:100_000]]


def config_key(folder: Path, sample: Path, name: str) -> Any:
    path = folder / "c.json"
    path.write_text(json.dumps({name: 1, "data": {name: 2}, "model": {"name": name}, "training": {"seed": name}}))
    return train.main, ["--config", str(path)]


def shard_members(folder: Path, sample: Path, name: str) -> Any:
    name = name.replace("/", "")[:80]
    make_tar(folder / "a.tar", [(f"{name}{number}.png", png_bytes(number)) for number in range(5)])
    return train.main, ["--data_dir", str(folder / "a.tar"), "--val_data", str(sample), "--output_dir", str(folder)]


@cache
def trained(sample: Path) -> dict[str, Any]:
    """Return the checkpoint of a small run."""
    with small_runs(), TemporaryDirectory() as output:
        assert train.main(["--data_dir", str(sample), *SMALL, "--num_epochs", "1", "--output_dir", output]) == 0
        return load_checkpoint(Path(output) / "model-checkpoint" / "last_model.pth")


def checkpoint(folder: Path, sample: Path, change: Callable[[dict[str, Any]], None]) -> str:
    content = copy.deepcopy(trained(sample))
    change(content)
    path = folder / "run" / "model-checkpoint" / "hostile.pth"
    save_checkpoint(path, content)
    return str(path)


def model_name(folder: Path, sample: Path, name: str) -> Any:
    path = checkpoint(folder, sample, lambda content: content["architecture"].update(name=name))
    return train.main, ["--resume", path, "--output_dir", str(folder / "run"), "--num_epochs", "2"]


def evaluated_model_name(folder: Path, sample: Path, name: str) -> Any:
    path = checkpoint(folder, sample, lambda content: content["architecture"].update(name=name))
    return evaluation.main, ["--checkpoint", path, "--output_dir", str(folder), "--num_workers", "0"]


def validation_images(folder: Path, sample: Path, name: str) -> Any:
    path = checkpoint(folder, sample, lambda content: content.update(val_images=[name, *content["val_images"]]))
    return evaluation.main, ["--checkpoint", path, "--output_dir", str(folder), "--num_workers", "0"]


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize(
    "case",
    [
        column, missing_images, check_missing_images, check_present_images, split_and_group, no_known_key, caption_key,
        data_dir, config_key, shard_members,
        *(pytest.param(case, marks=pytest.mark.slow) for case in (model_name, evaluated_model_name, validation_images)),
    ],
)  # fmt: skip
def test_what_a_file_names_is_shown_as_data(
    case: Case, name: str, sample_dir: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    main, flags = case(tmp_path, sample_dir, NAMES[name])
    capsys.readouterr()
    main(flags)
    written = capsys.readouterr()
    logs = [path.read_text() for path in tmp_path.rglob("*.log")]
    for text in (written.out, written.err, *logs):
        assert len(text) < MAX_PRINTED
        for line in text.split("\n"):
            assert line.isprintable(), line
            assert not line.startswith(FORGED)
    for path in tmp_path.rglob("*.jsonl"):
        for line in path.read_text().split("\n"):
            assert line.isprintable()
    for path in tmp_path.rglob("*_results.json"):
        assert len(path.read_text()) < 100_000
