import csv
from pathlib import Path
from typing import Any

import pytest

from cliptune.data.pairs import Pairs, load_pairs
from cliptune.data.suspects import Suspect, exclude, read_suspects, relative_name, update_suspects
from tests.helpers.datasets import make_images, make_index

CAPTIONS = [
    "=1+1", "+5 degrees", "-1", "@home", "'quoted'", "'=not a formula", 'says "no"', "one, two; three\tfour",
    "first line\nimg.jpg,second,line,no", "猫", "0012", "\u202eabc",
]  # fmt: skip


def make_pairs(folder: Path, captions: dict[str, list[str]]) -> Pairs:
    make_images(folder, *captions)
    make_index(folder, [{"image": name, "caption": texts} for name, texts in captions.items()])
    return load_pairs(folder)


def test_what_is_written_is_read_as_it_was(tmp_path: Path) -> None:
    rows = [Suspect("=a, b.jpg", caption, "odd: why", number % 2 == 0) for number, caption in enumerate(CAPTIONS)]
    path = tmp_path / "results" / "suspects.csv"
    found = update_suspects(path, rows, kinds=["odd"])
    assert [row._replace(more=()) for row in found] == sorted(rows)
    assert read_suspects(path) == found
    with path.open(encoding="utf-8-sig", newline="") as file:
        cells = [cell for row in list(csv.reader(file))[1:] for cell in row]
    assert not [cell for cell in cells if cell[:1] in "=+-@"]


@pytest.mark.parametrize("form", ["excel", "german excel", "unicode text", "libreoffice", "sep line", "by hand"])
def test_what_a_spreadsheet_saves_is_read(tmp_path: Path, form: str) -> None:
    rows = [("a.jpg", caption, "odd: why, and why", word) for caption in CAPTIONS for word in ("NO", "Yes")]
    delimiter = {"german excel": ";", "unicode text": "\t", "sep line": "|"}.get(form, ",")
    encoding = {"excel": "utf-8-sig", "german excel": "utf-8-sig", "unicode text": "utf-16"}.get(form, "utf-8")
    path = tmp_path / "suspects.csv"
    with path.open("w", encoding=encoding, newline="") as file:
        if form == "sep line":
            file.write("sep=|\r\n")
        quoting: Any = csv.QUOTE_ALL if form == "libreoffice" else csv.QUOTE_MINIMAL
        end = "\n" if form == "by hand" else "\r\n"
        writer = csv.writer(file, delimiter=delimiter, quoting=quoting, lineterminator=end)
        writer.writerow(["Keep", "reason", "my notes", "caption", "Image"])
        for image, caption, reason, word in rows:
            apart = f"'{caption}" if caption.lstrip("'")[:1] in "=+-@" else caption
            writer.writerow([word, reason, "look, again", apart, image])
        writer.writerow([""] * 5)
    found = read_suspects(path)
    assert [row[:4] for row in found] == [(*row[:3], row[3] == "Yes") for row in rows]
    assert {row.more for row in found} == {(("my notes", "look, again"),)}
    # what others have written stays, their columns too
    assert set(update_suspects(path, [], kinds=["other"])) == set(found) == set(read_suspects(path))


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("image,keep\na.jpg,maybe\n", "line 2: keep says 'maybe': yes, y, true and 1 keep"),
        ("file,caption\na.jpg,x\n", "no column 'image' and 'keep' in its first line (found: file, caption)"),
        ("image,caption,keep\na.jpg,x,y,no\n", "line 2: 4 cells, and the first line has 3"),
        ('image,caption,keep\na.jpg,"x\ny",no\nb.jpg,"x,no\n', "line 4: unexpected end of data"),
        ("image,keep\n,no\n", "line 2: no image"),
    ],
)
def test_what_is_no_list_of_suspects_is_refused_by_its_line(tmp_path: Path, text: str, message: str) -> None:
    path = tmp_path / "suspects.csv"
    path.write_text(text)
    with pytest.raises(ValueError) as error:
        read_suspects(path)
    assert message in str(error.value)


