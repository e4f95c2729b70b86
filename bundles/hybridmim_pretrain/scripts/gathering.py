"""Projections of all processes together, so that the contrastive terms compare all crops of a step."""

from __future__ import annotations

from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor


class _Gather(torch.autograd.Function):
    """Concatenation over all processes; in the backward pass each gets the gradients of all for its own part."""

    @staticmethod
    def forward(ctx: Any, part: Tensor) -> Tensor:
        parts = [torch.empty_like(part) for _ in range(dist.get_world_size())]
        dist.all_gather(parts, part.contiguous())
        return torch.cat(parts)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> Tensor:
        gradient = gradient.clone(memory_format=torch.contiguous_format)
        dist.all_reduce(gradient)
        return gradient.chunk(dist.get_world_size())[dist.get_rank()]


def gather(projection: Tensor) -> Tensor:
    """Projections of all processes, [B, E] → [ranks × B, E], with gradients to where they came from.

    Every process must have the same number of crops B.
    """
    if dist.is_available() and dist.is_initialized():
        return _Gather.apply(projection)
    return projection
