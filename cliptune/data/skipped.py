"""What a run skips because it cannot be used, and whether that is too much of its data."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from pathlib import Path

from cliptune.data.issues import Issue, first_issues
from cliptune.data.pairs import Pairs
from cliptune.runtime.distributed import gather_values, is_main
from cliptune.runtime.files import write_json
from cliptune.runtime.messages import count

logger = logging.getLogger(__name__)

MAX_LOGGED = 100


class SkippedData:
    """The records and the images that a run skips, each once.

    Each rank notes what it meets, and `agree` tells it to the others. Which of them finds that it is too much stops the
    run: so the first of `max_fraction` 0 does at once.

    Args:
        pairs: the data sets that were read; what their indexes skipped counts.
        num_images: images of the run, training and validation, that the indexes promise.
        max_fraction: how many of the images and records may be skipped, in [0, 1].
        path: where all of them are listed; None: nowhere. While nothing is skipped, there is no such file.
        max_logged: images that are logged one by one.
    """

    def __init__(
        self,
        pairs: Sequence[Pairs],
        *,
        num_images: int,
        max_fraction: float,
        path: Path | None = None,
        max_logged: int = MAX_LOGGED,
    ) -> None:
        indexes = {id(part.issues): part.issues for part in pairs}.values()  # selections of one index share them
        self.records = [issue for issues in indexes for issue in issues.first]
        self.num_records = sum(issues.count for issues in indexes)
        self.images: dict[str, Issue] = {}
        self.total = num_images + self.num_records
        self.max_fraction, self.path, self.max_logged = max_fraction, path, max_logged

    def __len__(self) -> int:
        return self.num_records + len(self.images)

    def note(self, issue: Issue) -> None:
        """Take in an image that cannot be read.

        Raises:
            ValueError: that is one too many; all are listed first.
        """
        if self._is_new(issue):
            self._check()

    def agree(self) -> None:
        """Take in what the other ranks have noted; all of them call this. The main one lists it.

        Raises:
            ValueError: all ranks together have skipped too much.
        """
        for issues in gather_values(list(self.images.values())):
            for issue in issues:
                self._is_new(issue)
        if is_main():
            self.write()
        self._check()

    def write(self) -> None:
        """List everything that is skipped."""
        if self.path is None:
            return
        if len(self):
            write_json(self.path, [issue.to_dict() for issue in (*self.records, *self.images.values())])
        else:
            self.path.unlink(missing_ok=True)  # a run that was resumed with mended data

    def summary(self) -> str:
        """Say how much was skipped, and where it is listed."""
        listed = f", see {self.path}" if self.path is not None else ""
        return f"skipped {count(len(self.images), 'image')} and {count(self.num_records, 'record')}{listed}"

    def _is_new(self, issue: Issue) -> bool:
        if issue.image in self.images:
            return False
        self.images[issue.image] = issue
        if len(self.images) <= self.max_logged and is_main():
            logger.warning("skipped: %s", issue)
        if len(self.images) == self.max_logged and is_main():
            logger.warning("skipped: more of them, which are only listed")
        return True

    def _check(self) -> None:
        if len(self) <= self.max_fraction * self.total:
            return
        self.write()
        shown = first_issues([*self.images.values(), *self.records], 3, total=len(self))
        listed = f"; all are listed in {self.path}" if self.path is not None else ""
        raise ValueError(
            f"{len(self):,} of {self.total:,} images and records cannot be used: {shown}{listed}. At most "
            f"{self.max_fraction:g} of all may be skipped: mend them, or try a larger --max_skipped_fraction"
        )