def test_a_writer_owns_its_rows_and_edits_survive(tmp_path: Path) -> None:
    path = tmp_path / "suspects.csv"
    update_suspects(
        path, [Suspect("a", "x", "tiny: 8 x 8", True), Suspect("b", "x", "tiny: 9 x 9", True)], kinds=["tiny"]
    )
    update_suspects(path, [Suspect("a", "x", "wrong: says the model", False)], kinds=["wrong"])
    path.write_text(path.read_text().replace("tiny: 8 x 8,yes", "tiny: 8 x 8,0"))
    update_suspects(
        path, [Suspect("a", "x", "tiny: 8 x 8", True), Suspect("c", "x", "tiny: 7 x 7", True)], kinds=["tiny"]
    )
    assert [(row.image, row.kind, row.keep) for row in read_suspects(path)] == [
        ("a", "tiny", False), ("a", "wrong", False), ("c", "tiny", True)
    ]  # fmt: skip


def test_an_edit_stays_when_the_reason_is_worded_anew_and_a_suggestion_does_not(tmp_path: Path) -> None:
    path = tmp_path / "suspects.csv"
    update_suspects(
        path,
        [Suspect("a", "x", "identical: the one that is kept", True), Suspect("b", "x", "identical: same as a", False),
         Suspect("c", "x", "identical: same as a", False)],
        kinds=["identical"],
    )  # fmt: skip
    path.write_text(path.read_text().replace("b,x,identical: same as a,no", "b,x,identical: same as a,YES"))
    path.write_text(path.read_text() + "d,x,by hand: blurred,no\n")  # four cells do
    now = [
        Suspect("a", "x", "identical: same as c", False), Suspect("b", "x", "identical: same as c", False),
        Suspect("c", "x", "identical: the one that is kept", True),
    ]  # fmt: skip
    for _ in range(2):
        found = update_suspects(path, now, kinds=["identical"])
        assert [(row.image, row.keep) for row in found] == [("a", False), ("b", True), ("c", True), ("d", False)]
        assert {row.reason for row in found if row.keep} == {"identical: same as c", "identical: the one that is kept"}
    # a list of before there were suggestions: what it says is taken for a person's
    path.write_text("image,caption,reason,keep\na,x,identical: of old,yes\n")
    assert update_suspects(path, now[:1], kinds=["identical"])[0].keep


def test_rows_leave_captions_out_and_the_last_one_its_image(tmp_path: Path) -> None:
    pairs = make_pairs(tmp_path, {"a.png": ["one", "two", "=3"], "b.png": ["one", "two\nlines"], "sub/c.png": ["one"]})
    rows = [
        Suspect("a.png", "two", "", False), Suspect("a.png", "one", "", True), Suspect("b.png", "", "", False),
        Suspect(str(tmp_path / "sub" / "c.png"), "other", "", False), Suspect("gone.png", "one", "", False),
        Suspect("sub\\..\\a.png", "=3", "", False),
    ]  # fmt: skip
    found = exclude(pairs, rows)
    assert [relative_name(path, pairs.root) for path in found.pairs.paths] == ["a.png", "sub/c.png"]
    assert [found.pairs.captions_of(image) for image in range(2)] == [["one"], ["one"]]
    assert (found.num_images, found.num_pairs) == (1, 4)
    assert [row.image for row in found.unmatched] == [str(tmp_path / "sub" / "c.png"), "gone.png"]
    assert exclude(pairs, [Suspect("b.png", "two lines", "", False)]).num_pairs == 1
    assert exclude(pairs, [Suspect("b.png", "two lines", "", True)]).pairs is pairs
    assert len(exclude(pairs, [Suspect(name, "", "", False) for name in ("a.png", "b.png", "sub/c.png")]).pairs) == 0
