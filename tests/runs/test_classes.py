import json
from pathlib import Path
from typing import Any

import pytest
import torch

from cliptune.data.pairs import DataSource, Pairs, load_pairs
from cliptune.runs.classes import Classes, find_labels, read_classes
from evaluation import main
from tests.helpers.datasets import make_images, make_index
from tests.helpers.models import SMALL_VIT, make_model, small_architectures

__all__ = ["small_architectures"]

NAMES = ("cat", "dog", "polar_bear")


@pytest.fixture
def data(tmp_path: Path) -> Path:
    """Twelve images in folders of three classes, with captions and a column of labels."""
    folder = tmp_path / "data"
    rows = []
    for number in range(12):
        label = NAMES[number % 3]
        image = f"{label}/{number}.png"
        make_images(folder, image)
        (folder / image).write_bytes((folder / image).read_bytes() + bytes([number]))
        rows.append({"image_path": image, "caption": f"scene {number}", "kind": label.replace("_", " ").title()})
    make_index(folder, rows)
    return folder


def classes_of(tmp_path: Path, content: Any, name: str = "classes.txt") -> Classes:
    path = tmp_path / name
    path.write_text(content if isinstance(content, str) else json.dumps(content), encoding="utf-8")
    return read_classes(str(path))


def test_classes_are_lines_or_json_or_folders(data: Path, tmp_path: Path) -> None:
    expected = {"cat": ["cat"], "dog": ["dog"], "polar_bear": ["polar bear"]}
    assert classes_of(tmp_path, "\ufeffcat\n\ndog\r\npolar_bear\n").names == expected
    assert classes_of(tmp_path, list(NAMES), "classes.json").names == expected
    assert read_classes(str(data)).names == expected
    assert classes_of(tmp_path, {"n01": ["tench", "a fish"], "n02": "dog"}, "c.json").names == {
        "n01": ["tench", "a fish"],
        "n02": ["dog"],
    }
    (tmp_path / "templates.txt").write_text("a {}\nthe {}.\n")
    assert read_classes(str(data), str(tmp_path / "templates.txt")).templates == ["a {}", "the {}."]
    assert read_classes(str(data)).templates == ["a photo of a {}"]


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("c.txt", "", "the file is empty"),
        ("c.txt", "cat\n", "1 class, of at least 2"),
        ("c.txt", "cat\ndog\nCat\n", "these classes come twice: cat"),
        ("c.json", {"polar_bear": "a", "Polar bear": "b"}, "these classes come twice: polar bear"),
        ("c.json", {"cat": [], "dog": ["dog"]}, r"expected \{label: \[names\]\}"),
        ("c.json", [1, 2], r"expected \{label: \[names\]\}"),
        ("c.json", "{", "not JSON"),
    ],
)
def test_classes_that_cannot_be_used_are_refused(name: str, content: Any, message: str, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=message):
        classes_of(tmp_path, content, name)


def test_a_template_without_a_place_for_the_name_is_refused(data: Path, tmp_path: Path) -> None:
    (tmp_path / "templates.txt").write_text("a {}\na photo\n")
    with pytest.raises(ValueError, match=r"'a photo' has no \{\}"):
        read_classes(str(data), str(tmp_path / "templates.txt"))
    with pytest.raises(FileNotFoundError, match="--classes: no such file"):
        read_classes("gone.txt")


def labels_of(pairs: Pairs, classes: Classes, **options: Any) -> tuple[list[str], str]:
    found, source = find_labels(pairs, classes, **options)
    return [list(classes.names)[index] for index in found], source


