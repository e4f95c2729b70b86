"""Sliding windows, and the sizes that networks accept."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from itertools import combinations
from typing import Any

import torch
from monai.inferers import SlidingWindowInfererAdapt
from torch import Tensor

from tools.common.mixed_precision import autocast


def require_roi(roi_size: Sequence[int], stride: int) -> None:
    """Check that the network accepts a window.

    Args:
        roi_size: voxels along the three axes.
        stride: total downsampling of the network (UNet and UNETR 16, SwinUNETR 32).

    Raises:
        ValueError: a side is not a multiple of the stride, or less than two strides (instance norm needs more than one
            voxel in the bottleneck).
    """
    if any(side % stride or side < 2 * stride for side in roi_size):
        raise ValueError(
            f"roi_size: found {list(roi_size)}, expected multiples of {stride} voxels, {2 * stride} at least "
            "(UNet and UNETR 16 and 32, SwinUNETR 32 and 64)"
        )


class SlidingWindow(SlidingWindowInfererAdapt):
    """MONAI's sliding window, which stitches on the CPU if GPU memory runs out, with mixed precision and flips.

    Args:
        amp: precision of the network, as in `amp_dtype`.
        device: the network's.
        flip_axes: axes of the volume, 0 to 2; the network's output (logits) is averaged over all flips along them,
            which takes 2ⁿ passes for n axes.
        overlap: of neighbouring windows, as a fraction of their size, 0 or more and less than 1.
        kwargs: other arguments of `SlidingWindowInfererAdapt`.

    Raises:
        ValueError: `amp`, `flip_axes` or `overlap` is out of range.
    """

    def __init__(
        self,
        amp: str | bool,
        device: str | torch.device,
        flip_axes: Sequence[int] = (),
        overlap: float = 0.5,
        **kwargs: Any,
    ) -> None:
        if not isinstance(flip_axes, Sequence) or len({*flip_axes} & {0, 1, 2}) < len(flip_axes):
            raise ValueError(f"flip_axes: found {flip_axes!r}, expected a list of different axes, 0 to 2")
        if not 0 <= overlap < 1:  # MONAI checks it when the first scan is there
            raise ValueError(f"overlap: found {overlap}, expected a fraction of a window, 0 or more and less than 1")
        super().__init__(overlap=overlap, **kwargs)
        self.autocast = autocast(amp, device)
        axes = [2 + axis for axis in flip_axes]
        self.flips = [dims for n in range(len(axes) + 1) for dims in combinations(axes, n)]

    def __call__(self, inputs: Tensor, network: Callable[..., Tensor], *args: Any, **kwargs: Any) -> Tensor:
        """[B, C, H, W, D] → [B, K, H, W, D]."""

        def mean_over_flips(window: Tensor) -> Tensor:
            with self.autocast:
                total = network(window)
                for dims in self.flips[1:]:
                    total = total + network(window.flip(dims)).flip(dims)
            return total if len(self.flips) == 1 else total / len(self.flips)

        return super().__call__(inputs, mean_over_flips, *args, **kwargs)
