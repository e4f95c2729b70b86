"""A network that needs no training: its classes are ranges of intensity."""

from __future__ import annotations

import torch
from torch import Tensor, nn


class Thresholds(nn.Module):
    """Class k where the first channel lies between bounds k and k + 1: [B, C, H, W, D] → logits [B, K, H, W, D]."""

    def __init__(self, bounds: list[float]) -> None:
        super().__init__()
        self.register_buffer("bounds", torch.tensor(bounds))

    def forward(self, image: Tensor) -> Tensor:
        middle, half = (self.bounds[1:] + self.bounds[:-1]) / 2, (self.bounds[1:] - self.bounds[:-1]) / 2
        return torch.cat([60 * (h - (image[:, :1] - m).abs()) for m, h in zip(middle, half, strict=True)], dim=1)
