"""Looking at scans: every format, and everything that can be wrong with a file."""

from __future__ import annotations

import json
import multiprocessing
import os
import re
from dataclasses import replace
from functools import partial
from pathlib import Path

import itk
import nibabel as nib
import numpy as np
import pydicom
import pytest

from image_files import SHAPE, SHARED, SPACING, cut, item, volume, write_any, write_dicom, write_itk, write_nifti
from tools.data import inspection, loading
from tools.data.cases import find_cases
from tools.data.inspection import inspect_scan, inspect_scans
from tools.data.loading import open_scan
from tools.data.rasters import voxel_file
from tools.data.runs import require_usable
from tools.data.scans import ScanError

# ---------------------------------------------------------------------------------------------- inspect_scan


@pytest.mark.parametrize("name", ["a.nii", "a.nii.gz", "a.mha", "a.mhd", "a.nrrd", "z.mha", "z.mhd", "z.nrrd"])
def test_reads_every_format(tmp_path, name):
    write = partial(write_itk, compression=True) if name[0] == "z" else write_any
    scan = inspect_scan(item(write(tmp_path / name)), channels=1)
    assert scan.problem is None
    assert (scan.channels, scan.shape, scan.spacing) == (1, SHAPE, SPACING)
    assert (scan.low, scan.high) == (volume().min(), volume().max())


def preview():
    """An icon has pixel data of its own, before those of the slice."""
    icon = pydicom.Dataset()
    icon.PixelData = bytes(8)
    icon["PixelData"].VR = "OW"
    return [icon]


def compress(folder):
    for path in slices(folder):
        data = pydicom.dcmread(path)
        data.compress(pydicom.uid.RLELossless)
        data.save_as(path)


@pytest.mark.parametrize(
    "options",
    [
        lambda: {},
        lambda: {"extension": ""},
        lambda: {"syntax": "ImplicitVRLittleEndian"},
        lambda: {"syntax": "ExplicitVRBigEndian"},
        lambda: {"IconImageSequence": preview()},
        None,
    ],
)
def test_reads_a_dicom_series(tmp_path, options):
    write_dicom(tmp_path / "series", **(options() if options else {}))
    if options is None:
        compress(tmp_path / "series")
    scan = inspect_scan(item(tmp_path / "series"), channels=1)
    assert (scan.problem, scan.shape, scan.spacing) == (None, (20, 24, 5), (1.5, 1.5, 3.0))


def test_a_report_beside_a_series_is_no_lost_slice(tmp_path):
    folder = write_dicom(tmp_path / "series")
    structured_report = "1.2.840.10008.5.1.4.1.1.88.11"
    report = slices(write_dicom(tmp_path / "report", 1, SOPClassUID=structured_report, PixelData=b""))[0]
    report.rename(folder / report.name)
    assert inspect_scan(item(folder), channels=1).problem is None


def test_reads_channels_from_the_last_axis_and_from_files(tmp_path):
    four = write_nifti(tmp_path / "four.nii.gz", np.stack([volume(n) for n in range(4)], -1))
    scan = inspect_scan(item(four), channels=4)
    assert (scan.problem, scan.channels, scan.shape) == (None, 4, SHAPE)
    files = [str(write_nifti(tmp_path / f"{n}.nii.gz", volume(n))) for n in range(4)]
    scan = inspect_scan({"image": files}, channels=4)
    assert (scan.problem, scan.channels, scan.shape, scan.image) == (None, 4, SHAPE, files)
    assert scan.high == max(volume(n).max() for n in range(4))


def nifti_with_spacing_zero(path):
    """Write a header without any affine, whose spacing is 0; nibabel would make it 1."""
    write_nifti(path)
    content = bytearray(path.read_bytes())
    content[252:256] = bytes(4)  # qform_code, sform_code
    content[80:92] = bytes(12)  # pixdim[1:4]
    path.write_bytes(content)


def nifti_with_flat_affine(path):
    image = nib.Nifti1Image(volume(), None)
    image.header.set_sform(np.diag([0.0, 1, 1, 1]), 1)
    nib.save(image, path)


