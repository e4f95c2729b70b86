"""Looks at every scan before any training time is spent on it.

Training meets a bad file hours after its start, and some readers never complain: GDCM drops the slices of a
DICOM series that it cannot read, ITK goes on after a failed decompression. So every scan is read once, whole,
by the reader that training will use, and what the reader keeps to itself is checked here.
"""

from __future__ import annotations

import hashlib
import json
import logging
import os
import re
import sys
import tempfile
import time
import warnings
from collections import Counter
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from concurrent.futures import ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from contextlib import contextmanager
from dataclasses import asdict, dataclass, replace
from functools import cache, partial
from pathlib import Path

import itk
import nibabel as nib
import numpy as np
import torch
from monai.data import affine_to_spacing
from monai.transforms import LoadImage
from nibabel.openers import ImageOpener
from nibabel.orientations import inv_ornt_aff, io_orientation, ornt_transform
from tqdm import tqdm

from tools.common.files import atomic_path
from tools.data.scans import files_of, is_dicom, paths_of

logger = logging.getLogger(__name__)

REMEMBER_FORMAT = 2  # raise it when a check is added, so that remembered scans are looked at again
SAVE_EVERY = 60.0  # seconds between two savings while thousands of scans are read
# How far a label's corner may lie from the image's. Rounding in headers (spacing of four digits, quaternions in
# single precision) reaches a tenth of a voxel over 512; the smallest real mistake, of the origin, is half a voxel.
LABEL_OFFSET = 0.25  # voxels
LABEL_SPACING = 1e-3  # mm; up to here MONAI's `Spacingd` makes sure that both are resampled to the same shape
UNCOMPRESSED = (b"1.2.840.10008.1.2", b"1.2.840.10008.1.2.1")  # DICOM transfer syntaxes, little endian


class _Unfit(Exception):
    """One scan cannot be trained on; the message becomes `Scan.problem`."""


@dataclass(frozen=True)
class Scan:
    """What training will see of one scan; without the voxels.

    Attributes:
        image: path of the file or DICOM folder, or a list of paths, one for each channel.
        channels: number of channels.
        shape: voxels along the three axes.
        spacing: voxel size in mm along the three axes.
        low: lowest intensity, in the unit of the file (HU for CT).
        high: highest intensity.
        problem: why it cannot be trained on, in one sentence, and then all numbers are zero; None if it can.
        labels: values in its label file, 0 among them, sorted; empty if it has no label.
    """

    image: str | list[str]
    channels: int
    shape: tuple[int, int, int]
    spacing: tuple[float, float, float]
    low: float
    high: float
    problem: str | None
    labels: tuple[int, ...] = ()

    @property
    def name(self) -> str:
        """Its path or paths, for messages."""
        return ", ".join(paths_of({"image": self.image}))


# ------------------------------------------------------------------------------------------ looking at a scan


@dataclass(frozen=True)
class _File:
    """What one file, or one DICOM folder, holds."""

    path: str
    channels: int
    shape: tuple[int, ...]
    affine: np.ndarray
    low: float
    high: float
    labels: tuple[int, ...] = ()

    def __str__(self) -> str:
        shape = self.shape if self.channels == 1 else (*self.shape, self.channels)
        return f"{len(shape)}D, shape {_times(shape)}"

    @property
    def spacing(self) -> tuple[float, float, float]:
        return tuple(affine_to_spacing(self.affine, r=3).tolist())


def inspect_scan(item: dict, channels: int, label_values: Sequence[int] | None = None) -> Scan:
    """Read a whole scan, and its label if it has one, as training will, and say what it is.

    While it reads, what libraries print to stderr is held back from the whole process: call it from several
    processes rather than from several threads.

    Args:
        item: `{"image": path}`, or a list of paths, one for each channel; `"label": path` beside it.
        channels: number of channels that the network takes.
        label_values: values that a label may hold beside 0; None for any whole numbers.

    Returns:
        The scan. Bad data do not raise: `Scan.problem` says what was found and what was expected.
    """
    paths = paths_of(item)
    try:
        files = [_read_file(paths[0], _measure_image)] if len(paths) == 1 else _read_channels(paths)
        _check_channels(files, channels)
        labels = _read_label(str(item["label"]), files[0], label_values).labels if "label" in item else ()
    except _Unfit as reason:
        return _unfit_scan(item, str(reason))
    return Scan(
        image=_image(item),
        channels=channels,
        shape=files[0].shape,
        spacing=files[0].spacing,
        low=min(file.low for file in files),
        high=max(file.high for file in files),
        problem=None,
        labels=labels,
    )


