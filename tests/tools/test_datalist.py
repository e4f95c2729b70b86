"""The data lists of the four public sets hold their scans and nothing else."""

from __future__ import annotations

import json
import shlex

import nibabel as nib
import numpy as np
import pytest

from tools.datalist import pretrain
from tools.inspection import inspect_scans
from tools.scans import ScanError, find_scans, read_datalist

HEADER = """ObjectType = Image
NDims = 3
DimSize = 4 4 4
ElementSpacing = 1 1 2.5
ElementType = MET_SHORT
ElementDataFile = {}
"""
VOXELS = np.random.default_rng(0).integers(-1000, 1000, (4, 4, 4)).astype(np.int16)


def nifti(path):
    path.parent.mkdir(parents=True, exist_ok=True)
    nib.save(nib.Nifti1Image(VOXELS, np.eye(4)), path)


def mhd(path, extension=".raw"):
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(HEADER.format(path.with_suffix(extension).name))
    path.with_suffix(extension).write_bytes(VOXELS.tobytes())


@pytest.fixture
def sets(tmp_path):
    """Make the four sets, with their labels and what else lies about."""
    mhd(tmp_path / "luna/subset0/1.2.mhd")
    mhd(tmp_path / "luna/subset9/1.10.mhd")
    mhd(tmp_path / "luna/seg-lungs-LUNA16/1.2.mhd", ".zraw")
    (tmp_path / "luna/annotations.csv").touch()
    for name in ("TrainingImg/train_000_0000", "ValidationImg/val_001_0000", "TrainingMask/train_000"):
        nifti(tmp_path / f"flare/{name}.nii.gz")
    for name in (
        "Train/volume-covid19-A-0003",
        "Train/volume-covid19-A-0011",
        "Validation/volume-covid19-A-0001",
    ):
        nifti(tmp_path / f"covid/{name}_ct.nii.gz")
    nifti(tmp_path / "covid/Train/volume-covid19-A-0003_seg.nii.gz")
    nifti(tmp_path / "covid/Train/volume-covid19-A-0011_seg.nii.gz")
    for name in ("imagesTr/ATM_001_0000", "labelsTr/ATM_001_0000"):
        nifti(tmp_path / f"atm/TrainBatch1/{name}.nii.gz")
    (tmp_path / "atm/TrainBatch1/imagesTr/._ATM_001_0000.nii.gz").touch()
    return tmp_path


EXPECTED = {
    "luna16": ("luna", ["luna/subset0/1.2.mhd", "luna/subset9/1.10.mhd"]),
    "flare21": (
        "flare",
        ["flare/TrainingImg/train_000_0000.nii.gz", "flare/ValidationImg/val_001_0000.nii.gz"],
    ),
    "covid19": (
        "covid",
        [
            "covid/Train/volume-covid19-A-0003_ct.nii.gz",
            "covid/Train/volume-covid19-A-0011_ct.nii.gz",
            "covid/Validation/volume-covid19-A-0001_ct.nii.gz",
        ],
    ),
    "atm22": ("atm", ["atm/TrainBatch1/imagesTr/ATM_001_0000.nii.gz"]),
}


def images(content):
    return [entry["image"] for entry in content["training"]]


def test_four_sets(sets, capsys):
    output = sets / "lists/ct.json"
    pretrain(str(output), **{option: str(sets / folder) for option, (folder, _) in EXPECTED.items()})
    content = json.loads(output.read_text())
    assert images(content) == [path for _, paths in EXPECTED.values() for path in paths]
    assert content["sources"] == {"luna16": 2, "flare21": 2, "covid19": 3, "atm22": 1}
    assert content["numTraining"] == 8
    assert {"name", "description"} <= set(content)
    scans = inspect_scans(read_datalist(output, sets, "training"), channels=1)
    assert [scan.problem for scan in scans] == [None] * 8

    lines = capsys.readouterr().out.splitlines()
    assert [line.split()[:3] for line in lines[:4]] == [
        ["LUNA16", "2", "scans"],
        ["FLARE2021", "2", "scans"],
        ["COVID-19-20", "3", "scans"],
        ["ATM22", "1", "scans"],
    ]
    assert lines[-1] == f"Train with: --datalist {output} --dataset_dir {sets}"