def replace_text(path, old, new):
    content = path.read_bytes()
    assert old in content
    path.write_bytes(content.replace(old, new))


def damage_compressed(path):
    write_itk(path, compression=True)
    content = bytearray(path.read_bytes())
    content[-3] ^= 0xFF
    path.write_bytes(content)


def with_nan(path):
    array = volume().astype(np.float32)
    array[0, 0, :5], array[1, 1, 1] = np.nan, np.inf
    write_nifti(path, array)


def one_channel_constant(path):
    write_nifti(path, np.stack([volume(), np.full(SHAPE, 3, np.int16)], -1))


def headless_mhd(path, change):
    write_itk(path)
    change(path.with_suffix(".raw"))


BAD = {
    "missing.nii": (lambda p: None, r"does not exist"),
    "empty.nii.gz": (lambda p: p.touch(), r"is empty: found 0 bytes"),
    "empty.mha": (lambda p: p.touch(), r"is empty: found 0 bytes"),
    "cut.nii": (lambda p: cut(write_nifti(p)), r"is truncated: found 1856 bytes, expected 3712 bytes of voxels"),
    "cut.nii.gz": (
        lambda p: cut(write_nifti(p)),
        r"is truncated: its compressed data end after \d+ bytes, before their checksum",
    ),
    "cut.mha": (lambda p: cut(write_itk(p)), r"is truncated: found \d+ bytes, expected 3360 bytes of voxels"),
    "cut_a_byte.mha": (lambda p: cut(write_itk(p), 0.9998), r"is truncated: found 3359 bytes, expected 3360"),
    "cut_z.mha": (
        lambda p: cut(write_itk(p, compression=True)),
        r"is truncated: its compressed data end after \d+ bytes",
    ),
    "damaged.mha": (damage_compressed, r"is damaged: its data cannot be decompressed, or differ from their checksum"),
    "cut.nrrd": (lambda p: cut(write_itk(p)), r"is truncated: found \d+ bytes, expected 3360 bytes of voxels"),
    "cut_z.nrrd": (
        lambda p: cut(write_itk(p, compression=True)),
        r"is truncated: its compressed data end after \d+ bytes",
    ),
    "short.mhd": (lambda p: headless_mhd(p, cut), r"is truncated: found 1680 bytes, expected 3360"),
    "no_raw.mhd": (lambda p: headless_mhd(p, Path.unlink), r"its data file no_raw\.raw does not exist"),
    "empty_raw.mhd": (lambda p: headless_mhd(p, lambda raw: raw.write_bytes(b"")), r"0 bytes in its data file"),
    "text.nii": (
        lambda p: p.write_text("version https://git-lfs" * 30),
        r"cannot be read: its header is not that of a NIfTI file .*begin with 'version https",
    ),
    "text.nii.gz": (
        lambda p: p.write_text("<html>" * 99),
        r"cannot be read: it is not compressed as its name says, or damaged .found 594 bytes that begin with '<ht",
    ),
    "text.mha": (lambda p: p.write_text("hello" * 99), r"cannot be read: .*found 495 bytes that begin with 'hello"),
    "text.mhd": (lambda p: p.write_text("hello" * 99), r"cannot be read: .*found 495 bytes that begin with 'hello"),
    "text.nrrd": (lambda p: p.write_text("hello" * 99), r"cannot be read: .*found 495 bytes that begin with 'hello"),
    "flat.nii.gz": (lambda p: write_nifti(p, volume()[..., 0]), r"is 2D: found the shape 10×12"),
    "flat.mha": (lambda p: write_itk(p, volume()[..., 0]), r"is 2D: found the shape 10×12"),
    "slice.nii.gz": (lambda p: write_nifti(p, volume()[..., :1]), r"is 2D: found a single slice .*10×12×1"),
    "4d.nii.gz": (
        lambda p: write_nifti(p, np.stack([volume()] * 4, -1)),
        r"has 4 channels or points in time \(4D, shape 10×12×14×4\), expected 1: .* set in_channels to 4",
    ),
    "5d.nii.gz": (lambda p: write_nifti(p, np.zeros((4, 4, 4, 2, 3), np.int16)), r"is 5D: .*4×4×4×2×3"),
    "nan.nii.gz": (with_nan, r"has 6 NaN or infinite values among 1680 voxels"),
    "constant.nii.gz": (lambda p: write_nifti(p, volume() * 0 + 7), r"is constant: every voxel has the value 7"),
    "half_constant.nii.gz": (one_channel_constant, r"is constant: channel 1 .* has the value 3"),
    "spacing_0.nii": (nifti_with_spacing_zero, r"degenerate affine matrix: .*expected three axes"),
    "affine_0.nii": (nifti_with_flat_affine, r"degenerate affine matrix: .*\[0\.0, 0\.0, 0\.0\]"),
    "spacing_0.mhd": (
        lambda p: replace_text(write_itk(p), b"ElementSpacing = 1", b"ElementSpacing = 0"),
        r"has a degenerate spacing: found ElementSpacing = 0 2 3",
    ),
    "complex.nii.gz": (lambda p: write_nifti(p, volume() + 1j), r"has complex values, expected real ones"),
}


