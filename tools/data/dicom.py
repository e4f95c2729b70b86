"""Reads DICOM series, and verifies their geometry: the affine matrix must put each slice where its own header does.

pydicom reads headers and uncompressed pixels, ITK (GDCM) compressed pixels. GDCM alone drops slices that it cannot
read, reads beyond the end of truncated ones, places the slices of a tilted gantry as if they were not shifted, and
gives all slices the pixel type of the first.
"""

from __future__ import annotations

import hashlib
import mmap
import re
import tempfile
from collections import Counter, defaultdict
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cached_property
from io import BytesIO
from pathlib import Path
from typing import Any

import nibabel as nib
import numpy as np
import pydicom
import pydicom.encaps

from tools.data.kinds import SERIES_NAME, UnfitError, dicom_files
from tools.data.rasters import check_directions

PYDICOM_3 = hasattr(pydicom.encaps, "generate_frames")  # MONAI Label needs version 2

# Largest distance between the place of a slice's corner in the volume, and by its own header. Rounding of positions
# reaches 0.1 mm. For thin slices it is a quarter of the gap: a missing slice moves others by half a gap or more.
PLACE_TOLERANCE = 0.25  # mm
AXES_TOLERANCE = 0.01  # of lengths and the scalar product of directions; rounding to 3 digits reaches 0.001
LARGEST_SLOPES = 1e6  # ratio of the largest and the smallest rescale slope; PET reaches 1e3
IMAGES = "1.2.840.10008.5.1.4.1.1."  # storage classes, whose next number tells
NO_SCANS = {
    "7": "screenshots",
    "9": "waveforms",
    "11": "presentation states",
    "66": "segmentations and registrations",
    "88": "structured reports",
    "104": "documents",
    "481": "dose maps, contours and plans",
}
PIXEL_TYPE = (  # of which a series has one
    "Rows",
    "Columns",
    "SamplesPerPixel",
    "PhotometricInterpretation",
    "BitsAllocated",
    "BitsStored",
    "PixelRepresentation",
)
HEADER = [  # what the first reading of a header keeps
    *PIXEL_TYPE,
    "SOPClassUID",
    "ImageType",
    "SeriesInstanceUID",
    "SeriesDescription",
    "NumberOfFrames",
    "PixelSpacing",
    "ImagePositionPatient",
    "ImageOrientationPatient",
    "RescaleSlope",
    "RescaleIntercept",
    "SharedFunctionalGroupsSequence",
    "PerFrameFunctionalGroupsSequence",
    "EchoTime",
    "DiffusionBValue",
    "TemporalPositionIdentifier",
    "TriggerTime",
]
VOLUMES_DIFFER_IN = ("ImageType", "EchoTime", "DiffusionBValue", "TemporalPositionIdentifier", "TriggerTime")


@dataclass(frozen=True)
class Frame:
    """One slice: a file, or one frame of a file with several.

    Attributes:
        path: its file.
        number: of the frame in its file.
        position: centre of its first pixel, [3], mm, in DICOM's axes (to the left, posterior and superior).
        axes: directions along a row and along a column, [2, 3].
        spacing: distance between the columns and between the rows, [2], mm.
        slope: of the rescaling of stored to real values.
        intercept: of the same.
    """

    path: Path
    number: int
    position: np.ndarray
    axes: np.ndarray
    spacing: np.ndarray
    slope: float
    intercept: float

    @property
    def name(self) -> str:
        """File, and number of the frame if there are several."""
        return self.path.name if self.number < 0 else f"frame {self.number} (counted from 0) of {self.path.name}"


