"""An index file of any known form, as rows of images with their captions.

The form is found by the content, never by the file's ending. Reading only reads: whether the images exist is
checked by the caller. What is wrong with single records is collected with its source location, so that
all of it can be reported at once; a file that cannot be read at all is a `ValueError`.
"""

from __future__ import annotations

from pathlib import Path

from cliptune.data.base64_images import is_texts, read_texts, refuse_images
from cliptune.data.columns import read_rows
from cliptune.data.delimited import MAX_HEADER, header, read_table
from cliptune.data.documents import is_json_lines, json_lines, read_object
from cliptune.data.folders import read_directory
from cliptune.data.index import KNOWN_FORMS, Index, Records, quote
from cliptune.data.parquet import is_parquet, read_parquet
from cliptune.data.text_stream import TextFile
from cliptune.data.token_lines import IMAGE_NAME, TOKEN_LINE, read_token_lines


def read_index(path: Path, *, caption_key: str | None = None) -> Index:
    """Read an index file of any known form; captions come from the column `caption_key` if it is given.

    Raises:
        FileNotFoundError: there is no such file.
        ValueError: the file is not UTF-8, of no known form, without a usable row, or lacks the column `caption_key`.
    """
    if path.is_dir():
        if caption_key is not None:
            raise ValueError(f"{path}: caption_key {quote(caption_key)}: a folder with captions/ has no columns")
        return read_directory(path)
    found = Records(path, caption_key)
    if is_parquet(path):
        return found.index(read_parquet(found))
    text = TextFile(path)
    number, line = text.first_line(2 * MAX_HEADER)
    first = line.strip()
    if not first:
        raise ValueError(f"{path}: the file is empty; {KNOWN_FORMS}")
    refuse_images(path, first)
    if first[0] == "[":
        form = read_rows(found, "json", lambda: enumerate(text.json_items(), 1), unit="row")
    elif is_texts(first):
        form = read_texts(found, text)
    elif first[0] == "{" and is_json_lines(text):
        form = read_rows(found, "jsonl", lambda: json_lines(text), unit="line")
    elif first[0] == "{":
        form = read_object(found, text)
    elif names := header(line.lstrip().removesuffix("\n"), caption_key):
        form = read_table(found, text, *names)
    elif TOKEN_LINE.match(first):
        form = read_token_lines(found, text)
    else:
        bare = " is a name without a caption" if IMAGE_NAME.search(first) and len(first.split()) == 1 else ""
        raise ValueError(f"{path}: line {number}: of no known form: {quote(first)}{bare}; {KNOWN_FORMS}")
    return found.index(form)
