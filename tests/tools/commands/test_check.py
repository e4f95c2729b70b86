"""`python -m tools check` names every bad scan at once and can write a list of the others."""

from __future__ import annotations

import json
import shlex
from pathlib import Path

import nibabel as nib
import numpy as np
import pytest

from tools.commands.check import check, summary
from tools.data.datalists import read_datalist
from tools.data.inspection import Scan
from tools.data.runs import find_training_cases
from tools.data.scans import ScanError
from tools.samples.sample_data import sample_data


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


# ---------------------------------------------------------------------------------------------- for a bundle

CONFIG = """
in_channels: {channels}
classes: {classes}
layout: {layout}
modalities: {modalities}
fold: {fold}
folds: 3
split_seed: 0
network_def: $1 / 0   # must not be looked at
"""


def bundle(folder, layout="msd", classes="{one: [1], two: [2]}", channels=1, modalities="null", fold=0):
    (folder / "bundle/configs").mkdir(parents=True)
    (folder / "bundle/configs/train.yaml").write_text(
        CONFIG.format(layout=layout, classes=classes, channels=channels, modalities=modalities, fold=fold)
    )
    return str(folder / "bundle")


def write_label(path, values=(0, 1, 2), shape=(8, 9, 10), spacing=(1.0, 1.0, 2.5)):
    path.parent.mkdir(parents=True, exist_ok=True)
    array = np.random.default_rng(0).choice(values, shape).astype(np.uint8)
    nib.save(nib.Nifti1Image(array, np.diag([*spacing, 1])), path)


@pytest.fixture
def cases(tmp_path):
    """Three good cases in the layout of the Decathlon, without its dataset.json."""
    for name in "abc":
        write(tmp_path / f"data/imagesTr/{name}.nii.gz")
        write_label(tmp_path / f"data/labelsTr/{name}.nii.gz")
    return tmp_path / "data"


def fails(capsys, *arguments, **options):
    with pytest.raises(SystemExit) as stopped:
        check(*arguments, workers=0, **options)
    assert stopped.value.code == 1
    return capsys.readouterr().out.splitlines()


def test_a_bundle_whose_cases_are_all_good(cases, tmp_path, capsys):
    check(str(cases), bundle=bundle(tmp_path), workers=0)
    lines = capsys.readouterr().out.splitlines()
    assert [line.split()[0] for line in lines] == ["scans", "shape", "spacing", "intensity", "labels"]
    assert lines[0] == "scans      3 readable, 0 unreadable"
    assert lines[-1].startswith("labels     3 checked, values 0, 1")


def test_a_bundle_tells_problems_of_pairs_images_and_labels_at_once(cases, tmp_path, capsys):
    (cases / "imagesTr/d.nii.gz").write_bytes(b"")
    (cases / "labelsTr/e.nii.gz").write_bytes(b"")
    (cases / "imagesTr/b.nii.gz").write_bytes(b"")
    write_label(cases / "labelsTr/c.nii.gz", (0, 1, 1, 1, 5))
    lines = fails(capsys, str(cases), bundle=bundle(tmp_path))
    assert lines[0] == f"{cases}/imagesTr/d.nii.gz has no label, expected d.nii.gz in labelsTr"
    assert lines[1] == f"{cases}/labelsTr/e.nii.gz has no image, expected e.nii.gz in imagesTr"
    assert lines[2].startswith(f"{cases}/imagesTr/b.nii.gz: is empty")
    assert lines[3].startswith(
        f"{cases}/imagesTr/c.nii.gz: its label {cases}/labelsTr/c.nii.gz has unknown label values"
    )
    assert lines[4] == "scans      1 readable, 2 unreadable"


def test_a_bundle_warns_of_classes_that_no_training_case_holds(cases, tmp_path, capsys):
    for name in "abc":
        write_label(cases / f"labelsTr/{name}.nii.gz", (0, 1))
    settings = bundle(tmp_path)
    trained = find_training_cases(str(cases), None, "msd", None, 0, 3, 0, 1.0, 0)
    write_label(Path(trained.validation[0]["label"]))
    check(str(cases), bundle=settings, workers=0)
    assert capsys.readouterr().out.splitlines()[-1] == ("WARNING    no training case holds two: this cannot be learnt")
    write_label(Path(trained.training[1]["label"]))
    check(str(cases), bundle=settings, workers=0)
    assert "WARNING" not in capsys.readouterr().out


def test_a_bundle_tells_the_order_of_its_channels(tmp_path, capsys):
    sample_data(str(tmp_path / "brats"), "brats", cases=2)
    classes = "{TC: [1, 4], WT: [1, 2, 4], ET: [4]}"
    settings = bundle(tmp_path, "brats", classes, 4, "[t1, t1ce, t2, flair]")
    check(str(tmp_path / "brats"), bundle=settings, workers=0)
    stem = tmp_path / "brats/BraTS20_Training_001/BraTS20_Training_001"
    expected = ", ".join(f"{name} {stem}_{name}.nii.gz" for name in ("t1", "t1ce", "t2", "flair"))
    assert f"channels   {expected}" in capsys.readouterr().out.splitlines()
    (stem.parent / f"{stem.name}_t2.nii.gz").unlink()
    lines = fails(capsys, str(tmp_path / "brats"), bundle=settings)
    assert lines[0].startswith(f"{stem} has no t2: expected {stem.name}_t2.nii.gz, found")
    assert lines[1].startswith(
        "found 1 cases, of which 0 for the test and fold 0 of 3 leave 0 to train and 1 to validate"
    )


