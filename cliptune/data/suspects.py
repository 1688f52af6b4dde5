"""`suspects.csv`: the pairs of a data set that look wrong, a row each, and whether to keep them for training.

A row is known by its image, its caption and the kind of finding, which its reason begins with: `identical: the same
file as images/3.jpg`. Each writer owns the rows of its kinds and leaves all others as they are. What a person wrote
into `keep` stays as long as the row does; it is known by the column `suggested`, which has what the writer would have.
"""

from __future__ import annotations

import csv
import io
import os
import re
from collections.abc import Collection, Iterable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import NamedTuple

import numpy as np

from cliptune.data.column_names import squeezed
from cliptune.data.delimited import SEPARATOR_LINE, header_names
from cliptune.data.pairs import Pairs
from cliptune.data.table import IntArray
from cliptune.data.text_stream import TextFile
from cliptune.runtime.files import atomic_writer
from cliptune.runtime.messages import count, shown

MISLABELLED = "mislabelled"
"""Kind of the rows that features, not files, speak for."""
COLUMNS = ("image", "caption", "reason", "keep")
SUGGESTED = "suggested"
"""Last column: what the writer of a row would have in `keep`."""
KEPT, LEFT_OUT = {"yes", "y", "true", "1"}, {"no", "n", "false", "0", ""}
"""What `keep` may say, in any case."""
MAX_CELL = 2**24
"""Characters; Python's own limit is less than a caption may have."""
_FORMULA = re.compile(r"'*[=+\-@\t\r]")
"""A spreadsheet computes what begins so, unless an apostrophe is before it."""


class Suspect(NamedTuple):
    """A pair that may be left out of training.

    Attributes:
        image: path, relative to the root of its data set where it lies below it.
        caption: of the pair; empty: all captions of the image.
        reason: its kind, then a colon and what is wrong.
        keep: whether training has it.
        more: other columns, by their names, which somebody has added.
    """

    image: str
    caption: str
    reason: str
    keep: bool
    more: tuple[tuple[str, str], ...] = ()

    @property
    def key(self) -> tuple[str, str, str]:
        """What a row is known by: the reason's wording may change with a count or a name in it."""
        return self.image, self.caption, self.kind

    @property
    def kind(self) -> str:
        """What comes before the colon of the reason."""
        return self.reason.partition(":")[0].strip()


def read_suspects(path: Path) -> list[Suspect]:
    """Read what `update_suspects` wrote, a person typed, or a spreadsheet has saved.

    The delimiter may be a comma, semicolon or tab, the encoding UTF-8 or what a byte order mark says. Columns are found
    by their names: `image` and `keep` must be there.

    Raises:
        FileNotFoundError: no such file.
        ValueError: it lacks one of these columns, or a row is none; names the line.
    """
    with _long_cells():
        return list(_read(path))


def _read(path: Path) -> Iterator[Suspect]:
    text = TextFile(path)
    number, line = text.first_line(2**16)
    delimiter = None
    if match := SEPARATOR_LINE.fullmatch(line.strip()):
        delimiter = match[1]
        number, line = text.first_line(2**16, after=number)
    if delimiter is None:
        delimiter = max(",;\t|", key=lambda mark: len(_known(header_names(line, mark))))
    names = header_names(line, delimiter)
    columns = _known(names)
    if missing := [f"{name!r}" for name in ("image", "keep") if name not in columns]:
        found = ", ".join(shown(name, 60) for name in names)
        raise ValueError(f"{path}: no column {' and '.join(missing)} in its first line (found: {found}); {_WANTED}")
    others = [(name, index) for index, name in enumerate(names) if index not in columns.values()]
    lines = (line for block in text.line_blocks(after=number) for line in block)
    rows = csv.reader(lines, delimiter=delimiter, skipinitialspace=True, strict=True)
    for cells in _strict(rows, path, first=number):
        if not any(cell.strip() for cell in cells):
            continue
        where = f"{path}: line {number + rows.line_num}"
        # a row that somebody added may end with the last column that has to be there
        if not max(columns.values()) < len(cells) <= len(names):
            raise ValueError(
                f"{where}: {count(len(cells), 'cell')}, and the first line has {len(names)}: a cell that holds the "
                "delimiter, a quote mark or a line end needs quotes around it"
            )
        values = {name: _plain(cells[index]) for name, index in columns.items()}
        if not values["image"].strip():
            raise ValueError(f"{where}: no image: a row names the image that it is about")
        yield Suspect(
            values["image"].strip(), values.get("caption", "").strip(), values.get("reason", "").strip(),
            _keep(values["keep"], where), tuple((name, cells[index]) for name, index in others if index < len(cells)),
        )  # fmt: skip


_WANTED = "a list of suspects has the columns image, caption, reason and keep"


def _known(names: Sequence[str]) -> dict[str, int]:
    """Return the index of each known column, by its name."""
    found = [squeezed(name) for name in names]
    return {name: found.index(name) for name in COLUMNS if name in found}


def _strict(rows: Iterator[list[str]], path: Path, *, first: int) -> Iterator[list[str]]:
    try:
        yield from rows
    except csv.Error as error:
        raise ValueError(f"{path}: line {first + rows.line_num}: {error}") from None  # type: ignore[attr-defined]


