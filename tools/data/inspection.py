"""Checks every scan before training.

Without this, a bad file may stop a training after hours. So every scan is read once, completely, by the reader that
training uses (`tools.data.reading`), and the results are saved.
"""

from __future__ import annotations

import hashlib
import json
import logging
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass, replace
from functools import partial
from pathlib import Path

import nibabel as nib
import numpy as np
from nibabel.orientations import inv_ornt_aff, io_orientation, ornt_transform
from tqdm import tqdm

from tools.common.files import write_json
from tools.common.text import size_text
from tools.data.geometry import disagreement
from tools.data.kinds import UnfitError
from tools.data.processes import in_processes
from tools.data.rasters import voxel_file
from tools.data.reading import File, read_image, read_label
from tools.data.scans import files_of, paths_of, series_folder

logger = logging.getLogger(__name__)

REMEMBER_FORMAT = 4  # increase it when a check is added, so that saved results are not used
SAVE_EVERY = 60.0  # seconds between two saves while thousands of scans are read
# Tolerance between the corners of label and image. Rounding in headers (spacing of four digits, quaternions in single
# precision) reaches a tenth of a voxel over 512 voxels; the smallest real error, of the origin, is half a voxel.
LABEL_OFFSET = 0.25  # voxels
LABEL_SPACING = 1e-3  # mm; up to this difference MONAI's `Spacingd` resamples both to the same shape
READ_BY_PYTHON = (".nii", ".nii.gz", ".mgz", ".mgh")  # the readers of other formats are C++, which can crash
SMALL = 200e6  # bytes of a file that takes no minute
MAX_SCAN_GB = 8.0  # of the voxels of a file, decompressed


@dataclass(frozen=True)
class Scan:
    """Properties of one scan, as training will read it.

    Attributes:
        image: path of the file or DICOM folder, or a list of paths, one per channel.
        channels: number of channels.
        shape: voxels along the three axes.
        spacing: voxel size in mm along the three axes.
        low: lowest intensity, in the unit of the file (HU for CT).
        high: highest intensity.
        problem: why the scan is unusable, in one sentence (all numbers are then zero); None if it is usable.
        labels: values in its label file, including 0, sorted; empty if it has no label.
        low_inside: lowest intensity that is no padding of a CT (-2000, -3024 …), outside of the field of view.
        doubt: how its header contradicts itself about its place, in one sentence; None if it does not.
    """

    image: str | list[str]
    channels: int
    shape: tuple[int, int, int]
    spacing: tuple[float, float, float]
    low: float
    high: float
    problem: str | None
    labels: tuple[int, ...] = ()
    low_inside: float = 0.0
    doubt: str | None = None

    @property
    def name(self) -> str:
        """Path or paths of the scan, for messages."""
        return ", ".join(paths_of({"image": self.image}))


# ------------------------------------------------------------------------------------------ looking at a scan


def inspect_scan(
    item: dict, channels: int, label_values: Sequence[int] | None = None, max_scan_gb: float = MAX_SCAN_GB
) -> Scan:
    """Read a whole scan, and its label if it has one, as training will, and return its properties.

    While it reads, stderr of the whole process is captured: call it from several processes, not from several threads.

    Args:
        item: `{"image": path}`, or a list of paths, one per channel; optionally with `"label": path`.
        channels: number of input channels of the network.
        label_values: label values that are allowed in addition to 0; None for any whole numbers.
        max_scan_gb: the largest file that is read, by its voxels.

    Returns:
        Properties of the scan. Bad data do not raise: `Scan.problem` says what was found and what was expected.
    """
    paths = paths_of(item)
    try:
        most = float(max_scan_gb) * 1e9
        files = [read_image(paths[0], most)] if len(paths) == 1 else _read_channels(paths, most)
        _check_channels(files, channels)
        labels = _read_label_of(str(item["label"]), most, files[0], label_values).labels if "label" in item else ()
    except UnfitError as reason:
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
        low_inside=min(file.low_inside for file in files),
        doubt=next(filter(None, map(disagreement, paths)), None),
    )


def _unfit_scan(item: dict, problem: str) -> Scan:
    return Scan(_image(item), 0, (0, 0, 0), (0.0, 0.0, 0.0), 0.0, 0.0, problem)


def _image(item: dict) -> str | list[str]:
    return paths_of(item) if isinstance(item["image"], list | tuple) else str(item["image"])


