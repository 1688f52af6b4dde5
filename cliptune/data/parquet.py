"""Parquet files, some thousands of rows at a time."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pyarrow as pa

from cliptune.data.columns import refuse_repeated, take_row
from cliptune.data.index import Records
from cliptune.runtime.messages import one_line

_MAGIC = b"PAR1"
_BATCH = 1 << 14


def is_parquet(path: Path) -> bool:
    """Tell whether a file begins as Parquet does."""
    if not path.is_file():
        return False
    with path.open("rb") as file:
        return file.read(len(_MAGIC)) == _MAGIC


def read_parquet(found: Records) -> str:
    """Take the rows of the columns that matter, some thousands at a time; no other column is read."""
    import pyarrow.parquet as pq  # noqa: PLC0415  (only where such a file is read)

    found.unit = "row"
    try:
        with pq.ParquetFile(found.path) as file:
            schema, num_rows = file.schema_arrow, file.metadata.num_rows
            refuse_repeated(found, schema.names)
            columns = Counter(dict.fromkeys(schema.names, num_rows))
            texts = Counter({name: num_rows for name in schema.names if not _holds_bytes(schema.field(name).type)})
            names = found.column_names
            if not names.images(texts) and (held := names.images(columns)):
                raise ValueError(
                    f"{found.path}: the column {held[0]} holds the images themselves, which is not read: write them to "
                    "files and name these in a column image_path"
                )
            found.texts_hold_lists = True
            chosen = found.choose_columns(columns if names.images(texts) else texts)
            chosen = chosen._replace(image=names.images(texts)[0])
            used = [name for name in (chosen.image, *chosen.captions, chosen.split, chosen.group) if name is not None]
            for number, row in enumerate(_parquet_rows(file, used), 1):
                if isinstance(row, ValueError):
                    found.issue(number, str(row))
                else:
                    take_row(found, number, row, chosen)
    except (pa.ArrowException, OSError, UnicodeDecodeError) as error:  # the last: of a column name
        raise ValueError(f"{found.path}: damaged Parquet file: {one_line(error)}") from None
    return "parquet"


def _parquet_rows(file: Any, columns: list[str]) -> Iterator[dict[str, Any] | ValueError]:
    """Yield the cells of each row by name; for one that Python cannot hold (not UTF-8, year 30,000) its error."""
    for batch in file.iter_batches(batch_size=_BATCH, columns=columns):
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
    """Tell a column of images from one of their paths; the Hub has both in one, `{"bytes": ..., "path": ...}`."""
    return bool(pa.types.is_struct(kind) or pa.types.is_binary(kind) or pa.types.is_large_binary(kind))