def _unfit_scan(item: dict, problem: str) -> Scan:
    return Scan(_image(item), 0, (0, 0, 0), (0.0, 0.0, 0.0), 0.0, 0.0, problem)


def _image(item: dict) -> str | list[str]:
    return paths_of(item) if isinstance(item["image"], list | tuple) else str(item["image"])


def _read_channels(paths: list[str]) -> list[_File]:
    """Read a scan of one file for each channel; as in MONAI, all must lie in one place."""
    files: list[_File] = []
    for path in paths:
        name = Path(path).name
        try:
            file = _read_file(path, _measure_image)
        except _Unfit as reason:
            raise _Unfit(f"its channel file {name} {reason}") from reason
        if file.channels != 1:
            raise _Unfit(f"its channel file {name} has {file.channels} channels ({file}), expected 1")
        files.append(file)
        pair = f"its channel files {Path(paths[0]).name} and {name}"
        if file.shape != files[0].shape:
            shapes = f"{_times(files[0].shape)} and {_times(file.shape)}"
            raise _Unfit(f"{pair} have different shapes ({shapes}), expected the same")
        if not np.allclose(file.affine, files[0].affine):
            raise _Unfit(f"{pair} have different affine matrices, expected the same place in space")
    return files


def _check_channels(files: list[_File], channels: int) -> None:
    found = sum(file.channels for file in files)
    if found != channels:
        many = f"{len(files)} files, each " if len(files) > 1 else ""
        raise _Unfit(
            f"has {found} channel{'s' * (found > 1)} ({many}{files[0]}), expected {channels}: "
            f"set in_channels to {found} if every scan has that many"
        )


def _read_label(path: str, image: _File, label_values: Sequence[int] | None) -> _File:
    """Read a label file, which must lie where the image does and hold nothing but label values."""
    try:
        file = _read_file(path, partial(_measure_label, label_values=label_values))
        _check_place(file, image)
    except _Unfit as reason:
        raise _Unfit(f"its label {path} {reason}") from reason
    return file


def _check_place(label: _File, image: _File) -> None:
    """Refuse a label of another grid than the image's: evaluation compares voxel by voxel."""
    axes = tuple("".join(nib.aff2axcodes(file.affine)) for file in (label, image))
    turn = ornt_transform(io_orientation(label.affine), io_orientation(image.affine))
    turned = replace(
        label,
        shape=tuple(np.take(label.shape, np.argsort(turn[:, 0]))),
        affine=label.affine @ inv_ornt_aff(turn, label.shape),
    )
    if axes[0] != axes[1] and turned.shape == image.shape and _offset(turned, image) <= LABEL_OFFSET:
        raise _Unfit(
            f"has another orientation: found {axes[0]}, expected {axes[1]} as the image (only the axes differ)"
        )
    if label.shape != image.shape:
        raise _Unfit(f"has the shape {_times(label.shape)}, expected {_times(image.shape)} as the image")
    offset = _offset(label, image)
    if offset > LABEL_OFFSET or not np.allclose(label.spacing, image.spacing, rtol=0, atol=LABEL_SPACING):
        found, expected = (
            f"{axcodes}, spacing {_by(file.spacing)} mm, origin {_by(file.affine[:3, 3])} mm"
            for axcodes, file in zip(axes, (label, image), strict=True)
        )
        raise _Unfit(
            f"lies elsewhere in space, by up to {offset:.3g} voxels: found {found}, expected {expected} as the image"
        )


def _offset(label: _File, image: _File) -> float:
    """Largest distance between the same corners of two volumes of one shape, in voxels of the image."""
    last = np.array(image.shape) - 1
    corners = np.array([(*(last * corner), 1) for corner in np.ndindex(2, 2, 2)])
    apart = np.linalg.solve(image.affine, (label.affine - image.affine) @ corners.T)
    return float(np.abs(apart[:3]).max())


def _by(numbers: Sequence[float]) -> str:
    return " x ".join(f"{number:.5g}" for number in numbers)


