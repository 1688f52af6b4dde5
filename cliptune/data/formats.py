"""An index file of any known form, as rows of images with their captions.

The form is found by the content, never by the file's ending. Reading only reads: whether the images exist is
checked by the caller. What is wrong with single records is collected with its source location, so that
all of it can be reported at once; a file that cannot be read at all is a `ValueError`.
"""

from __future__ import annotations

from pathlib import Path

from cliptune.data.columns import read_rows
from cliptune.data.delimited import MAX_HEADER, header, read_table
from cliptune.data.documents import is_json_lines, json_lines, read_object
from cliptune.data.index import IMAGE_COLUMNS, KNOWN_FORMS, Index, NoCaptionsError, Records, quote
from cliptune.data.parquet import is_parquet, read_parquet
from cliptune.data.text_stream import TextFile
from cliptune.data.token_lines import IMAGE_NAME, TOKEN_LINE, read_token_lines


def read_index(path: Path, *, caption_key: str | None = None) -> Index:
    """Read an index file of any known form; captions come from the column `caption_key` if it is given.

    Raises:
        FileNotFoundError: there is no such file.
        ValueError: the file is not UTF-8, of no known form, without a usable row, or lacks the column `caption_key`.
    """
    found = Records(path, caption_key)
    if is_parquet(path):
        return found.index(read_parquet(found))
    text = TextFile(path)
    number, line = text.first_line(2 * MAX_HEADER)
    first = line.strip()
    if not first:
        raise ValueError(f"{path}: the file is empty; {KNOWN_FORMS}")
    if first[0] == "[":
        form = read_rows(found, "json", lambda: enumerate(text.json_items(), 1), unit="row")
    elif first[0] == "{" and is_json_lines(text):
        form = read_rows(found, "jsonl", lambda: json_lines(text), unit="line")
    elif first[0] == "{":
        form = read_object(found, text)
    elif names := header(line.lstrip().removesuffix("\n"), caption_key):
        form = read_table(found, text, *names)
    elif TOKEN_LINE.match(first):
        form = read_token_lines(found, text)
    else:
        is_bare = first in IMAGE_COLUMNS or (IMAGE_NAME.search(first) and len(first.split()) == 1)
        bare = " is a name without a caption" if is_bare else ""
        error = NoCaptionsError if is_bare else ValueError
        raise error(f"{path}: line {number}: of no known form: {quote(first)}{bare}; {KNOWN_FORMS}")
    return found.index(form)
