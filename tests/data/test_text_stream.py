import json
from pathlib import Path

import pytest

from cliptune.data import text_stream
from cliptune.data.text_stream import TextFile

DOCUMENTS = [
    "[]",
    " \n[ ] \n",
    '[1, 23456, -1.5e3, NaN, -Infinity, true, null, "a\\u00e9\\ud83d\\ude00]", "", [[], {}]]',
    "[1, 123456789012345678901234567890, 1e400]",
    r'["\ud800", "\udc00x"]',
    '[{"a": [1, {"b": "],[ 四"}]}, -2.5]',
    '[\n {"a": 1},\r\n\t{"b": "' + "x" * 500 + '"} ,\n 7\n]\n',
]
BROKEN = [
    "[",
    "[1",
    "[1,",
    "[1,\n]",
    "[1\n 2]",
    "[1]\n x",
    '[{"a": 1},\n\n {"a" 2}]',
    '[{"a": 1},\n {"a": "never closed}, \n 3]',
    '["a\tb"]',
    '[1,\n "' + "y" * 300 + '",\n 2, tru]',
    '["\\u12", 3]',
]


BLOCKS = [1, 7, 1 << 20]


def write(folder: Path, content: bytes) -> TextFile:
    (folder / "text").write_bytes(content)
    return TextFile(folder / "text")


@pytest.mark.parametrize("block", BLOCKS)
@pytest.mark.parametrize("document", DOCUMENTS)
def test_a_list_is_read_value_by_value(document: str, block: int, tmp_path: Path) -> None:
    assert repr(list(write(tmp_path, document.encode()).json_items(block=block))) == repr(json.loads(document))


@pytest.mark.parametrize("block", BLOCKS)
@pytest.mark.parametrize("document", BROKEN)
def test_a_broken_list_is_told_as_the_json_module_tells_it(document: str, block: int, tmp_path: Path) -> None:
    with pytest.raises(json.JSONDecodeError) as expected:
        json.loads(document)
    with pytest.raises(ValueError, match="not valid JSON") as found:
        list(write(tmp_path, document.encode()).json_items(block=block))
    assert str(found.value).endswith(
        f"line {expected.value.lineno}, column {expected.value.colno}: {expected.value.msg}"
    )


def test_no_more_than_a_block_and_a_value_is_held(tmp_path: Path) -> None:
    text = write(tmp_path, json.dumps([f"{number:020}" for number in range(1000)]).encode())
    with text._open() as file:
        values = text_stream._JsonList(file, 50)
        longest = max(len(values.text) for _ in values)
    assert longest < 150


@pytest.mark.parametrize(
    ("content", "lines"),
    [
        (b"a\r\nb\rc\n\nd", ["a\r\n", "b\rc\n", "\n", "d"]),
        ("\ufeffa\rb\u2028c\x0b\r".encode(), ["a\n", "b\u2028c\x0b\n"]),
        (b"a\0b\n", ["a\udc00b\n"]),
    ],
)
def test_lines(content: bytes, lines: list[str], tmp_path: Path) -> None:
    text = write(tmp_path, content)
    assert list(text.lines()) == lines
    assert text.read() == "".join(lines)


def test_the_first_line_that_is_not_blank(tmp_path: Path) -> None:
    text = write(tmp_path, b"\n \n  abcdef\nx")
    assert text.first_line(100) == (3, "  abcdef\n")
    assert text.first_line(4) == (3, "  ab")
    assert write(tmp_path, b"\n\n").first_line(4) == (1, "")


@pytest.mark.parametrize(
    ("content", "byte"), [(b"\xef\xbb\xbf[1, \xff]", 7), (b'["abcd\xe4\xba"]', 6), (b"[1, \xe4\xba", 4)]
)
def test_a_byte_that_is_not_utf8_is_named(content: bytes, byte: int, tmp_path: Path) -> None:
    text = write(tmp_path, content)
    for read in (text.read, lambda: list(text.lines()), lambda: list(text.json_items()), lambda: text.first_line(99)):
        with pytest.raises(ValueError, match=f"text: not UTF-8 at byte {byte}; save the file as UTF-8"):
            read()


def test_a_missing_file(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match="no such file"):
        TextFile(tmp_path / "gone")
