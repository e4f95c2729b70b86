"""Opening files of every format but DICOM: damage, claims of headers, units; pipes and devices; what a folder holds."""

from __future__ import annotations

import gzip
import logging
import os
import resource
import signal
import socket

import nibabel as nib
import numpy as np
import pytest

from image_files import SHAPE, SHARED, item, names, volume, write_itk, write_nifti
from tests import fuzz
from tools.data import processes
from tools.data.compressed import inflate
from tools.data.hounsfield import doubtful_values
from tools.data.inspection import inspect_scan, inspect_scans
from tools.data.kinds import UnfitError
from tools.data.loading import LoadScand, open_scan
from tools.data.processes import in_processes
from tools.data.scans import ScanError, find_scans


def problem(path, **options):
    return inspect_scan(item(path), 1, **options).problem or ""


# -------------------------------------------------------------------------------------------------------- damage


@pytest.mark.parametrize("place", [-8, -1, 60])
def test_gzip_is_read_to_its_checksum(tmp_path, place):
    content = bytearray(write_nifti(tmp_path / "a.nii.gz").read_bytes())
    content[place] ^= 1  # checksum, length, data
    (tmp_path / "a.nii.gz").write_bytes(content)
    assert "damaged" in problem(tmp_path / "a.nii.gz")


def test_several_gzip_members_are_one_file(tmp_path):
    data = write_nifti(tmp_path / "a.nii").read_bytes()
    members = gzip.compress(data[:1000]) + gzip.compress(data[1000:]) + bytes(512)
    (tmp_path / "a.nii.gz").write_bytes(members)
    assert np.array_equal(np.asarray(open_scan(tmp_path / "a.nii.gz").dataobj), volume())


def test_a_compressed_file_is_named_as_such(tmp_path):
    (tmp_path / "a.nii").write_bytes(write_nifti(tmp_path / "a.nii.gz").read_bytes())
    assert problem(tmp_path / "a.nii").startswith("is compressed, which its name does not say: rename it to .nii.gz")


def test_a_single_channel_before_the_axes_of_an_nrrd(tmp_path):
    header = (
        "NRRD0004\ntype: short\ndimension: 4\nsizes: 1 4 5 6\nencoding: raw\nendian: little\nspace: RAS\n"
        "space directions: none (1,0,0) (0,1.5,0) (0,0,2)\nkinds: list domain domain domain\n\n"
    )
    array = volume(shape=(4, 5, 6))
    (tmp_path / "a.nrrd").write_bytes(header.encode() + array.tobytes("F"))
    assert np.array_equal(np.asarray(open_scan(tmp_path / "a.nrrd").dataobj), array)


def test_a_small_file_does_not_take_much_memory():
    bomb = gzip.compress(bytes(300_000_000))
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    with pytest.raises(UnfitError, match=r"more bytes than its header says, 1000"):
        inflate(bomb, 1000)
    assert (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) * 1024 < 100e6


@pytest.mark.parametrize("name", ["a.nii", "a.mha", "a.nrrd"])
def test_bytes_that_the_header_does_not_know_of(tmp_path, name):
    path = (write_nifti if name == "a.nii" else write_itk)(tmp_path / name)
    path.write_bytes(path.read_bytes() + b"more")
    assert "does not fit its header: found 3364 bytes of voxels, expected 3360" in problem(path)


def test_a_scan_is_at_most_so_large(tmp_path):
    write_nifti(tmp_path / "a.nii.gz", np.zeros((100, 100, 100), np.int16))
    assert "is too large: its header asks for 2 MB, expected at most 1 MB (max_scan_gb)" in problem(
        tmp_path / "a.nii.gz", max_scan_gb=0.001
    )


# ----------------------------------------------------------------------------------------------- pipes and devices


@pytest.fixture
def in_a_minute():
    """A test that would wait for ever fails."""

    def end(_number, _frame):
        pytest.fail("something waits for ever")  # no OSError, which would count as a damaged scan

    before = signal.signal(signal.SIGALRM, end)
    signal.alarm(60)
    yield
    signal.alarm(0)
    signal.signal(signal.SIGALRM, before)


@pytest.mark.usefixtures("in_a_minute")
def test_what_is_no_file_is_never_opened(tmp_path):
    write_nifti(tmp_path / "a.nii")
    os.mkfifo(tmp_path / "pipe")  # to open it would wait forever
    os.mkfifo(tmp_path / "pipe.nii.gz")
    os.mkfifo(tmp_path / "b.raw")
    (tmp_path / "device.mha").symlink_to("/dev/zero")
    with socket.socket(socket.AF_UNIX) as sock:
        sock.bind(str(tmp_path / "socket.nii"))
        write_itk(tmp_path / "c.mhd")
        header = (tmp_path / "c.mhd").read_text().replace("c.raw", "b.raw")
        (tmp_path / "b.mhd").write_text(header)
        scans = inspect_scans(find_scans(tmp_path), 1)
    problems = {scan.image.rpartition("/")[2]: scan.problem for scan in scans}
    assert [name for name, text in problems.items() if text is None] == ["a.nii", "c.mhd"]
    assert all("is a pipe, a socket, a device or a folder" in text for text in problems.values() if text)


