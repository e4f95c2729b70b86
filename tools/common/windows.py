"""Sizes of crops and sliding windows that a network can take."""

from __future__ import annotations

from collections.abc import Sequence


def require_roi(roi_size: Sequence[int], stride: int) -> None:
    """A window that the network can take.

    Args:
        roi_size: voxels along the three axes.
        stride: voxels of the input to one of the bottleneck (UNet and UNETR 16, SwinUNETR 32).

    Raises:
        ValueError: a side is no multiple of the stride, or holds fewer than two voxels of the bottleneck (instance
            norm has nothing to normalise then).
    """
    if any(side % stride or side < 2 * stride for side in roi_size):
        raise ValueError(
            f"roi_size: found {list(roi_size)}, expected multiples of {stride} voxels, {2 * stride} at least "
            "(UNet and UNETR 16 and 32, SwinUNETR 32 and 64)"
        )