@dataclass(frozen=True)
class Series:
    """The images of one series in a folder.

    Attributes:
        name: its UID, as the last part of the path of a scan.
        headers: of the files that hold its slices, without pixels.
    """

    name: str
    headers: dict[Path, pydicom.Dataset]

    @cached_property
    def slices(self) -> int:
        """Number of slices in all files."""
        return sum(_frames_of(header) for header in self.headers.values())

    def __str__(self) -> str:
        """Description, number of slices and spacing, for lists of series."""
        header = next(iter(self.headers.values()))
        text = f"{self.name} {str(header.get('SeriesDescription', ''))!r} ({self.slices} slices"
        try:
            spacing = np.linalg.norm(_affine(_sorted_frames(self.headers))[:3, :3], axis=0)
        except UnfitError:
            return f"{text})"
        return f"{text}, {' x '.join(f'{size:.4g}' for size in spacing)} mm)"


# ----------------------------------------------------------------------------------------------- files and series


def read_header(path: Path) -> pydicom.Dataset | None:
    """Read the header of a file without its pixels; None if it is damaged."""
    try:
        with path.open("rb") as file, mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as content:
            # a map, because `read` of a file takes the memory that a damaged header asks for
            header = pydicom.dcmread(content, force=True, stop_before_pixels=True, specific_tags=HEADER)
            list(header.iterall())  # converts all values
            return header
    except Exception:  # of any kind, by a damaged value
        return None


def no_scan(header: pydicom.Dataset) -> str | None:
    """What a DICOM object is that is no image of a scan, in the plural; None if it is one, or is damaged."""
    kind = NO_SCANS.get(str(header.get("SOPClassUID", "")).removeprefix(IMAGES).partition(".")[0])
    if kind is not None and not (kind == "screenshots" and "ImagePositionPatient" in header):  # converted scans
        return kind
    if "SOPClassUID" in header and "Rows" not in header:
        return "objects without an image"
    return "localizers" if "LOCALIZER" in _words(header.get("ImageType")) else None


def _words(value: object) -> list[str]:
    """Entries of a value that may have one or several, or be missing."""
    return [str(word).upper() for word in _listed(value)]


def _listed(value: object) -> list:
    return [] if value is None else [value] if isinstance(value, str) else list(value)


def series_name(header: pydicom.Dataset) -> str:
    """UID of the series of a slice; if it is none, a name made of it, because it becomes part of paths."""
    uid = str(header.get("SeriesInstanceUID", ""))
    return uid if SERIES_NAME.fullmatch(uid) else f"series-{hashlib.sha256(uid.encode()).hexdigest()[:8]}"


def series_in(folder: Path) -> tuple[list[Series], Counter[str]]:
    """Return the series of a folder, the one with most slices first, and what other DICOM objects it holds.

    Raises:
        UnfitError: the header of a file cannot be read, or a file that should be a slice is none.
    """
    files = dicom_files(folder)
    series: dict[str, dict[Path, pydicom.Dataset]] = {}
    objects: dict[Path, pydicom.Dataset] = {}
    for path in files:
        header = read_header(path)
        if header is None or not ("SOPClassUID" in header or "Rows" in header):
            raise UnfitError(f"is incomplete: the header of its file {path.name} cannot be read")
        if no_scan(header) is None:
            series.setdefault(series_name(header), {})[path] = header
        else:
            objects[path] = header
    for path, header in list(objects.items()):
        mates = series.get(series_name(header), {})
        turns = {str(mate.get("ImageOrientationPatient")) for mate in mates.values()}
        if "Rows" in header and str(header.get("ImageOrientationPatient")) in turns:
            mates[path] = objects.pop(path)  # a slice that is said to be something else
    kinds = {header.get("SOPClassUID") for one in series.values() for header in one.values() if "Rows" in header}
    for path, header in objects.items():
        own = "SeriesInstanceUID" in header and series_name(header) not in series
        cut = header.get("SOPClassUID") in kinds or not own
        if cut and "Rows" not in header:
            raise UnfitError(f"is incomplete: the header of its file {path.name} has no Rows")
    others = Counter(map(no_scan, objects.values()))
    if series and (lost := _lost(folder, files)):
        raise UnfitError(
            f"is incomplete: found {len(files)} DICOM files, expected {len(files) + len(lost)}: {lost[0].name} "
            f"is named like them, but is {'empty' if lost[0].stat().st_size == 0 else 'none'}"
        )
    return sorted((Series(*one) for one in series.items()), key=lambda one: (-one.slices, one.name)), others