@pytest.mark.parametrize("name", ["/dev/zero", "../a.raw", "sub/../../a.raw"])
def test_data_files_lie_in_the_folder(tmp_path, name):
    path = write_itk(tmp_path / "a.mhd")
    path.write_text(path.read_text().replace("a.raw", name))
    assert f"names the data file '{name}', expected one in its own folder" in problem(path)


# --------------------------------------------------------------------------------------------- formats and units


@pytest.mark.parametrize(
    "kind, name", [(nib.Nifti1Pair, "a.hdr"), (nib.AnalyzeImage, "a.hdr"), (nib.MGHImage, "a.mgz")]
)
def test_pairs_and_mgz_are_scans(tmp_path, kind, name):
    nib.save(kind(volume(), np.diag([1.0, 2, 3, 1])), tmp_path / name)
    assert names(find_scans(tmp_path), tmp_path) == [name]
    scan = inspect_scan(item(tmp_path / name), 1)
    assert (scan.problem, scan.shape, scan.spacing) == (None, SHAPE, (1, 2, 3))
    assert np.array_equal(np.asarray(open_scan(tmp_path / name).dataobj), volume())


def test_a_detached_nrrd_header_is_a_scan(tmp_path):
    fuzz._detached(tmp_path, volume())
    assert names(find_scans(tmp_path), tmp_path) == ["x.nhdr"]
    assert np.array_equal(np.asarray(open_scan(tmp_path / "x.nhdr").dataobj), volume())


@pytest.mark.parametrize("unit, factor", [("meter", 1e-3), ("micron", 1e3), ("mm", 1), ("unknown", 1)])
@pytest.mark.parametrize("form", ["sform", "qform"])
def test_units_become_mm(tmp_path, unit, factor, form):
    affine = np.diag([1.5, 2, 3, 1])
    affine[:3, 3] = -20, 30, 40
    image = nib.Nifti1Image(volume(), None)
    getattr(image, f"set_{form}")(affine @ np.diag([factor] * 3 + [1]) * [1, 1, 1, factor], 1)
    image.header["srow_x"], image.header["srow_y"], image.header["srow_z"] = image.header.get_sform()[:3]
    image.header.set_xyzt_units(unit, "sec")
    nib.save(image, tmp_path / "a.nii")
    assert np.allclose(open_scan(tmp_path / "a.nii").affine[:3, :3], affine[:3, :3], rtol=1e-5)
    assert np.allclose(open_scan(tmp_path / "a.nii").affine[:3, 3], affine[:3, 3], rtol=1e-5)


def test_a_unit_that_cannot_be(tmp_path):
    image = nib.Nifti1Image(volume(), np.diag([1.0, 1, 1, 1]))
    image.header.set_xyzt_units("meter")
    nib.save(image, tmp_path / "a.nii")
    assert "is in metres by its header, so that a voxel has 1000 x 1000 x 1000 mm" in problem(tmp_path / "a.nii")


def test_files_that_are_no_scans_are_counted(tmp_path, caplog):
    write_nifti(tmp_path / "a.nii")
    write_itk(tmp_path / "b.mhd")  # and its b.raw
    for name in ("x.txt", "y.TXT", "dataset.json", "lone.img", "lone.raw", "README"):
        (tmp_path / name).write_text("-")
    with caplog.at_level(logging.WARNING):
        find_scans(tmp_path)
    assert "6 files are not taken as scans: 2 .txt, " in caplog.text
    for kind in ("1 .json", "1 .img", "1 .raw", "1 no extension"):
        assert kind in caplog.text


# ------------------------------------------------------------------------------------------------------- values


def test_labels_are_whole_but_for_rounding(tmp_path):
    write_nifti(tmp_path / "a.nii")
    label = np.random.default_rng(0).integers(0, 3, SHAPE).astype(np.float32)
    case = item(tmp_path / "a.nii") | {"label": str(write_nifti(tmp_path / "l.nii", label * np.float32(1.0000001)))}
    assert inspect_scan(case, 1, (1, 2)).labels == (0, 1, 2)
    label[3, 3, 3] = 1.3
    write_nifti(tmp_path / "l.nii", label)
    assert "has 1 voxels that are not whole numbers (first: 1.29999995)" in inspect_scan(case, 1, (1, 2)).problem


