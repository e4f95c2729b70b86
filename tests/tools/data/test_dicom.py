"""DICOM series: every voxel in its place and with its value, or a reason."""

from __future__ import annotations

import logging
import re

import numpy as np
import pydicom
import pytest

from image_files import SHARED, item, names, volume, write_dicom, write_multiframe
from tools.data.datalists import read_datalist
from tools.data.inspection import inspect_scan
from tools.data.loading import LoadScan, open_scan
from tools.data.scans import ScanError, find_scans


def slices(folder):
    return sorted(folder.glob("*.dcm"), key=lambda path: int(path.stem.split("-")[1]))


def change(path, **tags):
    data = pydicom.dcmread(path)
    for tag, value in tags.items():
        setattr(data, tag, value) if value is not None else delattr(data, tag)
    data.save_as(path)


def change_all(folder, value):
    """Set tags of each slice by its number."""
    for number, path in enumerate(slices(folder)):
        change(path, **value(number))
    return folder


def problem(path):
    return inspect_scan(item(path), 1).problem or ""


def require_places(folder):
    """The affine matrix puts each slice where its own header does, with its own pixels."""
    image = open_scan(folder)
    found = np.asarray(image.dataobj)
    by_place = {tuple(map(float, data.ImagePositionPatient)): data for data in map(pydicom.dcmread, slices(folder))}
    for n in range(found.shape[2]):
        x, y, z, _ = image.affine @ [0, 0, n, 1]
        place = min(by_place, key=lambda p: np.linalg.norm(np.subtract(p, (-x, -y, z))))
        assert np.allclose(place, (-x, -y, z), atol=1e-3)
        assert np.array_equal(found[:, :, n], by_place.pop(place).pixel_array.T)
    assert not by_place
    return image.affine


# ------------------------------------------------------------------------------------------------------ geometry


def test_a_tilted_gantry_is_read_with_its_shear(tmp_path):
    tilt = {"ImageOrientationPatient": [1, 0, 0, 0, 0.94, -0.342]}
    folder = change_all(write_dicom(tmp_path / "series"), lambda n: tilt)
    affine = require_places(folder)
    assert affine[:3, 1] @ affine[:3, 2] != pytest.approx(0)  # the slices are not on top of each other
    assert np.allclose(LoadScan()(str(folder)).affine, affine)


@pytest.mark.parametrize("order", [[0, 1, 2, 3, 4], [4, 2, 0, 1, 3]])
def test_slices_are_sorted_by_place_not_by_name(tmp_path, order):
    folder = change_all(write_dicom(tmp_path / "series"), lambda n: {"ImagePositionPatient": [5, -7, 3 * order[n]]})
    assert np.allclose(require_places(folder)[:3, 3], [-5, 7, 0])


TURNED = [1, 0, 0, 0, 0.999, 0.0447]  # by 2.6 degrees: the far corner is 1.5 mm off

BAD = {
    "no place": (2, {"ImagePositionPatient": None}, r"no usable ImagePositionPatient in .*-2\.dcm: found None"),
    "twice": (2, {"ImagePositionPatient": [0, 0, 3]}, r"two slices at the same place: .*-1\.dcm and .*-2\.dcm"),
    "displaced": (2, {"ImagePositionPatient": [0, 1, 6]}, r"-2\.dcm 1 mm off its place in a regular grid, .* 0\.25 mm"),
    "last one displaced": (4, {"ImagePositionPatient": [2, 0, 12]}, r"uneven gaps .* off its place in a regular grid"),
    "turned": (
        3,
        {"ImageOrientationPatient": TURNED},
        r"different orientation or pixel spacing: .*-3\.dcm",
    ),
    "other spacing": (
        3,
        {"PixelSpacing": [1.6, 1.5]},
        r"different orientation or pixel spacing: .*-3\.dcm",
    ),
    "unsigned": (
        0,
        {"PixelRepresentation": 0},
        r"different PixelRepresentation: found 0 in .*-0\.dcm, expected 1",
    ),
    "of other bits": (0, {"BitsAllocated": 8}, r"different BitsAllocated: found 8 in .*-0\.dcm"),
    "slope 0": (1, {"RescaleSlope": 0, "RescaleIntercept": 0}, r"rescale slope 0 in .*-1\.dcm"),
    "slope 1e30": (1, {"RescaleSlope": 1e30, "RescaleIntercept": 0}, r"rescale slope 1e\+30 in .*-1\.dcm"),
    "a mosaic": (0, {"ImageType": ["ORIGINAL", "PRIMARY", "M", "MOSAIC"]}, r"is a mosaic: .*-0\.dcm .*dcm2niix"),
    "directions of length 2": (
        1,
        {"ImageOrientationPatient": [2, 0, 0, 0, 2, 0]},
        r"impossible ImageOrientationPatient in .*-1\.dcm: found 2, 0, 0, 0, 2, 0, expected two directions of length 1",
    ),
    "oblique directions": (
        1,
        {"ImageOrientationPatient": [1, 0, 0, 0.5, 0.866, 0]},
        r"impossible ImageOrientationPatient in .*-1\.dcm",
    ),
    "a report": (4, {"SOPClassUID": "1.2.840.10008.5.1.4.1.1.88.11"}, r"different SOPClassUID: .*-4\.dcm"),
}


