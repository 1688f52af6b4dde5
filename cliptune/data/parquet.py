"""Parquet files, some thousands of rows at a time; the images may lie in them."""

from __future__ import annotations

import hashlib
import logging
from collections import Counter
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import pyarrow as pa

from cliptune.data.column_names import Columns
from cliptune.data.columns import refuse_repeated, take_row
from cliptune.data.index import Records, quote
from cliptune.preprocess.decode import image_format
from cliptune.preprocess.encoded import is_parquet_name, parquet_path
from cliptune.preprocess.parquet_images import CACHE_BYTES, bytes_of, open_parquet, read_image
from cliptune.runtime.messages import one_line

logger = logging.getLogger(__name__)

_MAGIC = b"PAR1"
_BATCH = 1 << 14
_IMAGES = 16
"""Rows of a batch that holds images."""
_LARGE_GROUP = 1 << 26
"""Bytes of images from which on a row group is slow to read at random."""
_LONGEST_TEXT = 4096


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
    refuse_repeated(found, file.schema_arrow.names)
    found.texts_hold_lists = True
    chosen, holds_images = _choose_columns(found, file)
    for number, row in _rows(found, file, chosen, holds_images=holds_images):
        if isinstance(row, ValueError):
            found.issue(number, str(row))
        else:
            take_row(found, number, row, chosen)


def _choose_columns(found: Records, file: Any) -> tuple[Columns, bool]:
    """Return the columns to read, and whether that of the images holds themselves; note the others."""
    held, others = _image_columns(found, file)
    names, num_rows = file.schema_arrow.names, file.metadata.num_rows
    others, names = (_with_inner(found, file.schema_arrow, some) for some in (others, names))
    columns, all_columns = (Counter(dict.fromkeys(some, num_rows)) for some in (others, names))
    image = held or found.choose_image(columns if found.column_names.images(others) else all_columns)
    chosen = found.column_names.columns(columns)._replace(image=image, captions=found.choose_captions(columns))
    found.ignore(all_columns, (image, *chosen.captions, chosen.split, chosen.group))
    return chosen, held is not None


def _with_inner(found: Records, schema: pa.Schema, names: list[str]) -> list[str]:
    """Return names of columns with the inner keys in the place of the structs that hold them."""
    inner = [
        key
        for key, (column, field) in found.column_names.inner_keys.items()
        if key not in names and column in names and pa.types.is_struct(kind := schema.field(column).type)
        and kind.get_field_index(field) >= 0
    ]  # fmt: skip
    taken = {found.column_names.inner_keys[key][0] for key in inner}
    return [*(name for name in names if name not in taken), *inner]


def _type(found: Records, schema: pa.Schema, name: str) -> pa.DataType:
    """Return the type of a column, or of what an inner key names."""
    if name in schema.names:
        return schema.field(name).type
    column, field = found.column_names.inner_keys[name]
    return schema.field(column).type.field(field).type


def _rows(
    found: Records, file: Any, columns: Columns, *, holds_images: bool
) -> Iterator[tuple[int, dict[str, Any] | ValueError]]:
    """Yield number and cells of each row, an image that the file holds by its address; or what is wrong with it."""
    schema, image = file.schema_arrow, str(columns.image)
    texts = [name for name in (*columns.captions, columns.split, columns.group) if name is not None]
    texts += [] if holds_images else [image]
    in_bytes = [name for name in texts if _holds_bytes(_type(found, schema, name))]
    images = _HeldImages(found.path, file, image) if holds_images else None
    cells = [] if images is None else images.cells
    batch_size = _IMAGES if image in cells else _BATCH
    for number, row in enumerate(_parquet_rows(file, [*texts, *cells], batch_size), 1):
        if isinstance(row, dict):
            row = found.column_names.spread(row)  # noqa: PLW2901
            if images is not None:
                row[image] = images.address(number, row.get(image))
            yield number, _with_texts(row, in_bytes) if in_bytes else row
        else:
            yield number, row


def _with_texts(row: dict[str, Any], in_bytes: list[str]) -> dict[str, Any] | ValueError:
    """Return a row with the text of cells that hold it as bytes: some writers do not mark text as text."""
    try:
        return {**row, **{name: row[name].decode() for name in in_bytes if isinstance(row[name], bytes)}}
    except UnicodeDecodeError:
        return ValueError("text is not UTF-8")


