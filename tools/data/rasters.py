"""Checks MetaImage and NRRD files before ITK opens them.

ITK believes their headers: it may crash, hang, take any amount of memory, read files anywhere on the machine, or return
memory that nobody wrote to. And it does not read compressed data to their checksum.

Formats: https://itk.org/Wiki/ITK/MetaIO/Documentation and https://teem.sourceforge.net/nrrd/format.html.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from pathlib import Path, PurePath

import numpy as np

from tools.data.compressed import GZIP, ZLIB, check_claim, check_size, inflate
from tools.data.kinds import UnfitError, require_regular

LONGEST_HEADER = 1 << 20  # bytes
META_TYPES = {
    **dict.fromkeys(("MET_CHAR", "MET_UCHAR"), 1),
    **dict.fromkeys(("MET_SHORT", "MET_USHORT"), 2),
    **dict.fromkeys(("MET_INT", "MET_UINT", "MET_LONG", "MET_ULONG", "MET_FLOAT"), 4),
    **dict.fromkeys(("MET_LONG_LONG", "MET_ULONG_LONG", "MET_DOUBLE"), 8),
}
NRRD_TYPES = {
    **dict.fromkeys(("signed char", "int8", "int8_t", "uchar", "unsigned char", "uint8", "uint8_t"), 1),
    **dict.fromkeys(("short", "short int", "signed short", "signed short int", "int16", "int16_t"), 2),
    **dict.fromkeys(("ushort", "unsigned short", "unsigned short int", "uint16", "uint16_t"), 2),
    **dict.fromkeys(("int", "signed int", "int32", "int32_t", "uint", "unsigned int", "uint32", "uint32_t"), 4),
    **dict.fromkeys(("longlong", "long long", "long long int", "signed long long", "int64", "int64_t"), 8),
    **dict.fromkeys(("ulonglong", "unsigned long long", "unsigned long long int", "uint64", "uint64_t"), 8),
    "float": 4,
    "double": 8,
}


@dataclass(frozen=True)
class Raster:
    """What a header says of its voxels.

    Attributes:
        sizes: voxels along the axes, in the order of the header; several values in a voxel are the first of them.
        size: bytes of all voxels, decompressed.
        data: file of the voxels.
        start: first byte of the voxels; None if they are the last bytes of the file.
        compression: `GZIP`, `ZLIB` or None.
    """

    sizes: tuple[int, ...]
    size: int
    data: Path
    start: int | None
    compression: int | None


def check_raster(path: Path, max_bytes: float) -> Raster:
    """Check the header of a `.mha`, `.mhd`, `.nrrd` or `.nhdr`, and its voxels as far as they have a checksum.

    Raises:
        UnfitError: the header is damaged, or does not fit the voxels.
    """
    raster = read_raster(path)
    try:
        require_regular(raster.data)
    except UnfitError as error:
        raise UnfitError(f"has no voxels: its data file {raster.data.name} {error}") from error
    stored = raster.data.stat().st_size - (raster.start or 0)
    if stored <= 0:
        raise UnfitError(f"has no voxels: found 0 bytes in its data file {raster.data.name}")
    check_claim(raster.size, stored, max_bytes, raster.compression is not None)
    if raster.compression is not None:
        with raster.data.open("rb") as file:
            file.seek(raster.start or 0)
            stored = len(inflate(file.read(), raster.size, raster.compression))
    if raster.start is not None:
        check_size(stored, raster.size)
    return raster


def voxel_file(path: Path) -> Path:
    """File that holds the voxels of a scan: by the header of a `.mhd` or `.nhdr`, the name of a `.hdr`, or itself."""
    try:
        if path.suffix.lower() in (".mhd", ".nhdr"):
            return read_raster(path).data
    except (OSError, UnfitError):
        return path
    pair = (path.with_suffix(end) for end in (".img", ".img.gz"))
    return next(filter(Path.exists, pair), path) if path.suffix.lower() == ".hdr" else path


def unsaid(path: Path) -> str | None:
    """Which part of its place in the world a header leaves out, and what ITK takes for it; None if it says all."""
    text = _start(path)
    if path.suffix.lower() in (".nrrd", ".nhdr"):
        fields = _nrrd_fields(text)[0]
        sized = "space directions" in fields or "spacings" in fields
        oriented = "space" in fields
    else:
        fields = _meta_fields(text)[0]
        sized, oriented = "ElementSpacing" in fields or "ElementSize" in fields, True  # the axes have a default
    if not sized:
        return "voxel size: 1 mm is a guess"
    return None if oriented else "orientation (no `space`): left and right are a guess"


def read_raster(path: Path) -> Raster:
    """Read the header of a MetaImage or NRRD file.

    Raises:
        UnfitError: it is damaged, or asks for something that is not read.
    """
    text = _start(path)
    return _nrrd(path, text) if path.suffix.lower() in (".nrrd", ".nhdr") else _metaimage(path, text)


def _start(path: Path) -> bytes:
    with path.open("rb") as file:
        return file.read(LONGEST_HEADER)


def _metaimage(path: Path, text: bytes) -> Raster:
    fields, end = _meta_fields(text)
    axes = _numbers(fields, "NDims", 1, int)[0]
    if not 2 <= axes <= 4:
        raise UnfitError(f"has a damaged header: found NDims = {axes}, expected 3")
    sizes = _numbers(fields, "DimSize", axes, int)
    channels = _numbers({"ElementNumberOfChannels": "1", **fields}, "ElementNumberOfChannels", 1, int)[0]
    if channels < 1 or min(sizes) < 1:
        found = f"DimSize = {fields['DimSize']} and ElementNumberOfChannels = {channels}"
        raise UnfitError(f"has a damaged header: found {found}, expected numbers above 0")
    _check_meta_geometry(fields, axes)
    if fields.get("ElementType") not in META_TYPES:
        raise UnfitError(
            f"has a damaged header: found ElementType = {fields.get('ElementType')}, expected MET_SHORT or the like"
        )
    if fields.get("BinaryData", "True").lower() != "true":
        raise UnfitError("holds its voxels as text (BinaryData is not True), expected binary data: save it again")
    name, start = fields["ElementDataFile"], _numbers({"HeaderSize": "0", **fields}, "HeaderSize", 1, int)[0]
    if start < -1:
        raise UnfitError(f"has a damaged header: found HeaderSize = {start}, expected a number of bytes")
    data = path
    if name.upper() == "LOCAL":
        start = end
    else:
        data = _beside(path, name)
    compressed = fields.get("CompressedData", "").lower() == "true"
    size = math.prod(sizes) * channels * META_TYPES[fields["ElementType"]]
    sizes = (channels, *sizes) if channels > 1 else sizes
    return Raster(sizes, size, data, None if start < 0 else start, ZLIB if compressed else None)


def _meta_fields(text: bytes) -> tuple[dict[str, str], int]:
    """Fields of a MetaImage header, and the number of its bytes."""
    fields: dict[str, str] = {}
    end = 0
    for line in text.splitlines(keepends=True):
        end += len(line)
        key, _, value = line.decode("latin-1").partition("=")
        fields[key.strip()] = value.strip()
        if key.strip() == "ElementDataFile":
            return fields, end
        if not value and line.strip():
            break
    raise UnfitError("cannot be read: its header is not that of a MetaImage, `KEY = VALUE` up to ElementDataFile")


def _check_meta_geometry(fields: dict[str, str], axes: int) -> None:
    for key in ("ElementSpacing", "ElementSize"):
        if key in fields and min(_numbers(fields, key, axes)) <= 0:
            raise UnfitError(f"has a degenerate spacing: found {key} = {fields[key]}, expected numbers above 0")
    for key in ("Offset", "Position", "Origin"):
        if key in fields:
            _numbers(fields, key, axes)
    for key in ("TransformMatrix", "Rotation", "Orientation"):
        if key in fields:
            check_directions(np.reshape(_numbers(fields, key, axes * axes), (axes, axes)))


def check_directions(matrix: np.ndarray) -> None:
    """Refuse axes that do not span the space.

    Raises:
        UnfitError: two axes have the same direction, or one has none.
    """
    lengths = np.linalg.norm(matrix, axis=0)
    if not np.isfinite(matrix).all() or not lengths.all() or abs(np.linalg.det(matrix / lengths)) < 1e-6:
        rows = " ".join(str(row.round(4).tolist()) for row in matrix)
        raise UnfitError(
            f"has a degenerate affine matrix: found the rows {rows}, expected three axes with a spacing > 0"
        )


def _numbers(fields: dict[str, str], key: str, count: int, kind: type = float) -> tuple:
    """Read a field of so many numbers."""
    words = fields.get(key, "").split()
    try:
        numbers = tuple(kind(word) for word in words)
    except ValueError:
        numbers = ()
    if len(numbers) != count or not np.isfinite(numbers).all():
        found = ascii(fields.get(key))[:60]
        raise UnfitError(f"has a damaged header: found {key} = {found}, expected {count} number{'s' * (count > 1)}")
    return numbers


def _beside(path: Path, name: str) -> Path:
    """Path of the data file that a header names."""
    if name.upper().startswith("LIST") or "%" in name or (len(name.split()) > 1 and not (path.parent / name).exists()):
        raise UnfitError(f"names several data files ({name!r}), expected one: save it again in one file")
    if PurePath(name).is_absolute() or ".." in PurePath(name).parts:
        raise UnfitError(f"names the data file {name!r}, expected one in its own folder")
    return path.parent / name


def _nrrd(path: Path, text: bytes) -> Raster:
    fields, end = _nrrd_fields(text)
    axes = _numbers(fields, "dimension", 1, int)[0]
    if not 2 <= axes <= 4:
        raise UnfitError(f"has a damaged header: found dimension: {axes}, expected 3")
    sizes = _numbers(fields, "sizes", axes, int)
    if min(sizes) < 1:
        raise UnfitError(f"has a damaged header: found sizes: {fields['sizes']}, expected numbers above 0")
    item = NRRD_TYPES.get(fields.get("type", "").lower())
    if item is None:
        raise UnfitError(f"has a damaged header: found type: {fields.get('type')}, expected short or the like")
    encoding = fields.get("encoding", "").lower()
    if encoding not in ("raw", "gzip", "gz"):
        raise UnfitError(f"has the encoding {encoding!r}, expected raw or gzip: save it again")
    units = set(fields.get("space units", "").replace('"', " ").split()) - {"mm", "???", "none"}
    if units:
        raise UnfitError(f"has the units {', '.join(sorted(units))}, expected mm: convert it")
    skip = _numbers({"byte skip": "0", **fields}, "byte skip", 1, int)[0]
    if skip < -1 or fields.get("line skip", "0") != "0":
        raise UnfitError("skips lines of its data file, expected none: save it again")
    name = fields.get("data file", fields.get("datafile"))
    data = path if name is None else _beside(path, name)
    if name is None and path.suffix.lower() == ".nhdr":
        raise UnfitError("has no voxels: found no `data file:` in its header, expected one")
    start = (end if name is None else 0) + max(skip, 0)
    compression = GZIP if encoding != "raw" else None
    return Raster(sizes, math.prod(sizes) * item, data, None if skip < 0 else start, compression)


def _nrrd_fields(text: bytes) -> tuple[dict[str, str], int]:
    """Fields of an NRRD header, and the number of its bytes."""
    fields: dict[str, str] = {}
    lines = text.splitlines(keepends=True)
    end = len(lines[0])
    if not text.startswith(b"NRRD000"):
        raise UnfitError("cannot be read: its header is not that of an NRRD, which begins with NRRD0004 or the like")
    for line in lines[1:]:
        end += len(line)
        key, colon, value = line.decode("latin-1").partition(":")
        if not line.strip():
            break
        if colon and not key.startswith("#"):
            fields[key.strip().lower()] = value.strip()
    return fields, end