def _read_channels(paths: list[str], max_bytes: float) -> list[File]:
    """Read a scan with one file per channel; as in MONAI, all must have the same affine."""
    files: list[File] = []
    for path in paths:
        name = Path(path).name
        try:
            file = read_image(path, max_bytes)
        except UnfitError as reason:
            raise UnfitError(f"its channel file {name} {reason}") from reason
        if file.channels != 1:
            raise UnfitError(f"its channel file {name} has {file.channels} channels ({file}), expected 1")
        files.append(file)
        pair = f"its channel files {Path(paths[0]).name} and {name}"
        if file.shape != files[0].shape:
            shapes = f"{size_text(files[0].shape)} and {size_text(file.shape)}"
            raise UnfitError(f"{pair} have different shapes ({shapes}), expected the same")
        if not np.allclose(file.affine, files[0].affine):
            raise UnfitError(f"{pair} have different affine matrices, expected the same place in space")
    return files


def _check_channels(files: list[File], channels: int) -> None:
    found = sum(file.channels for file in files)
    if len(files) == 1 and found > channels == 1:
        raise UnfitError(
            f"has {found} channels or points in time ({files[0]}), expected 1: split points in time (fMRI, diffusion, "
            f"4D CT) into files; for channels, set in_channels to {found} if every scan has that many"
        )
    if found != channels:
        many = f"{len(files)} files, each " if len(files) > 1 else ""
        raise UnfitError(
            f"has {found} channel{'s' * (found > 1)} ({many}{files[0]}), expected {channels}: "
            f"set in_channels to {found} if every scan has that many"
        )


def _read_label_of(path: str, max_bytes: float, image: File, label_values: Sequence[int] | None) -> File:
    """Read a label file and check that its geometry is that of the image and its values are label values."""
    try:
        file = read_label(path, max_bytes, label_values)
        _check_place(file, image)
    except UnfitError as reason:
        raise UnfitError(f"its label {path} {reason}") from reason
    return file


def _check_place(label: File, image: File) -> None:
    """Refuse a label whose grid differs from that of the image: evaluation compares voxel by voxel."""
    axes = tuple("".join(nib.aff2axcodes(file.affine)) for file in (label, image))
    turn = ornt_transform(io_orientation(label.affine), io_orientation(image.affine))
    turned = replace(
        label,
        shape=tuple(np.take(label.shape, np.argsort(turn[:, 0]))),
        affine=label.affine @ inv_ornt_aff(turn, label.shape),
    )
    if axes[0] != axes[1] and turned.shape == image.shape and _offset(turned, image) <= LABEL_OFFSET:
        raise UnfitError(
            f"has another orientation: found {axes[0]}, expected {axes[1]} as the image (only the axes differ)"
        )
    if label.shape != image.shape:
        raise UnfitError(f"has the shape {size_text(label.shape)}, expected {size_text(image.shape)} as the image")
    offset = _offset(label, image)
    if offset > LABEL_OFFSET or not np.allclose(label.spacing, image.spacing, rtol=0, atol=LABEL_SPACING):
        found, expected = (
            f"{axcodes}, spacing {_by(file.spacing)} mm, origin {_by(file.affine[:3, 3])} mm"
            for axcodes, file in zip(axes, (label, image), strict=True)
        )
        raise UnfitError(
            f"lies elsewhere in space, by up to {offset:.3g} voxels: found {found}, expected {expected} as the image"
        )


def _offset(label: File, image: File) -> float:
    """Largest distance between the same corners of two volumes of one shape, in voxels of the image."""
    last = np.array(image.shape) - 1
    corners = np.array([(*(last * corner), 1) for corner in np.ndindex(2, 2, 2)])
    apart = np.linalg.solve(image.affine, (label.affine - image.affine) @ corners.T)
    return float(np.abs(apart[:3]).max())


def _by(numbers: Sequence[float]) -> str:
    return " x ".join(f"{number:.5g}" for number in numbers)


# -------------------------------------------------------------------------------------- looking at all scans