@pytest.mark.parametrize("option", EXPECTED)
def test_one_set_alone_is_relative_to_its_folder(sets, option, capsys):
    folder, paths = EXPECTED[option]
    pretrain(str(sets / "one.json"), **{option: str(sets / folder)})
    content = json.loads((sets / "one.json").read_text())
    assert images(content) == [path.removeprefix(f"{folder}/") for path in paths]
    assert content["sources"] == {option: len(paths)}
    assert len(read_datalist(sets / "one.json", sets / folder, "training")) == len(paths)


def test_the_printed_line_can_be_pasted(sets, tmp_path, capsys, monkeypatch):
    (sets / "atm").rename(sets / "a t m")
    monkeypatch.chdir(sets)
    pretrain("one list.json", atm22="a t m")
    words = shlex.split(capsys.readouterr().out.splitlines()[-1])
    assert words[-4:] == ["--datalist", "one list.json", "--dataset_dir", str(sets / "a t m")]


def test_the_folder_may_be_the_one_that_holds_the_scans(sets):
    pretrain(str(sets / "one.json"), atm22=str(sets / "atm/TrainBatch1/imagesTr"))
    assert images(json.loads((sets / "one.json").read_text())) == ["ATM_001_0000.nii.gz"]


def test_the_same_sets_give_the_same_file(sets):
    folders = {option: str(sets / folder) for option, (folder, _) in EXPECTED.items()}
    pretrain(str(sets / "a.json"), **folders)
    pretrain(str(sets / "b.json"), **dict(reversed(folders.items())))
    assert (sets / "a.json").read_bytes() == (sets / "b.json").read_bytes()


def test_mhd_without_voxels_are_named_and_left_out(sets, capsys):
    (sets / "luna/subset0/1.2.raw").unlink()
    pretrain(str(sets / "one.json"), luna16=str(sets / "luna"))
    assert images(json.loads((sets / "one.json").read_text())) == ["subset9/1.10.mhd"]
    assert "Left out: " + str(sets / "luna/subset0/1.2.mhd") in capsys.readouterr().out


def test_compressed_voxels_are_voxels(sets):
    mhd(sets / "luna/subset3/1.3.mhd", ".zraw")
    pretrain(str(sets / "one.json"), luna16=str(sets / "luna"))
    assert "subset3/1.3.mhd" in images(json.loads((sets / "one.json").read_text()))


def test_no_set_is_refused(tmp_path):
    with pytest.raises(ScanError, match=r"found no data set, expected at least one of --luna16, --flare21"):
        pretrain(str(tmp_path / "one.json"))


@pytest.mark.parametrize(
    "option, folder, message",
    [
        ("luna16", "nowhere", r"--luna16: .*nowhere does not exist, expected the folder of LUNA16"),
        ("luna16", "atm", r"--luna16: found TrainBatch1/ in .*atm, expected scans at subset\[0-9\]/\*\.mhd"),
        (
            "flare21",
            "covid",
            r"found Train/, Validation/ in .*expected scans at TrainingImg/\*\.nii\.gz or Val",
        ),
        ("covid19", "flare", r"expected scans at Train/\*_ct\.nii\.gz or Validation/\*_ct\.nii\.gz"),
        ("atm22", "luna", r"found annotations\.csv, seg-lungs-LUNA16/, subset0/, subset9/ in .*imagesTr/"),
        ("atm22", "empty", r"found nothing in"),
        ("atm22", "luna/annotations.csv", r"annotations\.csv is a file, expected the folder of ATM22"),
    ],
)
def test_a_folder_of_another_layout_is_refused(sets, option, folder, message):
    (sets / "empty").mkdir()
    with pytest.raises(ScanError, match=message):
        pretrain(str(sets / "one.json"), **{option: str(sets / folder)})
    assert not (sets / "one.json").exists()


def test_a_folder_of_scans_would_have_held_the_labels(sets):
    """Why the lists exist: taking every file of the folder takes labels for scans."""
    assert len(find_scans(sets / "covid")) == 5