@pytest.mark.parametrize("name", BAD)
def test_bad_file_gives_its_reason(tmp_path, name, capfd):
    write, reason = BAD[name]
    write(tmp_path / name)
    capfd.readouterr()
    scan = inspect_scan(item(tmp_path / name), channels=1)
    assert scan.problem is not None
    assert pytest.approx(0) == scan.low == scan.high
    assert "\n" not in scan.problem
    assert re.search(reason, scan.problem), scan.problem
    assert capfd.readouterr().err == ""  # what ITK prints by itself would only confuse


def slices(folder):
    return sorted(folder.iterdir())


def dicom_of(folder, **tags):
    write_dicom(folder, **tags)


def dicom_without(folder, number, change):
    write_dicom(folder)
    change(slices(folder)[number])


def dicom_two_series(folder):
    write_dicom(folder)
    write_dicom(folder)


BAD_DICOM = {
    "cut": (lambda f: dicom_without(f, 4, cut), r"is truncated: found \d+ bytes of pixels in .*-4\.dcm, expected 960"),
    "cut_header": (lambda f: dicom_without(f, 1, lambda p: cut(p, 0.2)), r"is incomplete: .*-1\.dcm"),
    "empty_slice": (lambda f: dicom_without(f, 4, lambda p: p.write_bytes(b"")), r"is incomplete: .*-4\.dcm"),
    "gap": (lambda f: dicom_without(f, 2, Path.unlink), r"uneven gaps between its 4 slices: found 3 to 6 mm"),
    "two": (dicom_two_series, r"holds 2 DICOM series, expected 1"),
    "short": (lambda f: dicom_of(f, PixelData=bytes(700)), r"is truncated: found 700 bytes .*expected 960"),
    "spacing": (lambda f: dicom_of(f, PixelSpacing=[0, 0]), r"pixel spacing \[0\.0, 0\.0\] mm"),
    "one": (lambda f: dicom_of(f, slices=1), r"is 2D: found a single slice"),
    "constant": (lambda f: dicom_of(f, PixelData=bytes(960)), r"is constant: every voxel has the value 0"),
    "no_dicom": (Path.mkdir, r"holds no DICOM image"),
}


@pytest.mark.parametrize("name", BAD_DICOM)
def test_bad_series_gives_its_reason(tmp_path, name, capfd):
    write, reason = BAD_DICOM[name]
    write(tmp_path / name)
    capfd.readouterr()
    problem = inspect_scan(item(tmp_path / name), channels=1).problem
    assert problem is not None
    assert re.search(reason, problem), problem
    assert capfd.readouterr().err == ""


