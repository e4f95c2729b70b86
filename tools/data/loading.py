"""Opens scans of every format: with their own geometry, verified as far as the format allows, or not at all."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import nibabel as nib
import numpy as np
from monai.config import KeysCollection
from monai.data import ITKReader, NibabelReader
from monai.transforms import LoadImage, LoadImaged
from monai.utils import ensure_tuple

from tools.common.text import size_text
from tools.data.compressed import GZIP_MAGIC, check_claim, check_size, inflate, inflate_start
from tools.data.dicom import read_dicom
from tools.data.kinds import SERIES_NAME, UnfitError, is_dicom, require_regular
from tools.data.rasters import check_directions, check_raster
from tools.data.scans import ScanError, files_of

NIFTI_HEADER = 540  # bytes of the longest, that of NIfTI-2
MGH_DATA = 284  # first byte of the voxels
MGH_REST = 1 << 20  # bytes that may follow the voxels
CIFTI = range(3000, 3100)  # intent codes
COMPLEX = "has complex values, expected real ones: save magnitude or phase alone"
TO_MM = {1: ("metres", 1000.0), 3: ("microns", 0.001)}  # by the code of the unit
VOXEL_SIZES = (0.001, 100.0)  # mm, that a scan in metres or microns may have


def open_scan(path: str | Path, max_bytes: float = math.inf) -> nib.Nifti1Pair:
    """Open a file, a DICOM folder, or one series of it (`FOLDER/UID`), as an image whose affine matrix is in mm, RAS.

    Args:
        path: the scan.
        max_bytes: the largest scan that is read.

    Raises:
        UnfitError: it cannot be read, or its header contradicts its voxels.
    """
    path = Path(path)
    name = path.name.lower()
    if path.is_dir() or (SERIES_NAME.fullmatch(path.name) and not path.exists() and path.parent.is_dir()):
        return read_dicom(path, max_bytes)
    require_regular(path)
    if path.stat().st_size == 0:
        raise UnfitError("is empty: found 0 bytes, expected an image")
    if name.endswith((".nii", ".nii.gz")):
        return _in_mm(_open_nifti(path, max_bytes))
    if name.endswith((".hdr", ".img", ".img.gz")) and not is_dicom(path.parent, path.name):
        return _in_mm(_open_pair(path, max_bytes))
    if name.endswith((".mgz", ".mgh")):
        return _open_mgh(path, max_bytes)
    if name.endswith((".mha", ".mhd", ".nrrd", ".nhdr")):
        return _open_itk(path, max_bytes)
    if is_dicom(path.parent, path.name):
        return read_dicom(path, max_bytes)
    raise UnfitError("is of a kind that is not read, expected NIfTI, MetaImage, NRRD, DICOM, Analyze or MGH")


def _open_nifti(path: Path, max_bytes: float) -> nib.Nifti1Pair:
    data, compressed = path.read_bytes(), path.name.lower().endswith(".gz")
    if data[:2] == GZIP_MAGIC and not compressed:
        raise UnfitError("is compressed, which its name does not say: rename it to .nii.gz")
    header = _nifti_header(inflate_start(data, NIFTI_HEADER) if compressed else data[:NIFTI_HEADER])
    voxels = _nifti_bytes(header)
    check_directions(header.get_best_affine()[:3, :3])  # nibabel would replace a spacing of 0 by 1
    start = int(header["vox_offset"])
    if start < header.single_vox_offset:
        raise UnfitError(f"has a damaged header: found vox_offset {start}, expected {header.single_vox_offset} or more")
    check_claim(start + voxels, len(data), max_bytes, compressed)
    content = inflate(data, start + voxels) if compressed else data
    check_size(len(content) - start, voxels)
    kind = nib.Nifti2Image if isinstance(header, nib.Nifti2Header) else nib.Nifti1Image
    return kind.from_bytes(content)


def _nifti_header(start: bytes) -> nib.Nifti1Header:
    """Header of a NIfTI file, of which nothing has been corrected."""
    kinds = {348: (nib.Nifti1Header, b"n+1\0", 344), 540: (nib.Nifti2Header, b"n+2\0", 4)}
    sizes = {int.from_bytes(start[:4], order) for order in ("little", "big")}
    for size, (kind, magic, where) in kinds.items():
        if size in sizes and start[where : where + 4] == magic:
            return kind(start[:size], check=False)
    raise UnfitError("cannot be read: its header is not that of a NIfTI file")


def _nifti_bytes(header: nib.AnalyzeHeader) -> int:
    """Bytes of the voxels; refuse what is no volume of numbers."""
    axes = int(header["dim"][0])
    shape = [int(size) for size in header["dim"][1 : max(axes, 0) + 1]]
    if not 1 <= axes <= 7 or min(shape) < 1:
        raise UnfitError(
            f"has a damaged header: found the dimensions {header['dim'].tolist()}, expected 3 sizes above 0"
        )
    if isinstance(header, nib.Nifti1Header) and int(header["intent_code"]) in CIFTI:
        raise UnfitError("is a CIFTI file (surfaces and grey matter), expected a volume: convert it with wb_command")
    code = int(header["datatype"])
    try:
        dtype = header.get_data_dtype()
    except nib.spatialimages.HeaderDataError as error:
        raise UnfitError(f"has a damaged header: found the data type {code}, which there is not") from error
    if dtype.kind == "V":
        raise UnfitError(f"is a colour image ({'RGB' if code == 128 else 'RGBA'}), expected one value for each voxel")
    if dtype.kind == "c":
        raise UnfitError(COMPLEX)
    if int(header["bitpix"]) != 8 * dtype.itemsize:
        found = f"{header['bitpix']} bits for the data type {dtype}"
        raise UnfitError(f"has a damaged header: found {found}, expected {8 * dtype.itemsize}")
    return math.prod(shape) * dtype.itemsize


def _in_mm(image: nib.Nifti1Pair) -> nib.Nifti1Pair:
    """Convert an image in metres or microns; its header's forms are kept, in mm."""
    header = image.header
    unit = int(header["xyzt_units"]) & 7 if isinstance(header, nib.Nifti1Header) else 0
    if unit not in TO_MM:
        return image
    name, factor = TO_MM[unit]
    for key in ("srow_x", "srow_y", "srow_z", "qoffset_x", "qoffset_y", "qoffset_z"):
        header[key] = header[key] * factor
    header["pixdim"][1:4] *= factor
    header["xyzt_units"] = int(header["xyzt_units"]) - unit + 2
    spacing = np.linalg.norm(header.get_best_affine()[:3, :3], axis=0)
    if not VOXEL_SIZES[0] <= spacing.min() <= spacing.max() <= VOXEL_SIZES[1]:
        sizes = " x ".join(f"{size:.4g}" for size in spacing)
        raise UnfitError(f"is in {name} by its header, so that a voxel has {sizes} mm: is the unit (xyzt_units) wrong?")
    return type(image)(image.dataobj, header.get_best_affine(), header)


