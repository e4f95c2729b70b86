"""Transforms, and functions that select voxels, that MONAI does not have."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

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