@pytest.mark.parametrize(
    "second, reason",
    [
        (lambda p: write_nifti(p, volume(0, (10, 12, 13))), r"have different shapes \(10×12×14 and 10×12×13\)"),
        (lambda p: write_nifti(p, affine=np.eye(4)), r"have different affine matrices"),
        (lambda p: cut(write_nifti(p)), r"its channel file b\.nii is truncated"),
        (lambda p: write_nifti(p, np.stack([volume()] * 2, -1)), r"its channel file b\.nii has 2 channels"),
        (lambda p: None, r"its channel file b\.nii does not exist"),
    ],
)
def test_bad_channel_file_gives_its_reason(tmp_path, second, reason):
    write_nifti(tmp_path / "a.nii")
    second(tmp_path / "b.nii")
    problem = inspect_scan({"image": [tmp_path / "a.nii", tmp_path / "b.nii"]}, channels=2).problem
    assert problem is not None
    assert re.search(reason, problem), problem


def test_says_how_many_channels_were_expected(tmp_path):
    scan = inspect_scan(item(write_nifti(tmp_path / "a.nii")), channels=4)
    assert scan.problem.startswith("has 1 channel (3D, shape 10×12×14), expected 4: set in_channels to 1")


@pytest.mark.parametrize("dtype", [np.int8, np.int16, np.int32, np.int64, np.float64])
def test_reads_types_that_itk_has_no_name_for_in_python(tmp_path, dtype):
    data = volume().clip(-100, 100).astype(dtype)
    names = {"int8": "CHAR", "int16": "SHORT", "int32": "INT", "int64": "LONG_LONG", "float64": "DOUBLE"}
    header = f"NDims = 3\nBinaryData = True\nDimSize = 10 12 14\nElementType = MET_{names[data.dtype.name]}\n"
    content = f"ObjectType = Image\n{header}ElementDataFile = LOCAL\n".encode() + data.tobytes("F")
    (tmp_path / "a.mha").write_bytes(content)
    assert np.array_equal(np.asarray(open_scan(tmp_path / "a.mha").dataobj), data)


def test_says_how_to_store_channels_that_itk_cannot_read(tmp_path):
    five = np.stack([volume()] * 5, -1).transpose(2, 1, 0, 3)
    itk.imwrite(itk.image_from_array(np.ascontiguousarray(five, np.float32), is_vector=True), str(tmp_path / "a.nrrd"))
    problem = inspect_scan(item(tmp_path / "a.nrrd"), 5).problem
    assert problem == "has 5 values in each voxel, expected a file for each channel, or a 4D file"


def test_stderr_works_again_afterwards(tmp_path, capfd):
    inspect_scan(item(cut(write_itk(tmp_path / "a.mha"))), channels=1)
    os.write(2, b"still here")
    assert capfd.readouterr().err == "still here"


@pytest.mark.parametrize("name", ["a.mhd", "a.mha"])
def test_the_file_of_the_voxels(tmp_path, name):
    assert voxel_file(write_itk(tmp_path / name)) == tmp_path / ("a.raw" if name == "a.mhd" else name)


# ----------------------------------------------------------------------------------------------------- labels

OBLIQUE = np.array([[0.9, -0.3, 0.1, -20], [0.25, 1.8, -0.4, 35], [-0.1, 0.5, 2.9, 7], [0, 0, 0, 1.0]])


def label_map(dtype=np.uint8, values=(0, 1, 2)):
    return np.random.default_rng(1).choice(values, SHAPE).astype(dtype)


def labelled(folder, label=None, affine=None, label_affine=None):
    """Write an image and its label."""
    image = write_nifti(folder / "image.nii.gz", affine=affine)
    affine = affine if label_affine is None else label_affine
    label = write_nifti(folder / "label.nii.gz", label_map() if label is None else label, affine)
    return {"image": str(image), "label": str(label)}


def label_problem(case, label_values=(1, 2)):
    problem = inspect_scan(case, 1, label_values).problem
    assert problem is not None
    assert problem.startswith(f"its label {case['label']} ")
    assert "\n" not in problem
    return problem.removeprefix(f"its label {case['label']} ")


@pytest.mark.parametrize("dtype", [np.uint8, np.int16, np.float32, np.float64])
def test_labels_of_every_type(tmp_path, dtype):
    scan = inspect_scan(labelled(tmp_path, label_map(dtype)), 1, (2, 1))
    assert (scan.problem, scan.labels) == (None, (0, 1, 2))
    assert (scan.low, scan.high) == (volume().min(), volume().max())