@pytest.mark.parametrize("name", BAD)
def test_one_wrong_slice_is_named(tmp_path, name):
    number, tags, reason = BAD[name]
    folder = write_dicom(tmp_path / "series")
    change(slices(folder)[number], **tags)
    found = problem(folder)
    assert "\n" not in found
    assert re.search(reason, found), found


@pytest.mark.parametrize("number", [0, 4])
@pytest.mark.parametrize("content", [b"", bytes(3000), b"\0" * 100])
def test_a_damaged_first_or_last_slice_is_no_end_of_the_series(tmp_path, number, content):
    folder = write_dicom(tmp_path / "series")
    slices(folder)[number].write_bytes(content)
    assert f"is incomplete: found 4 DICOM files, expected 5: {slices(folder)[number].name}" in problem(folder)


@pytest.mark.parametrize("number", [0, 4])
@pytest.mark.parametrize("size", [470, 600])  # before its series, and before its size
def test_a_slice_cut_in_its_header_is_no_other_object(tmp_path, number, size):
    folder = write_dicom(tmp_path / "series")
    path = slices(folder)[number]
    path.write_bytes(path.read_bytes()[:size])
    assert pydicom.dcmread(path).SOPClassUID == pydicom.uid.CTImageStorage
    assert "is incomplete: the header of its file" in problem(folder)


def test_rounding_of_positions_is_no_other_place(tmp_path):
    folder = change_all(
        write_dicom(tmp_path / "series"), lambda n: {"ImagePositionPatient": [0, 0, round(3.06 * n, 1)]}
    )
    assert problem(folder) == ""


def test_all_slices_at_one_place(tmp_path):
    folder = change_all(write_dicom(tmp_path / "series"), lambda n: {"ImagePositionPatient": [0, 0, 0]})
    assert "has all its 5 slices at the same place" in problem(folder)