def test_values_that_cannot_be_hu_are_named(tmp_path):
    hu = volume().astype(int)
    arrays = {
        "air": hu,
        "offset": hu + 1024,
        "padded_offset": np.where(hu < -900, -2000, hu + 1024),
        "picture": (hu - hu.min()) * 255 // 2000,
        "no_air": hu.clip(-150),
        "padded": np.where(hu < -900, -3024, hu),
    }
    items = [item(write_nifti(tmp_path / f"{name}.nii", array.astype(np.int16))) for name, array in arrays.items()]
    lines = doubtful_values(inspect_scans(items, 1))
    named = [[name for name in arrays if f"/{name}.nii" in line] for line in lines]
    assert named == [["picture"], ["offset", "padded_offset"], ["no_air"], ["padded_offset", "padded"]]
    assert "as if 1024 was added" in lines[1]
    assert "offset.nii (24 to 2023)" in lines[1]


# ----------------------------------------------------------------------------------------- processes of their own


def _crash_or_hang(case):
    if case["image"] == "crash":
        os.abort()
    while case["image"] == "hang":
        pass
    return case["image"]


def test_a_crash_and_a_hang_are_put_down_to_their_scans(monkeypatch):
    monkeypatch.setattr(processes, "COMPUTING", 0.5)
    items = [item(name) for name in ("a", "crash", "b", "hang", "c")]
    found = list(in_processes(_crash_or_hang, items, workers=2))
    assert found[::2] == ["a", "b", "c"]
    assert found[1].startswith("kills the process that reads it")
    assert "its reader hangs" in found[3]


def test_a_slow_scan_is_named(monkeypatch, caplog):
    monkeypatch.setattr(processes, "PATIENCE", 0.2)
    with caplog.at_level(logging.WARNING):
        assert list(in_processes(_sleep, [item("slow.mha")], 1)) == ["slow.mha"]
    assert "slow.mha: still reading after" in caplog.text


def _sleep(case):
    processes.time.sleep(2.5)
    return case["image"]


# ------------------------------------------------------------------------------------------- damage of every kind


@pytest.mark.skipif(not SHARED.exists(), reason="the real scans of ../shared/data are not on this machine")
@pytest.mark.parametrize("files", [pytest.param(1140, marks=pytest.mark.slow), 57])
def test_damaged_files_are_refused_or_read_right(tmp_path, files):
    seed = int(os.environ.get("FUZZ_SEED", "0"))
    print(f"seed {seed}")
    wrong = [judged for judged in fuzz.run(files, seed, tmp_path) if judged[1] not in fuzz.OUTCOMES]
    assert not wrong, "\n".join(f"{case.path} {case.what}: {outcome} ({reason})" for case, outcome, reason in wrong)


FIELD = {
    "fuzz/niigz_flips_191_voxels_wrong/x.nii.gz": "is damaged",
    "fuzz/niigz_insert_5299_voxels_wrong/x.nii.gz": "is damaged",
    "fuzz/niigz_zeros_39504_voxels_wrong/x.nii.gz": "is damaged",
    "fuzz/zmha_flips_accepted/x.mha": "is damaged",
    "fuzz/znrrd_flips_accepted/x.nrrd": "is damaged",
    "fuzz/mha_ndims_0_hang/x.mha": "found NDims = 0, expected 3",
    "fuzz/mha_ndims_-3_abort/x.mha": "found NDims = -3, expected 3",
    "fuzz/mha_percent_s_datafile_segfault/x.mha": "names several data files",
    "fuzz/mha_channels_0_reads_uninitialised_memory/x.mha": "ElementNumberOfChannels = 0",
    "fuzz/mhd_list_reads_uninitialised_memory/x.mhd": "names several data files",
    "fuzz/mha_datafile_dev_urandom_accepted/x.mha": "expected one in its own folder",
    "fuzz/nii_dims_5GB_allocated/x.nii": "does not fit its header: found 125302 bytes, expected 5488000352",
    "fuzz/nrrd_sizes_5GB_allocated/x.nrrd": "does not fit its header",
    "fuzz/mha_MET_CHAR_20s_and_misleading/x.mha": "does not fit its header",
    "rgba/scans/CIT168.nii.gz": "is a colour image (RGBA)",
    "units/scans/metres.nii.gz": "",
    "left_out/scans/c.hdr": "",
}


@pytest.mark.skipif(not (SHARED / "field_cases").exists(), reason="the cases of ../shared/data are not on this machine")
@pytest.mark.parametrize("case", FIELD)
def test_cases_from_the_field(case):
    found = problem(SHARED / "field_cases" / case)
    assert FIELD[case] in found
    assert bool(FIELD[case]) == bool(found), found


def test_a_scan_that_is_deleted_or_damaged_during_a_run_is_named(tmp_path):
    load = LoadScand("image")
    path = write_nifti(tmp_path / "a.nii")
    assert load({"image": str(path)})["image"].shape == (1, *SHAPE)
    path.write_bytes(path.read_bytes()[:-10])
    with pytest.raises(ScanError, match=rf"{path}: is truncated"):
        load({"image": str(path)})
    path.unlink()
    with pytest.raises(ScanError, match=rf"{path}: does not exist"):
        load({"image": str(path)})
