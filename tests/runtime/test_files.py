import errno
import os
import resource
import signal
import time
from pathlib import Path
from types import SimpleNamespace

import pytest

from cliptune.runtime import files
from cliptune.runtime.files import (
    atomic_writer,
    read_json_object,
    remove_partial_files,
    require_free_space,
    size_on_disk,
    write_json,
)


def test_a_reader_sees_the_old_file_until_the_new_one_is_whole(tmp_path: Path) -> None:
    path = tmp_path / "new" / "x.bin"
    with atomic_writer(path) as file:
        file.write(b"old")
    with atomic_writer(path) as file:
        file.write(b"half of the new one")
        file.flush()
        assert path.read_bytes() == b"old"
    assert path.read_bytes() == b"half of the new one"
    assert [each.name for each in path.parent.iterdir()] == ["x.bin"]


def test_a_failed_writing_leaves_what_was_there_and_nothing_else(tmp_path: Path) -> None:
    path = tmp_path / "x.json"
    write_json(path, {"a": 1})
    with pytest.raises(TypeError):
        write_json(path, {"a": object()})
    with pytest.raises(RuntimeError), atomic_writer(path) as file:
        file.write(b"{")
        raise RuntimeError
    assert read_json_object(path) == {"a": 1}
    assert [each.name for each in tmp_path.iterdir()] == ["x.json"]


def test_content_reaches_the_disk_before_its_name_does(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    events: list[str] = []
    fsync, replace = os.fsync, Path.replace

    def noted_sync(descriptor: int) -> None:
        events.append("sync")
        fsync(descriptor)

    def noted_replace(path: Path, target: Path) -> Path:
        events.append("rename")
        return replace(path, target)

    monkeypatch.setattr(os, "fsync", noted_sync)
    monkeypatch.setattr(Path, "replace", noted_replace)
    write_json(tmp_path / "x.json", {})
    assert events == ["sync", "rename", "sync"]  # the last one is the folder's


def test_no_room_is_told_with_what_is_needed_and_what_is_free(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(files.shutil, "disk_usage", lambda _: SimpleNamespace(free=10**9))
    require_free_space(tmp_path, 10**9, what="x", way_out="")
    with pytest.raises(OSError, match=r"it needs 2.00 GB, and 1.00 GB are free in .*\. Make room"):
        require_free_space(tmp_path, 2 * 10**9, what="the cache", way_out="Make room")


@pytest.mark.parametrize("number", [errno.EINVAL, errno.ENOSYS, errno.EOPNOTSUPP])
def test_a_file_system_that_cannot_sync_is_written_to(
    number: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(_: int) -> None:
        raise OSError(number, os.strerror(number))

    monkeypatch.setattr(os, "fsync", refuse)
    write_json(tmp_path / "x.json", {"a": 1})
    assert read_json_object(tmp_path / "x.json") == {"a": 1}
    assert [each.name for each in tmp_path.iterdir()] == ["x.json"]


@pytest.mark.parametrize("of_folder", [False, True])
def test_an_error_of_the_disk_is_an_error(of_folder: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    fsync, calls = os.fsync, []

    def fail(descriptor: int) -> None:
        calls.append(descriptor)
        if len(calls) == 1 + of_folder:
            raise OSError(errno.EIO, os.strerror(errno.EIO))
        fsync(descriptor)

    write_json(tmp_path / "x.json", {})
    monkeypatch.setattr(os, "fsync", fail)
    with pytest.raises(OSError, match=r"Input/output error: .*/"):
        write_json(tmp_path / "x.json", {"a": 1})
    assert [each.name for each in tmp_path.iterdir()] == ["x.json"]


def test_a_limit_of_the_size_of_files_leaves_the_old_file_and_names_it(tmp_path: Path) -> None:
    path = tmp_path / "x.json"
    write_json(path, {"a": 1})
    limits, before = resource.getrlimit(resource.RLIMIT_FSIZE), signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    resource.setrlimit(resource.RLIMIT_FSIZE, (2048, limits[1]))
    try:
        with pytest.raises(OSError, match=r"File too large: .*x\.json"):
            write_json(path, list(range(10_000)))
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
        signal.signal(signal.SIGXFSZ, before)
    assert read_json_object(path) == {"a": 1}
    assert [each.name for each in tmp_path.iterdir()] == ["x.json"]


def test_only_our_partial_files_are_removed(tmp_path: Path) -> None:
    ours = tmp_path / f".best_model.pth.{'0a' * 16}.cliptune.tmp"
    young = tmp_path / f".last_model.pth.{'0b' * 16}.cliptune.tmp"
    others = [".foo.tmp", ".best_model.pth.abc.tmp", ".mine.cliptune.tmp", f".x.{'0A' * 16}.cliptune.tmp", "y.pth"]
    for path in (ours, young, *(tmp_path / name for name in others)):
        path.touch()
    folder = tmp_path / f".folder.{'0c' * 16}.cliptune.tmp"
    folder.mkdir()
    os.utime(ours, (time.time() - 100,) * 2)
    remove_partial_files(tmp_path / "none")
    remove_partial_files(tmp_path, older_than=60)
    assert (ours.exists(), young.exists()) == (False, True)
    remove_partial_files(tmp_path)
    assert {path.name for path in tmp_path.iterdir()} == {*others, folder.name}


def test_a_file_with_two_names_counts_once(tmp_path: Path) -> None:
    (tmp_path / "a").mkdir()
    (tmp_path / "a" / "x").write_bytes(b"x" * 1000)
    (tmp_path / "y").hardlink_to(tmp_path / "a" / "x")
    (tmp_path / "a" / "gone").symlink_to("nowhere")
    (tmp_path / "a" / "around").symlink_to(tmp_path)
    assert size_on_disk(tmp_path, tmp_path / "y", tmp_path / "none") == 1000


@pytest.mark.parametrize(
    "text", ['{"a": 1, "a": 2}', '{"a": 1, "a": 1}', '{"b": {"a": 1, "c": 2, "a": 3}}', '{"b": [{"a": {}, "a": []}]}']
)
def test_a_key_that_occurs_twice_is_named(text: str, tmp_path: Path) -> None:
    path = tmp_path / "x.json"
    path.write_text(text)
    with pytest.raises(ValueError, match=r"x.json: not valid JSON: the key 'a' occurs twice in one object"):
        read_json_object(path)
    path.write_text('{"a": {"a": 1}, "b": [{"a": 1}, {"a": 1}]}')
    assert read_json_object(path)["b"] == [{"a": 1}, {"a": 1}]
