"""Where the header of a file places its voxels in the world.

A NIfTI header has up to three places: its sform, its qform, and its voxel sizes (pixdim) alone. Programs differ in
which they take: nibabel and this project the sform if its code is not 0, ITK (3D Slicer, ITK-SNAP) often the qform.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import nibabel as nib
import numpy as np

from tools.data.rasters import unsaid

NIFTI = (".nii", ".nii.gz", ".hdr", ".img")
RASTERS = (".mha", ".mhd", ".nrrd", ".nhdr")
FORMS = (
    *("sform_code", "srow_x", "srow_y", "srow_z"),
    *("qform_code", "quatern_b", "quatern_c", "quatern_d", "qoffset_x", "qoffset_y", "qoffset_z"),
    "xyzt_units",
)
APART = 0.25  # voxels; rounding in headers (quaternions in single precision) reaches a tenth over 512 voxels


def nifti_header(path: str | Path) -> nib.Nifti1Header | None:
    """Header of a NIfTI file; None for other formats, and where there is no such file."""
    if not str(path).lower().endswith(NIFTI) or not Path(path).is_file():
        return None
    header = nib.load(path).header
    return header if isinstance(header, nib.Nifti1Header) else None


def result_header(scan: str | Path, affine: np.ndarray, shape: Sequence[int]) -> nib.Nifti1Header:
    """Header of a volume on the voxels of a scan, in the same place for every program.

    It has the forms, codes, voxel sizes and unit of a NIfTI scan. For other formats, both forms are the affine matrix;
    a sheared one, which a qform cannot hold, is in the sform alone: ITK then refuses the file, and shows it nowhere
    else.

    Args:
        scan: file or folder of the scan.
        affine: its affine matrix [4, 4], mm.
        shape: its voxels along the three axes.
    """
    header = nib.Nifti1Header()
    source = nifti_header(scan)
    if source is not None and source.get_data_shape()[:3] == tuple(shape):
        for name in FORMS:
            header[name] = source[name]
        header["pixdim"][:4] = source["pixdim"][:4]
        return header
    header.set_xyzt_units("mm")
    header.set_sform(affine, code="scanner")
    header.set_qform(affine, code="scanner")
    if _apart(header.get_qform(), affine, shape)[1] > APART:
        header["qform_code"] = 0
    return header


def disagreement(path: str | Path) -> str | None:
    """Describe how a header leaves the place of its voxels in doubt; None if it does not."""
    if (unsaid := _unsaid(Path(path))) is not None:
        return f"says nothing about its {unsaid}"
    header = nifti_header(path)
    if header is None or len(header.get_data_shape()) < 3:
        return None
    shape, used = header.get_data_shape()[:3], header.get_best_affine()
    sform, qform = (int(header[f"{form}_code"]) for form in ("sform", "qform"))
    if not sform and not qform:
        return "says nothing about its place (the codes of sform and qform are 0): left and right are a guess"
    said = []
    if sform and qform:
        mm, voxels = _apart(header.get_qform(), used, shape)
        if voxels > APART:
            said.append(f"its sform (used) and its qform are up to {mm:.3g} mm apart")
    sizes, own = header["pixdim"][1:4], np.linalg.norm(used[:3, :3], axis=0)
    off = np.abs(sizes - own) * (np.array(shape) - 1)
    if (off / own).max() > APART:
        said.append(
            f"its voxel size is {_by(sizes)} mm by pixdim and {_by(own)} mm by its affine matrix (used), which is up "
            f"to {off.max():.3g} mm over the scan"
        )
    return "; ".join(said) or None


def _unsaid(path: Path) -> str | None:
    """What MetaImage, NRRD and Analyze may leave out, with what is taken in its place."""
    name = path.name.lower()
    if not path.is_file():
        return None
    if name.endswith(RASTERS):
        return unsaid(path)
    if name.endswith((".hdr", ".img")) and nifti_header(path) is None:
        return "orientation (Analyze): left and right are a guess"
    return None


def _apart(affine: np.ndarray, other: np.ndarray, shape: Sequence[int]) -> tuple[float, float]:
    """Largest distance between the same corners of two volumes of one shape, in mm and in voxels of the other."""
    corners = np.array([(*(np.array(shape[:3]) - 1) * corner, 1) for corner in np.ndindex(2, 2, 2)])
    world = ((affine - other) @ corners.T)[:3]
    return float(np.linalg.norm(world, axis=0).max()), float(np.abs(np.linalg.solve(other[:3, :3], world)).max())


def _by(numbers: Sequence[float]) -> str:
    return " x ".join(f"{number:.4g}" for number in numbers)
