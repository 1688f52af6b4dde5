"""Images inside Parquet and base64 files: their addresses, and how their bytes are read."""

from __future__ import annotations

import base64
import binascii
import re

from cliptune.runtime.messages import one_line

_PARQUET = re.compile(r"(.+\.(?:parquet|parq|pq))@(\d+)/(.+)", re.DOTALL | re.IGNORECASE)
_BASE64 = re.compile(r"(.+\.tsv)@(\d+)\+(\d+)/.*", re.DOTALL | re.IGNORECASE)
_URL_SAFE = bytes.maketrans(b"-_", b"+/")


def parquet_path(file: str, row: int, column: str) -> str:
    """Return a path by which an image inside a Parquet file is read like any other: `x.parquet@17/image`.

    Args:
        file: path of the Parquet file, whose ending must be Parquet's: an address is told by it.
        row: counted from 1.
        column: that holds the bytes of images' files, or structs with the fields `bytes` and `path`, as the Hub has.
    """
    return f"{file}@{row}/{column}"


def base64_path(file: str, offset: int, size: int, name: str) -> str:
    """Return a path by which an image that a `.tsv` file holds in base64 is read: `x.tsv@512+9000/17`.

    Args:
        file: path of the text file.
        offset: of the first byte of the image's text in it.
        size: of that text, in bytes.
        name: of the image, which ends the path.
    """
    return f"{file}@{offset}+{size}/{name}"


def is_parquet_name(file: str) -> bool:
    """Tell whether a file's name is one that `parquet_path` can address."""
    return _PARQUET.fullmatch(f"{file}@1/x") is not None


def container_of(path: str) -> str | None:
    """Return the Parquet or base64 file that an image lies in; None if it lies in neither."""
    if "@" not in path:  # all but every path, and this is asked of each image of a data set
        return None
    match = _PARQUET.fullmatch(path) or _BASE64.fullmatch(path)
    return None if match is None else match[1]


def read_encoded(path: str) -> bytes:
    """Read an image that lies in a Parquet or base64 file, see `container_of`.

    Raises:
        OSError: there is no such file or row, the row holds no bytes, or what it holds is damaged.
    """
    match = _PARQUET.fullmatch(path)
    if match is None:
        return _read_base64(path)
    from cliptune.preprocess.parquet_images import read_image  # noqa: PLC0415  (a model alone needs no pyarrow)

    return read_image(match[1], int(match[2]), match[3])


def _read_base64(path: str) -> bytes:
    match = _BASE64.fullmatch(path)
    if match is None:
        raise OSError(f"{path}: not an image in a Parquet or base64 file")
    with open(match[1], "rb") as file:  # noqa: PTH123  (pathlib is slower, and this is once an image)
        file.seek(int(match[2]))
        text = file.read(int(match[3])).translate(_URL_SAFE)
    try:
        return base64.b64decode(text + b"=" * (-len(text) % 4), validate=True)
    except binascii.Error as error:
        raise OSError(f"{path}: damaged base64: {one_line(error)}") from None
