"""What trainings are compared with: the learning rate's schedule, and other checkpoints."""

from __future__ import annotations

import math
from typing import Any

import torch


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