def test_labels_are_folders_or_a_column_or_captions_that_name_a_class(data: Path, tmp_path: Path) -> None:
    classes = read_classes(str(data))
    pairs = load_pairs(data)
    expected = [Path(path).parent.name for path in pairs.paths]
    assert labels_of(pairs, classes) == (expected, "folders")
    of_column = load_pairs(DataSource(data, caption_key="kind"))
    assert labels_of(of_column, classes, label_key="kind") == (expected, "column kind")
    flat = tmp_path / "flat"
    make_images(flat, "0.png", "1.png", "2.png")
    texts = ["a photo of a cat", ["DOG", "a walk"], "This is a polar bear!"]
    make_index(flat, [{"image_path": f"{i}.png", "caption": text} for i, text in enumerate(texts)])
    assert labels_of(load_pairs(flat), classes, template="This is a {}!") == (list(NAMES), "captions")
    with pytest.raises(ValueError, match="1 of the 3 images have a label that is no class"):
        labels_of(load_pairs(flat), classes)


def test_a_label_is_not_taken_for_a_name_of_another_class(tmp_path: Path) -> None:
    content = {"bank": ["river side"], "institution": ["bank", "money house"], "shore": ["river side"]}
    classes = classes_of(tmp_path, content, "classes.json")
    flat = tmp_path / "flat"
    make_images(flat, "0.png", "1.png", "2.png")
    labels = ["bank", "institution", "money house"]
    make_index(flat, [{"image_path": f"{i}.png", "kind": label, "caption": "x"} for i, label in enumerate(labels)])
    pairs = load_pairs(DataSource(flat, caption_key="kind"))
    assert labels_of(pairs, classes, label_key="kind")[0] == ["bank", "institution", "institution"]
    # "river side" may be two classes
    make_index(flat, [{"image_path": "0.png", "kind": "river side"}, {"image_path": "1.png", "kind": "bank"}])
    with pytest.raises(ValueError, match="1 of the 2 images have a label that is no class"):
        labels_of(load_pairs(DataSource(flat, caption_key="kind")), classes, label_key="kind")


def test_labels_that_are_no_class_are_named_with_their_counts(data: Path, tmp_path: Path) -> None:
    classes = classes_of(tmp_path, "cat\nhorse\n")
    with pytest.raises(ValueError, match=r"8 of the 12 images have a label .*'dog' \(4\); 'polar_bear' \(4\)"):
        find_labels(load_pairs(data), classes)
    with pytest.raises(ValueError, match=r"no image's class is known.*--label_key"):
        find_labels(load_pairs(data), classes_of(tmp_path, "red\ngreen\n"))
    two = tmp_path / "two"
    make_images(two, "0.png")
    make_index(two, [{"image_path": "0.png", "caption": ["cat", "a photo of a horse"]}])
    with pytest.raises(ValueError, match="an image has captions of 2 classes"):
        find_labels(load_pairs(two), classes)


def test_the_stage_classifies(data: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    torch.save(make_model(SMALL_VIT.name).state_dict(), tmp_path / "weights.pt")
    flags = ["--checkpoint", str(tmp_path / "weights.pt"), "--data_dir", str(data), "--output_dir", str(tmp_path)]
    flags += ["--num_workers", "0", "--device", "cpu", "--precision", "fp32"]
    assert main([*flags, "--classes", str(data)]) == 0
    printed = capsys.readouterr().out
    assert "12 images, 3 classes (by folders)" in printed
    assert "chance 33.3" in printed
    found = json.loads((tmp_path / "results" / "classification_results.json").read_text())["evaluations"][0]
    assert (found["num_images"], found["top5"], found["labels_from"]) == (12, 100, "folders")
    assert sum(number for _, _, number in found["confusions"]) == 12 - round(0.12 * found["top1"])
    by_folder = found["top1"]
    assert main([*flags, "--classes", str(data), "--label_key", "kind"]) == 0
    found = json.loads((tmp_path / "results" / "classification_results.json").read_text())["evaluations"][0]
    assert (found["top1"], found["labels_from"]) == (by_folder, "column kind")
    assert main([*flags, "--label_key", "kind"]) == 2
    assert "label_key needs classes" in capsys.readouterr().err
    (tmp_path / "c.txt").write_text("cat\nhorse\n")
    assert main([*flags, "--classes", str(tmp_path / "c.txt")]) == 2
    assert "'dog' (4)" in capsys.readouterr().err