def test_a_label_may_lack_every_class(tmp_path):
    assert inspect_scan(labelled(tmp_path, label_map() * 0), 1, (1, 2)).labels == (0,)
    assert inspect_scan(labelled(tmp_path, label_map() * 0 + 2), 1, (1, 2)).labels == (2,)
    assert inspect_scan(item(tmp_path / "image.nii.gz"), 1, (1, 2)).labels == ()


def test_a_label_of_several_channel_files(tmp_path):
    case = labelled(tmp_path)
    case["image"] = [case["image"], str(write_nifti(tmp_path / "second.nii.gz", volume(3)))]
    assert inspect_scan(case, 2, (1, 2)).labels == (0, 1, 2)


@pytest.mark.parametrize("affine", [OBLIQUE, OBLIQUE @ np.diag([-1, 1, -1, 1])])
def test_rounding_of_a_header_is_no_other_place(tmp_path, affine):
    """The label's place comes from quaternions in single precision, the image's from a matrix."""
    rotation = np.linalg.qr(affine[:3, :3])[0]
    rotation *= np.sign(np.diag(rotation))
    affine = nib.affines.from_matvec(rotation * (0.703125, 0.703125, 2.5), (-179.6, 120.3, 88.1))
    case = labelled(tmp_path, affine=affine)
    image = nib.Nifti1Image(label_map(), None)
    image.header.set_qform(affine, 1)
    image.header["pixdim"][1:4] = 0.7031, 0.7031, 2.5
    nib.save(image, case["label"])
    found = nib.load(case["label"])
    assert not found.get_sform(coded=True)[1]
    assert not np.array_equal(found.affine, nib.load(case["image"]).affine)
    assert inspect_scan(case, 1, (1, 2)).problem is None


def test_label_of_another_shape(tmp_path):
    case = labelled(tmp_path, label_map()[:, :, 1:])
    assert label_problem(case) == "has the shape 10×12×13, expected 10×12×14 as the image"


@pytest.mark.parametrize("affine", [np.diag([*SPACING, 1.0]), OBLIQUE])
@pytest.mark.parametrize(
    "change, voxels",
    [
        ([[1, 0, 0, 0.5], [0, 1, 0, 0], [0, 0, 1, 0], [0, 0, 0, 1]], "0.5"),  # half a voxel, as of another convention
        ([[1, 0, 0, 0], [0, 1, 0, 0], [0, 0, 1, -3], [0, 0, 0, 1]], "3"),
        (np.diag([1, 1.1, 1, 1]), "1.1"),
        (np.diag([1, 1, 1.01, 1]), "0.13"),  # resampling could make it a voxel longer
    ],
)
def test_label_of_another_place(tmp_path, affine, change, voxels):
    problem = label_problem(labelled(tmp_path, affine=affine, label_affine=affine @ change))
    assert problem.startswith(f"lies elsewhere in space, by up to {voxels} voxels: found RAS, spacing ")
    assert problem.endswith(f"mm, origin {'0 x 0 x 0' if affine[0, 3] == 0 else '-20 x 35 x 7'} mm as the image")


@pytest.mark.parametrize("affine", [np.diag([*SPACING, 1.0]), OBLIQUE])
def test_label_of_another_orientation_alone(tmp_path, affine):
    case = labelled(tmp_path, affine=affine)
    turn = nib.orientations.ornt_transform(*(nib.orientations.axcodes2ornt(code) for code in ("RAS", "PIR")))
    nib.save(nib.load(case["label"]).as_reoriented(turn), tmp_path / "turned.nii.gz")
    case["label"] = str(tmp_path / "turned.nii.gz")
    assert label_problem(case) == "has another orientation: found PIR, expected RAS as the image (only the axes differ)"


def test_label_that_was_saved_without_its_place(tmp_path):
    case = labelled(tmp_path, affine=np.diag([-1.0, -2, 3, 1]), label_affine=np.diag([1.0, 2, 3, 1]))
    assert re.search(r"lies elsewhere .*found RAS, .* expected LPS, .* as the image", label_problem(case))