def _read_file(path: str, measure: Callable[[str, np.ndarray, np.ndarray], _File]) -> _File:
    """Read a file whole; `measure` describes its array [channels, *spatial] and affine."""
    with _held_back() as printed:
        try:
            _check_bytes(Path(path))
            if Path(path).is_dir():
                _check_dicom(Path(path))
            elif path.lower().endswith((".nii", ".nii.gz")):
                _check_nifti(path)
            volume = _loader()(path)
            file = measure(path, volume.array, np.asarray(volume.affine, dtype=float))
        except _Unfit:
            raise
        except Exception as error:
            raise _Unfit(_failure(Path(path), error, printed())) from error
        _check_warnings(printed(), file)
    return file


@cache
def _loader() -> LoadImage:
    return LoadImage(image_only=True, ensure_channel_first=True)


@contextmanager
def _held_back() -> Iterator[Callable[[], str]]:
    """Hold back what is printed to stderr, and give it as text.

    ITK's C++ parts write to file descriptor 2, past `sys.stderr`, and some failures are told nowhere else.
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


def _check_bytes(path: Path) -> None:
    if not path.exists():
        raise _Unfit("does not exist")
    if path.is_dir():
        return
    if path.stat().st_size == 0:
        raise _Unfit("is empty: found 0 bytes, expected an image")
    raw = raw_file(path)
    if raw is not None and not raw.exists():
        raise _Unfit(f"has no voxels: its data file {raw.name} does not exist, expected it beside the .mhd")
    if raw is not None and raw.stat().st_size == 0:
        raise _Unfit(f"has no voxels: found 0 bytes in its data file {raw.name}")


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
    """Refuse an affine without volume, which nibabel and MONAI would replace (a spacing of 0 becomes 1)."""
    header_class = nib.load(path).header_class
    with ImageOpener(path) as file:
        affine = header_class.from_fileobj(file, check=False).get_best_affine()
    _check_affine(affine)


def _check_affine(affine: np.ndarray) -> None:
    matrix = affine[:3, :3]
    spacing = np.linalg.norm(matrix, axis=0)
    if not np.isfinite(affine).all() or not spacing.all() or abs(np.linalg.det(matrix / spacing)) < 1e-6:
        rows = " ".join(str(row.round(4).tolist()) for row in matrix)
        raise _Unfit(f"has a degenerate affine matrix: found the rows {rows}, expected three axes with a spacing > 0")


def _check_axes(array: np.ndarray) -> None:
    channels, *shape = array.shape
    if len(shape) != 3:
        axes = shape if channels == 1 else [*shape, channels]
        raise _Unfit(f"is {len(axes)}D: found the shape {_times(axes)}, expected three axes in space")
    if 1 in shape:
        raise _Unfit(f"is 2D: found a single slice (shape {_times(shape)}), expected a volume")


def _check_finite(array: np.ndarray) -> None:
    if not np.isfinite(array.min()) or not np.isfinite(array.max()):
        bad = array.size - np.isfinite(array).sum()
        raise _Unfit(f"has {bad} NaN or infinite values among {array.size} voxels, expected finite values")


def _measure_image(path: str, array: np.ndarray, affine: np.ndarray) -> _File:
    """Describe an image [channels, *spatial]; refuse what cannot be trained on."""
    _check_axes(array)
    _check_affine(affine)
    _check_finite(array)
    channels, *shape = array.shape
    low, high = np.array([(channel.min(), channel.max()) for channel in array]).T
    if (low == high).any():
        channel = int((low == high).argmax())
        what = f"channel {channel} (counted from 0)" if channels > 1 else "every voxel"
        raise _Unfit(f"is constant: {what} has the value {low[channel]:g}, expected an image")
    return _File(path, channels, tuple(shape), affine, float(low.min()), float(high.max()))


def _measure_label(path: str, array: np.ndarray, affine: np.ndarray, label_values: Sequence[int] | None) -> _File:
    """Describe a label map [1, *spatial]; refuse what no class can be made of. One value everywhere is no mistake."""
    _check_axes(array)
    _check_affine(affine)
    _check_finite(array)
    channels, *shape = array.shape
    if channels != 1:
        raise _Unfit(f"has {channels} channels (shape {_times([*shape, channels])}), expected one label map")
    fractions = array[0][array[0] != np.rint(array[0])]
    if fractions.size:
        raise _Unfit(f"has {fractions.size} voxels of no whole number (first: {fractions[0]:g}), expected label values")
    voxels = _count_values(array[0])
    strange = set() if label_values is None else voxels.keys() - {0, *label_values}
    if strange:
        values = ", ".join(map(str, sorted({0, *label_values})))
        raise _Unfit(f"has values of no class: found {_value_text(strange, voxels)}, expected {values}")
    labels = tuple(sorted(voxels))
    return _File(path, channels, tuple(shape), affine, min(labels), max(labels), labels)


def _count_values(array: np.ndarray) -> Counter[int]:
    """Voxels of each value; most are 0, and sorting the others alone is many times faster."""
    voxels: Counter[int] = Counter()
    for plane in array:
        values, counts = np.unique(plane[plane != 0], return_counts=True)
        voxels.update(dict(zip(values.astype(int).tolist(), counts.tolist(), strict=True)))
        voxels[0] += plane.size - int(counts.sum())
    return +voxels  # without those that have no voxel


def _value_text(values: Collection[int], voxels: Mapping[int, int]) -> str:
    """Name the values that have the most voxels."""
    first = sorted(values, key=lambda value: (-voxels[value], value))[:5]
    more = f" and {len(values) - 5} more" if len(values) > 5 else ""
    return ", ".join(f"{value} ({voxels[value]} voxels)" for value in first) + more


def _times(shape: tuple[int, ...] | list[int]) -> str:
    return "x".join(str(size) for size in shape)


# Each reader says "short file" in its own words: ITK for MetaImage, nibabel, and two of teem's for NRRD.
_SHORT = (
    r"ideal = (?P<expected>\d+) : actual = (?P<found>\d+)",
    r"Expected (?P<expected>\d+) bytes, got (?P<found>\d+) bytes",
    r"expected (?P<expected>\d+) bytes but received (?P<found>\d+)",
    r"got only (?P<found>\d+) (?P<size>\d+)-sized things, not (?P<expected>\d+)",
)
_NO_IMAGE = ("Cannot work out file type", "is not a gzip file", "Could not create IO object")


def _failure(path: Path, error: Exception, printed: str) -> str:
    """Say in one sentence why a reader failed."""
    said = f"{error}\n{printed}"
    for pattern in _SHORT:
        if short := re.search(pattern, said):
            size = int(short.groupdict().get("size", 1))
            found, expected = int(short["found"]) * size, int(short["expected"]) * size
            return f"is truncated: found {found} bytes of data, expected {expected}"
    if isinstance(error, EOFError):
        return f"is truncated: found {path.stat().st_size} bytes, but its compressed data go on"
    if path.is_file() and any(words in said for words in _NO_IMAGE):
        with path.open("rb") as file:
            start = file.read(24)
        found = f"found {path.stat().st_size} bytes that begin with {start!r}"
        return f"is not an image: {found}, expected the format that its name stands for"
    if "is not wrapped for input type" in said:
        return "has several channels of a type that ITK cannot read in Python, expected a file for each channel"
    return f"cannot be read: {_last_words(printed or str(error)) or type(error).__name__}"


def _last_words(text: str) -> str:
    """Return the most specific part of an error message, in one line; teem goes from general to specific."""
    text = re.split(r"ITK ERROR: (?:\w+\(0x\w+\): )?|\[nrrd\] ", text)[-1]
    return " ".join(text.split())[:300]


def _check_warnings(printed: str, file: _File) -> None:
    """Refuse a volume that ITK gave although it had complained about it."""
    if "Uncompress failed" in printed:
        raise _Unfit("is damaged: ITK could not decompress its data and gave what it had, expected intact data")
    uneven = re.search(r"maximum nonuniformity:([0-9.e+-]+)", printed)
    gap = file.spacing[2]  # their mean
    if uneven and float(uneven[1]) > 0.25 * gap:  # less is rounding in the headers
        raise _Unfit(
            f"has uneven gaps between its {file.shape[2]} slices: found up to {float(uneven[1]):.3g} mm "
            f"off the mean of {gap:.3g} mm, expected equal ones (is a slice missing, or there twice?)"
        )


def _check_dicom(folder: Path) -> None:
    """Refuse what GDCM passes over in silence: more series, unreadable slices, short slices, no spacing."""
    generator = itk.GDCMSeriesFileNames.New()  # with the settings of MONAI's ITKReader
    generator.SetUseSeriesDetails(True)
    generator.AddSeriesRestriction("0008|0021")
    generator.SetDirectory(str(folder))
    series = generator.GetSeriesUIDs()
    if not series:
        raise _Unfit("holds no DICOM image that can be read, expected one series")
    if len(series) > 1:
        raise _Unfit(f"holds {len(series)} DICOM series, expected 1: give each a folder of its own")
    slices = [Path(name) for name in generator.GetFileNames(series[0])]
    lost = _lost_slices(folder, slices)
    if lost:
        raise _Unfit(
            f"is incomplete: found {len(slices)} slices that can be read, expected {len(slices) + len(lost)} "
            f"(the first that cannot: {lost[0].name})"
        )
    _check_dicom_tags(slices)


def _lost_slices(folder: Path, slices: list[Path]) -> list[Path]:
    """Find the slices that GDCM did not take; files of another kind (reports, contours) are no slices."""
    kind = _dicom_uid(slices[0], b"\x02\x00\x02\x00")
    taken = {path.name for path in slices}
    rest = [path for path in folder.iterdir() if path.name not in taken]
    broken = [
        path for path in rest if is_dicom(folder, path.name) and _dicom_uid(path, b"\x02\x00\x02\x00") in (kind, b"")
    ]
    suffix = slices[0].suffix
    empty = [path for path in rest if path.suffix == suffix and path.is_file() and path.stat().st_size == 0]
    return sorted(broken + empty)


def _dicom_uid(path: Path, tag: bytes) -> bytes:
    """Return a UID of the file's meta information; empty if there is none."""
    with path.open("rb") as file:
        found = re.search(re.escape(tag) + rb"UI..([0-9.]+)", file.read(2048), re.DOTALL)
    return found[1] if found else b""


