import csv
import io
import logging
import time
import tracemalloc
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from cliptune.data.formats import read_index


def read(folder: Path, text: str, name: str = "data.csv") -> list[tuple[str, tuple[str, ...]]]:
    (folder / name).write_bytes(text.encode())
    return [(row.image, row.captions) for row in read_index(folder / name).rows]


def table(delimiter: str, odd: dict[int, str], num_rows: int = 40) -> str:
    """A header and rows; captions that are not plain by the number of their row."""
    rows = [f"img/{number}.jpg{delimiter}{odd.get(number, f'kite {number}')}" for number in range(num_rows)]
    return "\n".join([f"image{delimiter}caption", *rows, ""])


LONE = {
    "one that never closes": {10: '"tis a kite'},
    "one in the last row": {39: '"tis a kite'},
    "one that a later row closes": {10: '"a kite', 30: 'a boat"'},
    "one that a later row's lone quote meets": {10: '"tis a kite', 30: '"twas a boat'},
    "two in rows one after another": {10: '"tis a kite', 11: '"twas a boat'},
    "one that closes in the next row": {10: '"a kite', 11: 'a boat"'},
    "quoted words first": {10: '"Big" is a kite', 11: 'a boat of 12"'},
    "a quoted cell behind it": {10: '"tis a kite', 20: '"a boat, or ""two"""'},
}


