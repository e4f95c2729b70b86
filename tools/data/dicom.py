"""Checks of a DICOM series that its reader, GDCM, does not make.

GDCM drops slices that it cannot read, and reads beyond the end of truncated ones, so that other memory appears as
voxels or the process crashes.
"""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pydicom

from tools.data.scans import is_dicom

UNEVEN = 0.25  # fraction of the mean gap between slices; smaller differences are rounding in the headers


def series_problem(folder: Path) -> str | None:
    """Describe the problem of a series, as in "holds 2 DICOM series, expected 1"; None if there is none.

    Checks for several series, unreadable slices, a pixel spacing of 0, truncated pixel data and uneven gaps.
    """
    import itk  # takes seconds, and only DICOM needs it here

    generator = itk.GDCMSeriesFileNames.New()  # with the settings of MONAI's ITKReader
    generator.SetUseSeriesDetails(True)
    generator.AddSeriesRestriction("0008|0021")
    generator.SetDirectory(str(folder))
    series = generator.GetSeriesUIDs()
    if not series:
        return "holds no DICOM image that can be read, expected one series"
    if len(series) > 1:
        return f"holds {len(series)} DICOM series, expected 1: give each a folder of its own"
    slices = [Path(name) for name in generator.GetFileNames(series[0])]
    if lost := _lost_slices(folder, slices):
        return (
            f"is incomplete: found {len(slices)} slices that can be read, expected {len(slices) + len(lost)} "
            f"(the first that cannot: {lost[0].name})"
        )
    headers = []
    for path in slices:
        header = pydicom.dcmread(path, force=True)
        if not all(header.get("PixelSpacing", [1])):
            return f"has the pixel spacing {[*map(float, header.PixelSpacing)]} mm in {path.name}, expected more than 0"
        found, expected = len(header.get("PixelData", b"")), _pixel_bytes(header)
        if found < expected:
            return f"is truncated: found {found} bytes of pixels in {path.name}, expected {expected}"
        header.pop("PixelData", None)  # do not keep the whole series in memory
        headers.append(header)
    return _gap_problem(headers)


def _lost_slices(folder: Path, slices: list[Path]) -> list[Path]:
    """Find the slices that GDCM did not read; other objects (reports, contours) are not slices."""
    kind = pydicom.dcmread(slices[0], force=True, stop_before_pixels=True).get("SOPClassUID")
    lost = []
    for path in sorted(set(folder.iterdir()) - set(slices)):
        if is_dicom(folder, path.name):
            if pydicom.dcmread(path, stop_before_pixels=True).get("SOPClassUID") in (None, kind):
                lost.append(path)
        elif path.suffix == slices[0].suffix and path.is_file() and path.stat().st_size == 0:
            lost.append(path)
    return lost


def _pixel_bytes(header: pydicom.Dataset) -> int:
    """Bytes that the pixels of a slice take; 0 if they are compressed."""
    syntax = header.file_meta.get("TransferSyntaxUID")
    if syntax is not None and syntax.is_compressed:
        return 0
    bits = header.Rows * header.Columns * header.get("SamplesPerPixel", 1) * header.get("BitsAllocated", 8)
    return bits * int(header.get("NumberOfFrames", 1)) // 8


def _gap_problem(headers: list[pydicom.Dataset]) -> str | None:
    """Check the gaps between slices, along their normal."""
    if len(headers) < 3 or not all("ImagePositionPatient" in s and "ImageOrientationPatient" in s for s in headers):
        return None
    row, column = np.reshape(headers[0].ImageOrientationPatient, (2, 3)).astype(float)
    gaps = np.diff(np.sort([np.cross(row, column) @ np.array(s.ImagePositionPatient, float) for s in headers]))
    off = np.abs(gaps - gaps.mean()).max()
    if off <= UNEVEN * gaps.mean():
        return None
    return (
        f"has uneven gaps between its {len(headers)} slices: found up to {off:.3g} mm off the mean of "
        f"{gaps.mean():.3g} mm, expected equal ones (is a slice missing, or there twice?)"
    )