def _check_dicom_tags(slices: list[Path]) -> None:
    reader = itk.GDCMImageIO.New()
    reader.SetFileName(str(slices[0]))
    reader.ReadImageInformation()
    tags = reader.GetMetaDataDictionary()

    def numbers(tag: str, default: str) -> list[float]:
        text = tags[tag] if tags.HasKey(tag) else default
        return [float(number) for number in text.split("\\")]

    spacing = numbers("0028|0030", "1")
    if not all(spacing):
        raise _Unfit(f"has the pixel spacing {spacing} mm, expected more than 0")
    rows, columns, bits = numbers("0028|0010", "0") + numbers("0028|0011", "0") + numbers("0028|0100", "8")
    samples, frames = numbers("0028|0002", "1") + numbers("0028|0008", "1")
    expected = int(rows * columns * samples * frames * bits) // 8
    for path in slices:
        found = _pixel_bytes(path, expected)
        if found < expected:
            raise _Unfit(f"is truncated: found {found} bytes of pixels in {path.name}, expected {expected}")


def _pixel_bytes(path: Path, enough: int) -> int:
    """Return the length of the pixel data, or `enough` if they are compressed.

    GDCM reads beyond the end of short ones: other memory shows up as voxels, or the process crashes.
    """
    if _dicom_uid(path, b"\x02\x00\x10\x00") not in UNCOMPRESSED:
        return enough
    content = path.read_bytes()
    longest, at = 0, content.find(b"\xe0\x7f\x10\x00")
    while at >= 0 and longest < enough:  # the first may belong to a preview
        length_at = at + 8 if content[at + 4 : at + 6] in (b"OB", b"OW") else at + 4
        length = int.from_bytes(content[length_at : length_at + 4], "little")
        if length_at + 4 + length <= len(content):
            longest = max(longest, length)
        at = content.find(b"\xe0\x7f\x10\x00", at + 4)
    return min(longest, enough)


