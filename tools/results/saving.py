"""Writes volumes as NIfTI where their scan lies: in every viewer, whichever of the header's forms it reads."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import nibabel as nib
import numpy as np
from monai.config import DtypeLike
from monai.data import NibabelWriter
from monai.transforms import SaveImaged

from tools.data.geometry import result_header
from tools.data.outputs import output_name


class ScanGeometryWriter(NibabelWriter):
    """Writes a volume on the voxels of its scan's file with the geometry of that file's header.

    MONAI's writer makes both forms of the header out of one affine matrix: a scan whose forms differ would be shown in
    one place and its label map in another, and a sheared qform is not possible.
    """

    def set_metadata(self, meta_dict: Mapping | None, resample: bool = False, **options: Any) -> None:
        """Remember the file of the scan, too."""
        super().set_metadata(meta_dict, resample=resample, **options)
        self.source = str(meta_dict["filename_or_obj"])

    def write(self, filename: str | Path, verbose: bool = False, **options: Any) -> None:
        """Write the volume to a `.nii` or `.nii.gz` file."""
        array = np.asarray(self.data_obj, dtype=self.output_dtype)
        header = result_header(self.source, np.asarray(self.affine, dtype=float), array.shape[:3])
        header.set_data_dtype(array.dtype)
        Path(filename).parent.mkdir(parents=True, exist_ok=True)
        nib.save(nib.Nifti1Image(array, None, header), filename)


class SaveResultd(SaveImaged):
    """Saves volumes [C, H, W, D] that are on the voxels of the scan's file, as `NAME/NAME_POSTFIX.nii.gz`.

    Args:
        keys: entries to save.
        output_dir: folder of all results.
        postfix: end of the name.
        dtype: type of the values in the file.
    """

    def __init__(self, keys: str, output_dir: str | Path, postfix: str, dtype: DtypeLike = np.float32) -> None:
        super().__init__(keys, output_dtype=dtype, writer=ScanGeometryWriter)
        self.output_dir = Path(output_dir)
        self.postfix = postfix

    def __call__(self, data: Mapping[str, Any]) -> dict[str, Any]:
        """Save; the folder and the name are the scan's `output`."""
        for key in self.key_iterator(data):
            path = self.output_dir / output_name(data, data[key].meta["filename_or_obj"])
            self.saver(data[key], filename=path / f"{path.name}_{self.postfix}")
        return dict(data)
