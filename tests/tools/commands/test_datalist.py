"""The data lists of the four public sets hold their scans and nothing else."""

from __future__ import annotations

import json
import shlex

import nibabel as nib
import numpy as np
import pytest

from tools.commands.datalist import brats, btcv, msd, pretrain
from tools.data.datalists import read_datalist
from tools.data.inspection import inspect_scans
from tools.data.runs import find_training_cases
from tools.data.scans import ScanError
from tools.samples.anatomy import CHANNELS

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
    """Make the four sets, with their labels and other files."""
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
    mhd(sets / "luna/subset3/1.3.mhd", ".zraw")  # compressed voxels are voxels
    pretrain(str(sets / "one.json"), luna16=str(sets / "luna"))
    assert images(json.loads((sets / "one.json").read_text())) == ["subset3/1.3.mhd", "subset9/1.10.mhd"]
    assert "Left out: " + str(sets / "luna/subset0/1.2.mhd") in capsys.readouterr().out


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


# ----------------------------------------------------------------------------------------------- labelled sets

USUAL = [*range(1, 11), *range(21, 41)]


def btcv_set(folder, numbers=USUAL):
    for number in numbers:
        for name in (f"img/img{number:04}.nii.gz", f"label/label{number:04}.nii.gz"):
            (folder / name).parent.mkdir(parents=True, exist_ok=True)
            (folder / name).touch()
    return folder


def brats_set(folder, count=8):
    for number in range(count):
        for part in (*CHANNELS, "seg"):
            path = folder / f"B{number}/B{number}_{part}.nii.gz"
            path.parent.mkdir(parents=True, exist_ok=True)
            path.touch()
    return folder


def msd_set(folder, count=8):
    entries = [{"image": f"./imagesTr/s_{n}.nii.gz", "label": f"./labelsTr/s_{n}.nii.gz"} for n in range(count)]
    for entry in entries:
        for name in entry.values():
            (folder / name).parent.mkdir(parents=True, exist_ok=True)
            (folder / name).touch()
    (folder / "dataset.json").write_text(json.dumps({"labels": {"1": "spleen"}, "training": entries}))
    return folder


LABELLED = {"btcv": (btcv, btcv_set), "brats": (brats, brats_set), "msd": (msd, msd_set)}


@pytest.mark.parametrize("layout", LABELLED)
@pytest.mark.parametrize(
    "options", [{}, {"fold": 1, "folds": 4, "seed": 3}, {"fold": 0, "seed": 1, "label_fraction": 0.3}]
)
def test_a_list_is_the_split_that_a_bundle_makes(tmp_path, layout, options):
    write, make = LABELLED[layout]
    folder = make(tmp_path / "set")
    write(str(folder), str(tmp_path / "list.json"), **options)
    modalities = CHANNELS if layout == "brats" else None
    settings = {"fold": None if layout == "btcv" else 0, "folds": 5, "seed": 0, "label_fraction": 1.0, **options}
    settings["split_seed"] = settings["seed"]
    by_itself = find_training_cases(str(folder), None, layout, modalities, **settings)
    settings["label_fraction"] = 1.0
    listed = find_training_cases(str(folder), str(tmp_path / "list.json"), layout, modalities, **settings)
    assert listed == by_itself
    content = json.loads((tmp_path / "list.json").read_text())
    assert content["numTraining"] == len(content["training"]) == len(listed.training)
    assert content["numValidation"] == len(content["validation"]) == len(listed.validation)
    assert (content["numTest"], content["test"]) == (0, [])


def test_the_usual_split_of_btcv(tmp_path, capsys):
    btcv(str(btcv_set(tmp_path / "BTCV")), str(tmp_path / "list.json"))
    content = json.loads((tmp_path / "list.json").read_text())
    assert (content["name"], content["numTraining"], content["labels"]["6"]) == ("BTCV", 24, "liver")
    expected = [{"image": f"img/img{n:04}.nii.gz", "label": f"label/label{n:04}.nii.gz"} for n in range(35, 41)]
    assert content["validation"] == expected
    assert capsys.readouterr().out.splitlines() == [
        "training        24 cases: img0001.nii.gz, img0002.nii.gz, img0003.nii.gz, …",
        "validation       6 cases: img0035.nii.gz, img0036.nii.gz, img0037.nii.gz, …",
        "test             0 cases",
        f"together        30 of 30 cases, listed in {tmp_path}/list.json",
        f"Train with: --datalist {tmp_path}/list.json --dataset_dir {tmp_path}/BTCV",
    ]


def test_channels_of_brats_are_listed_in_order(tmp_path):
    brats(str(brats_set(tmp_path)), str(tmp_path / "list.json"), test_cases=2)
    content = json.loads((tmp_path / "list.json").read_text())
    assert content["labels"] == {"0": "background", "1": "necrotic core", "2": "edema", "4": "enhancing tumour"}
    assert (content["numTraining"], content["numValidation"], content["numTest"]) == (4, 2, 2)
    (number,) = {entry["label"][1] for entry in content["test"][:1]}
    channels = [f"B{number}/B{number}_{name}.nii.gz" for name in ("t1", "t1ce", "t2", "flair")]
    assert content["test"][0] == {"image": channels, "label": f"B{number}/B{number}_seg.nii.gz"}


def test_a_list_of_the_decathlon_keeps_the_names_of_its_labels(tmp_path, monkeypatch, capsys):
    msd_set(tmp_path / "Task 09")
    monkeypatch.chdir(tmp_path)
    msd("Task 09", "lists/a list.json", folds=4)
    assert json.loads((tmp_path / "lists/a list.json").read_text())["labels"] == {"1": "spleen"}
    words = shlex.split(capsys.readouterr().out.splitlines()[-1])
    assert words[-4:] == ["--datalist", "lists/a list.json", "--dataset_dir", str(tmp_path / "Task 09")]
    (tmp_path / "Task 09/dataset.json").unlink()
    msd("Task 09", "lists/a list.json", folds=4)
    assert "labels" not in json.loads((tmp_path / "lists/a list.json").read_text())


def test_lists_of_labelled_sets_are_not_written_with_errors(tmp_path):
    output = tmp_path / "list.json"
    (msd_set(tmp_path / "a") / "labelsTr/s_3.nii.gz").unlink()
    with pytest.raises(ScanError, match=r"labelsTr/s_3\.nii\.gz does not exist, but dataset\.json lists it"):
        msd(str(tmp_path / "a"), str(output))
    with pytest.raises(ScanError, match=r"fold: found 5, expected one of 0 to 4"):
        btcv(str(btcv_set(tmp_path / "b")), str(output), fold=5)
    assert not output.exists()
