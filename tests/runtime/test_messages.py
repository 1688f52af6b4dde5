import pytest

from cliptune.runtime.messages import count, first_few, message_line, nearest, one_line, printable, shorten, shown


def test_counts_are_singular_or_plural() -> None:
    assert [count(number, "caption") for number in (0, 1, 2)] == ["0 captions", "1 caption", "2 captions"]
    assert count(12345, "index", "indices") == "12,345 indices"


def test_long_texts_are_cut_and_say_so() -> None:
    assert shorten("a" * 200) == "a" * 200
    assert shorten("a" * 201) == "a" * 200 + "..."


def test_control_characters_are_escaped() -> None:
    assert printable("a\n\x1b[31m\u200eé\udc80中") == r"a\n\x1b[31m\u200eé\udc80中"


@pytest.mark.parametrize(
    ("items", "total", "expected"),
    [
        ([], None, ""),
        (["a", "b"], None, "a; b"),
        (list("abcde"), None, "a; b; c; and 2 more"),
        (["a"], 5, "a; and 4 more"),
    ],
)
def test_the_first_of_many(items: list[str], total: int | None, expected: str) -> None:
    assert first_few(items, total=total) == expected


def test_what_is_meant() -> None:
    assert nearest("ViT-B32", ["ViT-B/32", "RN50"]) == "; did you mean ViT-B/32?"
    assert nearest("xyz", ["ViT-B/32", "RN50"]) == "; known: ViT-B/32, RN50"


def test_an_error_is_one_line() -> None:
    assert one_line(ValueError("a\n  b")) == "a b"
    assert one_line(KeyboardInterrupt()) == "KeyboardInterrupt"


def test_values_from_files_are_shown_short_and_printable() -> None:
    assert shown("a\nb\u202e" * 1000, 3) == r"a\nb..."
    assert shown(3) == "3"


def test_a_message_keeps_its_beginning_and_its_end() -> None:
    line = message_line("in " + "x" * 10_000_000 + "\n: try y")
    assert line.startswith("in xxx")
    assert line.endswith(r"xxx\n: try y")
    assert len(line) < 5000


def test_an_item_of_a_list_is_cut() -> None:
    assert len(first_few(["a" * 1_000_000, "b"])) < 2000
