"""Transforms, and functions that select voxels, that MONAI does not have."""

from __future__ import annotations

import zlib
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch
from monai.data import affine_to_spacing
from monai.transforms import Transform


class AddFileAndSpacingd(Transform):
    """Adds the plain entries `file` (path) and `spacing` (mm, [3]) of the volume `image` [C, H, W, D].

    MONAI has them in the volume's meta data, which not every cache stores, and which cannot be collated if a batch has
    files of different formats.
    """

    def __call__(self, data: Mapping[str, Any]) -> dict[str, Any]:
        """Add both."""
        image = data["image"]
        spacing = torch.as_tensor(affine_to_spacing(image.affine), dtype=torch.float32)
        return {**data, "file": str(image.meta["filename_or_obj"]), "spacing": spacing}


class LabelPositionsd(Transform):
    """Adds voxels of the label that are not 0 (`foreground`) and that are (`background`), as flat indices [N].

    `RandCropByPosNegLabeld` centres crops on them, and then does not look at the label. MONAI's `FgBgToIndicesd` lists
    all voxels, 8 bytes each; this keeps a random sample, drawn with a seed from the name of the scan's `file`.

    Args:
        most: number of voxels of each kind to keep.
    """

    def __init__(self, most: int = 100_000) -> None:
        self.most = most

    def __call__(self, data: Mapping[str, Any]) -> dict[str, Any]:
        """Add both, sorted, from `label` [1, H, W, D]."""
        labelled = np.asarray(data["label"][0]) != 0
        generator = np.random.default_rng(zlib.crc32(Path(data["file"]).name.encode()))
        return {
            **data,
            "foreground": _sample_true(labelled, self.most, generator),
            "background": _sample_true(~labelled, self.most, generator),
        }


def _sample_true(mask: np.ndarray, most: int, generator: np.random.Generator) -> torch.Tensor:
    """Sorted flat indices of at most `most` true voxels; plane by plane, because an index is larger than a voxel."""
    planes = mask.reshape(len(mask), -1)
    ends = planes.sum(axis=1).cumsum()
    total = int(ends[-1])
    ranks = np.arange(total) if total <= most else np.sort(generator.choice(total, most, replace=False, shuffle=False))
    found = []
    for n, chosen in enumerate(np.split(ranks, ranks.searchsorted(ends[:-1]))):
        before = ends[n - 1] if n else 0
        found.append(np.flatnonzero(planes[n])[chosen - before] + n * planes.shape[1])
    indices = np.concatenate(found)
    return torch.from_numpy(indices.astype(np.int32) if mask.size < 2**31 else indices)


class Above:
    """Voxels above a threshold, for `CropForegroundd`; all voxels if none is."""

    def __init__(self, threshold: float) -> None:
        self.threshold = threshold

    def __call__(self, image: torch.Tensor) -> torch.Tensor:
        """Image of any shape → bool of the same shape."""
        chosen = image > self.threshold
        return chosen if chosen.any() else torch.ones_like(chosen)


class Nonzero:
    """Voxels that are not 0 in any channel, for `CropForegroundd`; all voxels if none is."""

    def __call__(self, image: torch.Tensor) -> torch.Tensor:
        """Image of any shape → bool of the same shape."""
        chosen = image != 0
        return chosen if chosen.any() else torch.ones_like(chosen)