def test_a_bundle_and_a_datalist(cases, tmp_path, capsys):
    entries = [{"image": f"imagesTr/{name}.nii.gz", "label": f"labelsTr/{name}.nii.gz"} for name in "abc"]
    content = {
        "training": [entries[0], "imagesTr/b.nii.gz"],
        "validation": [{"image": "imagesTr/c.nii.gz", "label": "labelsTr/no.nii.gz"}, entries[2]],
        "test": ["imagesTr/b.nii.gz"],
    }
    path = tmp_path / "list.json"
    path.write_text(json.dumps(content))
    settings = bundle(tmp_path)
    lines = fails(capsys, str(cases), str(path), bundle=settings)
    assert lines[:3] == [
        f"{cases}/imagesTr/b.nii.gz: has no label in the data list, expected one to train with",
        f"{cases}/imagesTr/c.nii.gz: its label {cases}/labelsTr/no.nii.gz does not exist",
        "scans      3 readable, 2 unreadable",
    ]
    assert [line for line in lines if line.startswith("labels")] == ["labels     2 checked, values 0, 1, 2"]
    check(str(cases), str(path), output=str(tmp_path / "good.json"), bundle=settings, workers=0)
    good = json.loads((tmp_path / "good.json").read_text())
    assert (good["training"], good["validation"], good["test"]) == (entries[:1], entries[2:], ["imagesTr/b.nii.gz"])


def test_a_bundle_gets_a_list_of_its_good_cases(cases, tmp_path, capsys):
    write_label(cases / "labelsTr/b.nii.gz", shape=(8, 9, 11))
    check(str(cases), output=str(tmp_path / "good.json"), bundle=bundle(tmp_path), workers=0)
    assert f"{cases}/imagesTr/b.nii.gz: its label" in capsys.readouterr().out
    found = find_training_cases(str(cases), str(tmp_path / "good.json"), "msd", None, 0, 2, 0, 1.0, 0)
    names = sorted(Path(case["label"]).name for case in (*found.training, *found.validation))
    assert names == ["a.nii.gz", "c.nii.gz"]


def test_what_is_no_bundle_for_segmentation(cases, tmp_path):
    with pytest.raises(ScanError, match=r"nowhere/configs/train\.yaml does not exist, expected the folder of a bundle"):
        check(str(cases), bundle=str(tmp_path / "nowhere"))
    other = Path(bundle(tmp_path))
    (other / "configs/train.yaml").write_text("in_channels: 1\nlayout: msd\n")
    with pytest.raises(ScanError, match=r"train\.yaml has no classes, modalities, fold, folds, split_seed, expected a"):
        check(str(cases), bundle=str(other))


def test_a_header_that_contradicts_itself_is_said_in_mm(tmp_path, capsys):
    write(tmp_path / "scan.nii")
    image = nib.load(tmp_path / "scan.nii")
    image.set_qform(np.diag([1, 1, 2.5, 1]) + np.eye(4, k=3) * 12, code=1)
    nib.save(image, tmp_path / "moved.nii")
    check(str(tmp_path), workers=0)
    warnings = [line for line in capsys.readouterr().out.splitlines() if line.startswith("WARNING")]
    moved = tmp_path / "moved.nii"
    assert warnings == [f"WARNING    {moved}: its sform (used) and its qform are up to 12 mm apart"]


def test_brats_of_another_year(tmp_path, capsys):
    """Its channels have other names, and its enhancing tumour is 3."""
    for name in ("a", "b"):
        for channel, part in enumerate(("t1n", "t1c", "t2w", "t2f")):
            write(tmp_path / f"data/{name}/{name}-{part}.nii.gz", seed=channel)
        write_label(tmp_path / f"data/{name}/{name}-seg.nii.gz", (0, 1, 2, 3))
    settings = bundle(tmp_path, "brats", "{TC: [1, 4], WT: [1, 2, 4], ET: [4]}", 4, "[t1, t1ce, t2, flair]")
    last = fails(capsys, str(tmp_path / "data"), bundle=settings)[-1]
    assert last.startswith("WARNING    enhancing tumour is 4 in BraTS until 2021 and 3 since 2023")
    classes = json.loads(last.partition('--classes "')[2].rstrip('"').replace("'", '"'))
    assert classes == {"TC": [1, 3], "WT": [1, 2, 3], "ET": [3]}
    check(str(tmp_path / "data"), bundle=settings, workers=0, classes=classes, modalities=["t1n", "t1c", "t2w", "t2f"])
    lines = capsys.readouterr().out.splitlines()
    assert lines[0] == "scans      2 readable, 0 unreadable" and "values 0, 1, 2, 3" in lines[4]


def test_channel_files_without_labels(tmp_path, capsys):
    for part in ("t1", "t2"):
        write(tmp_path / f"a_{part}.nii.gz", seed=len(part))
    write(tmp_path / "b_t1.nii.gz")
    lines = fails(capsys, str(tmp_path), modalities=["t1", "t2"])
    assert lines[0].startswith(f"{tmp_path}/b has no t2: found b_t1.nii.gz")
    assert lines[1] == "scans      1 readable, 0 unreadable"