def _open_pair(path: Path, max_bytes: float) -> nib.Nifti1Pair:
    """Open `.hdr` and `.img`: NIfTI, or Analyze, which has no orientation (nibabel takes its x axis as to the left)."""
    stem = path.name[: -7 if path.name.lower().endswith(".gz") else -4]
    header, data = (path.parent / f"{stem}{end}" for end in (".hdr", ".img"))
    data = data if data.exists() else data.with_name(f"{data.name}.gz")
    for file in (header, data):
        try:
            require_regular(file)
        except UnfitError as error:
            raise UnfitError(f"is incomplete: its file {file.name} {error}") from error
    content = header.read_bytes()
    if len(content) < 348:
        raise UnfitError(f"is truncated: found {len(content)} bytes in {header.name}, expected 348")
    kinds = {b"ni1\0": nib.nifti1.Nifti1PairHeader, b"ni2\0": nib.nifti2.Nifti2PairHeader}
    kind = kinds.get(content[344:348]) or kinds.get(content[4:8]) or nib.AnalyzeHeader
    fields = kind(content[: kind.template_dtype.itemsize], check=False)
    start, voxels = int(fields["vox_offset"]), _nifti_bytes(fields)
    image = nib.load(header)
    compressed = data.suffix == ".gz"
    check_claim(start + voxels, data.stat().st_size, max_bytes, compressed)
    found = len(inflate(data.read_bytes(), start + voxels)) if compressed else data.stat().st_size
    check_size(found - start, voxels)
    if isinstance(image, nib.Nifti1Pair):
        return image
    return nib.Nifti1Image(np.asanyarray(image.dataobj), image.affine)


