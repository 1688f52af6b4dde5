"""A measured figure beside what it must be: told by one process to another, printed, written, laid in a table."""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path

MARK = "ROW "
"""Begins a line of a measurement's output that is a row; the rest of it is JSON."""
SKIPPED = "skipped"
FAILED = "FAILED"


@dataclass(frozen=True)
class Row:
    """One figure, or why there is none."""

    name: str
    value: float | None = None
    unit: str = ""
    must: float | None = None
    """What it has to reach."""
    hope: float | None = None
    """What would be good."""
    higher: bool = True
    """More is better."""
    check: bool = False
    """It is right or wrong: beyond `must` it has failed."""
    note: str = ""
    """What else there is to say."""
    state: str = ""
    """`skipped` or `FAILED`: there is no figure, and `note` says why."""

    @property
    def verdict(self) -> str:
        """Say whether it is as it must be."""
        if self.state or self.must is None:
            return self.state
        if self.check:
            return "PASS" if self._reaches(self.must) else "FAIL"
        if not self._reaches(self.must):
            return "missed"
        return "hope met" if self.hope is not None and self._reaches(self.hope) else "met"

    @property
    def is_failure(self) -> bool:
        """Tell whether something is wrong; to be slower than one must is no failure of the measurement."""
        return self.verdict in {FAILED, "FAIL"}

    @property
    def bound(self) -> str:
        """Say what it has to reach, and what would be good."""
        bounds = (("must", self.must), ("hope", self.hope))
        parts = [f"{word} {number(each)}" for word, each in bounds if each is not None]
        return f"{'at least' if self.higher else 'at most'}: {', '.join(parts)}" if parts else ""

    @property
    def measured(self) -> str:
        """Say the figure with its unit."""
        if self.value is None:
            return "-"
        return f"{number(self.value)}{'' if self.unit in {'', '%'} else ' '}{self.unit}"

    def line(self, part: str) -> str:
        """Return one line for people."""
        cells = [f"{part:12} {self.name:58}", f"{self.measured:>16}", f"{self.verdict:8}", self.bound, self.note]
        return "  ".join(cell for cell in cells if cell.strip()).rstrip()

    def _reaches(self, bound: float) -> bool:
        # not a number reaches nothing
        return self.value is not None and (self.value >= bound if self.higher else self.value <= bound)


def number(value: float) -> str:
    """Write a figure with three or four digits that count."""
    if value and abs(value) < 0.01:
        return f"{value:.1e}"
    return f"{value:,.0f}" if abs(value) >= 100 else f"{value:.3g}"


def tell(row: Row) -> None:
    """Give a row to the process that started this one, at once."""
    print(MARK + json.dumps(asdict(row)), flush=True)


def told(line: str) -> Row | None:
    """Return the row that a line of a measurement's output is; None: it is another line."""
    return Row(**json.loads(line[len(MARK) :])) if line.startswith(MARK) else None


def write_line(path: Path, part: str, row: Row, about: dict[str, str]) -> None:
    """Add a row to a file of JSON lines, with the machine that it was measured on."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("a", encoding="utf-8") as file:
        file.write(json.dumps({"part": part, **asdict(row), "about": about}) + "\n")


def rows_of(path: Path) -> Iterator[tuple[str, Row, dict[str, str]]]:
    """Yield what `write_line` has written: part, row, and the machine that it was measured on.

    Raises:
        OSError: the file cannot be read.
        ValueError, KeyError, TypeError: it is another file.
    """
    for line in filter(str.strip, path.read_text(encoding="utf-8").splitlines()):
        content = json.loads(line)
        part, about = content.pop("part"), content.pop("about")
        yield part, Row(**content), about


def table(path: Path) -> list[str]:
    """Make a Markdown table of such a file: of a row that was measured several times the last."""
    latest: dict[tuple[str, str], tuple[Row, str]] = {}
    for part, row, about in rows_of(path):
        latest.pop((part, row.name), None)
        latest[part, row.name] = row, ", ".join(f"{name} {value}" for name, value in about.items())
    machines = dict.fromkeys(machine for _, machine in latest.values())
    found = [f"Measured on {machine}." for machine in machines]
    found += ["", "| part | what | measured | must | hope | |", "|---|---|---|---|---|---|"]
    for (part, _), (row, machine) in latest.items():
        bounds = ["" if each is None else number(each) for each in (row.must, row.hope)]
        notes = [row.verdict, row.note, *([f"on {machine}"] if len(machines) > 1 else [])]
        cells = [part, row.name, row.measured, *bounds, "; ".join(filter(None, notes))]
        found.append(f"| {' | '.join(cell.replace('|', '/') for cell in cells)} |")
    return found
