"""Reads one file of a scan as training will read it, and refuses unusable files."""

from __future__ import annotations

import logging
import os
import sys
import tempfile
import warnings
from collections import Counter
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cache, partial
from pathlib import Path

import numpy as np
from monai.data import affine_to_spacing

from tools.common.text import size_text
from tools.data.kinds import UnfitError
from tools.data.loading import LoadScan
from tools.data.rasters import check_directions

logger = logging.getLogger(__name__)

PADDING = -1500.0  # HU; what is lower is outside of the field of view (-2000, -2048, -3024), not in the patient
ROUNDING = 1e-3  # largest distance of a label value from a whole number


@dataclass(frozen=True)
class File:
    """Properties of one file or one DICOM folder."""

    path: str
    channels: int
    shape: tuple[int, ...]
    affine: np.ndarray
    low: float
    high: float
    low_inside: float = 0.0  # lowest value that is no padding of a CT
    labels: tuple[int, ...] = ()

    def __str__(self) -> str:
        shape = self.shape if self.channels == 1 else (*self.shape, self.channels)
        return f"{len(shape)}D, shape {size_text(shape)}"

    @property
    def spacing(self) -> tuple[float, float, float]:
        """Voxel size in mm along the three axes."""
        return tuple(affine_to_spacing(self.affine, r=3).tolist())


def read_image(path: str, max_bytes: float) -> File:
    """Read a whole image file or DICOM series, at most of this size.

    Raises:
        UnfitError: the file is not readable, or is unusable for training.
    """
    return _read(path, max_bytes, _measure_image)


def read_label(path: str, max_bytes: float, label_values: Sequence[int] | None) -> File:
    """Read a whole label file.

    Args:
        path: label file.
        max_bytes: the largest file that is read.
        label_values: values that are allowed in addition to 0; None for any whole numbers.

    Raises:
        UnfitError: the file is not readable, or has other values.
    """
    return _read(path, max_bytes, partial(_measure_label, label_values=label_values))


def _read(path: str, max_bytes: float, measure: Callable[[str, np.ndarray, np.ndarray], File]) -> File:
    """Read a whole file; `measure` describes its array [channels, *spatial] and affine."""
    with _held_back() as printed:
        try:
            volume = _loader(max_bytes)(path)
            return measure(path, volume.array, np.asarray(volume.affine, dtype=float))
        except UnfitError as error:
            raise UnfitError(f"{error}{_content_text(Path(path), str(error))}") from error
        except MemoryError as error:
            raise UnfitError("is too large for the memory of this machine") from error
        except Exception as error:  # of any kind, by the libraries that read
            logger.debug("%s: %s", path, printed() or error, exc_info=True)
            raise UnfitError(f"cannot be read: its content is damaged{_content_text(Path(path))}") from error


@cache
def _loader(max_bytes: float) -> LoadScan:
    return LoadScan(max_bytes)


@contextmanager
def _held_back() -> Iterator[Callable[[], str]]:
    """Capture stderr as text.

    ITK's C++ code writes to file descriptor 2, not to `sys.stderr`, and reports some failures only there.
    """
    with tempfile.TemporaryFile() as sink, warnings.catch_warnings():
        warnings.simplefilter("ignore")

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


def _content_text(path: Path, reason: str = "cannot be read") -> str:
    """Size and first characters of a file that is of no known format: a web page, a pointer to another file …"""
    if not reason.startswith("cannot be read") or not path.is_file():
        return ""
    with path.open("rb") as file:
        start = file.read(24).decode("latin-1")
    begin = f" that begin with {start!r}" if start.isascii() and start.isprintable() else ""
    return f" (found {path.stat().st_size} bytes{begin})"


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
    check_directions(affine[:3, :3])
    _check_finite(array)
    channels, *shape = array.shape
    low, high = np.array([(channel.min(), channel.max()) for channel in array]).T
    if (low == high).any():
        channel = int((low == high).argmax())
        what = f"channel {channel} (counted from 0)" if channels > 1 else "every voxel"
        raise UnfitError(f"is constant: {what} has the value {low[channel]:g}, expected an image")
    inside = float(low.min())
    if inside < PADDING:
        inside = float(array.min(initial=high.max(), where=array >= PADDING))
    return File(path, channels, tuple(shape), affine, float(low.min()), float(high.max()), inside)


def _measure_label(path: str, array: np.ndarray, affine: np.ndarray, label_values: Sequence[int] | None) -> File:
    """Describe a label map [1, *spatial]; refuse values that are not labels. A constant label map is allowed."""
    _check_axes(array)
    check_directions(affine[:3, :3])
    _check_finite(array)
    channels, *shape = array.shape
    if channels != 1:
        raise UnfitError(f"has {channels} channels (shape {size_text([*shape, channels])}), expected one label map")
    whole = np.rint(array[0])
    fractions = array[0][np.abs(array[0] - whole) > ROUNDING]
    if fractions.size:
        raise UnfitError(
            f"has {fractions.size} voxels that are not whole numbers (first: {fractions[0]:.9g}), expected label values"
        )
    voxels = _count_values(whole)
    strange = set() if label_values is None else voxels.keys() - {0, *label_values}
    if strange:
        values = ", ".join(map(str, sorted({0, *label_values})))
        raise UnfitError(f"has unknown label values: found {_value_text(strange, voxels)}, expected {values}")
    labels = tuple(sorted(voxels))
    return File(path, channels, tuple(shape), affine, min(labels), max(labels), labels=labels)


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
