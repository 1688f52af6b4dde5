"""Which images a run takes for one image: looked for by the main rank, and told to all."""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

from cliptune.data.near_duplicates import NearDuplicates, look_for_near_duplicates
from cliptune.data.table import Strings
from cliptune.runtime.distributed import broadcast, is_main, main_first
from cliptune.settings import Config

CopyFinder = Callable[[Strings], NearDuplicates]
"""Finds the images that are one image, by their paths."""


def copy_finder(config: Config, cache_file: Path) -> CopyFinder:
    """Return how a run finds copies.

    Args:
        config: of the run.
        cache_file: of identities of files; fingerprints are cached beside it.
    """
    workers = config.data.num_workers
    return functools.partial(look_for_near_duplicates, cache_dir=cache_file.parent, num_workers=workers)


@contextmanager
def main_finds_copies(find: CopyFinder) -> Iterator[CopyFinder]:
    """Let the main rank read data before the others, and these take the copies that it found.

    What is found depends on what is cached, and machines may have caches of their own: their splits must be one. On
    each machine one rank reads before its others, as in `main_first`.

    Args:
        find: is asked on the main rank alone.
    """
    found: list[tuple[int, NearDuplicates]] = []

    def look(paths: Strings) -> NearDuplicates:
        found.append((len(paths), find(paths)))
        return found[-1][1]

    def take(paths: Strings) -> NearDuplicates:
        for num_images, copies in found:
            if num_images == len(paths):
                return copies
        raise ValueError(
            f"this machine has {len(paths):,} images where the main rank has "
            f"{' and '.join(f'{number:,}' for number, _ in found) or 'none to split'}: all ranks need the same data"
        )

    if is_main():
        with main_first():
            yield look
            broadcast(found)  # before the barrier that the others wait at once they have it
        return
    found.extend(broadcast(found))
    with main_first():
        yield take
