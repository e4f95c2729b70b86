"""Checks the sizes of crops and sliding windows."""

from __future__ import annotations

from collections.abc import Sequence


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