def _keep(value: str, where: str) -> bool:
    word = value.strip().casefold()
    if word not in KEPT | LEFT_OUT:
        raise ValueError(
            f"{where}: keep says {shown(value, 60)!r}: yes, y, true and 1 keep a row; no, n, false, 0 and an empty "
            "cell leave it out"
        )
    return word in KEPT


def update_suspects(path: Path, suspects: Iterable[Suspect], *, kinds: Collection[str]) -> list[Suspect]:
    """Put a writer's rows into the file, in place of those of its kinds that are there; return all rows.

    Args:
        path: made if it is missing.
        suspects: the writer's rows.
        kinds: all that it may write, found now or not.

    Raises:
        OSError: the file cannot be written.
        ValueError: it is there, and cannot be read.
    """
    before = read_suspects(path) if path.exists() else []
    old = {row.key: row for row in before}
    ours = [_with_edits(row, old[row.key]) if row.key in old else _suggested(row) for row in suspects]
    rows = sorted([*ours, *(row for row in before if row.kind not in kinds)], key=lambda row: row[:3])
    _write(path, rows)
    return rows


def _suggested(row: Suspect) -> Suspect:
    return row._replace(more=(*row.more, (SUGGESTED, _word(row.keep))))


def _with_edits(row: Suspect, old: Suspect) -> Suspect:
    """Return a row with what a person made of it: of a list without suggestions all counts as a person's.

    What nobody changed follows the new suggestion: of three copies another one may be the one to keep by now.
    """
    more = dict(old.more)
    is_edited = more.pop(SUGGESTED, "").strip().casefold() != _word(old.keep)
    new = _suggested(row._replace(more=tuple(more.items())))
    return new._replace(keep=old.keep) if is_edited else new


def _word(keep: bool) -> str:
    return "yes" if keep else "no"


def _write(path: Path, rows: Sequence[Suspect]) -> None:
    others = dict.fromkeys(name for row in rows for name, _ in row.more if name != SUGGESTED)
    if any(SUGGESTED in dict(row.more) for row in rows):
        others[SUGGESTED] = None
    text = io.StringIO(newline="")
    writer = csv.writer(text, lineterminator="\n")
    writer.writerow([*COLUMNS, *others])
    for row in rows:
        more = dict(row.more)
        cells = [_harmless(row.image), _harmless(row.caption), _harmless(row.reason), _word(row.keep)]
        writer.writerow([*cells, *(more.get(name, "") for name in others)])
    content = text.getvalue()
    # without the mark Excel takes UTF-8 for the system's old encoding
    mark = "" if content.isascii() else "\ufeff"
    with atomic_writer(path) as file:
        file.write((mark + content).encode("utf-8", "backslashreplace"))


def _harmless(cell: str) -> str:
    return f"'{cell}" if _FORMULA.match(cell) else cell


def _plain(cell: str) -> str:
    """Return what `_harmless` was given."""
    return cell[1:] if cell.startswith("'") and _FORMULA.match(cell) else cell


@contextmanager
def _long_cells() -> Iterator[None]:
    before = csv.field_size_limit(MAX_CELL)
    try:
        yield
    finally:
        csv.field_size_limit(before)


def relative_name(path: str, root: str) -> str:
    """Return an image's path as the list has it."""
    return path[len(root) + 1 :] if root and path.startswith(f"{root}/") else path


class Excluded(NamedTuple):
    """What is left of pairs without the rows that are not to be kept."""

    pairs: Pairs
    num_images: int
    """Of the images: those that are gone, with all their captions."""
    num_pairs: int
    """That are gone."""
    unmatched: list[Suspect]
    """Rows not to be kept, and not here."""


def exclude(pairs: Pairs, suspects: Iterable[Suspect]) -> Excluded:
    """Leave pairs out; an image goes with the last of its captions.

    Captions are the same if they differ in nothing but white space, which spreadsheets change.

    Args:
        pairs: a data set.
        suspects: rows; those to be kept change nothing. Of two rows of one pair the one that leaves it out counts.
    """
    rows = [row for row in suspects if not row.keep]
    images = find_images(pairs, [row.image for row in rows])
    is_out = np.zeros(pairs.num_pairs, dtype=bool)
    unmatched = []
    for row, image in zip(rows, images.tolist(), strict=True):
        captions = pairs.captions_of(image) if image >= 0 else []
        hits = [at for at, caption in enumerate(captions) if not row.caption or _words(caption) == _words(row.caption)]
        if hits:
            is_out[pairs.starts[image] + np.array(hits)] = True
        else:
            unmatched.append(row)
    if not is_out.any():
        return Excluded(pairs, 0, 0, unmatched)
    left = pairs.without(is_out)
    return Excluded(left, len(pairs) - len(left), int(is_out.sum()), unmatched)


def find_images(pairs: Pairs, names: Sequence[str]) -> IntArray:
    """Return the index of each image, -1 for one that is not here."""
    found = pairs.find([os.path.join(pairs.root, name) for name in names])  # noqa: PTH118  (a million of them)
    rest = np.flatnonzero(found < 0)  # typed by a person, perhaps
    others = [os.path.realpath(os.path.join(pairs.root, names[row].replace("\\", "/"))) for row in rest.tolist()]  # noqa: PTH118
    found[rest] = pairs.find(others)
    return found


def _words(caption: str) -> str:
    return " ".join(caption.split())
