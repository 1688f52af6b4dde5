"""Parquet files, some thousands of rows at a time; the images may lie in them."""

from __future__ import annotations

import logging
from collections import Counter
from collections.abc import Iterator, Sequence
from itertools import groupby
from pathlib import Path
from typing import Any, NamedTuple

import pyarrow as pa

from cliptune.data.columns import refuse_repeated
from cliptune.data.index import Records, quote
from cliptune.preprocess.decode import image_format
from cliptune.preprocess.encoded import is_parquet_name, parquet_path
from cliptune.preprocess.parquet_images import CACHE_BYTES, bytes_of, open_parquet
from cliptune.runtime.messages import one_line

logger = logging.getLogger(__name__)

_MAGIC = b"PAR1"
_BATCH = 1 << 14
_IMAGES = 16
"""Rows of a batch that holds images."""
_LARGE_GROUP = 1 << 26
"""Bytes of images from which on a row group is slow to read at random."""
_LONGEST_PATH = 4096


def is_parquet(path: Path) -> bool:
    """Tell whether a file begins as Parquet does."""
    if not path.is_file():
        return False
    with path.open("rb") as file:
        return file.read(len(_MAGIC)) == _MAGIC


def read_parquet(found: Records) -> str:
    """Take the rows of the columns that matter, some thousands at a time; no other column is read.

    Images that the file holds stay in it: each gets its address, see `parquet_path`.
    """
    found.unit = "row"
    try:
        with open_parquet(found.path) as file:
            _read(found, file)
    except (pa.ArrowException, OSError, UnicodeDecodeError) as error:  # the last: of a column name
        raise ValueError(f"{found.path}: damaged Parquet file: {one_line(error)}") from None
    return "parquet"


def _read(found: Records, file: Any) -> None:
    schema, num_rows = file.schema_arrow, file.metadata.num_rows
    refuse_repeated(found, schema.names)
    columns = Counter(dict.fromkeys(schema.names, num_rows))
    held, paths = _image_columns(found, file)
    image_column = held or found.choose(Counter(dict.fromkeys(paths, num_rows)), found.image_columns, "image")
    caption_column = found.choose_caption(columns)
    used = [caption_column, *({"split", "group"} & columns.keys())]
    found.ignore(columns, [image_column, *used])
    if held is not None:
        _warn_of_large_groups(file, held)
    for span in _spans(file, held):
        names = used if span.is_full else [image_column, *used]
        batch = _BATCH if held is None or span.is_full else _IMAGES
        for number, row in enumerate(_parquet_rows(file, names, span.groups, batch), span.first):
            if isinstance(row, ValueError):
                found.issue(number, str(row))
                continue
            image = row.get(image_column)
            if held is not None:
                image = _address(found, number, held, image, is_full=span.is_full)
            try:
                image, captions = _text(image), _text(row[caption_column])
            except UnicodeDecodeError:
                found.issue(number, "text is not UTF-8")
                continue
            found.add(number, image, captions, row.get("split"), row.get("group"))


class _Span(NamedTuple):
    """Row groups one after another: all of their rows hold an image, or some may hold none."""

    groups: list[int]
    first: int
    """Number of the first row."""
    is_full: bool


def _spans(file: Any, held: str | None) -> Iterator[_Span]:
    """Yield the row groups. Where the file says that no image is missing, none needs to be read."""
    metadata, first = file.metadata, 1
    leaf = None if held is None else _leaf(file, held)

    def is_full(group: int) -> bool:
        statistics = None if leaf is None else metadata.row_group(group).column(leaf).statistics
        return statistics is not None and statistics.has_null_count and statistics.null_count == 0

    for full, run in groupby(range(file.num_row_groups), is_full):
        groups = list(run)
        yield _Span(groups, first, full)
        first += sum(metadata.row_group(group).num_rows for group in groups)


def _address(found: Records, number: int, column: str, cell: Any, *, is_full: bool) -> Any:
    """Return the address of an image in the file, or its path where the row has only that."""
    content, path = (cell.get("bytes"), cell.get("path")) if isinstance(cell, dict) else (cell, None)
    if is_full or content is not None:
        return parquet_path(str(found.path.absolute()), number, column)
    return path


