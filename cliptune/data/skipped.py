"""What a run leaves out because it cannot be used, and whether that is too much of its data."""

from __future__ import annotations

import json
import logging
import os
from collections.abc import Sequence
from pathlib import Path

from cliptune.data.issues import Issue
from cliptune.data.pairs import Pairs
from cliptune.runtime.distributed import gather_values, is_main

logger = logging.getLogger(__name__)

MAX_LOGGED = 100
NUM_SHOWN = 3


class SkippedData:
    """The entries of a run's indexes and the pictures that are left out, each once.

    Each of several processes notes what it meets, and `agree` tells it to the others. Which of them finds that it is
    too much stops the run: so the first of `max_share` 0 does at once.

    Args:
        pairs: the data sets that were read; what was left out of their indexes counts.
        num_images: images of the run, training and validation, that the indexes promise.
        max_share: share of images and entries that may be left out.
        path: where all of them are listed; None: nowhere. While there is none, there is no such file.
    """

    def __init__(self, pairs: Sequence[Pairs], *, num_images: int, max_share: float, path: Path | None = None) -> None:
        indexes = {id(part.issues): part.issues for part in pairs}.values()  # selections of one index share them
        self.entries = [issue for issues in indexes for issue in issues.first]
        self.num_entries = sum(issues.count for issues in indexes)
        self.pictures: dict[str, Issue] = {}
        self.total = num_images + self.num_entries
        self.max_share = max_share
        self.path = path

    def __len__(self) -> int:
        return self.num_entries + len(self.pictures)

    def note(self, picture: Issue) -> None:
        """Take in a picture that could not be read.

        Raises:
            ValueError: that is one too many; all are listed first.
        """
        if self._is_new(picture):
            self._check()

    def agree(self) -> None:
        """Take in what the other processes have noted; all of them call this. The main one lists it.

        Raises:
            ValueError: all processes together have left out too much.
        """
        for pictures in gather_values(list(self.pictures.values())):
            for picture in pictures:
                self._is_new(picture)
        if is_main():
            self.write()
        self._check()

    def write(self) -> None:
        """List everything that is left out, so that a reader sees the old list or the new one."""
        if self.path is None:
            return
        if not len(self):
            self.path.unlink(missing_ok=True)  # a run that was resumed with mended data
            return
        content = [issue.to_dict() for issue in (*self.entries, *self.pictures.values())]
        self.path.parent.mkdir(parents=True, exist_ok=True)
        temporary = self.path.with_suffix(f".{os.getpid()}.tmp")
        temporary.write_text(json.dumps(content, indent=1) + "\n", encoding="utf-8")
        temporary.replace(self.path)

    def summary(self) -> str:
        """Say how much was left out, and where it is listed."""
        listed = f"; they are listed in {self.path}" if self.path is not None else ""
        return f"{len(self.pictures)} bad picture(s) and {self.num_entries} bad entries were left out{listed}"

    def _is_new(self, picture: Issue) -> bool:
        if picture.image in self.pictures:
            return False
        self.pictures[picture.image] = picture
        if len(self.pictures) <= MAX_LOGGED and is_main():
            logger.warning("left out: %s", picture)
        if len(self.pictures) == MAX_LOGGED and is_main():
            logger.warning("left out: more of them, which are only listed")
        return True

    def _check(self) -> None:
        if len(self) <= self.max_share * self.total:
            return
        self.write()
        shown = "; ".join(map(str, [*self.pictures.values(), *self.entries][:NUM_SHOWN]))
        more = f"; and {len(self) - NUM_SHOWN} more" if len(self) > NUM_SHOWN else ""
        listed = f"; all are listed in {self.path}" if self.path is not None else ""
        raise ValueError(
            f"{len(self)} of {self.total} pictures and entries are bad: {shown}{more}{listed} "
            f"(allowed is a share of {self.max_share:g}: --max_skipped_fraction, --on_unreadable_image)"
        )