def _lost(folder: Path, files: list[Path]) -> list[Path]:
    """Find files that are named like the slices and are no DICOM: damaged ones."""

    def pattern(path: Path) -> str:
        return path.suffix if re.fullmatch(r"\.\w*[a-z]\w*", path.suffix, re.I) else re.sub(r"\d+", "#", path.name)

    patterns = {pattern(path) for path in files}
    others = sorted(set(folder.iterdir()) - set(files))
    return [
        path
        for path in others
        if pattern(path) in patterns and path.is_file() and not path.name.startswith((".", "DICOMDIR"))
    ]


def find_series(path: Path) -> Series:
    """Find the series of a scan: a folder with one, `FOLDER/UID`, or one file.

    Raises:
        UnfitError: there is none, or there are several.
    """
    if path.is_file():
        header = read_header(path)
        if header is None:
            raise UnfitError("is a DICOM file whose header cannot be read")
        if kind := no_scan(header):
            raise UnfitError(f"is no scan: found {kind} (DICOM), expected images")
        return Series(series_name(header), {path: header})
    found, others = series_in(path if path.is_dir() else path.parent)
    if not path.is_dir():
        found = [one for one in found if one.name == path.name]
    if not found:
        listed = ", ".join(f"{count} {kind}" for kind, count in others.items()) or "no DICOM image that can be read"
        raise UnfitError(f"holds {listed}, expected a series")
    if len(found) > 1:
        raise UnfitError(
            f"holds {len(found)} DICOM series, expected 1: {'; '.join(map(str, found))}. Choose with dicom_series: "
            "`each` takes each as a scan, `largest` the one with most slices"
        )
    return found[0]


# ------------------------------------------------------------------------------------------------------- geometry


def _frames_of(header: pydicom.Dataset) -> int:
    return max(1, int(header.get("NumberOfFrames") or 1))


def _frames(path: Path, header: pydicom.Dataset) -> Iterator[Frame]:
    """Geometry and scaling of each frame of a file.

    Raises:
        UnfitError: an entry is missing, or is no number.
    """
    several = "NumberOfFrames" in header and _frames_of(header) > 1
    groups = _listed(header.get("PerFrameFunctionalGroupsSequence"))
    if several and len(groups) != _frames_of(header):
        raise UnfitError(
            f"has {_frames_of(header)} frames in {path.name}, but places for {len(groups)}, expected one each"
        )
    for number in range(_frames_of(header)):
        where = [*groups[number : number + 1], *_listed(header.get("SharedFunctionalGroupsSequence"))]

        def entry(key: str, count: int, sequence: str, default: Any = None, where: list = where) -> np.ndarray:
            value = next((group[sequence][0].get(key) for group in where if group.get(sequence)), None)
            value = header.get(key, default) if value is None else value
            try:
                numbers = np.array(_listed(value) if count > 1 else [value], dtype=float)
            except (TypeError, ValueError):
                numbers = np.empty(0)
            if numbers.shape != (count,) or not np.isfinite(numbers).all():
                raise UnfitError(f"has no usable {key} in {path.name}: found {value}, expected {count} numbers")
            return numbers

        spacing = entry("PixelSpacing", 2, "PixelMeasuresSequence")[::-1]
        if min(spacing) <= 0:
            raise UnfitError(f"has the pixel spacing {[*map(float, spacing)]} mm in {path.name}, expected more than 0")
        axes = entry("ImageOrientationPatient", 6, "PlaneOrientationSequence").reshape(2, 3)
        if np.abs(axes @ axes.T - np.eye(2)).max() > AXES_TOLERANCE:
            found = ", ".join(f"{number:.4g}" for number in axes.flat)
            raise UnfitError(
                f"has an impossible ImageOrientationPatient in {path.name}: found {found}, expected two directions of "
                "length 1 at right angles"
            )
        yield Frame(
            path,
            number if several else -1,
            entry("ImagePositionPatient", 3, "PlanePositionSequence"),
            axes,
            spacing,
            float(entry("RescaleSlope", 1, "PixelValueTransformationSequence", 1)[0]),
            float(entry("RescaleIntercept", 1, "PixelValueTransformationSequence", 0)[0]),
        )


