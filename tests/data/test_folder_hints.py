"""A folder that is not read: what it resembles, and the smallest change that makes it readable."""

from pathlib import Path

import pytest

from cliptune.data.pairs import DataSource, load_pairs
from tests.helpers.datasets import make_images, make_shards, write_files


@pytest.mark.parametrize(
    ("images", "others", "message"),
    [
        ((), ("a.txt",), r"no data set: it holds 1 \.txt; looked for .*makes sample data"),
        (
            ("kite/1.png", "boat/2.png"),
            (),
            r"2 images and no captions: write them to boat/2.txt .*folder \(here 'boat'\)",
        ),
        (
            ("1.png",),
            (),
            r"metadata.csv with the header file_name,caption.*--captions_from folder or --captions_from fi",
        ),
        (("img/1.png",), ("txt/1.txt",), r"txt/1.txt may be the captions of img/1.png.*\(now: img, txt\)"),
        (
            ("a/1.png",),
            ("annotations/captions.csv",),
            r"annotations/captions.csv may be the index: --data_dir FILE --im",
        ),
        ((), ("a/one.csv", "b/two.csv"), r"a/one.csv; .*b/two.csv: name one with --data_dir FILE"),
        ((), ("pairs.xlsx",), r"pairs.xlsx: save the workbook as CSV"),
        ((), ("a/images.zip",), r"images.zip: unpack it"),
        ((), ("data-00000-of-00001.arrow", "state.json", "dataset_info.json"), r"to_parquet"),
    ],
)
def test_the_message_says_what_to_do(
    images: tuple[str, ...], others: tuple[str, ...], message: str, tmp_path: Path
) -> None:
    make_images(tmp_path, *images)
    write_files(tmp_path, *others, text="image,caption\na.png,x\n" if others and others[0].endswith("csv") else "x")
    with pytest.raises((ValueError, FileNotFoundError), match=message):
        load_pairs(tmp_path)


def test_a_folder_of_shards_is_told_as_braces_that_work(tmp_path: Path) -> None:
    make_shards(tmp_path, 2, 2, 2)
    write_files(tmp_path, "00_stats.json", "00.parquet", text="{}")
    with pytest.raises(FileNotFoundError, match="3 tar files, which are shards") as caught:
        load_pairs(tmp_path)
    assert len(load_pairs(str(caught.value).split("'")[1])) == 6
    (tmp_path / "01.tar").unlink()
    with pytest.raises(FileNotFoundError) as caught:
        load_pairs(tmp_path)
    assert len(load_pairs(DataSource(str(caught.value).split("'")[1]))) == 4
