import re
from collections.abc import Sequence
from pathlib import Path

import pytest

from cliptune.data import missing
from cliptune.data.pairs import DataSource, load_pairs
from data_loader import main as data_loader
from tests.helpers.datasets import make_images, make_index


def refusal(index_folder: Path, names: Sequence[str], image_dir: Path | None = None) -> str:
    index = make_index(index_folder, [{"image_path": name, "caption": name} for name in names])
    with pytest.raises(ValueError, match=re.escape(f"{index}: none of its ")) as error:
        load_pairs(DataSource(index, image_dir=image_dir, max_skipped_fraction=1))
    return str(error.value).removeprefix(f"{index}: ")


NUMBERS = [f"{number:03}" for number in range(12)]


@pytest.mark.parametrize("folder", ["Images", "a/b/Images"])
def test_the_folder_that_holds_the_images_is_named(folder: str, tmp_path: Path) -> None:
    make_images(tmp_path, *(f"{folder}/{number}.png" for number in NUMBERS), "thumbs/000.png", ".hidden/001.png")
    names = [f"{number}.png" for number in NUMBERS]
    way_out = f"try --image_dir {tmp_path}/{folder}, which holds them"
    assert refusal(tmp_path, names) == f"none of its 12 images is found (000.png is not in {tmp_path}): {way_out}"
    make_images(tmp_path, "wrong/x.png")
    for number in NUMBERS:
        (tmp_path / "wrong" / f"{number}.txt").touch()
    assert refusal(tmp_path, names, tmp_path / "wrong").endswith(
        f"try --image_dir {tmp_path}/{folder}, which holds them"
    )
    found = load_pairs(DataSource(tmp_path / "data.json", image_dir=tmp_path / folder))
    assert len(found) == 12


@pytest.mark.parametrize(
    ("path", "folder", "facts"),
    [
        ("/content/drive/data/img/{}.png", "new", "is not there; all lie in /content/drive/data/img"),
        ("C:\\data\\img\\{}.png", "new", "is not there; these are paths of Windows; all lie in C:/data/img"),
        ("img/{}.png", "new", "; all lie in img"),
        ("img/{}", "new", "; all lie in img; none has an ending such as .jpg"),
        ("other/{}.PNG", "new/img", "; all lie in other"),
    ],
)
def test_what_the_paths_have_in_common_is_said(path: str, folder: str, facts: str, tmp_path: Path) -> None:
    make_images(tmp_path, *(f"new/img/{number}.png" for number in NUMBERS))
    message = refusal(tmp_path, [path.format(number) for number in NUMBERS])
    assert f"{facts}): try --image_dir {tmp_path}/{folder}, which holds them" in message


def test_images_beside_the_folder_of_the_index_are_found(tmp_path: Path) -> None:
    """As COCO has them."""
    make_images(tmp_path, *(f"val2017/{number}.png" for number in NUMBERS))
    (tmp_path / "annotations").mkdir()
    message = refusal(tmp_path / "annotations", [f"{number}.png" for number in NUMBERS])
    assert message.endswith(f"try --image_dir {tmp_path}/val2017, which holds them")


def test_a_folder_that_holds_some_is_named_as_such(tmp_path: Path) -> None:
    make_images(tmp_path, "some/000.png", "some/003.png")
    assert "try --image_dir" in (message := refusal(tmp_path, [f"{number}.png" for number in NUMBERS]))
    assert message.endswith(f"{tmp_path}/some, which holds 2 of the 4 looked for")


def test_where_nothing_is_found_the_flag_is_named(tmp_path: Path) -> None:
    assert refusal(tmp_path, ["a.png", "b/c.png"]) == (
        f"none of its 2 images is found (a.png is not in {tmp_path}): --image_dir FOLDER names the folder that holds "
        "them, and takes the place of those of the paths"
    )


def test_other_endings_are_said(tmp_path: Path) -> None:
    make_images(tmp_path, *(f"img/{number}.png" for number in NUMBERS))
    message = refusal(tmp_path, [f"img/{number}.jpg" for number in NUMBERS])
    assert message.endswith(f"{tmp_path} has files of such names, but with other endings: the index must have those")


def test_what_may_be_packed_is_named(tmp_path: Path) -> None:
    (tmp_path / "Flickr8k_Dataset.zip").touch()
    assert f"{tmp_path}/Flickr8k_Dataset.zip may hold them: unpack it" in refusal(tmp_path, ["a.png"])


def test_images_in_the_cells_are_named_as_such(tmp_path: Path) -> None:
    assert "perhaps images in base64" in refusal(tmp_path, ["iVBORw0KGgo/" * 1000] * 3)


def test_addresses_are_refused_with_the_way_out(tmp_path: Path) -> None:
    message = refusal(tmp_path, [f"https://example.org/{number}.png" for number in NUMBERS])
    assert message.startswith(
        "none of its 12 images is found: they are addresses, such as https://example.org/000.png."
    )
    assert "img2dataset" in message


def test_a_large_folder_is_not_walked_to_its_end(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(missing, "_MAX_LISTED", 8)
    make_images(tmp_path, *(f"{letter}/{number}.png" for letter in "abcd" for number in NUMBERS[:4]))
    make_images(tmp_path, "x/y/z/deep/z.png")
    assert "takes the place" in refusal(tmp_path, ["z.png"])


def test_one_split_of_which_no_image_is_there_is_said(
    tmp_path: Path, caplog: pytest.LogCaptureFixture, capsys: pytest.CaptureFixture[str]
) -> None:
    make_images(tmp_path, "a.png", "test/b.png")
    make_index(tmp_path, [{"image": "a.png", "caption": "a"}], "train.json")
    make_index(tmp_path, [{"image": "b.png", "caption": "b"}], "test.json")
    assert len(load_pairs(DataSource(tmp_path, max_skipped_fraction=1))) == 1
    assert "test.json: none of its 1 image is found" in caplog.text
    assert data_loader(["--data_dir", str(tmp_path)]) == 2
    assert "1 of 2 records cannot be used" in capsys.readouterr().err
