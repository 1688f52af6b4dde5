import random
from itertools import product

import numpy as np
import pytest

from cliptune.data import table as rows
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


@pytest.mark.parametrize("collide", [False, True])
def test_equal_strings_are_found_by_their_bytes(collide: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    if collide:  # hashes that tell nothing
        monkeypatch.setattr(Strings, "_hashes", lambda self: np.full(len(self), -1))
    monkeypatch.setattr(rows, "_MAX_PART", 4)
    strings, wanted = Strings.of(TEXTS), Strings.of(["a", "none", "\udcff", "", "\ue000", "c"])
    assert strings.find(wanted).tolist() == [1, -1, -1, 2, 8, -1]
    assert strings.find(strings).tolist() == [TEXTS.index(text) for text in TEXTS]
    assert Strings.of([]).find(wanted).tolist() == [-1] * 6
    assert strings.find(Strings.of([])).tolist() == []


@pytest.mark.parametrize("block", [16, 1 << 16])
def test_the_order_is_that_of_sorted(block: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(rows, "_BLOCK", block)
    texts = [*TEXTS, *("".join(letters) for letters in product("ab\udc80四", repeat=4))]
    random.Random(0).shuffle(texts)
    expected = sorted(range(len(texts)), key=texts.__getitem__)
    assert Strings.of(texts).sorted_order().tolist() == expected
    assert Strings.of([]).sorted_order().tolist() == []


def buffered(*given: tuple[str, list[str], str | None, str | None]) -> Rows:
    buffer = RowBuffer()
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


def test_rows_come_back_as_given(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(rows, "_BATCH", 2)
    found = buffered(*ROWS)
    assert [(row.image, list(row.captions), row.split, row.group) for row in found] == ROWS
    assert found[-1].place == "d.json: row 5"
    assert list(found.take(np.array([4, 1]))) == [found[4], found[1]]


def test_rows_of_one_image_are_joined() -> None:
    found = buffered(*ROWS)
    joined = found.joined(found.images.find(found.images))
    assert list(joined) == [
        ("a", ("1", "2", "4", "6"), "test", "g", "d.json: row 1"),
        ("b", ("3", "5"), "val", "g", "d.json: row 2"),
    ]


def test_parts_keep_their_places() -> None:
    parts = [buffered(*ROWS[:2]), buffered(*ROWS[2:])]
    assert list(Rows.concatenate(parts)) == [*parts[0], *parts[1]]
    assert [row.captions for row in Rows.concatenate(parts)] == [tuple(captions) for _, captions, _, _ in ROWS]


def test_problems_are_counted_and_the_first_kept() -> None:
    issues = Issues()
    for number in range(MAX_ISSUES - 1):
        issues.add(Issue(f"{number}"))
    issues.extend(Issues([Issue("x"), Issue("y")], 7))
    assert (issues.count, len(issues.first), issues.first[-1].reason) == (MAX_ISSUES + 6, MAX_ISSUES, "x")