# -------------------------------------------------------------------------------------- looking at all scans


def inspect_scans(
    items: list[dict],
    channels: int,
    workers: int = 0,
    remember: Path | None = None,
    label_values: Sequence[int] | None = None,
) -> list[Scan]:
    """Inspect many scans, and the labels of those that have one.

    Args:
        items: as from `find_scans`, `read_datalist` or `find_cases`.
        channels: number of channels that the network takes.
        workers: processes that read; 0 reads in this one.
        remember: JSON file that keeps readable scans, so that unchanged files are not read a second time.
            Several processes may share it. If it cannot be read or written, that is only logged.
        label_values: values that a label may hold beside 0; None for any whole numbers.

    Returns:
        One `Scan` for each item, in their order.
    """
    remembered = _recall(remember)
    values = None if label_values is None else sorted(label_values)
    keys = [f"{scan_key(item)} {channels} {values if 'label' in item else None} {REMEMBER_FORMAT}" for item in items]
    unread = [n for n, key in enumerate(keys) if key not in remembered]
    scans = [remembered.get(key) for key in keys]
    pending = [items[n] for n in unread]
    inspect = partial(inspect_scan, channels=channels, label_values=label_values)
    results = _in_processes(inspect, pending, workers) if workers else map(inspect, pending)
    fresh: dict[str, Scan] = {}
    saved = time.monotonic()
    try:
        bar = tqdm(results, total=len(pending), desc="Reading scans", unit="scan", disable=len(pending) <= 20)
        for n, scan in zip(unread, bar, strict=True):
            scans[n] = scan
            if scan.problem is None:  # a disk or a network may recover: problems are looked at again
                fresh[keys[n]] = scan
            if time.monotonic() - saved > SAVE_EVERY:
                _save(remember, fresh)
                saved = time.monotonic()
    finally:  # an interrupted start keeps what it has read
        _save(remember, fresh)
    return scans