class _HeldImages:
    """The images in a column of a file. Rows of one image are joined: a row a caption repeats it.

    Attributes:
        cells: what is read of the column: where the first rows hold images, only their names, so that one that is
            missing later is an issue once it is decoded; else all of it.
    """

    def __init__(self, path: Path, file: Any, column: str) -> None:
        self._file, self._column, field = str(path.absolute()), column, file.schema_arrow.field(column)
        self._is_full = all(content is not None for content in _first_rows(file, field))
        has_names = pa.types.is_struct(field.type) and field.type.get_field_index("path") >= 0
        names = [f"{column}.path"] if has_names else []
        self.cells = names if self._is_full else [column]
        self._rows: dict[str, int] = {}
        self._digests: dict[str, bytes] = {}
        sizes = [file.metadata.row_group(group).total_byte_size for group in range(file.num_row_groups)]
        if max(sizes, default=0) > _LARGE_GROUP and sum(sizes) > CACHE_BYTES:
            logger.warning(
                "%s: row groups of %.0f MB: in training each image costs reading half of one. --to_shards SHARDS "
                "writes the images as shards, which are read fast; or write the file anew with 100 rows a group",
                path,
                max(sizes) / 1e6,
            )

    def address(self, number: int, cell: Any) -> Any:
        """Return the address of a row's image; its path where the row has only that, as with the Hub's datasets."""
        content, name = (cell.get("bytes"), cell.get("path")) if isinstance(cell, dict) else (cell, None)
        if content is None and not self._is_full:
            return name
        if isinstance(name, str) and self._rows.setdefault(name, number) != number:
            number = self._first_of(name, number)
        return parquet_path(self._file, number, self._column)

    def _first_of(self, name: str, number: int) -> int:
        """Return the first row of a name if it has the same image; once one has not, the name says nothing."""
        first = self._rows[name]
        if not first:
            return number
        try:
            if name not in self._digests:
                self._digests[name] = self._digest(first)
            is_same = self._digest(number) == self._digests[name]
        except OSError:  # an issue once it is decoded
            return number
        self._rows[name] = first if is_same else 0
        return first if is_same else number

    def _digest(self, number: int) -> bytes:
        return hashlib.blake2b(read_image(self._file, number, self._column), digest_size=16).digest()


def _image_columns(found: Records, file: Any) -> tuple[str | None, list[str]]:
    """Return the column that holds the images themselves, by a known name or by its content, and those that hold none.

    Where a file has both, images come before paths: they are there for sure.
    """
    fields = [file.schema_arrow.field(name) for name in file.schema_arrow.names]
    firsts = {field.name: _first(file, field) for field in fields if _holds_bytes(field.type)}
    others = [field for field in fields if field.name not in firsts or _is_text(field, firsts[field.name])]
    names = found.column_names
    paths = names.images(field.name for field in others)
    known = names.images(name for name in firsts if name not in {field.name for field in others})
    held = [
        *(name for name in known if firsts[name] is not None),
        *(name for name, content in firsts.items() if names.image_key is None and _is_image(content)),
        *(name for name in known if not paths),  # whose first rows are null
    ]
    if held and not is_parquet_name(str(found.path)):
        raise ValueError(f"{found.path} holds images: rename it to end in .parquet, by which their addresses are known")
    if not held and paths and all(_is_list_of_bytes(file.schema_arrow.field(name).type) for name in paths):
        raise ValueError(f"{found.path}: the column {quote(paths[0])} holds lists of images: give each image a row")
    return (held[0] if held else None), [field.name for field in others]


def _first(file: Any, field: pa.Field) -> Any:
    """Return the first bytes of a column that are not null, among the first rows."""
    return next((content for content in _first_rows(file, field) if content is not None), None)


def _first_rows(file: Any, field: pa.Field) -> list[Any]:
    batch = next(file.iter_batches(_IMAGES, columns=[bytes_of(field)]), None)
    cells = [] if batch is None else batch.column(0).to_pylist()
    return [cell.get("bytes") if isinstance(cell, dict) else cell for cell in cells]


def _is_image(content: Any) -> bool:
    try:
        return isinstance(content, bytes) and bool(image_format(content))
    except ValueError:
        return False


def _is_text(field: pa.Field, content: Any) -> bool:
    """Tell a column of text in bytes, by the first of them, from one of images."""
    if pa.types.is_struct(field.type) or not isinstance(content, bytes) or len(content) > _LONGEST_TEXT:
        return False
    try:
        return "".join(content.decode().split()).isprintable()
    except UnicodeDecodeError:
        return False


def _parquet_rows(file: Any, columns: Sequence[str], batch_size: int) -> Iterator[dict[str, Any] | ValueError]:
    """Yield the cells of each row by name; for one that Python cannot hold (not UTF-8, year 30,000) its error."""
    for batch in file.iter_batches(batch_size, columns=columns):
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
