"""The folder of an export: whole or not there, and nobody else's files are lost."""

from pathlib import Path

import pytest

from cliptune.export.folder import MARKER, check_free, new_export


def test_an_export_is_seen_whole(tmp_path: Path) -> None:
    folder = tmp_path / "new" / "export"
    with new_export(folder) as temporary:
        (temporary / "a").write_text("1")
        assert not folder.exists()
    assert [path.name for path in folder.parent.iterdir()] == ["export"]
    assert (folder / "a").read_text() == "1"


def test_one_that_fails_leaves_what_was_there(tmp_path: Path) -> None:
    folder = tmp_path / "export"
    folder.mkdir()
    (folder / MARKER).write_text("{}")
    with pytest.raises(ValueError, match="no"), new_export(folder) as temporary:
        (temporary / "a").write_text("1")
        raise ValueError("no")
    assert [path.name for path in tmp_path.iterdir()] == ["export"]
    assert [path.name for path in folder.iterdir()] == [MARKER]


def test_a_new_one_replaces_all_of_an_earlier_one(tmp_path: Path) -> None:
    folder = tmp_path / "export"
    folder.mkdir()
    (folder / MARKER).write_text("{}")
    with new_export(folder) as temporary:
        (temporary / "a").write_text("1")
    assert [path.name for path in tmp_path.iterdir()] == ["export"]
    assert [path.name for path in folder.iterdir()] == ["a"]


def test_behind_a_link_the_folder_is_replaced(tmp_path: Path) -> None:
    (tmp_path / "real").mkdir()
    (tmp_path / "link").symlink_to("real")
    with new_export(tmp_path / "link") as temporary:
        (temporary / "a").write_text("1")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["link", "real"]
    assert (tmp_path / "real" / "a").is_file()


def test_only_an_export_is_replaced_and_only_when_asked(tmp_path: Path) -> None:
    check_free(tmp_path / "nothing", overwrite=False)
    check_free(tmp_path, overwrite=False)  # an empty folder
    (tmp_path / "thesis.tex").write_text("")
    for overwrite in (False, True):
        with pytest.raises(ValueError, match="is no export of this toolkit"):
            check_free(tmp_path, overwrite=overwrite)
        with pytest.raises(ValueError, match="is no export of this toolkit"):
            check_free(tmp_path / "thesis.tex", overwrite=overwrite)
    (tmp_path / MARKER).write_text("{}")
    with pytest.raises(ValueError, match="--overwrite replaces it"):
        check_free(tmp_path, overwrite=False)
    check_free(tmp_path, overwrite=True)
