"""`python -m tools check` names every bad scan at once and can write a list of the others."""

from __future__ import annotations

import json
import shlex

import nibabel as nib
import numpy as np
import pytest

from tools.check import check, summary
from tools.inspection import Scan
from tools.scans import ScanError, read_datalist


def write(path, shape=(8, 9, 10), spacing=(1.0, 1.0, 2.5), seed=0):
    path.parent.mkdir(parents=True, exist_ok=True)
    array = np.random.default_rng(seed).integers(-1000, 1000, shape).astype(np.int16)
    array.flat[:2] = -1024, 1500
    nib.save(nib.Nifti1Image(array, np.diag([*spacing, 1])), path)


@pytest.fixture
def folder(tmp_path):
    """Three good scans and two bad ones."""
    write(tmp_path / "data/a.nii.gz")
    write(tmp_path / "data/sub/b.nii.gz", shape=(8, 12, 16), spacing=(1.0, 0.5, 2.5))
    write(tmp_path / "data/c.nii")
    (tmp_path / "data/empty.nii.gz").touch()
    write(tmp_path / "data/cut.nii")
    (tmp_path / "data/cut.nii").write_bytes((tmp_path / "data/cut.nii").read_bytes()[:900])
    return tmp_path / "data"


def test_names_every_bad_scan_and_fails(folder, capsys):
    with pytest.raises(SystemExit) as stopped:
        check(str(folder), workers=0)
    assert stopped.value.code == 1
    lines = capsys.readouterr().out.splitlines()
    assert lines[0].startswith(f"{folder / 'cut.nii'}: is truncated")
    assert lines[1].startswith(f"{folder / 'empty.nii.gz'}: is empty")
    assert lines[2:] == [
        "scans      3 readable, 2 unreadable",
        "shape      8 x 9-12 x 10-16 voxels",
        "spacing    1 x 0.5-1 x 2.5 mm",
        "intensity  -1024 to 1500",
    ]


def test_passes_when_all_are_good(folder, capsys):
    (folder / "empty.nii.gz").unlink()
    (folder / "cut.nii").unlink()
    check(str(folder), workers=2)
    assert capsys.readouterr().out.startswith("scans      3 readable, 0 unreadable\n")


def test_writes_a_list_of_the_good_scans(folder, capsys, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    check("data", output="lists/good.json", workers=0)
    content = json.loads((tmp_path / "lists/good.json").read_text())
    assert [entry["image"] for entry in content["training"]] == ["a.nii.gz", "c.nii", "sub/b.nii.gz"]
    assert content["numTraining"] == 3
    words = shlex.split(capsys.readouterr().out.splitlines()[-1])
    assert words[-4:] == ["--datalist", "lists/good.json", "--dataset_dir", str(folder)]
    assert len(read_datalist(words[-3], words[-1], "training")) == 3


def test_thins_out_a_datalist_and_keeps_the_rest_of_it(folder, tmp_path):
    content = {
        "name": "mine",
        "numTraining": 3,
        "training": [{"image": "a.nii.gz", "label": "l"}, "cut.nii", {"image": "missing.nii"}],
        "validation": [{"image": "empty.nii.gz"}, {"image": "sub/b.nii.gz", "fold": 1}],
    }
    (tmp_path / "all.json").write_text(json.dumps(content))
    check(str(folder), str(tmp_path / "all.json"), output=str(tmp_path / "good.json"), workers=0)
    assert json.loads((tmp_path / "good.json").read_text()) == {
        "name": "mine",
        "numTraining": 1,
        "training": [{"image": "a.nii.gz", "label": "l"}],
        "numValidation": 1,
        "validation": [{"image": "sub/b.nii.gz", "fold": 1}],
    }


def test_missing_images_of_a_datalist_are_named_with_the_others(folder, capsys):
    (folder / "all.json").write_text(json.dumps({"training": ["no.nii", "a.nii.gz"], "test": ["cut.nii"]}))
    with pytest.raises(SystemExit):
        check(datalist=str(folder / "all.json"), workers=0)
    lines = capsys.readouterr().out.splitlines()
    assert lines[0] == f"{folder / 'no.nii'}: does not exist"
    assert lines[1].startswith(f"{folder / 'cut.nii'}: is truncated")
    assert lines[2] == "scans      1 readable, 2 unreadable"


def test_channels_in_several_files(folder, capsys):
    (folder / "all.json").write_text(json.dumps({"training": [{"image": ["a.nii.gz", "c.nii"]}]}))
    check(datalist=str(folder / "all.json"), channels=2, workers=0)
    with pytest.raises(SystemExit):
        check(datalist=str(folder / "all.json"), workers=0)
    assert f"{folder / 'a.nii.gz'}, {folder / 'c.nii'}: has 2 channels" in capsys.readouterr().out


def test_writes_no_empty_list(folder, tmp_path):
    with pytest.raises(ScanError, match=r"found no readable scan to train on, expected at least one"):
        check(str(folder), channels=3, output=str(tmp_path / "good.json"), workers=0)
    assert not (tmp_path / "good.json").exists()


def test_wants_something_to_check():
    with pytest.raises(ScanError, match=r"neither --dataset_dir nor --datalist"):
        check()


def test_summary_without_a_good_scan():
    bad = Scan("a.nii", 0, (0, 0, 0), (0.0, 0.0, 0.0), 0.0, 0.0, "is empty")
    assert summary([bad]) == "scans      0 readable, 1 unreadable"
