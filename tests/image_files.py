"""Real image files for tests, in every format."""

from __future__ import annotations

from pathlib import Path

import itk
import nibabel as nib
import numpy as np
import pydicom

SHAPE, SPACING = (10, 12, 14), (1.0, 2.0, 3.0)
SHARED = Path(__file__).resolve().parents[2] / "shared/data"


def volume(seed=0, shape=SHAPE):
    return np.random.default_rng(seed).integers(-1000, 1000, shape).astype(np.int16)


def write_nifti(path, array=None, affine=None):
    array = volume() if array is None else array
    nib.save(nib.Nifti1Image(array, np.diag([*SPACING, 1]) if affine is None else affine), path)
    return path


def write_itk(path, array=None, compression=False):
    array = volume() if array is None else array
    image = itk.image_from_array(np.ascontiguousarray(array.T))
    image.SetSpacing(SPACING[: array.ndim])
    itk.imwrite(image, str(path), compression=compression)
    return path


def write_any(path, seed=0):
    return (write_nifti if ".nii" in path.name else write_itk)(path, volume(seed))


def write_dicom(folder, slices=5, extension=".dcm", syntax="ExplicitVRLittleEndian", **tags):
    """Write a CT series of 20 x 24 voxels (in MONAI's order), 1.5 x 1.5 x 3 mm."""
    uid = pydicom.uid.generate_uid
    folder.mkdir(exist_ok=True, parents=True)
    series = uid()
    for number in range(slices):
        data = pydicom.Dataset()
        data.file_meta = pydicom.dataset.FileMetaDataset()
        data.file_meta.TransferSyntaxUID = getattr(pydicom.uid, syntax)
        data.SOPClassUID = pydicom.uid.CTImageStorage
        data.SOPInstanceUID = data.file_meta.MediaStorageSOPInstanceUID = uid()
        data.SeriesInstanceUID, data.StudyInstanceUID, data.Modality = series, "1.2.3", "CT"
        data.Rows, data.Columns, data.PixelSpacing, data.SliceThickness = 24, 20, [1.5, 1.5], 3
        data.ImagePositionPatient, data.ImageOrientationPatient = [0, 0, 3 * number], [1, 0, 0, 0, 1, 0]
        data.SamplesPerPixel, data.PhotometricInterpretation = 1, "MONOCHROME2"
        data.BitsAllocated, data.BitsStored, data.HighBit, data.PixelRepresentation = 16, 16, 15, 1
        data.PixelData = volume(number, (24, 20)).tobytes()
        for tag, value in tags.items():
            setattr(data, tag, value)
        data.file_meta.MediaStorageSOPClassUID = data.SOPClassUID
        strict = {"enforce_file_format": True}
        if int(pydicom.__version_info__[0]) < 3:  # as MONAI Label has it
            data.is_little_endian, data.is_implicit_VR = True, syntax.startswith("Implicit")
            strict = {"write_like_original": False}
        data.save_as(folder / f"{series[-6:]}-{number}{extension}", **strict)
    return folder


def cut(path, keep=0.5):
    content = path.read_bytes()
    path.write_bytes(content[: int(len(content) * keep)])
    return path


def item(path):
    return {"image": str(path)}


def names(items, root):
    return [str(Path(entry["image"]).relative_to(root)) for entry in items]


def sequence(**tags):
    """A DICOM sequence of one item."""
    data = pydicom.Dataset()
    for tag, value in tags.items():
        setattr(data, tag, value)
    return pydicom.Sequence([data])


def write_multiframe(path, frames, positions=None, slopes=None):
    """Write an enhanced CT: one file of frames [n, rows, columns], 1.5 x 1.5 mm, by default 3 mm apart."""
    uid, frames = pydicom.uid.generate_uid, np.asarray(frames, np.int16)
    positions = [[0, 0, 3 * n] for n in range(len(frames))] if positions is None else positions
    data = pydicom.Dataset()
    data.file_meta = pydicom.dataset.FileMetaDataset()
    data.file_meta.TransferSyntaxUID = pydicom.uid.ExplicitVRLittleEndian
    data.SOPClassUID = data.file_meta.MediaStorageSOPClassUID = pydicom.uid.EnhancedCTImageStorage
    data.SOPInstanceUID = data.file_meta.MediaStorageSOPInstanceUID = uid()
    data.SeriesInstanceUID, data.Modality, data.NumberOfFrames = uid(), "CT", len(frames)
    data.Rows, data.Columns = frames.shape[1:]
    data.SamplesPerPixel, data.PhotometricInterpretation = 1, "MONOCHROME2"
    data.BitsAllocated, data.BitsStored, data.HighBit, data.PixelRepresentation = 16, 16, 15, 1
    data.SharedFunctionalGroupsSequence = sequence(
        PixelMeasuresSequence=sequence(PixelSpacing=[1.5, 1.5], SliceThickness=3),
        PlaneOrientationSequence=sequence(ImageOrientationPatient=[1, 0, 0, 0, 1, 0]),
    )
    data.PerFrameFunctionalGroupsSequence = pydicom.Sequence(
        sequence(
            PlanePositionSequence=sequence(ImagePositionPatient=list(position)),
            PixelValueTransformationSequence=sequence(
                RescaleSlope=1 if slopes is None else slopes[n], RescaleIntercept=0, RescaleType="HU"
            ),
        )[0]
        for n, position in enumerate(positions)
    )
    data.PixelData = frames.tobytes()
    path.parent.mkdir(parents=True, exist_ok=True)
    data.save_as(path, enforce_file_format=True)
    return path
