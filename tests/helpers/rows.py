"""Rows that a measurement tells."""

from benchmarks.rows import Row, told


def rows_of(printed: str) -> dict[str, Row]:
    rows = [row for line in printed.splitlines() if (row := told(line)) is not None]
    assert len({row.name for row in rows}) == len(rows)
    return {row.name: row for row in rows}
