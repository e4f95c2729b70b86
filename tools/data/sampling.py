"""Which scans a run draws, in which order, and with which random numbers."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import NamedTuple

import numpy as np
from torch.utils.data import Dataset
from torch.utils.data.distributed import DistributedSampler


class Draw(NamedTuple):
    """A scan, and the seed of the random transforms that draw from it."""

    index: int
    seed: int


class SeededSampler(DistributedSampler):
    """All scans in a new random order every epoch, distributed over the processes, each with the seed of its draw.

    Order and seeds depend on the seed of the run, the epoch and the place in the epoch alone: a run draws the same with
    any number of workers, which can live on from epoch to epoch, and after it was resumed.

    Args:
        dataset: scans.
        seed: of the run.
        num_replicas: number of processes. If the scans cannot be divided evenly, some are drawn twice.
        rank: of this process.
    """

    def __init__(self, dataset: Dataset | Sequence, seed: int = 0, num_replicas: int = 1, rank: int = 0) -> None:
        super().__init__(dataset, num_replicas, rank, shuffle=True, seed=seed)
        self.start = (
            0  # number of draws of this process that a resumed run has behind it, in the epoch in which it begins
        )

    def __iter__(self) -> Iterator[Draw]:
        """Yield the draws of the epoch that MONAI's engine has set."""
        for place, index in enumerate(super().__iter__()):
            if place < self.start:
                continue
            of_all = place * self.num_replicas + self.rank
            seed = np.random.SeedSequence([self.seed, self.epoch, of_all]).generate_state(1)
            yield Draw(index, int(seed[0]))