def test_several_volumes_in_one_series(tmp_path):
    folder = change_all(
        write_dicom(tmp_path / "series", 6),
        lambda n: {"ImagePositionPatient": [0, 0, 3 * (n % 3)], "EchoTime": 5 * (n // 3 + 1)},
    )
    assert "holds 2 volumes in one series: found 3 places for 6 slices (they differ in EchoTime)" in problem(folder)


# -------------------------------------------------------------------------------------------------------- values


def test_each_slice_is_scaled_by_its_own_slope(tmp_path):
    """As in PET, whose slopes are no whole numbers and differ from slice to slice."""
    folder = change_all(
        write_dicom(tmp_path / "series"), lambda n: {"RescaleSlope": f"{0.37 + n / 7:.6f}", "RescaleIntercept": n}
    )
    found = np.asarray(open_scan(folder).dataobj)
    for n in range(5):
        expected = volume(n, (24, 20)).T * float(f"{0.37 + n / 7:.6f}") + n
        assert np.array_equal(found[:, :, n], expected.astype(np.float32))


def test_frames_are_scaled_and_placed_by_their_own_entries(tmp_path):
    frames = np.stack([volume(n, (24, 20)) for n in range(4)])
    order = [2, 0, 3, 1]
    path = write_multiframe(tmp_path / "series/a.dcm", frames, [[1, 2, 3 * k] for k in order], [1, 2, 0.5, 3])
    image = open_scan(path.parent)
    found = np.asarray(image.dataobj)
    for number, (place, slope) in enumerate(zip(order, [1, 2, 0.5, 3], strict=True)):
        assert np.array_equal(found[:, :, place], (frames[number].T * slope).astype(np.float32))
    assert np.allclose(image.affine[:3, 3], [-1, -2, 0])


def test_two_volumes_in_one_file(tmp_path):
    frames = np.stack([volume(n, (24, 20)) for n in range(6)])
    path = write_multiframe(tmp_path / "series/a.dcm", frames, [[0, 0, 3 * (n % 3)] for n in range(6)])
    assert "holds 2 volumes in one series: found 3 places for 6 slices" in problem(path.parent)


def test_frames_without_places(tmp_path):
    path = write_multiframe(tmp_path / "series/a.dcm", np.stack([volume(n, (24, 20)) for n in range(3)]))
    change(path, PerFrameFunctionalGroupsSequence=None)
    assert "has 3 frames in a.dcm, but places for 0, expected one each" in problem(path.parent)


def test_compressed_frames_are_scaled_by_their_own_slope(tmp_path):
    frames = np.stack([volume(n, (24, 20)) for n in range(3)])
    path = write_multiframe(tmp_path / "series/a.dcm", frames, slopes=[1, 2, 0.5])
    data = pydicom.dcmread(path)
    data.compress(pydicom.uid.RLELossless)
    data.save_as(path)
    found = np.asarray(open_scan(path.parent).dataobj)
    assert np.array_equal(found, (frames * np.array([1, 2, 0.5])[:, None, None]).transpose(2, 1, 0).astype(np.float32))


def test_a_colour_image_is_named(tmp_path):
    folder = write_dicom(tmp_path / "series", SamplesPerPixel=3, PhotometricInterpretation="RGB", PixelData=bytes(2880))
    assert "is a colour image (RGB)" in problem(folder)


# -------------------------------------------------------------------------------------------- series of a folder

REPORT, LOCALIZER = "1.2.840.10008.5.1.4.1.1.88.11", ["ORIGINAL", "PRIMARY", "LOCALIZER"]


@pytest.fixture
def study(tmp_path):
    """A folder with two series, a localizer and a report."""
    folder = tmp_path / "data/study"
    write_dicom(folder, 4, SeriesDescription="thin")
    write_dicom(folder, 6, SeriesDescription="thick")
    write_dicom(folder, 1, ImageType=LOCALIZER)
    write_dicom(folder, 1, SOPClassUID=REPORT)
    return folder


def uids(folder):
    headers = [pydicom.dcmread(path, stop_before_pixels=True) for path in folder.iterdir()]
    return {str(header.get("SeriesDescription", "")): header.SeriesInstanceUID for header in headers}


def test_several_series_are_refused_with_a_list(study):
    assert find_scans(study.parent) == [item(study)]
    found = problem(study)
    assert "holds 2 DICOM series, expected 1" in found
    assert f"{uids(study)['thick']} 'thick' (6 slices, 1.5 x 1.5 x 3 mm)" in found
    assert f"{uids(study)['thin']} 'thin' (4 slices, 1.5 x 1.5 x 3 mm)" in found
    assert "dicom_series" in found


def test_each_series_is_a_scan(study, caplog, tmp_path):
    with caplog.at_level(logging.WARNING):
        scans = find_scans(study.parent, "each")
    assert names(scans, study.parent) == sorted(f"study/{uids(study)[name]}" for name in ("thick", "thin"))
    assert sorted(inspect_scan(scan, 1).shape[2] for scan in scans) == [4, 6]
    assert "2 DICOM series, each a scan" in caplog.text
    assert "1 DICOM localizers" in caplog.text
    assert "1 DICOM structured reports" in caplog.text
    (tmp_path / "list.json").write_text(f'{{"training": ["study/{uids(study)["thin"]}"]}}')
    (scan,) = read_datalist(tmp_path / "list.json", study.parent, "training")
    assert inspect_scan(scan, 1).shape == (20, 24, 4)


def test_the_largest_series_alone(study, caplog):
    with caplog.at_level(logging.WARNING):
        (scan,) = find_scans(study.parent, "largest")
    assert inspect_scan(scan, 1).shape == (20, 24, 6)
    assert "2 DICOM series, of which 1 are not taken" in caplog.text


def test_what_else_can_be_chosen(study):
    with pytest.raises(ScanError, match=r"dicom_series: found 'all', expected one of refuse, each, largest"):
        find_scans(study.parent, "all")


def test_a_folder_of_reports_is_no_scan(tmp_path, caplog):
    write_dicom(tmp_path / "reports", 2, SOPClassUID=REPORT)
    write_dicom(tmp_path / "scan")
    with caplog.at_level(logging.WARNING):
        assert find_scans(tmp_path) == [item(tmp_path / "scan")]
    assert "2 DICOM structured reports" in caplog.text


@pytest.mark.parametrize("uid", ["../../elsewhere", "", "1.2/3"])
def test_a_name_of_a_series_never_leaves_its_folder(study, uid):
    for path in study.glob("*"):
        if pydicom.dcmread(path).get("SeriesDescription") == "thin":
            change(path, SeriesInstanceUID=uid)
    found = {path.name for path in map(type(study), (scan["image"] for scan in find_scans(study.parent, "each")))}
    assert len(found) == 2 and all("/" not in name and not name.startswith(".") for name in found)


def test_files_without_preamble_are_dicom(tmp_path):
    folder = write_dicom(tmp_path / "series", extension="")
    before = np.asarray(open_scan(folder).dataobj)
    for path in folder.iterdir():
        data = pydicom.dcmread(path)
        data.file_meta, data.preamble = pydicom.dataset.FileMetaDataset(), None
        data.save_as(path, implicit_vr=True, little_endian=True)
        assert path.read_bytes()[:4] != bytes(4)
    assert find_scans(tmp_path) == [item(folder)]
    assert np.array_equal(np.asarray(open_scan(folder).dataobj), before)


def test_a_series_with_a_report_of_its_own_folder(tmp_path):
    folder = write_dicom(tmp_path / "series")
    write_dicom(folder, 1, SOPClassUID=REPORT, PixelData=b"")
    assert problem(folder) == ""


# ------------------------------------------------------------------------------------------------- cases from the field


@pytest.mark.skipif(not (SHARED / "field_cases").exists(), reason="the cases of ../shared/data are not on this machine")
@pytest.mark.parametrize(
    "case, reason",
    [
        ("gantry_tilt/scans/series", ""),
        ("multiframe/scans/series", "holds 2 volumes in one series: found 32 places for 64 slices"),
        ("left_out/scans/old_dicom", ""),
        ("fuzz/dicom_bits8_in_first_slice_hang", "different BitsAllocated"),
        ("fuzz/dicom_positions_equal_accepted", "all its 12 slices at the same place"),
        ("fuzz/dicom_no_positions_accepted_z_1mm", "no usable ImagePositionPatient"),
        ("fuzz/dicom_unsigned_first_slice_accepted", "different PixelRepresentation"),
        ("fuzz/dicom_slope_1e30_one_slice", "rescale slope 1e+30 in s00.dcm"),
        ("fuzz/dicom_flips_3.8GB", "the header of its file s09.dcm cannot be read"),
        ("fuzz/dicom_last_slice_cut_to_100_bytes_accepted", "is incomplete: found 11 DICOM files, expected 12"),
        ("fuzz/dicom_last_slice_zeros_accepted", "is incomplete: found 11 DICOM files, expected 12"),
    ],
)
def test_cases_from_the_field(case, reason):
    found = problem(SHARED / "field_cases" / case)
    assert reason in found
    assert bool(reason) == bool(found), found
    if case.startswith("gantry"):
        require_places(SHARED / "field_cases" / case)
