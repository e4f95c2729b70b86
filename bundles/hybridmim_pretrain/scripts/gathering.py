"""Gathers the projections of all processes, so that the contrastive terms compare all crops of a step."""

from __future__ import annotations

from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor


class _Gather(torch.autograd.Function):
    """Concatenation over all processes; the backward pass sums the gradients of all processes for the own part."""

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
    """Gather the projections of all processes, [B, E] → [ranks × B, E]; gradients flow back to each process.

    Every process must have the same number of crops B.
    """
    if dist.is_available() and dist.is_initialized():
        return _Gather.apply(projection)
    return projection
