"""From the grid that the network sees back to the voxels of the file, by linear interpolation along one axis at a time.

MONAI's `Invertd` takes a volume through every step backwards, in 64 bit. The steps of our preprocessing (turning the
axes, resampling to a spacing, cropping) together are one affine map in which every axis of the network's grid belongs
to one axis of the file. So the way back is an interpolation along each axis in turn, which needs no volume between.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from copy import deepcopy
from dataclasses import dataclass
from functools import cached_property, lru_cache
from typing import Any

import numpy as np
import torch
from monai.data import MetaTensor
from torch import Tensor
from torch.nn.functional import pad

TOLERANCE = 1e-3  # voxels, over the whole scan, by which the axes of a header may be not quite perpendicular
KINDS = ("original_affine", "src_affine", "cropped")  # in MONAI's records: turned, resampled, cropped; in this order


@dataclass(frozen=True)
class _Axis:
    """For each voxel of the file, its two neighbours on the network's grid and the fraction of the way between them.

    The grid has one plane of zeros before its first and after its last plane, for what was cropped.
    """

    lower: Tensor
    upper: Tensor
    fraction: Tensor

    @cached_property
    def between(self) -> bool:
        """Whether any voxel of the file lies between two of the grid."""
        return bool(self.fraction.any())

    def rows(self, volume: Tensor) -> Tensor:
        """[h, w] → [H, w]."""
        lower = volume.index_select(0, self.lower)
        return torch.lerp(lower, volume.index_select(0, self.upper), self.fraction[:, None]) if self.between else lower

    def columns(self, volume: Tensor) -> Tensor:
        """[..., w] → [..., W]."""
        # `index_select` takes 8 times as long along the last axis
        lower, upper = (volume.gather(-1, k.expand(*volume.shape[:-1], -1)) for k in (self.lower, self.upper))
        return torch.lerp(lower, upper, self.fraction) if self.between else lower


@dataclass(frozen=True)
class WayBack:
    """Linear interpolation at every voxel of the file, equal to MONAI's inverse of the preprocessing up to rounding.

    Attributes:
        shape: of the file, voxels.
        order: for each axis of the network's grid, the axis of the file.
        meta: meta data of a volume in the file's geometry.
    """

    axes: tuple[_Axis, _Axis, _Axis]
    shape: tuple[int, int, int]
    order: tuple[int, int, int]
    meta: dict[str, Any]

    def view(self, volume: Tensor) -> Tensor:
        """A volume [..., H, W, D] of the file with its axes in the order of the network's grid; not a copy."""
        first = volume.ndim - 3
        return volume.permute(*range(first), *(first + axis for axis in self.order))

    def planes(self, logits: Tensor, activation: Callable[[Tensor], Tensor]) -> Iterator[Iterator[Tensor]]:
        """Interpolate the activated logits [K, h, w, d].

        No more than a few planes are held at a time.

        Args:
            logits: of any floating type; computed in 32 bit.
            activation: of the planes [K, 1, w, d].

        Yields:
            The planes along the first axis of `view`; each an iterator over its K classes, to be used up in turn.
        """
        first, second, third = self.axes

        @lru_cache(maxsize=2)  # a plane of the file lies between two neighbours
        def plane(index: int) -> Tensor:
            rows = logits[:, max(index - 1, 0) : index]  # none before the first
            if rows.shape[1] == 0 or index > logits.shape[1]:
                return logits.new_zeros(len(logits), logits.shape[2] + 2, len(third.lower), dtype=torch.float32)
            return third.columns(pad(activation(rows.float())[:, 0], (1, 1, 1, 1)))

        places = (part.tolist() for part in (first.lower, first.upper, first.fraction))
        for lower, upper, fraction in zip(*places, strict=True):
            between = torch.lerp(plane(lower), plane(upper), fraction) if fraction else plane(lower)
            yield (second.rows(one) for one in between)


def find_way_back(image: MetaTensor) -> WayBack | None:
    """Read the way back off a preprocessed image [C, h, w, d], from the steps that MONAI recorded in it.

    Returns:
        None where there are other steps than turning the axes, resampling linearly, and cropping, in this order.
    """
    steps = {kind: step for step in image.applied_operations for kind in KINDS if kind in step["extra_info"]}
    own = [kind for kind in KINDS if kind in steps]
    if [steps[kind] for kind in own] != list(image.applied_operations):
        return None
    info = {kind: steps[kind]["extra_info"] for kind in own}
    cropped = np.array(info.get("cropped", {"cropped": [0] * 6})["cropped"]).reshape(3, 2)
    padded = np.array(info.get("cropped", {}).get("pad_info", {"extra_info": {"padded": 0}})["extra_info"]["padded"])
    linear = {"mode": "bilinear", "padding_mode": "border", "align_corners": False}
    if padded.any() or any(info.get("src_affine", linear)[key] != value for key, value in linear.items()):
        return None
    size = np.array(image.shape[1:])
    grid = np.array(image.affine, dtype=float)  # of the grid before the crop
    grid[:3, 3] -= grid[:3, :3] @ cropped[:, 0]
    turned = own and own[0] != "cropped"
    affine = np.array(info[own[0]][own[0]] if turned else grid, dtype=float)
    shape = [int(n) for n in (steps[own[0]]["orig_size"] if own else size)]

    between = np.linalg.solve(grid, affine)[:3]  # voxel of the file → voxel of the grid
    order = np.abs(between[:, :3]).argmax(1)
    scale = between[range(3), order]
    others = np.abs(between[:, :3])
    others[range(3), order] = 0
    if sorted(order) != [0, 1, 2] or (others @ shape).max() > TOLERANCE:
        return None
    axes = []
    for axis in range(3):
        whole = size[axis] + cropped[axis].sum()
        place = (scale[axis] * np.arange(shape[order[axis]]) + between[axis, 3]).round(9).clip(0, whole - 1)
        lower = np.floor(place)
        ends = (torch.tensor((lower + k - cropped[axis, 0]).clip(-1, size[axis]) + 1) for k in (0, 1))
        axes.append(
            _Axis(*(end.long().to(image.device) for end in ends), torch.tensor(place - lower).float().to(image.device))
        )
    return WayBack(
        axes=tuple(axes),
        shape=tuple(shape),
        order=tuple(int(axis) for axis in order),
        meta={**deepcopy(image.meta), "affine": torch.tensor(affine)},
    )