def _open_mgh(path: Path, max_bytes: float) -> nib.Nifti1Image:
    data, compressed = path.read_bytes(), path.name.lower().endswith("z")
    start = inflate_start(data, MGH_DATA) if compressed else data[:MGH_DATA]
    sizes = [int.from_bytes(start[n : n + 4], "big", signed=True) for n in range(4, 20, 4)]
    item = {0: 1, 1: 4, 3: 4, 4: 2}.get(int.from_bytes(start[20:24], "big"))
    if len(start) < MGH_DATA or start[:4] != b"\0\0\0\1" or min(sizes) < 1 or item is None:
        raise UnfitError("cannot be read: its header is not that of an MGH file")
    voxels = math.prod(sizes) * item
    check_claim(MGH_DATA + voxels, len(data), max_bytes, compressed)
    content = inflate(data, MGH_DATA + voxels + MGH_REST) if compressed else data
    check_size(min(len(content) - MGH_DATA, voxels), voxels)
    image = nib.MGHImage.from_bytes(content)
    return nib.Nifti1Image(np.asanyarray(image.dataobj), image.affine)


def _open_itk(path: Path, max_bytes: float) -> nib.Nifti1Image:
    raster = check_raster(path, max_bytes)
    import itk  # takes seconds, and NIfTI does not need it

    io = itk.ImageIOFactory.CreateImageIO(str(path), itk.CommonEnums.IOFileMode_ReadMode)
    if io is None:
        raise UnfitError("cannot be read: ITK does not know its format")
    io.SetFileName(str(path))
    try:
        io.ReadImageInformation()
    except RuntimeError as error:
        raise UnfitError("has a damaged header: ITK does not understand it") from error
    channels = io.GetNumberOfComponents()
    kind = io.GetPixelTypeAsString(io.GetPixelType())
    if kind in ("rgb", "rgba"):
        raise UnfitError(f"is a colour image ({kind.upper()}), expected one value for each voxel")
    if kind == "complex":
        raise UnfitError(COMPLEX)
    sizes = [io.GetDimensions(axis) for axis in range(io.GetNumberOfDimensions())]
    if [*[channels] * (len(raster.sizes) > len(sizes)), *sizes] != list(raster.sizes):
        raise UnfitError(f"has a damaged header: found the sizes {sizes}, expected {list(raster.sizes)}")
    if len(sizes) < 3:
        raise UnfitError(f"is 2D: found the shape {size_text(sizes)}, expected three axes in space")
    # without a type, ITK's Python takes half a minute to say that it has none for some
    pixel_type = itk.F if channels == 1 else _vector_type(channels)
    image = itk.imread(str(path), pixel_type=pixel_type)
    image.SetMetaDataDictionary(itk.MetaDataDictionary())  # texts, which Python cannot read in any encoding but UTF-8
    array, meta = ITKReader().get_data(image)
    return nib.Nifti1Image(array, meta["affine"])


def _vector_type(channels: int) -> Any:
    import itk

    if channels not in (2, 3, 4):
        raise UnfitError(f"has {channels} values in each voxel, expected a file for each channel, or a 4D file")
    return itk.Vector[itk.F, channels]


class ScanReader(NibabelReader):
    """MONAI's `NibabelReader` for everything that `open_scan` opens.

    MONAI's own readers replace the sform where it disagrees with the voxel size in the header, and misplace the slices
    of a tilted gantry.
    """

    def __init__(self, max_bytes: float = math.inf) -> None:
        super().__init__()
        self.max_bytes = max_bytes

    def verify_suffix(self, filename: Sequence[str | Path] | str | Path) -> bool:
        """Whether the reader takes a file: any."""
        return True

    def read(self, data: Sequence[str | Path] | str | Path, **kwargs: Any) -> Any:
        """Open one file, or one for each channel."""
        self.filenames = ensure_tuple(data)
        images = [open_scan(name, self.max_bytes) for name in self.filenames]
        return images if len(images) > 1 else images[0]


class LoadScan(LoadImage):
    """MONAI's `LoadImage` with our reader: path, or paths of the channels → MetaTensor [C, H, W, D], float32."""

    def __init__(self, max_bytes: float = math.inf) -> None:
        super().__init__(image_only=True, ensure_channel_first=True)
        self.readers: list[Callable] = [ScanReader(max_bytes)]


class LoadScand(LoadImaged):
    """`LoadScan` for the entries of a dictionary.

    Raises:
        ScanError: a file is missing or damaged; a scan may change while a run lasts. The message names it.
    """

    def __init__(self, keys: KeysCollection) -> None:
        super().__init__(keys)
        self._loader = LoadScan()

    def __call__(self, data: Mapping[str, Any], reader: Any = None) -> dict[str, Any]:
        """Load them."""
        try:
            return super().__call__(data, reader)
        except UnfitError as reason:
            raise ScanError(f"{', '.join(files_of(data))}: {reason}") from reason