def _sorted_frames(headers: dict[Path, pydicom.Dataset]) -> list[Frame]:
    """All frames of a series, along the normal of the first."""
    frames = [frame for path, header in headers.items() for frame in _frames(path, header)]
    normal = np.cross(*frames[0].axes)
    return sorted(frames, key=lambda frame: float(normal @ frame.position))


def _affine(frames: list[Frame]) -> np.ndarray:
    """Affine matrix [4, 4] from voxels (column, row, slice) to mm in DICOM's axes.

    The third column is the way from the first to the last slice, so that slices of a tilted gantry stay where they are:
    the matrix is then sheared. Formula: DICOM PS3.3, C.7.6.2.1.1.
    """
    first, last = frames[0], frames[-1]
    affine = np.eye(4)
    affine[:3, :2] = first.axes.T * first.spacing
    affine[:3, 2] = (last.position - first.position) / max(len(frames) - 1, 1)
    affine[:3, 3] = first.position
    return affine


def _check_places(frames: list[Frame], headers: dict[Path, pydicom.Dataset]) -> np.ndarray:
    """Return the affine matrix; refuse frames that it puts elsewhere than their own headers do.

    Raises:
        UnfitError: a single slice, several volumes, a missing, turned or displaced slice.
    """
    if len(frames) == 1:
        raise UnfitError(f"is 2D: found a single slice, {frames[0].path.name}, expected a volume")
    places = Counter(tuple(frame.position.round(3)) for frame in frames)
    if len(places) == 1:
        raise UnfitError(f"has all its {len(frames)} slices at the same place, expected a position for each")
    if len(places) < len(frames):
        raise UnfitError(_volumes_text(frames, len(places), headers))
    affine = _affine(frames)
    check_directions(affine[:3, :3])
    rows, columns = (next(iter(headers.values())).get(key) - 1 for key in ("Rows", "Columns"))
    corners = np.array([[0, 0], [columns, 0], [0, rows]])
    tolerance = min(PLACE_TOLERANCE, np.linalg.norm(affine[:3, 2]) / 4)
    for number, frame in enumerate(frames):
        own = frame.position + corners @ (frame.axes * frame.spacing[:, None])
        loaded = (affine @ np.column_stack([corners, np.full((3, 1), number), np.ones((3, 1))]).T)[:3].T
        apart = np.linalg.norm(own - loaded, axis=1)
        if apart[0] > tolerance:
            gaps = np.linalg.norm(np.diff([frame.position for frame in frames], axis=0), axis=1)
            raise UnfitError(
                f"has uneven gaps between its {len(frames)} slices: found {gaps.min():.3g} to {gaps.max():.3g} mm, and "
                f"{frame.name} {apart[0]:.3g} mm off its place in a regular grid, expected at most {tolerance:.3g} mm "
                "(is a slice missing, or there twice?)"
            )
        if apart.max() > tolerance:
            raise UnfitError(
                f"has slices of different orientation or pixel spacing: a corner of {frame.name} lies "
                f"{apart.max():.3g} mm off that of the first slice, {frames[0].name}, expected at most "
                f"{tolerance:.3g} mm"
            )
    return affine


def _volumes_text(frames: list[Frame], places: int, headers: dict[Path, pydicom.Dataset]) -> str:
    if len(frames) % places:
        seen: dict[tuple, Frame] = {}
        for frame in frames:
            other = seen.setdefault(tuple(frame.position.round(3)), frame)
            if other is not frame:
                return f"has two slices at the same place: {other.name} and {frame.name}, expected one"
    volumes = len(frames) // places
    differ = [key for key in VOLUMES_DIFFER_IN if len({str(one.get(key)) for one in headers.values()}) > 1]
    why = f" (they differ in {', '.join(differ)})" if differ else ""
    return (
        f"holds {volumes} volumes in one series: found {places} places for {len(frames)} slices{why}, expected one "
        "volume: export each as a series of its own, or convert it with dcm2niix"
    )


