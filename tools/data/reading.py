"""Reads one file of a scan as training will read it, and refuses unusable files.

Some readers ignore errors: ITK continues after a failed decompression, nibabel replaces a spacing of 0 by 1. This
module and `tools.data.dicom` check for such errors.
"""

from __future__ import annotations

import os
import re
import sys
import tempfile
import warnings
from collections import Counter
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cache, partial
from pathlib import Path

import nibabel as nib
import numpy as np
from monai.data import affine_to_spacing
from nibabel.openers import ImageOpener

from tools.common.text import size_text
from tools.data.dicom import series_problem
from tools.data.loading import LoadScan


class UnfitError(Exception):
    """A scan is unusable for training; the message becomes `Scan.problem`."""


@dataclass(frozen=True)
class File:
    """Properties of one file or one DICOM folder."""

    path: str
    channels: int
    shape: tuple[int, ...]
    affine: np.ndarray
    low: float
    high: float
    labels: tuple[int, ...] = ()

    def __str__(self) -> str:
        shape = self.shape if self.channels == 1 else (*self.shape, self.channels)
        return f"{len(shape)}D, shape {size_text(shape)}"

    @property
    def spacing(self) -> tuple[float, float, float]:
        """Voxel size in mm along the three axes."""
        return tuple(affine_to_spacing(self.affine, r=3).tolist())


def read_image(path: str) -> File:
    """Read a whole image file or DICOM folder.

    Raises:
        UnfitError: the file is not readable, or is unusable for training.
    """
    return _read(path, _measure_image)


def read_label(path: str, label_values: Sequence[int] | None) -> File:
    """Read a whole label file.

    Args:
        path: label file.
        label_values: values that are allowed in addition to 0; None for any whole numbers.

    Raises:
        UnfitError: the file is not readable, or has other values.
    """
    return _read(path, partial(_measure_label, label_values=label_values))


def _read(path: str, measure: Callable[[str, np.ndarray, np.ndarray], File]) -> File:
    """Read a whole file; `measure` describes its array [channels, *spatial] and affine."""
    with _held_back() as printed:
        try:
            _check_bytes(Path(path))
            if Path(path).is_dir():
                if problem := series_problem(Path(path)):
                    raise UnfitError(problem)
            elif path.lower().endswith((".nii", ".nii.gz")):
                _check_nifti(path)
            volume = _loader()(path)
            file = measure(path, volume.array, np.asarray(volume.affine, dtype=float))
        except UnfitError:
            raise
        except Exception as error:
            raise UnfitError(_failure(Path(path), error, printed())) from error
        if "Uncompress failed" in printed():  # ITK returns incomplete data
            raise UnfitError("is damaged: ITK could not decompress its data, expected intact data")
    return file


@cache
def _loader() -> LoadScan:
    return LoadScan()


@contextmanager
def _held_back() -> Iterator[Callable[[], str]]:
    """Capture stderr as text.

    ITK's C++ code writes to file descriptor 2, not to `sys.stderr`, and reports some failures only there.
    """
    with tempfile.TemporaryFile() as sink, warnings.catch_warnings():
        warnings.simplefilter("ignore")
        warnings.simplefilter("error", np.exceptions.ComplexWarning)  # half of the data would be thrown away

        def printed() -> str:
            sys.stderr.flush()
            sink.seek(0)
            return sink.read().decode(errors="replace").strip()

        sys.stderr.flush()
        stderr = os.dup(2)
        os.dup2(sink.fileno(), 2)
        try:
            yield printed
        finally:
            sys.stderr.flush()
            os.dup2(stderr, 2)
            os.close(stderr)


def _failure(path: Path, error: Exception, printed: str) -> str:
    """Describe in one sentence why a reader failed, with its own message and the first bytes of the file."""
    if "is not wrapped for input type" in str(error):
        return "has several channels of a type that ITK cannot read in Python, expected a file for each channel"
    # ITK and teem print the most specific message last
    words = re.split(r"ITK ERROR: (?:\w+\(0x\w+\): )?|\[nrrd\] ", printed or str(error))[-1]
    words = " ".join(words.split())[:300] or type(error).__name__
    if path.is_dir():
        return f"cannot be read: {words}"
    with path.open("rb") as file:
        start = file.read(24).decode("latin-1")
    begin = f" that begin with {start!r}" if start.isascii() and start.isprintable() else ""  # a web page, a pointer …
    return f"cannot be read: {words} (found {path.stat().st_size} bytes{begin})"


def _check_bytes(path: Path) -> None:
    if not path.exists():
        raise UnfitError("does not exist")
    if path.is_dir():
        return
    if path.stat().st_size == 0:
        raise UnfitError("is empty: found 0 bytes, expected an image")
    raw = raw_file(path)
    if raw is not None and not raw.exists():
        raise UnfitError(f"has no voxels: its data file {raw.name} does not exist, expected it beside the .mhd")
    if raw is not None and raw.stat().st_size == 0:
        raise UnfitError(f"has no voxels: found 0 bytes in its data file {raw.name}")


