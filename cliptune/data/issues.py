"""What is wrong with a record of an index or with an image, and where it stands."""

from __future__ import annotations

import errno
from dataclasses import dataclass, field
from typing import NamedTuple

from cliptune.runtime.messages import printable, shorten

MAX_ISSUES = 100_000
MAX_SHOWN = 1000
"""Characters of a path or a reason."""


class Issue(NamedTuple):
    """What is wrong with one record of an index, or with one image."""

    reason: str
    image: str = ""
    """Path or name, where it is known."""
    location: str = ""
    """Where a record stands ("data.json: row 17"); empty for an image."""

    def __str__(self) -> str:
        return printable(f"{shorten(self.location or self.image, MAX_SHOWN)}: {shorten(self.reason, MAX_SHOWN)}")

    def to_dict(self) -> dict[str, str | None]:
        """Return image, reason and, for a record, its source location."""
        values = {"image": self.image or None, "reason": self.reason}
        return {**values, "location": self.location} if self.location else values


def image_issue(path: str, error: OSError | ValueError) -> Issue:
    """Return why an image cannot be used, without its path, which the error may name.

    Raises:
        OSError: it is not the image's fault, but that of a process that may open no more files.
    """
    if isinstance(error, OSError) and error.errno in {errno.EMFILE, errno.ENFILE}:
        raise OSError(f"{path}: {error.strerror}: try fewer --num_workers, or a higher limit (ulimit -n)") from None
    reason = error.strerror if isinstance(error, OSError) else None
    return Issue(reason or str(error).removeprefix(f"{path}: "), image=path)


@dataclass
class Issues:
    """What is wrong with single records: the first 100,000, and how many there are."""

    first: list[Issue] = field(default_factory=list)
    count: int = 0

    def add(self, issue: Issue) -> None:
        """Note one more."""
        self.extend(Issues([issue], 1))

    def extend(self, others: Issues) -> None:
        """Note others after these."""
        self.first += others.first[: MAX_ISSUES - len(self.first)]
        self.count += others.count
