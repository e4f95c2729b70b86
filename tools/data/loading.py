"""Loads scans with the geometry that stands in their files."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import nibabel as nib
from monai.config import KeysCollection
from monai.data import NibabelReader
from monai.transforms import LoadImage, LoadImaged
from monai.utils import ensure_tuple


class NiftiReader(NibabelReader):
    """MONAI's `NibabelReader`, which keeps the header.

    MONAI replaces the sform by the qform, or the other way round, where the one in use disagrees with the voxel size in
    the header: a scan that was registered with 12 parameters would be read as it was before.
    """

    def read(self, data: Sequence[str | Path] | str | Path, **kwargs: Any) -> Any:
        """Open one file, or several."""
        self.filenames = ensure_tuple(data)
        images = [nib.load(name, **self.kwargs, **kwargs) for name in self.filenames]
        return images if len(images) > 1 else images[0]


class LoadScan(LoadImage):
    """MONAI's `LoadImage` with our readers: path, or paths of the channels → MetaTensor [C, H, W, D], float32."""

    def __init__(self) -> None:
        super().__init__(image_only=True, ensure_channel_first=True)
        self.register(NiftiReader())  # the last that takes a file's extension reads it


class LoadScand(LoadImaged):
    """`LoadScan` for the entries of a dictionary."""

    def __init__(self, keys: KeysCollection) -> None:
        super().__init__(keys)
        self._loader = LoadScan()
