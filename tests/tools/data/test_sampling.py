"""Order and random numbers of a run depend on its seed, epoch and place alone."""

from __future__ import annotations

import pytest
import torch
from monai.data import DataLoader
from monai.transforms import Compose, RandomizableTransform

from tools.data.datasets import SeededDataset
from tools.data.sampling import SeededSampler


class AddNumber(RandomizableTransform):
    """Adds a random number to an item."""

    def __call__(self, data):
        return {**data, "drawn": self.R.random()}


def epochs(workers, seed=0, num_replicas=1, rank=0, first=1, last=3):
    data = SeededDataset([{"scan": n} for n in range(7)], Compose([AddNumber()]))
    sampler = SeededSampler(data, seed, num_replicas, rank)
    loader = DataLoader(
        data,
        batch_size=2,
        sampler=sampler,
        num_workers=workers,
        persistent_workers=workers > 0,
        multiprocessing_context=None,
    )
    drawn = []
    for epoch in range(first, last + 1):
        sampler.set_epoch(epoch)
        batches = list(loader)
        drawn.append(
            [(int(s), float(d)) for batch in batches for s, d in zip(batch["scan"], batch["drawn"], strict=True)]
        )
    return drawn


def test_an_epoch_draws_every_scan_once_in_a_new_order_with_new_numbers():
    drawn = epochs(0)
    assert all(sorted(scan for scan, _ in epoch) == list(range(7)) for epoch in drawn)
    assert len({tuple(scan for scan, _ in epoch) for epoch in drawn}) == 3
    assert len({number for epoch in drawn for _, number in epoch}) == 21


@pytest.mark.parametrize("workers", [1, 2])
def test_workers_that_live_on_draw_what_one_process_draws(workers):
    torch.manual_seed(1)  # which a loader gives to its workers
    assert epochs(workers) == epochs(0)


def test_a_later_start_draws_what_follows():
    assert epochs(2, first=2) == epochs(0)[1:]


def test_processes_draw_different_scans_and_numbers():
    (first,), (second,) = (epochs(0, num_replicas=2, rank=rank, last=1) for rank in (0, 1))
    assert {scan for scan, _ in first + second} == set(range(7))
    assert len({number for _, number in first + second}) == 8  # one scan twice, to divide evenly


def test_the_seed_matters():
    assert epochs(0, seed=1) != epochs(0, seed=2)
