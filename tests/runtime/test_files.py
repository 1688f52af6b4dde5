import os
from pathlib import Path
from types import SimpleNamespace

import pytest

from cliptune.runtime import files
from cliptune.runtime.files import atomic_writer, read_json_object, require_free_space, write_json


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
