"""Log lines on a terminal, beside a progress bar."""

import io
import logging
import warnings
from collections.abc import Iterator
from pathlib import Path

import pytest
from tqdm import tqdm

from cliptune.runtime.logs import SHOWN_BY_BAR, setup_logging


class Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


@pytest.fixture(autouse=True)
def logging_as_before() -> Iterator[None]:
    root = logging.getLogger()
    handlers, level = list(root.handlers), root.level
    root.handlers.clear()  # or they would be closed, and come back so
    yield
    for handler in root.handlers:
        handler.close()
    root.handlers[:], root.level = handlers, level
    logging.captureWarnings(False)


@pytest.mark.parametrize("terminal", [True, False])
def test_what_a_bar_shows_goes_to_the_log_file_alone_on_a_terminal(
    terminal: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    stream = Terminal() if terminal else io.StringIO()
    monkeypatch.setattr("sys.stderr", stream)
    setup_logging("info", tmp_path / "x.log")
    logging.getLogger("train").info("loss 1.0", extra=SHOWN_BY_BAR)
    logging.getLogger("train").info("epoch 1")
    assert ("loss 1.0" in stream.getvalue()) == (not terminal)
    assert "epoch 1\n" in stream.getvalue()
    assert [line.split(": ")[1] for line in (tmp_path / "x.log").read_text().splitlines()] == ["loss 1.0", "epoch 1"]


def test_a_line_does_not_stand_in_a_bar(monkeypatch: pytest.MonkeyPatch) -> None:
    stream = Terminal()
    monkeypatch.setattr("sys.stderr", stream)
    setup_logging("info")
    with tqdm(total=3, file=stream, ncols=40, disable=False) as bar:
        bar.update()
        bar.refresh()
        stream.seek(0)
        stream.truncate()
        logging.getLogger("train").info("epoch 1")
    written = stream.getvalue()
    before, _, behind = written.partition("epoch 1\n")
    assert before.endswith("\r")  # the bar was cleared
    assert not before.strip()
    assert "1/3" in behind  # and drawn again


def test_a_closed_terminal_is_no_error(monkeypatch: pytest.MonkeyPatch) -> None:
    stream = io.StringIO()
    monkeypatch.setattr("sys.stderr", stream)
    monkeypatch.setattr(logging, "raiseExceptions", False)
    setup_logging("info")
    stream.close()
    logging.getLogger("train").info("epoch 1", extra=SHOWN_BY_BAR)


FORGED = "2026-01-01 00:00:00,000 INFO train: forged"


def test_a_message_is_one_printable_line_in_every_log(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    stream = io.StringIO()
    monkeypatch.setattr("sys.stderr", stream)
    setup_logging("debug", tmp_path / "x.log")
    logger = logging.getLogger("train")
    logger.info("name %s, and the end", f"a\x1b[31m\r\n{FORGED}\u2028\u202e\x9b")
    logger.info("name %s, and the end", "n" * 10_000_000)
    warnings.warn(f"odd\n{FORGED}", UserWarning, stacklevel=1)
    try:
        raise ValueError(f"a\x1b\n{FORGED}")
    except ValueError:
        logger.debug("traceback", exc_info=True)
    for text in (stream.getvalue(), (tmp_path / "x.log").read_text()):
        lines = text.splitlines()
        assert all(line.isprintable() for line in lines)
        assert not any(line.startswith(FORGED) for line in lines)
        assert len(text) < 10_000
        assert sum("and the end" in line for line in lines) == 2
        assert any("raise ValueError" in line for line in lines)  # a traceback has its lines


def test_a_log_that_cannot_be_written_is_said_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    stream = io.StringIO()
    monkeypatch.setattr("sys.stderr", stream)
    (tmp_path / "full.log").symlink_to("/dev/full")
    setup_logging("info", tmp_path / "full.log")
    for number in range(3):
        logging.getLogger("train").info("line %d", number)
    lines = stream.getvalue().splitlines()
    assert [line for line in lines if line.startswith("line")] == ["line 0", "line 1", "line 2"]
    assert [line for line in lines if not line.startswith("line")] == [
        f"{tmp_path}/full.log cannot be written: [Errno 28] No space left on device"
    ]


def test_a_closed_log_file_whose_folder_is_gone_is_said_once(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "logs").mkdir()
    setup_logging("info", tmp_path / "logs" / "train.log")
    logging.getLogger().handlers[1].close()
    (tmp_path / "logs" / "train.log").unlink()
    (tmp_path / "logs").rmdir()
    for number in range(2):
        logging.getLogger("train").info("line %d", number)
    error = capsys.readouterr().err.splitlines()
    assert error[0] == "line 0"
    assert "cannot be written" in error[1]
    assert error[2:] == ["line 1"]