def half(array):
    array = array.astype(np.float32)
    array[3, 3, :4] = 0.5
    return array


def with_not_a_number(array):
    array = array.astype(np.float32)
    array[3, 3, :4] = np.nan
    return array


@pytest.mark.parametrize(
    "label, message",
    [
        (
            label_map(np.int16, (0, 1, 2, 2, 2, 7, -1)),
            r"has unknown label values: found -?\d \(2\d\d voxels\), -?\d \(2\d\d voxels\), expected 0, 1, 2$",
        ),
        (label_map(values=range(99)), r"found (\d+ \(\d+ voxels\), ){4}\d+ \(\d+ voxels\) and 91 more, expected 0, 1"),
        (half(label_map()), r"has 4 voxels that are not whole numbers \(first: 0\.5\), expected label values"),
        (with_not_a_number(label_map()), r"has 4 NaN or infinite values among 1680 voxels, expected finite values"),
        (np.stack([label_map()] * 2, -1), r"has 2 channels \(shape 10×12×14×2\), expected one label map"),
        (label_map()[..., 0], r"is 2D: found the shape 10×12"),
    ],
)
def test_label_of_other_values(tmp_path, label, message):
    assert re.search(message, label_problem(labelled(tmp_path, label)))


def test_without_label_values_any_whole_number_will_do(tmp_path):
    case = labelled(tmp_path, label_map(np.int16, (0, 300, -1)))
    assert inspect_scan(case, 1).labels == (-1, 0, 300)


@pytest.mark.parametrize(
    "change, message",
    [
        (Path.unlink, r"does not exist"),
        (lambda p: p.write_bytes(b""), r"is empty: found 0 bytes"),
        (
            lambda p: p.write_text("<html>" * 99),
            r"cannot be read: it is not compressed as its name says, .*found 594",
        ),
        (lambda p: cut(p, 0.9), r"is truncated: its compressed data end"),
    ],
)
def test_label_that_cannot_be_read(tmp_path, change, message, capfd):
    case = labelled(tmp_path)
    change(Path(case["label"]))
    capfd.readouterr()
    assert re.match(message, label_problem(case))
    assert capfd.readouterr().err == ""


# --------------------------------------------------------------------------------------------- inspect_scans


@pytest.mark.parametrize("workers", [0, 2])
def test_keeps_the_order(tmp_path, workers):
    items = [item(write_nifti(tmp_path / f"{n:02}.nii", volume(n))) for n in range(23)]
    cut(tmp_path / "07.nii")
    result = inspect_scans(items, channels=1, workers=workers)
    assert [scan.image for scan in result] == [entry["image"] for entry in items]
    assert [n for n, scan in enumerate(result) if scan.problem] == [7]
    assert [scan.high for scan in result if not scan.problem] == [volume(n).max() for n in range(23) if n != 7]


def test_nothing_to_inspect():
    assert inspect_scans([], channels=1, workers=2) == []


@pytest.mark.skipif(multiprocessing.get_start_method() != "fork", reason="the patch reaches forked workers only")
def test_a_crash_of_a_reader_is_put_down_to_its_scan(tmp_path, monkeypatch):
    regular = loading.require_regular
    monkeypatch.setattr(loading, "require_regular", lambda p: os._exit(1) if p.name == "1.nii" else regular(p))
    items = [item(write_nifti(tmp_path / f"{n}.nii")) for n in range(4)]
    problems = [scan.problem for scan in inspect_scans(items, channels=1, workers=2)]
    assert problems[:1] + problems[2:] == [None] * 3
    assert problems[1].startswith("kills the process that reads it")


def tamper(remember):
    """As another reader would have written it."""
    scans = json.loads(remember.read_text())["scans"]
    for scan in scans.values():
        scan["low"] = -123456.0
    remember.write_text(json.dumps({"sha256": inspection._digest(scans), "scans": scans}))


def rewrite(path, write):
    write(path)
    os.utime(path, ns=(1, 1))  # a clock may be too coarse to tell two writings apart