def inspect_scans(
    items: list[dict],
    channels: int,
    workers: int = 0,
    remember: Path | None = None,
    label_values: Sequence[int] | None = None,
    max_scan_gb: float = MAX_SCAN_GB,
) -> list[Scan]:
    """Inspect many scans, and the labels of those that have one.

    Args:
        items: items from `find_scans`, `read_datalist` or `find_cases`.
        channels: number of input channels of the network.
        workers: number of processes that read; 0 reads in this process, except what a reader could crash or hang on.
        remember: JSON file that stores the results of usable scans, so that unchanged files are not read again.
            Several processes may share it. Failure to read or write it is only logged.
        label_values: label values that are allowed in addition to 0; None for any whole numbers.
        max_scan_gb: the largest file that is read, by its voxels.

    Returns:
        One `Scan` per item, in the same order.
    """
    remembered = _recall(remember)
    keys = _keys(items, channels, label_values)
    unread = [n for n, key in enumerate(keys) if key not in remembered]
    scans = [remembered.get(key) for key in keys]
    pending = [items[n] for n in unread]
    inspect = partial(inspect_scan, channels=channels, label_values=label_values, max_scan_gb=max_scan_gb)
    results = _results(inspect, pending, workers)
    fresh: dict[str, Scan] = {}
    saved = time.monotonic()
    try:
        bar = tqdm(results, total=len(pending), desc="Reading scans", unit="scan", disable=len(pending) <= 20)
        for n, scan in zip(unread, bar, strict=True):
            scans[n] = scan
            if scan.problem is None:  # problems are checked again, because a disk or a network may recover
                fresh[keys[n]] = scan
            if time.monotonic() - saved > SAVE_EVERY:
                _save(remember, fresh)
                saved = time.monotonic()
    finally:  # an interrupted check keeps its results so far
        _save(remember, fresh)
    return scans


def save_scans(
    items: Sequence[dict],
    scans: Sequence[Scan],
    channels: int,
    remember: Path,
    label_values: Sequence[int] | None = None,
) -> None:
    """Remember the results of `inspect_scans` with the same arguments."""
    keys = _keys(items, channels, label_values)
    _save(remember, {key: scan for key, scan in zip(keys, scans, strict=True) if scan.problem is None})


def _keys(items: Sequence[dict], channels: int, label_values: Sequence[int] | None) -> list[str]:
    values = None if label_values is None else sorted(label_values)
    return [f"{scan_key(item)} {channels} {values if 'label' in item else None} {REMEMBER_FORMAT}" for item in items]


def _results(inspect: Callable[[dict], Scan], items: list[dict], workers: int) -> Iterator[Scan]:
    """Inspect scans in processes; with 0 workers, in one of its own only what is not read by Python."""
    here = [not workers and all(map(_is_read_by_python, files_of(item))) for item in items]
    there = in_processes(inspect, [item for item, own in zip(items, here, strict=True) if not own], workers or 1)
    for item, own in zip(items, here, strict=True):
        result = inspect(item) if own else next(there)
        yield _unfit_scan(item, result) if isinstance(result, str) else result


def _is_read_by_python(path: str) -> bool:
    return path.lower().endswith(READ_BY_PYTHON) and Path(path).is_file() and Path(path).stat().st_size < SMALL


def scan_key(item: dict) -> str:
    """Hash of the paths, sizes and dates of all files of a scan, including its label."""
    lines = []
    for path in map(series_folder, files_of(item)):
        try:
            files = sorted(path.iterdir()) if path.is_dir() else [path, voxel_file(path)]
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
        if content["sha256"] != _digest(content["scans"]):
            raise ValueError("changed since it was written")
        return {key: _from_json(scan) for key, scan in content["scans"].items()}
    except (OSError, ValueError, TypeError, AttributeError, KeyError) as error:
        logger.warning("%s cannot be used (%s): scans are read again", remember, error)
        return {}


def _digest(scans: dict[str, dict]) -> str:
    return hashlib.sha256(json.dumps(scans, sort_keys=True).encode()).hexdigest()


def _from_json(scan: dict) -> Scan:
    return Scan(**scan | {name: tuple(scan[name]) for name in ("shape", "spacing", "labels")})


def _save(remember: Path | None, fresh: dict[str, Scan]) -> None:
    if remember is None or not fresh:
        return
    scans = {**_recall(remember), **fresh}  # read again: another process may have saved in the meantime
    try:
        plain = {key: asdict(scan) for key, scan in scans.items()}
        write_json(remember, {"sha256": _digest(plain), "scans": plain}, indent=None)
    except OSError as error:
        logger.warning("%s cannot be written (%s): scans will be read again at the next start", remember, error)
