import errno
import json
import os
import platform
import subprocess
import sys
import threading
import time
from pathlib import Path
from typing import Any

import pytest

from cliptune.runtime import lock
from cliptune.runtime.files import write_json
from cliptune.runtime.lock import LOCK_NAME, MARKER_NAME, exclusive
from tests.helpers.launch import ROOT

fcntl = pytest.importorskip("fcntl")
HOLD = (
    "import sys, time; from pathlib import Path; from cliptune.runtime import lock\n"
    "if sys.argv[2]:\n"
    "    def refuse(*_): raise OSError(int(sys.argv[2]), 'no locks')\n"
    "    lock.fcntl.flock = refuse\n"
    "with lock.exclusive(Path(sys.argv[1])):\n"
    "    print('held', flush=True)\n"
    "    time.sleep(60)\n"
)


@pytest.fixture(params=[errno.ENOLCK, errno.EOPNOTSUPP, errno.ENOSYS, errno.EINVAL])
def no_locks(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> int:
    """A file system whose every lock fails so."""

    def refuse(*_: object) -> None:
        raise OSError(request.param, os.strerror(request.param))

    monkeypatch.setattr(fcntl, "flock", refuse)
    monkeypatch.setattr(lock, "CONFIRM_SECONDS", 0.01)
    return int(request.param)


def held(folder: Path, error: int | str = "") -> subprocess.Popen[bytes]:
    """Start a process that holds the folder; its file system has no locks, if an error is given."""
    command = [sys.executable, "-c", HOLD, str(folder), str(error)]
    process = subprocess.Popen(command, cwd=ROOT, stdout=subprocess.PIPE)
    assert process.stdout is not None
    assert process.stdout.readline() == b"held\n"
    return process


def refused(folder: Path) -> str:
    with pytest.raises(ValueError, match=r"another run .* choose another --output_dir") as error, exclusive(folder):
        pass
    return str(error.value)


def edit(folder: Path, **values: Any) -> Path:
    """Change what the marker says."""
    path = folder / MARKER_NAME
    write_json(path, {**json.loads(path.read_text()), **values})  # whole at once, since the run looks at it
    return path


def left_marker(folder: Path) -> Path:
    """Leave the marker of a run that was killed, as if on another machine."""
    with exclusive(folder):
        text = (folder / MARKER_NAME).read_text()
    (folder / MARKER_NAME).write_text(text)
    return edit(folder, host="other")


def test_a_folder_is_free_again_and_nothing_is_left_but_the_lock(tmp_path: Path) -> None:
    for _ in range(2):
        with exclusive(tmp_path / "new"):
            assert "another run is writing" in refused(tmp_path / "new")
    assert [path.name for path in (tmp_path / "new").iterdir()] == [LOCK_NAME]


def test_a_file_system_without_locks_warns_once_and_the_marker_keeps_others_out(
    no_locks: int, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    with exclusive(tmp_path):
        warnings = [record.getMessage() for record in caplog.records]
        assert len(warnings) == 1
        assert f"has no locks ({os.strerror(no_locks)})" in warnings[0]
        assert f"process {os.getpid()}" in refused(tmp_path)
    with exclusive(tmp_path):
        pass


@pytest.mark.slow
def test_a_killed_run_locks_nobody_out_where_there_are_no_locks(no_locks: int, tmp_path: Path) -> None:
    with held(tmp_path, no_locks) as run:
        assert f"process {run.pid}" in refused(tmp_path)
        run.kill()
        os.waitid(os.P_PID, run.pid, os.WEXITED | os.WNOWAIT)  # a zombie is no run
        with exclusive(tmp_path):
            pass


@pytest.mark.slow
def test_a_number_of_a_process_that_was_given_anew_is_no_run(no_locks: int, tmp_path: Path) -> None:
    with held(tmp_path, no_locks) as run:
        run.kill()
    edit(tmp_path, pid=os.getpid())
    with exclusive(tmp_path):
        pass


@pytest.mark.parametrize("content", ["", "{", "[1]", '{"pid": "x", "host": 1}', '{"pid": -1}', "x" * 100_000])
def test_a_damaged_marker_locks_nobody_out_for_good(content: str, no_locks: int, tmp_path: Path) -> None:
    path = tmp_path / MARKER_NAME
    path.write_text(content)
    os.utime(path, (time.time() - 500,) * 2)
    with exclusive(tmp_path):
        pass


def test_a_marker_without_a_process_is_no_run(no_locks: int, tmp_path: Path) -> None:
    left_marker(tmp_path)
    for pid in (None, "x", 1.5, -1, 2**70, [1], 2**31 - 1):
        edit(tmp_path, host=platform.node(), pid=pid)
        text = (tmp_path / MARKER_NAME).read_text()
        with exclusive(tmp_path):
            pass
        (tmp_path / MARKER_NAME).write_text(text)


@pytest.mark.parametrize("change", [{"host": "other\n\x1b[2J"}, {"boot": "of another container"}])
def test_a_run_on_another_machine_is_there_as_long_as_it_touches_its_marker(
    change: dict[str, str], no_locks: int, tmp_path: Path
) -> None:
    path = left_marker(tmp_path)
    edit(tmp_path, **change)
    message = refused(tmp_path)
    assert f"If it was killed, the folder is free in 120 seconds. If there is none, delete {path}" in message
    assert message.isprintable()
    for seconds in (-500, 500):  # also one of a clock that is ahead
        path = left_marker(tmp_path) if not path.exists() else path
        os.utime(path, (time.time() + seconds,) * 2)
        with exclusive(tmp_path):
            pass
    path = left_marker(tmp_path)
    path.unlink()  # the way out
    with exclusive(tmp_path):
        pass


def test_a_run_on_another_machine_that_has_lost_its_lock_is_gone(tmp_path: Path) -> None:
    """A container that is started again at once, with another name: the lock that the old one held is free."""
    with held(tmp_path) as run:
        edit(tmp_path, host="other")
        refused(tmp_path)
        run.kill()
    with exclusive(tmp_path):
        pass


def test_a_lock_that_is_deleted_while_a_run_holds_it_lets_nobody_in(tmp_path: Path) -> None:
    with held(tmp_path) as run:
        (tmp_path / LOCK_NAME).unlink()
        assert f"process {run.pid}" in refused(tmp_path)
        assert f"process {run.pid}" in refused(tmp_path)
        run.kill()
        run.wait()
        with exclusive(tmp_path):
            pass


@pytest.mark.slow
def test_of_two_that_begin_at_the_same_moment_without_locks_one_goes_on(
    monkeypatch: pytest.MonkeyPatch, no_locks: int, tmp_path: Path
) -> None:
    monkeypatch.setattr(lock, "CONFIRM_SECONDS", 0.3)
    both_looked, ended, results = threading.Barrier(3), threading.Event(), []
    look = lock._Marker._refuse_living

    def look_together(marker: Any) -> None:
        look(marker)
        both_looked.wait()

    monkeypatch.setattr(lock._Marker, "_refuse_living", look_together)

    def run() -> None:
        try:
            with exclusive(tmp_path):
                results.append("held")
                ended.wait(10)
        except ValueError:
            results.append("refused")

    threads = [threading.Thread(target=run) for _ in range(3)]
    for thread in threads:
        thread.start()
    time.sleep(1)
    assert sorted(results) == ["held", "refused", "refused"]
    ended.set()
    for thread in threads:
        thread.join()
    assert not (tmp_path / MARKER_NAME).exists()


def test_a_marker_is_touched_and_made_again_while_the_run_goes_on(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(lock, "TOUCH_SECONDS", 0.02)
    path = tmp_path / MARKER_NAME

    def comes(condition: Any) -> bool:
        for _ in range(200):
            if condition():
                return True
            time.sleep(0.02)
        return False

    with exclusive(tmp_path):
        os.utime(path, (1, 1))
        assert comes(lambda: path.stat().st_mtime > 1)
        path.unlink()
        assert comes(path.exists)
        edit(tmp_path, token="other")
        assert comes(lambda: "another run has begun" in caplog.text)
    assert path.exists()  # it is the other's