@pytest.mark.parametrize("kind", ["file", "raw", "list", "folder"])
def test_unchanged_scans_are_remembered_and_changed_ones_read_again(tmp_path, kind):
    if kind == "file":
        scan, changed = write_nifti(tmp_path / "a.nii"), tmp_path / "a.nii"
    elif kind == "raw":
        scan, changed = write_itk(tmp_path / "a.mhd"), tmp_path / "a.raw"
    elif kind == "list":
        scan = [write_nifti(tmp_path / "a.nii"), write_nifti(tmp_path / "b.nii", volume(1))]
        changed = tmp_path / "b.nii"
    else:
        scan = write_dicom(tmp_path / "series")
        changed = slices(scan)[3]
    items = [{"image": [str(path) for path in scan] if kind == "list" else str(scan)}]
    channels = 2 if kind == "list" else 1
    remember = tmp_path / "cache/scans.json"

    first = inspect_scans(items, channels, remember=remember)
    assert first[0].problem is None
    assert inspect_scans(items, channels, remember=remember) == first
    tamper(remember)
    assert inspect_scans(items, channels, remember=remember)[0].low == -123456.0  # the files were not opened
    content = changed.read_bytes()
    rewrite(changed, lambda path: path.write_bytes(content))
    assert inspect_scans(items, channels, remember=remember) == first


def test_other_channels_are_not_remembered(tmp_path):
    items = [item(write_nifti(tmp_path / "a.nii"))]
    inspect_scans(items, channels=1, remember=tmp_path / "scans.json")
    assert inspect_scans(items, channels=2, remember=tmp_path / "scans.json")[0].problem is not None


def test_labels_are_remembered_for_the_same_values_and_file_alone(tmp_path):
    case, remember = labelled(tmp_path), tmp_path / "scans.json"

    def again(case=case, label_values=(1, 2)):
        return inspect_scans([case], 1, remember=remember, label_values=label_values)[0]

    first = again()
    assert first.labels == (0, 1, 2)
    tamper(remember)
    assert again(label_values=[2, 1]) == replace(first, low=-123456.0)  # the files were not opened
    assert again(label_values=(1,)).problem.endswith("expected 0, 1")
    assert again(label_values=(1, 2, 3)) == first
    assert again(label_values=None) == first
    assert again(item(case["image"])) == replace(first, labels=())
    rewrite(case["label"], lambda path: write_nifti(path, label_map(values=(0, 2))))
    assert again().labels == (0, 2)
    Path(case["label"]).unlink()
    assert again().problem.endswith("does not exist")


def test_a_start_needs_good_labels_where_labels_are_used(tmp_path):
    good = labelled(tmp_path)
    (tmp_path / "bad").mkdir()
    bad = labelled(tmp_path / "bad", label_map()[1:])
    remember = str(tmp_path / "scans.json")
    assert [scan.labels for scan in require_usable([good, bad], 1, 0, remember)] == [(), ()]
    with pytest.raises(ScanError, match=r"1 of 2 scans cannot be used:\n.*/bad/image.nii.gz: its label .*9×12×14"):
        require_usable([good, bad], 1, 0, remember, [1, 2])
    assert require_usable([good], 1, 0, remember, [1, 2])[0].labels == (0, 1, 2)


def test_a_memory_serves_several_data_sets(tmp_path):
    items = [item(write_nifti(tmp_path / f"{n}.nii")) for n in range(2)]
    inspect_scans(items[:1], channels=1, remember=tmp_path / "scans.json")
    inspect_scans(items[1:], channels=1, remember=tmp_path / "scans.json")
    assert len(json.loads((tmp_path / "scans.json").read_text())["scans"]) == 2