# --------------------------------------------------------------------------------------------------------- voxels


def read_dicom(path: Path, max_bytes: float) -> nib.Nifti1Image:
    """Read a series as a volume [columns, rows, slices] with the true affine matrix, in float32.

    Slices are in the order of their normal, and each is scaled by its own slope and intercept.

    Raises:
        UnfitError: there are several series or volumes, a file is damaged, or the slices form no regular grid.
    """
    series = find_series(path)
    headers = series.headers
    _check_types(headers)
    frames = _sorted_frames(headers)
    slopes = np.abs([frame.slope for frame in frames])
    if slopes.min() == 0 or slopes.max() > LARGEST_SLOPES * slopes.min():
        worst = frames[int(slopes.argmin() if slopes.min() == 0 else slopes.argmax())]
        raise UnfitError(f"has the rescale slope {worst.slope:g} in {worst.name}, expected one like the other slices'")
    affine = _check_places(frames, headers)
    first = next(iter(headers.values()))
    shape = (int(first.Columns), int(first.Rows), len(frames))
    if 4 * np.prod(shape, dtype=float) > max_bytes:
        raise UnfitError(f"is too large: {shape} voxels in 4 bytes each are more than max_scan_gb")
    volume = np.empty(shape, np.float32, order="F")
    files: dict[Path, list[tuple[int, Frame]]] = defaultdict(list)
    for place, frame in enumerate(frames):
        files[frame.path].append((place, frame))
    for file, placed in files.items():
        placed.sort(key=lambda pair: pair[1].number)
        for (place, _), pixels in zip(placed, _pixels(file, [frame for _, frame in placed]), strict=True):
            volume[:, :, place] = pixels.T
    return nib.Nifti1Image(volume, np.diag([-1.0, -1, 1, 1]) @ affine)


def slice_files(path: Path) -> list[Path]:
    """Files of a series of single slices, in the order of the slices of `read_dicom`.

    Raises:
        UnfitError: there is no series, or there are several; or a file holds several slices.
    """
    if not path.exists() and not path.parent.is_dir():
        raise UnfitError("does not exist any more")
    frames = _sorted_frames(find_series(path).headers)
    if any(frame.number >= 0 for frame in frames):
        raise UnfitError(f"holds several slices in {frames[0].path.name}, expected a file for each")
    return [frame.path for frame in frames]


def _check_types(headers: dict[Path, pydicom.Dataset]) -> None:
    """Refuse slices of different size or pixel type, colour images, and mosaics."""
    paths = list(headers)
    first = headers[paths[0]]
    for key in ("SOPClassUID", *PIXEL_TYPE):
        values = Counter(str(header.get(key)) for header in headers.values())
        if len(values) > 1:
            usual = values.most_common(1)[0][0]
            odd = next(path for path in paths if str(headers[path].get(key)) != usual)
            raise UnfitError(
                f"has slices of different {key}: found {headers[odd].get(key)} in {odd.name}, expected {usual} as in "
                f"{values[usual]} others"
            )
        if first.get(key) is None:
            raise UnfitError(f"has no {key} in {paths[0].name}, expected one")
    if first.SamplesPerPixel != 1:
        raise UnfitError(f"is a colour image ({first.PhotometricInterpretation}), expected one value for each voxel")
    if first.BitsAllocated not in (8, 16, 32) or not 0 < first.BitsStored <= first.BitsAllocated:
        found = f"{first.BitsStored} of {first.BitsAllocated} bits"
        raise UnfitError(f"has pixels of {found} in {paths[0].name}, expected 8, 16 or 32 bits")
    if first.PhotometricInterpretation not in ("MONOCHROME1", "MONOCHROME2"):
        raise UnfitError(f"is a colour image ({first.PhotometricInterpretation}), expected one value for each voxel")
    for path, header in headers.items():
        if "MOSAIC" in _words(header.get("ImageType")):
            raise UnfitError(f"is a mosaic: {path.name} shows all slices in one image; convert it with dcm2niix")