def raw_file(path: Path) -> Path | None:
    """Return the file that holds the voxels of a `.mhd`, by its header; None if it names no single file."""
    if path.suffix.lower() != ".mhd":
        return None
    with path.open("rb") as file:
        header = file.read(1 << 16).decode("latin-1")
    name = re.search(r"^ElementDataFile\s*=\s*(.+?)\s*$", header, re.MULTILINE)
    if name is None or name[1] in ("LOCAL", "LIST") or "%" in name[1]:  # the last two: one file for each slice
        return None
    return path.parent / name[1]


def _check_nifti(path: str) -> None:
    """Refuse a degenerate affine, which nibabel and MONAI would replace (a spacing of 0 becomes 1)."""
    header_class = nib.load(path).header_class
    with ImageOpener(path) as file:
        affine = header_class.from_fileobj(file, check=False).get_best_affine()
    _check_affine(affine)


def _check_affine(affine: np.ndarray) -> None:
    matrix = affine[:3, :3]
    spacing = np.linalg.norm(matrix, axis=0)
    if not np.isfinite(affine).all() or not spacing.all() or abs(np.linalg.det(matrix / spacing)) < 1e-6:
        rows = " ".join(str(row.round(4).tolist()) for row in matrix)
        raise UnfitError(
            f"has a degenerate affine matrix: found the rows {rows}, expected three axes with a spacing > 0"
        )


def _check_axes(array: np.ndarray) -> None:
    channels, *shape = array.shape
    if len(shape) != 3:
        axes = shape if channels == 1 else [*shape, channels]
        raise UnfitError(f"is {len(axes)}D: found the shape {size_text(axes)}, expected three axes in space")
    if 1 in shape:
        raise UnfitError(f"is 2D: found a single slice (shape {size_text(shape)}), expected a volume")


def _check_finite(array: np.ndarray) -> None:
    if not np.isfinite(array.min()) or not np.isfinite(array.max()):
        bad = array.size - np.isfinite(array).sum()
        raise UnfitError(f"has {bad} NaN or infinite values among {array.size} voxels, expected finite values")


def _measure_image(path: str, array: np.ndarray, affine: np.ndarray) -> File:
    """Describe an image [channels, *spatial]; refuse one that is unusable for training."""
    _check_axes(array)
    _check_affine(affine)
    _check_finite(array)
    channels, *shape = array.shape
    low, high = np.array([(channel.min(), channel.max()) for channel in array]).T
    if (low == high).any():
        channel = int((low == high).argmax())
        what = f"channel {channel} (counted from 0)" if channels > 1 else "every voxel"
        raise UnfitError(f"is constant: {what} has the value {low[channel]:g}, expected an image")
    return File(path, channels, tuple(shape), affine, float(low.min()), float(high.max()))


def _measure_label(path: str, array: np.ndarray, affine: np.ndarray, label_values: Sequence[int] | None) -> File:
    """Describe a label map [1, *spatial]; refuse values that are not labels. A constant label map is allowed."""
    _check_axes(array)
    _check_affine(affine)
    _check_finite(array)
    channels, *shape = array.shape
    if channels != 1:
        raise UnfitError(f"has {channels} channels (shape {size_text([*shape, channels])}), expected one label map")
    fractions = array[0][array[0] != np.rint(array[0])]
    if fractions.size:
        raise UnfitError(
            f"has {fractions.size} voxels that are not whole numbers (first: {fractions[0]:g}), expected label values"
        )
    voxels = _count_values(array[0])
    strange = set() if label_values is None else voxels.keys() - {0, *label_values}
    if strange:
        values = ", ".join(map(str, sorted({0, *label_values})))
        raise UnfitError(f"has unknown label values: found {_value_text(strange, voxels)}, expected {values}")
    labels = tuple(sorted(voxels))
    return File(path, channels, tuple(shape), affine, min(labels), max(labels), labels)


def _count_values(array: np.ndarray) -> Counter[int]:
    """Count the voxels of each value; most are 0, and sorting only the others is many times faster."""
    voxels: Counter[int] = Counter()
    for plane in array:
        values, counts = np.unique(plane[plane != 0], return_counts=True)
        voxels.update(dict(zip(values.astype(int).tolist(), counts.tolist(), strict=True)))
        voxels[0] += plane.size - int(counts.sum())
    return +voxels  # without values that have no voxel


def _value_text(values: Collection[int], voxels: Mapping[int, int]) -> str:
    """List the values with the most voxels."""
    first = sorted(values, key=lambda value: (-voxels[value], value))[:5]
    more = f" and {len(values) - 5} more" if len(values) > 5 else ""
    return ", ".join(f"{value} ({voxels[value]} voxels)" for value in first) + more