def _image_columns(found: Records, file: Any) -> tuple[str | None, list[str]]:
    """Return the column that holds the images themselves, by a known name or by its content, and those that hold none.

    Where a file has both, images come before paths: they are there for sure.
    """
    fields = [file.schema_arrow.field(name) for name in file.schema_arrow.names]
    firsts = {field.name: _first(file, field) for field in fields if _holds_bytes(field.type)}
    others = [field for field in fields if field.name not in firsts or _is_path(field, firsts[field.name])]
    paths = [field for field in others if field.name in found.image_columns]
    known = [name for name in found.image_columns if name in firsts and name not in {field.name for field in others}]
    held = [
        *(name for name in known if firsts[name] is not None),
        *(name for name, content in firsts.items() if _is_image(content)),
        *(name for name in known if not paths),  # whose first rows are null
    ]
    if held and not is_parquet_name(str(found.path)):
        raise ValueError(f"{found.path} holds images: rename it to end in .parquet, by which their addresses are known")
    if not held and paths and all(_is_list_of_bytes(field.type) for field in paths):
        raise ValueError(
            f"{found.path}: the column {quote(paths[0].name)} holds lists of images: give each image a row"
        )
    return (held[0] if held else None), [field.name for field in others]


def _first(file: Any, field: pa.Field) -> Any:
    """Return the first bytes of a column that are not null, among the first rows."""
    batch = next(file.iter_batches(_IMAGES, columns=[bytes_of(field)]), None)
    cells = [] if batch is None else batch.column(0).to_pylist()
    values = (cell.get("bytes") if isinstance(cell, dict) else cell for cell in cells)
    return next((value for value in values if value is not None), None)


def _text(cell: Any) -> Any:
    """Return the text of bytes: some writers do not mark text as text."""
    return cell.decode() if isinstance(cell, bytes) else cell


def _is_image(content: Any) -> bool:
    try:
        return isinstance(content, bytes) and bool(image_format(content))
    except ValueError:
        return False


def _is_path(field: pa.Field, content: Any) -> bool:
    """Tell a column of paths in bytes, by the first of them, from one of images."""
    if pa.types.is_struct(field.type) or not isinstance(content, bytes) or len(content) > _LONGEST_PATH:
        return False
    try:
        return content.decode().isprintable()
    except UnicodeDecodeError:
        return False


def _warn_of_large_groups(file: Any, held: str) -> None:
    leaf = _leaf(file, held)
    sizes = [
        file.metadata.row_group(group).column(leaf).total_uncompressed_size for group in range(file.num_row_groups)
    ]
    if max(sizes, default=0) > _LARGE_GROUP and sum(sizes) > CACHE_BYTES:
        logger.warning(
            "row groups of %.0f MB of images: in training each image costs reading half a group. --to_shards SHARDS "
            "writes them as shards, which are read fast; or write the file anew with 100 rows a group",
            max(sizes) / 1e6,
        )


def _leaf(file: Any, column: str) -> int:
    """Return the index of the column that the bytes are stored in; fields of columns are columns of the file."""
    name = bytes_of(file.schema_arrow.field(column))
    return next(index for index in range(len(file.schema)) if file.schema.column(index).path == name)


def _parquet_rows(
    file: Any, columns: Sequence[str], groups: list[int], batch_size: int
) -> Iterator[dict[str, Any] | ValueError]:
    """Yield the cells of each row by name; for one that Python cannot hold (not UTF-8, year 30,000) its error."""
    for batch in file.iter_batches(batch_size, row_groups=groups, columns=columns):
        try:
            rows = batch.to_pylist()
        except (ValueError, OverflowError):  # one by one, so that a bad cell costs its row alone
            rows = [_parquet_row(batch.slice(row, 1)) for row in range(len(batch))]
        yield from rows


def _parquet_row(batch: pa.RecordBatch) -> dict[str, Any] | ValueError:
    try:
        row: dict[str, Any] = batch.to_pylist()[0]
    except UnicodeDecodeError:
        return ValueError("text is not UTF-8")
    except (ValueError, OverflowError) as error:
        return ValueError(one_line(error))
    return row


def _holds_bytes(kind: pa.DataType) -> bool:
    """Tell a column of bytes; the Hub has them in a field, beside the path of the image."""
    kind = kind.value_type if pa.types.is_dictionary(kind) else kind
    if pa.types.is_struct(kind):
        index = kind.get_field_index("bytes")
        return index >= 0 and (pa.types.is_null(kind.field(index).type) or _holds_bytes(kind.field(index).type))
    return any(test(kind) for test in (pa.types.is_binary, pa.types.is_large_binary, pa.types.is_binary_view))


def _is_list_of_bytes(kind: pa.DataType) -> bool:
    lists = (pa.types.is_list, pa.types.is_large_list, pa.types.is_fixed_size_list)
    return any(test(kind) for test in lists) and _holds_bytes(kind.value_type)