def _in_processes(inspect: Callable[[dict], Scan], items: list[dict], workers: int) -> Iterator[Scan]:
    with ProcessPoolExecutor(min(workers, len(items)) or 1, initializer=torch.set_num_threads, initargs=(1,)) as pool:
        futures = [pool.submit(inspect, item) for item in items]
        try:
            for item, future in zip(items, futures, strict=True):
                try:
                    yield future.result()
                except BrokenProcessPool:
                    yield _alone(inspect, item)
        finally:
            pool.shutdown(cancel_futures=True)


def _alone(inspect: Callable[[dict], Scan], item: dict) -> Scan:
    """Read a scan in a process of its own, so that a crash of the reader is put down to the right scan."""
    with ProcessPoolExecutor(1) as pool:
        try:
            return pool.submit(inspect, item).result()
        except BrokenProcessPool:
            return _unfit_scan(item, "kills the process that reads it (a crash of the reader, or memory ran out)")


def scan_key(item: dict) -> str:
    """Name a scan by its path, and the size and time of every file that belongs to it, its label among them."""
    lines = []
    for path in map(Path, files_of(item)):
        try:
            files = sorted(path.iterdir()) if path.is_dir() else [path, raw_file(path) or path]
            states = [(file, file.stat()) for file in files]
        except OSError:  # missing: never remembered, because it has a problem
            states = []
        lines += [f"{file.absolute()} {state.st_size} {state.st_mtime_ns}" for file, state in states]
    return hashlib.sha256("\n".join(lines).encode(errors="surrogateescape")).hexdigest()


def _recall(remember: Path | None) -> dict[str, Scan]:
    if remember is None or not Path(remember).exists():
        return {}
    try:
        content = json.loads(Path(remember).read_text(encoding="utf-8"))
        return {key: _from_json(scan) for key, scan in content.items()}
    except (OSError, ValueError, TypeError, AttributeError, KeyError) as error:
        logger.warning("%s cannot be used (%s): scans are read again", remember, error)
        return {}


def _from_json(scan: dict) -> Scan:
    return Scan(**scan | {name: tuple(scan[name]) for name in ("shape", "spacing", "labels")})


def _save(remember: Path | None, fresh: dict[str, Scan]) -> None:
    if remember is None or not fresh:
        return
    scans = {**_recall(remember), **fresh}  # read again: another process may have saved in the meantime
    try:
        with atomic_path(remember) as temporary:
            temporary.write_text(json.dumps({key: asdict(scan) for key, scan in scans.items()}), encoding="utf-8")
    except OSError as error:
        logger.warning("%s cannot be written (%s): scans will be read again at the next start", remember, error)
