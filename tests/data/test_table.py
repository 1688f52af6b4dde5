import pickle

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from cliptune.data.issues import MAX_ISSUES, Issue, Issues
from cliptune.data.table import RowBuffer, Rows, Strings

TEXTS = ["b", "a", "", "四 猫", "b", "x" * 1000, "bad \udcff byte", "", "\ue000", "a"]


def test_strings_hold_what_they_are_given() -> None:
    strings = Strings.of(iter(TEXTS))
    assert list(strings) == [strings[number] for number in range(len(TEXTS))] == TEXTS
    assert strings[-1] == TEXTS[-1]
    assert strings[1:3] == TEXTS[1:3]
    assert strings.empty.tolist() == [not text for text in TEXTS]
    with pytest.raises(IndexError):
        strings[len(TEXTS)]


def test_taken_concatenated_and_filled_strings() -> None:
    strings = Strings.of(TEXTS)
    taken = strings.take(np.array([3, 0, 3]))
    assert list(taken) == ["四 猫", "b", "四 猫"]
    assert list(Strings.concatenate([taken, strings])) == [*taken, *TEXTS]
    others = Strings.of(map(str, range(len(TEXTS))))
    assert list(strings.filled(others)) == [text or str(number) for number, text in enumerate(TEXTS)]
    assert Strings.of(["", ""]).filled(taken) is taken


def test_equal_strings_are_found_by_their_bytes() -> None:
    strings, wanted = Strings.of(TEXTS), Strings.of(["a", "none", "\udcff", "", "\ue000", "c"])
    assert strings.find(wanted).tolist() == [1, -1, -1, 2, 8, -1]
    assert strings.find(strings).tolist() == [TEXTS.index(text) for text in TEXTS]
    assert Strings.of([]).find(wanted).tolist() == [-1] * 6
    assert strings.find(Strings.of([])).tolist() == []


@given(st.lists(st.text("ab\udc80\udcff\ue000四\U0001f600", max_size=3)), st.integers(1, 9))
def test_first_equal_and_order_are_those_of_lists(texts: list[str], block: int) -> None:
    strings = Strings.of([*texts, "x"]).take(np.arange(len(texts)))
    assert strings.first_equal(block=block).tolist() == [texts.index(text) for text in texts]
    assert strings.sorted_order().tolist() == sorted(range(len(texts)), key=texts.__getitem__)


def test_strings_travel_to_other_processes() -> None:
    assert list(pickle.loads(pickle.dumps(Strings.of(TEXTS).take(np.array([6, 0]))))) == [TEXTS[6], TEXTS[0]]


def buffered(*given: tuple[str, list[str], str | None, str | None]) -> Rows:
    buffer = RowBuffer(batch=2)
    for number, (image, captions, split, group) in enumerate(given, 1):
        buffer.append(image, captions, split=split, group=group, number=number)
    return buffer.rows("d.json: row")


ROWS = [
    ("a", ["1", "2"], None, None),
    ("b", ["3"], "val", "g"),
    ("a", ["4"], "test", None),
    ("b", ["5"], None, "h"),
    ("a", ["6"], "val", "g"),
]


def test_rows_come_back_as_given() -> None:
    found = buffered(*ROWS)
    assert [(row.image, list(row.captions), row.split, row.group) for row in found] == ROWS
    assert found[-1].location == "d.json: row 5"
    assert list(found.take(np.array([4, 1]))) == [found[4], found[1]]


def test_rows_of_one_image_are_joined() -> None:
    found = buffered(*ROWS)
    joined = found.joined(found.images.first_equal())
    assert list(joined) == [
        ("a", ("1", "2", "4", "6"), "test", "g", "d.json: row 1"),
        ("b", ("3", "5"), "val", "g", "d.json: row 2"),
    ]


def test_parts_keep_their_source_locations() -> None:
    parts = [buffered(*ROWS[:2]), buffered(*ROWS[2:])]
    assert list(Rows.concatenate(parts)) == [*parts[0], *parts[1]]
    assert [row.captions for row in Rows.concatenate(parts)] == [tuple(captions) for _, captions, _, _ in ROWS]


@pytest.mark.slow
def test_issues_are_counted_and_the_first_are_listed() -> None:
    issues = Issues()
    for number in range(MAX_ISSUES - 1):
        issues.add(Issue(f"{number}"))
    issues.extend(Issues([Issue("x"), Issue("y")], 7))
    assert (issues.count, len(issues.first), issues.first[-1].reason) == (MAX_ISSUES + 6, MAX_ISSUES, "x")


def test_rows_of_hundreds_of_files_know_where_they_are_from() -> None:
    parts = []
    for number in range(300):
        buffer = RowBuffer()
        buffer.append(f"{number}.png", ["x"], split=None, group=None, number=number + 1)
        parts.append(buffer.rows(f"train-{number:05}.parquet: row"))
    rows = Rows.concatenate(parts)
    assert [rows.location(number) for number in (0, 127, 128, 299)] == [
        f"train-{number:05}.parquet: row {number + 1}" for number in (0, 127, 128, 299)
    ]
