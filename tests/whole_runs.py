"""What trainings are compared with: the learning rate's schedule, other checkpoints, and their own earlier epochs."""

from __future__ import annotations

import gc
import math
from typing import Any

import torch
from ignite.engine import Engine, Events


def expected_rate(step: int, warmup: int, total: int) -> float:
    """Share of the learning rate: linear from a hundredth to the whole, then half a cosine to 0."""
    if step < warmup:
        return 0.01 + 0.99 * step / warmup
    return (1 + math.cos(math.pi * (step - warmup) / (total - warmup))) / 2


def same(first: Any, second: Any) -> bool:
    """Whether two contents of checkpoints are equal to the last bit."""
    if isinstance(first, torch.Tensor):
        return torch.equal(first, second)
    if isinstance(first, dict):
        return first.keys() == second.keys() and all(same(first[key], second[key]) for key in first)
    if isinstance(first, list | tuple):
        return len(first) == len(second) and all(map(same, first, second))
    return first == second


class Objects:
    """Counts Python's objects at the end of each epoch of a training: what it keeps of every step shows as growth."""

    def __init__(self, trainer: Engine) -> None:
        self.counts: list[int] = []
        trainer.add_event_handler(Events.EPOCH_COMPLETED, self)

    def __call__(self, trainer: Engine) -> None:
        """Count them."""
        gc.collect()
        self.counts.append(len(gc.get_objects()))

    def growth(self, warm: int) -> int:
        """Most objects more than at the end of the epoch `warm`, by when all that is made once is there."""
        return max(self.counts[warm:]) - self.counts[warm - 1]