@pytest.mark.parametrize("delimiter", [",", "\t", ";", "|"])
@pytest.mark.parametrize("case", LONE)
def test_a_lone_quote_mark_is_text_and_swallows_no_row(
    case: str, delimiter: str, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    odd = {number: caption.replace(", ", f"{delimiter} ") for number, caption in LONE[case].items()}
    expected = [(f"img/{number}.jpg", (odd.get(number, f"kite {number}"),)) for number in range(40)]
    if 20 in odd:
        expected[20] = ("img/20.jpg", (f'a boat{delimiter} or "two"',))
    assert read(tmp_path, table(delimiter, odd)) == expected
    assert f"the first of them line {min(odd) + 2}" in caplog.text


@pytest.mark.parametrize("names", ["img_{:03}", "{:03}", "{:012x}", "a/b {:03}"])
def test_rows_are_told_from_text_though_names_have_no_ending(names: str, tmp_path: Path) -> None:
    images = [names.format(number + 0xA0_0000) for number in range(30)]
    captions = ['"tis a kite' if number == 5 else 'a boat"' if number == 20 else "a cat" for number in range(30)]
    for delimiter in ",\t":
        lines = [f"image{delimiter}caption", *map(delimiter.join, zip(images, captions, strict=True))]
        assert read(tmp_path, "\n".join(lines)) == [
            (image, (caption,)) for image, caption in zip(images, captions, strict=True)
        ]


def test_a_quoted_cell_may_hold_lines_that_are_no_records(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    text = '''caption,image
"one,
two, three
and ""four""",a.jpg
"see b.jpg, or
not",b.jpg
plain,c.jpg
"
",d.jpg
'''
    assert read(tmp_path, text) == [
        ("a.jpg", ('one,\ntwo, three\nand "four"',)),
        ("b.jpg", ("see b.jpg, or\nnot",)),
        ("c.jpg", ("plain",)),
    ]
    assert "quote" not in caplog.text


CELLS = st.text(st.sampled_from('a ",\n\r;|\t"'), max_size=12)


@pytest.mark.slow
@settings(max_examples=200, deadline=None)
@given(st.lists(st.tuples(CELLS, CELLS), max_size=6), st.sampled_from(",;\t|"), st.integers(1, 40))
def test_what_csv_writes_is_read_as_it_was(
    tmp_path_factory: pytest.TempPathFactory, rows: list[tuple[str, str]], delimiter: str, repeats: int
) -> None:
    file = io.StringIO()
    writer = csv.writer(file, delimiter=delimiter, lineterminator="\n", quoting=csv.QUOTE_NONNUMERIC)
    writer.writerow(["note", "caption", "image"])
    writer.writerows((note, f"x{caption}x", f"{number}.jpg") for number, (note, caption) in enumerate(rows * repeats))
    expected = [(f"{number}.jpg", (f"x{caption}x",)) for number, (_, caption) in enumerate(rows * repeats)]
    if rows:
        assert read(tmp_path_factory.mktemp("t"), file.getvalue()) == expected


def test_blocks_of_lines_are_joined(tmp_path: Path) -> None:
    long = "\n".join(f"line {number} of a cell" for number in range(3000))
    odd = {number: f'"{long}"' if number % 10 == 3 else '"tis' for number in range(0, 100, 3)}
    expected = [
        (f"img/{number}.jpg", (odd.get(number, f"kite {number}").strip('"') if number % 10 == 3 else
                               odd.get(number, f"kite {number}"),))
        for number in range(100)
    ]  # fmt: skip
    assert read(tmp_path, table("\t", odd, 100)) == expected


@pytest.mark.slow
@pytest.mark.parametrize("caption", ['"tis a kite', 'a "kite" ""', '""' + "tis", '"""tis""'])
def test_many_lone_quotes_cost_no_more_than_a_moment_and_a_little_memory(caption: str, tmp_path: Path) -> None:
    lines = [f"{number}\t{caption}" for number in range(60_000)]
    (tmp_path / "few.tsv").write_text("\n".join(["image\tcaption", *lines[:9]]))
    read_index(tmp_path / "few.tsv")  # what it imports is not counted
    (tmp_path / "data.tsv").write_text("\n".join(["image\tcaption", *lines]))
    begin = time.process_time()
    tracemalloc.start()
    assert len(read_index(tmp_path / "data.tsv").rows) == 60_000
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert time.process_time() - begin < 20
    assert peak < 20e6


@pytest.mark.slow
def test_a_lone_quote_at_the_top_does_not_read_all(tmp_path: Path) -> None:
    words = ["".join(chr(97 + number // 26**place % 26) for place in range(5)) for number in range(100_000)]
    lines = [f"{word}\tkite {word}" for word in words]
    peaks = []
    for first in ("tis", '"tis'):
        (tmp_path / "data.tsv").write_text("\n".join(["image\tcaption", f"top\t{first}", *lines]))
        tracemalloc.start()
        rows = read_index(tmp_path / "data.tsv").rows
        peaks.append(tracemalloc.get_traced_memory()[1])
        tracemalloc.stop()
        assert (len(rows), rows[0].captions) == (100_001, (first,))
    assert peaks[1] < peaks[0] + 2e6


def test_lines_that_are_no_rows_count_each(tmp_path: Path) -> None:
    odd = {10: '"a kite, and more', 20: "one, two", 30: '"said ""so"" and, left'}
    (tmp_path / "data.csv").write_text(table(",", odd))
    index = read_index(tmp_path / "data.csv")
    assert (len(index.rows), index.issues.count) == (37, 3)
    assert [issue.location for issue in index.issues.first] == [f"data.csv: line {line}" for line in (12, 22, 32)]


def test_a_separator_line_names_the_delimiter(tmp_path: Path) -> None:
    for first in ("sep=;", "SEP=;", '"sep=;"'):
        assert read(tmp_path, f"\ufeff{first}\r\nimage;caption\r\na.jpg;x, y\r\n") == [("a.jpg", ("x, y",))]
    assert read(tmp_path, "sep=^\nimage^caption\na.jpg^x\n") == [("a.jpg", ("x",))]
    assert read(tmp_path, "sep=,\nimage;caption\na.jpg;x\n") == [("a.jpg", ("x",))]
    with pytest.raises(ValueError, match="of no known form"):
        read(tmp_path, "sep=;\n")


def test_bars_with_blanks_around_as_flickr30k_has_them(tmp_path: Path) -> None:
    text = (
        'image_name| comment_number| comment\n1.jpg| 0| A dog , running .\n1.jpg| 1| Two "dogs" .\n2.jpg| 4   A cat .\n'
    )
    assert read(tmp_path, text) == [("1.jpg", ("A dog , running .", 'Two "dogs" .'))]


@pytest.mark.parametrize("encoding", ["utf-16", "utf-16-be", "utf-32", "utf-8-sig"])
def test_a_byte_order_mark_tells_the_encoding(encoding: str, tmp_path: Path) -> None:
    mark = "\ufeff" if encoding.endswith("be") else ""
    for text in (
        "image\tcaption\r\na.jpg\tein grüner Käse 四\r\n",
        '[{"image": "a.jpg", "caption": "ein grüner Käse 四"}]',
    ):
        (tmp_path / "data.txt").write_bytes((mark + text).encode(encoding))
        assert [row.captions for row in read_index(tmp_path / "data.txt").rows] == [("ein grüner Käse 四",)]


def test_other_encodings_are_refused_with_the_way_out(tmp_path: Path) -> None:
    path = tmp_path / "data.csv"
    path.write_bytes("image;caption\na.jpg;grüner Käse\n".encode("cp1252"))
    with pytest.raises(ValueError, match=r"not UTF-8 at byte 22; save the file as UTF-8 \(in Excel: CSV UTF-8\)"):
        read_index(path)
    path.write_bytes("image;caption\na.jpg;x\n".encode("utf-16-le"))
    with pytest.raises(ValueError, match="UTF-16 without a byte order mark: save it as UTF-8"):
        read_index(path)
    path.write_bytes("image;caption\na.jpg;x\n".encode("utf-16")[:-1])
    with pytest.raises(ValueError, match="not UTF-16 at byte"):
        read_index(path)


def test_no_word_of_quotes_where_there_is_none(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.WARNING)
    assert len(read(tmp_path, table(",", {3: '12" long', 4: '"one ""two"", three"', 5: "it's"}))) == 40
    assert not caplog.text
