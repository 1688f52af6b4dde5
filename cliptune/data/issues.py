"""What is wrong with a record of an index or with an image, and where it stands."""

from __future__ import annotations

import errno
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import NamedTuple

from cliptune.runtime.messages import first_few, printable, shorten

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
    num_records: int = 1
    """That it costs, where one line stands for many."""

    def __str__(self) -> str:
        return printable(f"{shorten(self.location or self.image, MAX_SHOWN)}: {shorten(self.reason, MAX_SHOWN)}")

    def to_dict(self) -> dict[str, str | None]:
        """Return image, reason and, for a record, its source location."""
        values = {"image": self.image or None, "reason": self.reason}
        return {**values, "location": self.location} if self.location else values


def first_issues(issues: Sequence[Issue], limit: int, *, total: int) -> str:
    """List some of the issues, a way out of several once, and how many records more have one of all, `total`."""
    told_at_once = sum(issue.num_records - 1 for issue in issues[:limit])
    shown, ways_out = [], set()
    for issue in issues[:limit]:
        # "no caption among .png; the files of a sample ...": the same half a line for each would hide what is wrong
        what, _, way_out = issue.reason.partition("; ")
        shown.append(issue._replace(reason=what) if way_out in ways_out else issue)
        ways_out.add(way_out)
    return first_few(shown, limit, total=total - told_at_once)


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
    """What is wrong with single records: the first 100,000 issues, and how many records have one."""

    first: list[Issue] = field(default_factory=list)
    count: int = 0

    @property
    def num_untold(self) -> int:
        """How many records have an issue that is not among the first."""
        return self.count - sum(issue.num_records for issue in self.first)

    def add(self, issue: Issue) -> None:
        """Note one more."""
        self.extend(Issues([issue], issue.num_records))

    def extend(self, others: Issues) -> None:
        """Note others after these."""
        self.first += others.first[: MAX_ISSUES - len(self.first)]
        self.count += others.count
