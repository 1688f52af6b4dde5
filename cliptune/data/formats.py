"""An index file of any known form, as rows of images with their captions.

The form is found by the content, never by the file's ending. Reading only reads: whether the images exist is
checked by the caller. What is wrong with single records is collected with its source location, so that
all of it can be reported at once; a file that cannot be read at all is a `ValueError`.
"""

from __future__ import annotations

from pathlib import Path

from cliptune.data.base64_images import is_texts, read_texts, refuse_images
from cliptune.data.columns import read_rows
from cliptune.data.delimited import MAX_HEADER, SEPARATOR_LINE, Header, header, header_names, read_table
from cliptune.data.documents import is_json_lines, json_lines, read_object
from cliptune.data.index import KNOWN_FORMS, Index, Records
from cliptune.data.parquet import is_parquet, read_parquet
from cliptune.data.split_lists import with_split_lists
from cliptune.data.text_stream import TextFile
from cliptune.data.token_lines import TOKEN_LINE, read_token_lines
from cliptune.data.unknown import refuse_binary, resemblance


def read_index(path: Path, *, caption_key: str | None = None, image_key: str | None = None) -> Index:
    """Read an index file of any known form.

    Args:
        path: of the file.
        caption_key: column of the captions, or several of them, `caption_en,caption_de`; None: a known one.
        image_key: column of the images; None: a known one.

    Raises:
        FileNotFoundError: there is no such file.
        ValueError: the file is not UTF-8, of no known form, without a usable row, or lacks a column that is named.
    """
    found = Records(path, caption_key, image_key)
    if is_parquet(path):
        return found.index(read_parquet(found))
    refuse_binary(path)
    index = found.index(_read_text(found, TextFile(path)))
    return with_split_lists(index, path) if index.form in {"token", "csv", "tsv"} else index


def _read_text(found: Records, text: TextFile) -> str:
    """Read a text in the form that its first lines show; the docs state the order."""
    number, line = text.first_line(2 * MAX_HEADER)
    first = line.strip()
    if not first:
        raise ValueError(f"{found.path}: the file is empty; {KNOWN_FORMS}")
    refuse_images(found.path, first)
    if first[0] == "[":
        return read_rows(found, "json", lambda: enumerate(text.json_items(), 1), unit="row")
    if is_texts(first):
        return read_texts(found, text)
    if first[0] == "{" and is_json_lines(text):
        return read_rows(found, "jsonl", lambda: json_lines(text), unit="line")
    if first[0] == "{":
        return read_object(found, text)
    keys, said = found.column_names, None
    if separator := SEPARATOR_LINE.fullmatch(first.strip('"')):
        number, line = text.first_line(2 * MAX_HEADER, after=number)
        said = Header(separator[1], header_names(line.strip("\r\n"), separator[1])) if line.strip() else None
    table = said if said and keys.num_known(said.names) else None
    table = table or header(line.lstrip().removesuffix("\n"), keys.caption_key, keys.image_key) or said
    if table is not None:
        return read_table(found, text, table, line=number)
    if TOKEN_LINE.match(first):
        return read_token_lines(found, text)
    reason, error = resemblance(first)
    raise error(f"{found.path}: line {number}: {reason}")