@pytest.mark.parametrize(
    "spoil",
    [
        lambda text: text.replace('"low": ', '"low": 1'),
        lambda text: text.replace("10, 12, 14", "10, 12, 15"),
        lambda text: text[: len(text) // 2],
        lambda text: "",
        lambda text: "\0" * len(text),
        lambda text: "[]",
        lambda text: json.dumps(json.loads(text)["scans"]),  # of an earlier version
    ],
)
def test_a_memory_that_is_damaged_or_was_changed_is_not_believed(tmp_path, caplog, spoil):
    items, remember = [item(write_nifti(tmp_path / "a.nii"))], tmp_path / "scans.json"
    first = inspect_scans(items, channels=1, remember=remember)
    good = remember.read_text()
    remember.write_text(spoil(good))
    assert remember.read_text() != good
    assert inspect_scans(items, channels=1, remember=remember) == first
    assert f"{remember} cannot be used" in caplog.text
    assert remember.read_text() == good


def test_problems_are_looked_at_again(tmp_path):
    items = [item(write_nifti(tmp_path / "a.nii")), item(cut(write_nifti(tmp_path / "b.nii")))]
    inspect_scans(items, channels=1, remember=tmp_path / "scans.json")
    assert [scan["image"] for scan in json.loads((tmp_path / "scans.json").read_text())["scans"].values()] == [
        items[0]["image"]
    ]


@pytest.mark.parametrize("content", ["{", "[]", '{"a": 1}', '{"a": {"image": "x"}}', "\xff"])
def test_a_corrupt_memory_is_replaced(tmp_path, content, caplog):
    remember = tmp_path / "scans.json"
    remember.write_text(content, encoding="latin-1")
    items = [item(write_nifti(tmp_path / "a.nii"))]
    assert inspect_scans(items, channels=1, remember=remember)[0].problem is None
    assert "scans are read again" in caplog.text
    assert len(json.loads(remember.read_text())["scans"]) == 1


def test_a_memory_that_cannot_be_written_is_only_logged(tmp_path, caplog):
    (tmp_path / "file").touch()
    items = [item(write_nifti(tmp_path / "a.nii"))]
    assert inspect_scans(items, channels=1, remember=tmp_path / "file/scans.json")[0].problem is None
    assert "cannot be written" in caplog.text


def test_an_interrupted_start_keeps_what_it_has_read(tmp_path, monkeypatch):
    items = [item(write_nifti(tmp_path / f"{n}.nii")) for n in range(3)]

    def interrupted(entry, **options):
        if entry is items[2]:
            raise KeyboardInterrupt
        return inspect_scan(entry, **options)

    monkeypatch.setattr(inspection, "inspect_scan", interrupted)
    with pytest.raises(KeyboardInterrupt):
        inspect_scans(items, channels=1, remember=tmp_path / "scans.json")
    assert len(json.loads((tmp_path / "scans.json").read_text())["scans"]) == 2


@pytest.mark.skipif(multiprocessing.get_start_method() != "fork", reason="starting afresh is slow")
def test_several_ranks_may_share_a_memory(tmp_path):
    items = [item(write_nifti(tmp_path / f"{n}.nii", volume(n))) for n in range(6)]
    remember = tmp_path / "scans.json"
    ranks = [
        multiprocessing.Process(target=inspect_scans, args=(items, 1), kwargs={"remember": remember}) for _ in range(3)
    ]
    for rank in ranks:
        rank.start()
    for rank in ranks:
        rank.join()
    assert [rank.exitcode for rank in ranks] == [0, 0, 0]
    assert len(json.loads(remember.read_text())["scans"]) == 6
    assert [path.name for path in tmp_path.iterdir() if path.name.startswith(".")] == []


@pytest.mark.skipif(not SHARED.exists(), reason="the real scans of ../shared/data are not on this machine")
def test_real_scans_and_labels():
    cases = find_cases(SHARED / "Task04_Hippocampus", "msd")[:12]
    assert {(s.problem, s.labels) for s in inspect_scans(cases, 1, label_values=(1, 2))} == {(None, (0, 1, 2))}
    ct = {"image": str(SHARED / "ct_abdomen/ct.nii.gz"), "label": str(SHARED / "ct_abdomen/label_btcv.nii.gz")}
    scan = inspect_scan(ct, 1, range(1, 14))
    assert (scan.problem, scan.shape, scan.spacing) == (None, (122, 101, 30), (3.0, 3.0, 3.0))
    assert set(range(14)) - set(scan.labels) == {5}  # the esophagus is outside the field
