"""What is wrong with a record of an index or with an image, and where it stands."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import NamedTuple

MAX_ISSUES = 100_000


class Issue(NamedTuple):
    """What is wrong with one entry of an index, or with one picture."""

    reason: str
    image: str = ""
    """Path or name, where it is known."""
    place: str = ""
    """Where the entry stands ("data.json: row 17"), for an entry."""

    def __str__(self) -> str:
        text = f"{self.place or self.image}: {self.reason}"
        return "".join(each if each.isprintable() else ascii(each)[1:-1] for each in text)

    def to_dict(self) -> dict[str, str | None]:
        """Return image, reason and, for an entry, place."""
        values = {"image": self.image or None, "reason": self.reason}
        return {**values, "place": self.place} if self.place else values


def image_issue(path: str, error: OSError | ValueError) -> Issue:
    """Return why a picture cannot be used, without its path, which the error may name."""
    reason = error.strerror if isinstance(error, OSError) else None
    return Issue(reason or str(error).removeprefix(f"{path}: "), image=path)


@dataclass
class Issues:
    """What is wrong with single entries: the first 100,000, and how many there are."""

    first: list[Issue] = field(default_factory=list)
    count: int = 0

    def add(self, issue: Issue) -> None:
        """Note one more."""
        self.extend(Issues([issue], 1))

    def extend(self, others: Issues) -> None:
        """Note others after these."""
        self.first += others.first[: MAX_ISSUES - len(self.first)]
        self.count += others.count
