"""Workers that stay from one pass over some data sets to the next: a run evaluates the same ones again and again."""

from __future__ import annotations

from collections.abc import Callable, Hashable, Iterator, Sequence
from typing import Any

import torch
from torch.utils.data import Dataset

from cliptune.data.loaders import Batch, SampleDataset, collate
from cliptune.data.workers import Loader, fitting_workers, make_loader


class KeptWorkers:
    """Loads data sets in turn with the same workers; they end with the object, or with the program.

    However many data sets there are, one set of workers is alive. It has them all from its start, so one that comes
    anew starts it again, once: of three sets that are evaluated after each epoch, the first evaluation starts workers
    three times, and all later ones not at all.
    """

    def __init__(self) -> None:
        self._numbers: dict[Hashable, int] = {}
        self._datasets = _Several()
        self._batches: list[list[tuple[int, int]]] = []
        self._loader: Loader | None = None
        self._num_workers = 0

    def open(self, key: Hashable, make: Callable[[], SampleDataset]) -> SampleDataset:
        """Return the data set of this key, made when it is first asked for."""
        if key not in self._numbers:
            self.end()
            self._datasets.parts.append(make())
            self._numbers[key] = len(self._datasets.parts) - 1
        dataset: SampleDataset = self._datasets.parts[self._numbers[key]]
        return dataset

    def holds(self, dataset: SampleDataset) -> bool:
        """Tell whether `open` has returned it."""
        return any(part is dataset for part in self._datasets.parts)

    def load(
        self, dataset: SampleDataset, batches: Sequence[Sequence[int]], *, num_workers: int, device: torch.device
    ) -> Iterator[Batch]:
        """Yield batches of a data set that `open` has returned, each loaded by one worker; one pass at a time.

        Args:
            dataset: it.
            batches: items of each.
            num_workers: at least; a data set that wants more starts them for all.
            device: where the batches will be used.
        """
        number = next(number for number, part in enumerate(self._datasets.parts) if part is dataset)
        self._batches[:] = [[(number, item) for item in items] for items in batches]
        if self._loader is None or num_workers > self._num_workers:
            self.end()
            self._num_workers = max(num_workers, self._num_workers)
            # training may start as many after these, which do not go before it does
            fitting = fitting_workers(self._num_workers, others=self._num_workers)
            self._loader = make_loader(
                self._datasets, batch_sampler=self._batches, num_workers=fitting, device=device,
                collate_fn=collate, persistent=True,
            )  # fmt: skip
        return iter(self._loader)

    def end(self) -> None:
        """End the workers; the next pass starts others."""
        if self._loader is not None:
            self._loader.end_workers()
        self._loader = None


class _Several(Dataset[Any]):
    """Items of several data sets, each by the number of its data set and its own."""

    def __init__(self) -> None:
        self.parts: list[Any] = []

    def __len__(self) -> int:
        return sum(map(len, self.parts))

    def __getitem__(self, index: Any) -> Any:
        number, item = index
        return self.parts[number][item]