def _pixels(path: Path, frames: list[Frame]) -> Iterator[np.ndarray]:
    """Scaled pixels [rows, columns] of the frames of a file, in the order of the file.

    Raises:
        UnfitError: the pixels are fewer or more than the header says, or cannot be decoded.
    """
    try:
        header = pydicom.dcmread(BytesIO(path.read_bytes()), force=True)
        if "TransferSyntaxUID" not in header.file_meta:  # as in files without a preamble
            names = ("ExplicitVRLittleEndian", "ImplicitVRLittleEndian")
            implicit = header.original_encoding[0] if PYDICOM_3 else header.is_implicit_VR
            header.file_meta.TransferSyntaxUID = getattr(pydicom.uid, names[implicit])
        compressed = header.file_meta.TransferSyntaxUID.is_compressed
    except Exception as error:
        raise UnfitError(f"is damaged: its file {path.name} cannot be read") from error
    if compressed:
        stored = _decoded(path, header, len(frames))
    else:
        found = len(header.get("PixelData", b""))
        expected = header.Rows * header.Columns * len(frames) * header.BitsAllocated // 8
        if not expected <= found <= expected + 1:  # an even number of bytes
            what = "is truncated" if found < expected else "does not fit its header"
            raise UnfitError(f"{what}: found {found} bytes of pixels in {path.name}, expected {expected}")
        stored = header.pixel_array
    for pixels, frame in zip(stored.reshape(len(frames), header.Rows, header.Columns), frames, strict=True):
        yield pixels if (frame.slope, frame.intercept) == (1, 0) else pixels * frame.slope + frame.intercept


def _decoded(path: Path, header: pydicom.Dataset, frames: int) -> np.ndarray:
    """Stored values of compressed pixels, [frames, rows, columns].

    GDCM gets a file of nothing but them: it would scale all frames as the first, and take the memory that damaged
    entries ask for.
    """
    import itk  # takes seconds, and only compressed pixels need it

    plain = pydicom.Dataset()
    plain.file_meta = pydicom.dataset.FileMetaDataset()
    plain.file_meta.TransferSyntaxUID = header.file_meta.TransferSyntaxUID
    plain.SOPClassUID = pydicom.uid.MultiFrameGrayscaleWordSecondaryCaptureImageStorage
    plain.SOPInstanceUID = pydicom.uid.generate_uid()
    plain.NumberOfFrames = frames
    try:
        for key in (*PIXEL_TYPE, "HighBit"):
            plain[key] = header[key]
        split = pydicom.encaps.generate_frames if PYDICOM_3 else pydicom.encaps.generate_pixel_data_frame
        streams = split(header.PixelData, **{"number_of_frames" if PYDICOM_3 else "nr_frames": frames})
        plain.PixelData = pydicom.encaps.encapsulate(list(streams))
        plain["PixelData"].is_undefined_length = True
        with tempfile.TemporaryDirectory() as folder:
            if PYDICOM_3:
                plain.save_as(f"{folder}/frames.dcm", enforce_file_format=True)
            else:
                plain.is_little_endian, plain.is_implicit_VR = True, False
                plain.save_as(f"{folder}/frames.dcm", write_like_original=False)
            image = itk.array_from_image(itk.imread(f"{folder}/frames.dcm", pixel_type=itk.D))
    except Exception as error:  # of any kind, by a damaged value or stream
        raise UnfitError(f"is damaged: the pixels of {path.name} cannot be decompressed") from error
    if image.size != frames * header.Rows * header.Columns:
        raise UnfitError(f"does not fit its header: found {image.size} pixels in {path.name}")
    return image
