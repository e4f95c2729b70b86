"""Finding cases in the published layouts, pairing them with their labels, and splitting them."""

from __future__ import annotations

import json
import logging
import os
import random
import re
from itertools import pairwise
from pathlib import Path

import pytest

from image_files import write_nifti
from tools.data.cases import find_cases, find_inference_scans, pair_cases
from tools.data.classes import absent_classes
from tools.data.inspection import Scan
from tools.data.runs import InferenceScans, TrainingCases, find_training_cases
from tools.data.scans import ScanError
from tools.data.splits import BTCV_VALIDATION, btcv_split, label_subset, split_by_layout, split_cases
from tools.samples.sample_data import sample_data

MODALITIES = ["t1", "t1ce", "t2", "flair"]
CASE = "BraTS20_Training_{:03d}"


def touch(root, *names):
    for name in names:
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).write_bytes(b"x")
    return root


def write_json(path, content):
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(content))
    return path


def relative(cases, root):
    return [
        {key: os.path.relpath(value, root) for key, value in case.items() if isinstance(value, str)} for case in cases
    ]


def image_names(cases):
    return [Path(case["image"]).name for case in cases]


def problems_of(root, layout, modalities=None):
    """The lines of the one error that tells all of them."""
    with pytest.raises(ScanError) as error:
        find_cases(root, layout, modalities)
    head, *lines = str(error.value).split("\n")
    assert head == f"dataset_dir: {root}: {len(lines)} problem(s) with its cases:"
    return [line.strip().removeprefix(f"{root}/") for line in lines]


# ------------------------------------------------------------------------------------------------------ btcv


@pytest.mark.parametrize("folders", [("imagesTr", "labelsTr"), ("RawData/Training/img", "RawData/Training/label")])
def test_btcv_is_paired_by_number_at_any_depth(tmp_path, folders):
    images, labels = folders
    touch(tmp_path, f"{images}/img0002.nii.gz", f"{images}/img0001.nii", f"{images}/._img0001.nii.gz", "readme.txt")
    touch(tmp_path, f"{labels}/label0001.nii.gz", f"{labels}/label0002.nii.gz")
    assert find_cases(tmp_path, "btcv") == [
        {"image": f"{tmp_path}/{images}/img0001.nii", "label": f"{tmp_path}/{labels}/label0001.nii.gz"},
        {"image": f"{tmp_path}/{images}/img0002.nii.gz", "label": f"{tmp_path}/{labels}/label0002.nii.gz"},
    ]


def test_paths_start_with_the_folder_as_given(tmp_path, monkeypatch):
    touch(tmp_path, "data/img/img0001.nii.gz", "data/label/label0001.nii.gz")
    monkeypatch.chdir(tmp_path)
    assert find_cases("data", "btcv") == [{"image": "data/img/img0001.nii.gz", "label": "data/label/label0001.nii.gz"}]


def test_btcv_leaves_out_the_test_scans(tmp_path, caplog):
    touch(tmp_path, "Training/img/img0001.nii.gz", "Training/label/label0001.nii.gz")
    touch(tmp_path, "Testing/img/img0061.nii.gz", "Testing/img/img0062.nii.gz")
    assert image_names(find_cases(tmp_path, "btcv")) == ["img0001.nii.gz"]
    assert f"{tmp_path}/Testing/img: 2 scans without labels are left out" in caplog.text


def test_btcv_names_every_file_without_its_counterpart(tmp_path):
    touch(tmp_path, *(f"img/img{n:04}.nii.gz" for n in (1, 2, 3)), *(f"label/label{n:04}.nii.gz" for n in (1, 4, 5)))
    assert problems_of(tmp_path, "btcv") == [
        "img/img0002.nii.gz has no label, expected label0002.nii.gz",
        "img/img0003.nii.gz has no label, expected label0003.nii.gz",
        "label/label0004.nii.gz has no image, expected img0004.nii.gz",
        "label/label0005.nii.gz has no image, expected img0005.nii.gz",
    ]


def test_btcv_refuses_a_number_that_is_there_twice(tmp_path):
    touch(tmp_path, "a/img0001.nii.gz", "b/img0001.nii", "a/label0001.nii.gz")
    (problem,) = problems_of(tmp_path, "btcv")
    assert problem == f"a/img0001.nii.gz and {tmp_path}/b/img0001.nii are the same part of one case, expected one file"


# ----------------------------------------------------------------------------------------------------- brats


def brats_case(root, number, *leave_out, extension=".nii.gz"):
    name = CASE.format(number)
    parts = [part for part in (*MODALITIES, "seg") if part not in leave_out]
    return touch(root, *(f"{name}/{name}_{part}{extension}" for part in parts))


def test_brats_channels_are_in_the_order_asked_for(tmp_path):
    brats_case(tmp_path / "MICCAI/Training", 2, extension=".nii")
    brats_case(tmp_path / "MICCAI/Training", 1)
    touch(tmp_path, "MICCAI/Training/survival_info.csv")
    for order in (MODALITIES, ["flair", "t1", "t2", "t1ce"], ["t1ce"]):
        first, second = find_cases(tmp_path, "brats", order)
        stem = f"{tmp_path}/MICCAI/Training/{CASE.format(1)}/{CASE.format(1)}"
        assert first == {
            "image": [f"{stem}_{modality}.nii.gz" for modality in order],
            "label": f"{stem}_seg.nii.gz",
        }
        assert second["label"].endswith(f"{CASE.format(2)}_seg.nii")


def test_brats_names_every_missing_file(tmp_path):
    brats_case(tmp_path, 1)
    brats_case(tmp_path, 2, "t1ce", "t2")
    brats_case(tmp_path, 3, "seg")
    brats_case(tmp_path, 355, "seg")
    touch(tmp_path / CASE.format(355), "W39_1998.09.19_Segm.nii")
    two, three, last = (CASE.format(number) for number in (2, 3, 355))
    found = problems_of(tmp_path, "brats", MODALITIES)
    assert found[0] == (
        f"{two}/{two} has no t1ce and no t2: expected {two}_t1ce.nii.gz and {two}_t2.nii.gz, "
        f"found {two}_flair.nii.gz, {two}_seg.nii.gz, {two}_t1.nii.gz"
    )
    assert found[1].startswith(f"{three}/{three} has no label: expected {three}_seg.nii.gz, found {three}_flair")
    assert found[2].startswith(f"{last}/{last} has no label: expected {last}_seg.nii.gz, found")
    assert found[2].endswith(", W39_1998.09.19_Segm.nii")
    assert len(found) == 3


def test_brats_leaves_out_the_validation_set(tmp_path, caplog):
    brats_case(tmp_path / "Training", 1)
    brats_case(tmp_path / "Validation", 7, "seg")
    brats_case(tmp_path / "Validation", 8, "seg")
    assert len(find_cases(tmp_path, "brats", MODALITIES)) == 1
    assert f"{tmp_path}/Validation: 2 scans without labels are left out" in caplog.text
    with pytest.raises(ScanError, match=r"found no labelled case but BraTS.*_007/, BraTS.*_008/ in .*_seg\.nii\.gz"):
        find_cases(tmp_path / "Validation", "brats", MODALITIES)


@pytest.mark.parametrize("modalities", [MODALITIES, ["t1n", "t1c", "t2w", "t2f"]])
def test_channels_are_known_by_their_names_of_other_years(tmp_path, caplog, modalities):
    for names in (("t1", "t1ce", "t2", "flair"), ("t1n", "t1c", "t2w", "t2f")):
        case = f"BraTS-{names[0]}-000"
        touch(tmp_path, *(f"{case}/{case}-{part}.nii.gz" for part in (*names, "seg")))
    for cases in (find_cases(tmp_path, "brats", modalities), find_inference_scans(str(tmp_path), None, modalities)):
        endings = [[re.search(r"-(\w+)\.nii", path)[1] for path in case["image"]] for case in cases]
        assert endings == [["t1", "t1ce", "t2", "flair"], ["t1n", "t1c", "t2w", "t2f"]]
    own = "t1n as t1" if modalities == MODALITIES else "t1 as t1n"
    assert "channels are named as in another year of BraTS: " in caplog.text and own in caplog.text


def test_brats_wants_modalities(tmp_path):
    with pytest.raises(ScanError, match=r"modalities: found None, expected names of the channels"):
        find_cases(brats_case(tmp_path, 1), "brats")


# ------------------------------------------------------------------------------------------------------- msd


def msd_set(root, *names):
    touch(root, *(f"{folder}/{name}.nii.gz" for name in names for folder in ("imagesTr", "labelsTr")))
    entries = [{"image": f"./imagesTr/{name}.nii.gz", "label": f"./labelsTr/{name}.nii.gz"} for name in names]
    write_json(root / "dataset.json", {"labels": {"0": "background", "1": "spleen"}, "training": entries, "test": []})
    return root


@pytest.mark.parametrize("described", [True, False])
def test_msd_cases(tmp_path, described):
    touch(msd_set(tmp_path, "spleen_9", "spleen_10"), "imagesTr/._spleen_9.nii.gz", "imagesTs/spleen_1.nii.gz")
    if not described:
        (tmp_path / "dataset.json").unlink()
    assert find_cases(tmp_path, "msd") == [
        {"image": f"{tmp_path}/imagesTr/{name}.nii.gz", "label": f"{tmp_path}/labelsTr/{name}.nii.gz"}
        for name in ("spleen_10", "spleen_9")
    ]


def test_msd_names_every_missing_and_every_unknown_file(tmp_path):
    msd_set(tmp_path, "a", "b", "c")
    for name in ("imagesTr/a.nii.gz", "labelsTr/a.nii.gz", "labelsTr/b.nii.gz"):
        (tmp_path / name).unlink()
    touch(tmp_path, "imagesTr/d.nii.gz", "labelsTr/e.nii.gz")
    assert problems_of(tmp_path, "msd") == [
        "imagesTr/a.nii.gz does not exist, but dataset.json lists it",
        "labelsTr/a.nii.gz does not exist, but dataset.json lists it",
        "labelsTr/b.nii.gz does not exist, but dataset.json lists it",
        "imagesTr/d.nii.gz has no entry in dataset.json, expected one (or give a datalist)",
        "labelsTr/e.nii.gz has no entry in dataset.json, expected one (or give a datalist)",
    ]


def test_msd_entry_without_a_label(tmp_path):
    touch(tmp_path, "imagesTr/a.nii.gz")
    write_json(tmp_path / "dataset.json", {"training": ["imagesTr/a.nii.gz"]})
    assert problems_of(tmp_path, "msd") == ["imagesTr/a.nii.gz has no label in dataset.json, expected 'label'"]


def test_msd_without_a_description_names_every_file_without_its_counterpart(tmp_path):
    touch(tmp_path, *(f"imagesTr/{name}.nii.gz" for name in "abc"), *(f"labelsTr/{name}.nii.gz" for name in "bd"))
    assert problems_of(tmp_path, "msd") == [
        "imagesTr/a.nii.gz has no label, expected a.nii.gz in labelsTr",
        "imagesTr/c.nii.gz has no label, expected c.nii.gz in labelsTr",
        "labelsTr/d.nii.gz has no image, expected d.nii.gz in imagesTr",
    ]
    assert image_names(pair_cases(tmp_path, "msd").cases) == ["b.nii.gz"]


def test_files_in_no_case_are_counted_by_kind(tmp_path, caplog):
    touch(tmp_path, "imagesTr/a.nii.gz", "labelsTr/a.nii.gz", "imagesTs/z.nii.gz", "dataset.json.bak", "b/img.mnc")
    write_json(tmp_path / "dataset.json", {"training": [{"image": "imagesTr/a.nii.gz", "label": "labelsTr/a.nii.gz"}]})
    pair_cases(tmp_path, "msd")
    assert f"{tmp_path}: 2 files are in no case: 1 .bak, 1 .mnc" in caplog.text


def test_all_files_in_cases_are_not_counted(tmp_path, caplog):
    touch(tmp_path, "imagesTr/a.nii.gz", "labelsTr/a.nii.gz", "imagesTs/z.nii.gz")
    pair_cases(tmp_path, "msd")
    assert "in no case" not in caplog.text


@pytest.mark.parametrize("described", [True, False])
def test_nnunet_cases_have_a_file_for_each_channel(tmp_path, described):
    touch(tmp_path, *(f"imagesTr/{name}_{n:04d}.mha" for name in ("b_7", "a") for n in (0, 1)))
    touch(tmp_path, "labelsTr/a.mha", "labelsTr/b_7.mha")
    if described:
        write_json(tmp_path / "dataset.json", {"channel_names": {"0": "T1", "1": "T2"}, "file_ending": ".mha"})
    assert find_cases(tmp_path, "msd") == [
        {
            "image": [f"{tmp_path}/imagesTr/{name}_{n:04d}.mha" for n in (0, 1)],
            "label": f"{tmp_path}/labelsTr/{name}.mha",
        }
        for name in ("a", "b_7")
    ]
    (tmp_path / "imagesTr/a_0000.mha").unlink()
    assert problems_of(tmp_path, "msd") == ["a lacks channels that others have: found a_0001.mha, expected a_0000 too"]


def test_a_number_is_that_of_a_channel_only_if_the_label_lacks_it(tmp_path):
    touch(tmp_path, *(f"{folder}/scan_{n:04d}.nii.gz" for folder in ("images", "labels") for n in (0, 1)))
    assert image_names(find_cases(tmp_path, "msd")) == ["scan_0000.nii.gz", "scan_0001.nii.gz"]


def test_images_and_labels_without_a_common_name_are_one_problem(tmp_path):
    touch(tmp_path, *(f"images/ct_{n}.nii" for n in range(9)), "labels/seg_1.nii")
    (problem,) = problems_of(tmp_path, "msd")
    assert "found ct_0.nii, ct_1.nii, ct_2.nii, … in images and seg_1.nii in labels" in problem


@pytest.mark.parametrize(
    "layout, message",
    [
        ("other", r"layout: found 'other', expected one of btcv, brats, msd"),
        ("btcv", r"found no labelled case but ct\.nii\.gz in .*, expected img0001\.nii\.gz with label0001"),
        ("brats", r"found no labelled case but .*, expected folders X with X_MODALITY"),
        ("msd", r"found no labelled case but .*, expected dataset\.json, or files of the same names"),
    ],
)
def test_a_folder_of_another_layout_is_refused(tmp_path, layout, message):
    with pytest.raises(ScanError, match=message):
        find_cases(touch(tmp_path, "ct.nii.gz"), layout, MODALITIES)
    with pytest.raises(ScanError, match=r"layout: found 'other'|nowhere does not exist"):
        find_cases(tmp_path / "nowhere", layout, MODALITIES)


@pytest.mark.parametrize("kind", ["btcv", "brats", "liver", "spleen", "hippocampus"])
def test_sample_data_are_found(tmp_path, kind):
    sample_data(str(tmp_path), kind, cases=2)
    layout = kind if kind in ("btcv", "brats") else "msd"
    found = find_cases(tmp_path, layout, MODALITIES)
    assert len(found) == 2
    assert all(isinstance(case["image"], list) == (kind == "brats") for case in found)


# ----------------------------------------------------------------------------------------------------- split


def many(count=23, root="/data"):
    return [{"image": f"{root}/img/{n:02}.nii", "label": f"{root}/label/{n:02}.nii"} for n in range(count)]


def test_split_is_the_one_that_is_described():
    training, validation, test = split_cases(many(), folds=4, fold=1, seed=3, test_cases=5)
    order = random.Random(3).sample(many(), 23)
    assert test == sorted(order[:5], key=lambda case: case["image"])
    assert validation == sorted(order[5:][1::4], key=lambda case: case["image"])
    assert training == [case for case in many() if case not in test and case not in validation]


def test_folds_cover_all_cases_once_and_leave_the_test_alone():
    parts = [split_cases(many(), 5, fold, seed=0, test_cases=3) for fold in range(5)]
    assert sorted((case for _, validation, _ in parts for case in validation), key=str) == sorted(
        (case for case in many() if case not in parts[0][2]), key=str
    )
    for training, validation, test in parts:
        assert test == parts[0][2]
        assert sorted([*training, *validation, *test], key=str) == many()


def test_split_depends_on_neither_place_nor_order():
    here, there = many(root="/a/b"), many(root="/z")[::-1]
    for first, second in zip(split_cases(here, 5, 0, 1, 2), split_cases(there, 5, 0, 1, 2), strict=True):
        assert relative(first, "/a/b") == relative(second, "/z")
    assert split_cases(here, 5, 0, 2, 2) != split_cases(here, 5, 0, 1, 2)


@pytest.mark.parametrize(
    "settings, message",
    [
        ({"fold": 5}, r"fold: found 5, expected one of 0 to 4"),
        ({"fold": -1}, r"fold: found -1, expected one of 0 to 4"),
        ({"folds": 1}, r"folds: found 1, expected at least 2"),
        ({"test_cases": -1}, r"test_cases: found -1, expected 0 or more"),
        ({"test_cases": 22}, r"found 23 cases, of which 22 for the test and fold 0 of 5 leave 0 to train and 1 to"),
        ({"cases": []}, r"found 0 cases, .* leave 0 to train and 0 to validate, expected at least 1 each"),
        ({"cases": many(2) * 2}, r"/data/img: found 00\.nii; 01\.nii more than once"),
    ],
)
def test_split_refuses(settings, message):
    with pytest.raises(ScanError, match=message):
        split_cases(**{"cases": many(), "folds": 5, "fold": 0, "seed": 0, **settings})


def test_split_of_the_real_hippocampus(shared_data):
    cases = find_cases(shared_data / "Task04_Hippocampus", "msd")
    training, validation, test = split_cases(cases, 10, 0, seed=0, test_cases=50)
    assert (len(training), len(validation), len(test)) == (144, 16, 50)
    numbers = [int(name.removesuffix(".nii.gz")[-3:]) for name in image_names(validation)]
    assert numbers[:3] == [1, 3, 15]
    assert image_names(test)[:2] == ["hippocampus_007.nii.gz", "hippocampus_020.nii.gz"]


def btcv_cases(numbers, root="/data"):
    return [{"image": f"{root}/img/img{n:04}.nii.gz", "label": f"{root}/label/label{n:04}.nii.gz"} for n in numbers]


USUAL = [*range(1, 11), *range(21, 41)]


def test_usual_split_of_btcv():
    training, validation = btcv_split(btcv_cases(USUAL)[::-1])
    assert training == btcv_cases([*range(1, 11), *range(21, 35)])
    assert validation == btcv_cases(BTCV_VALIDATION)
    assert split_by_layout(btcv_cases(USUAL), "btcv", None, 5, 0) == (training, validation, [])
    assert split_by_layout(btcv_cases(USUAL), "btcv", 0, 5, 0) == split_cases(btcv_cases(USUAL), 5, 0, 0)


@pytest.mark.parametrize(
    "numbers, message",
    [
        ([n for n in USUAL if n not in (7, 8, 9, 30)], r"found 26 cases, missing img0007-0009, img0030, others none;"),
        ([*USUAL, 50], r"found 31 cases, missing none, others img0050\.nii\.gz; expected exactly those, or a fold"),
        ([*range(1, 5)], r"found 4 cases, missing img0005-0010, img0021-0040,"),
        ([*USUAL, 1], r"found 31 cases"),
    ],
)
def test_usual_split_needs_exactly_its_cases(numbers, message):
    with pytest.raises(ScanError, match=message):
        btcv_split(btcv_cases(numbers))


def test_other_btcv_cases_fall_back_to_a_fold_and_say_so(caplog):
    few = btcv_cases(range(1, 5))
    assert split_by_layout(few, "btcv", None, 5, 0) == split_cases(few, 5, 0, 0)
    (record,) = caplog.records
    assert record.getMessage().endswith("Fold 0 of 5 is used.")


def test_label_fractions_are_nested():
    fractions = (0.001, 0.1, 0.25, 0.5, 0.9, 1)
    parts = [label_subset(many(), fraction, seed=4) for fraction in fractions]
    assert [len(part) for part in parts] == [1, 2, 6, 12, 21, 23]
    for smaller, larger in pairwise(parts):
        assert all(case in larger for case in smaller)
        assert smaller == sorted(smaller, key=lambda case: case["image"])
    assert parts[-1] == many()
    assert label_subset(many()[::-1], 0.5, seed=4) == parts[3] != label_subset(many(), 0.5, seed=5)
    assert relative(label_subset(many(root="/q/r"), 0.5, seed=4), "/q/r") == relative(parts[3], "/data")


@pytest.mark.parametrize("fraction", [0, -0.5, 1.01])
def test_label_fraction_outside_is_refused(fraction):
    with pytest.raises(ScanError, match=rf"label_fraction: found {fraction}, expected a number above 0, at most 1"):
        label_subset(many(), fraction, seed=0)


# ------------------------------------------------------------------------------------------- training cases


def listed(*numbers):
    return [{"image": f"img/{n}.nii", "label": f"label/{n}.nii"} for n in numbers]


@pytest.fixture
def listed_set(tmp_path):
    return touch(tmp_path, *(f"{folder}/{n}.nii" for n in range(9) for folder in ("img", "label")))


def training_cases(root, datalist=None, layout="msd", fold=0, folds=3, label_fraction=1.0):
    return find_training_cases(str(root), datalist, layout, None, fold, folds, 0, label_fraction, 0)


def test_training_cases_of_a_datalist(listed_set):
    content = {"training": listed(*range(4, 9)), "validation": listed(2, 3)}
    content["test"] = [*listed(1), "img/0.nii", {"image": "img/not_here.nii", "label": None}]
    cases = training_cases(listed_set, write_json(listed_set / "list.json", content))
    assert relative(cases.training, listed_set) == content["training"]
    assert relative(cases.validation, listed_set) == content["validation"]
    assert relative(cases.test, listed_set) == content["test"][:1]


def test_label_fraction_thins_out_training_alone(listed_set):
    content = {"training": listed(*range(4, 9)), "validation": listed(2, 3)}
    cases = training_cases(listed_set, write_json(listed_set / "list.json", content), label_fraction=0.4)
    assert (len(cases.training), len(cases.validation)) == (2, 2)


def test_a_datalist_without_validation_is_split(listed_set):
    path = write_json(listed_set / "list.json", {"training": listed(*range(9))})
    cases = training_cases(listed_set, path, fold=2)
    assert (cases.training, cases.validation) == split_cases([*cases.training, *cases.validation], 3, 2, 0)[:2]
    assert len(cases.validation) == 3


def test_a_case_on_both_sides_is_told(listed_set, caplog):
    content = {"training": listed(1, 2), "validation": listed(2)}
    training_cases(listed_set, write_json(listed_set / "list.json", content))
    assert f"1 cases are used for both training and evaluation (first: {listed_set}/img/2.nii)" in caplog.text


@pytest.mark.parametrize(
    "entries, message",
    [
        (
            ["img/0.nii", *listed(1), {"image": "img/2.nii"}],
            r"no label in entry 0 .*0\.nii\), entry 2 .*2\.n",
        ),
        ([{"image": "img/0.nii", "label": 5}], r"entry 0 .*found the label 5, expected a path"),
        ([{"image": "img/0.nii", "label": "no.nii"}], r"1 image or label files do not exist: .*/no\.nii; expected"),
    ],
)
def test_a_datalist_without_labels_is_refused(listed_set, entries, message):
    path = write_json(listed_set / "list.json", {"training": entries})
    with pytest.raises(ScanError, match=message):
        training_cases(listed_set, path)


# ------------------------------------------------------------------------------------------------- inference


def test_any_folder_can_be_segmented(tmp_path):
    touch(tmp_path, "b.nii.gz", "deep/a.mha")
    assert find_inference_scans(str(tmp_path), None) == [
        {"image": f"{tmp_path}/b.nii.gz", "output": "b"},
        {"image": f"{tmp_path}/deep/a.mha", "output": "deep/a"},
    ]


def test_channels_of_a_scan_are_grouped_and_labels_left_out(tmp_path, caplog):
    with caplog.at_level(logging.WARNING):
        brats_case(tmp_path, 1)
        brats_case(tmp_path, 2, "seg", extension=".nii")
        touch(tmp_path, "four_channels.nii.gz", "GLI/GLI-1-t1.nii", "GLI/GLI-1-flair.nii", "GLI/GLI-1-t2.nii")
        touch(tmp_path, "GLI/GLI-1-t1ce.nii", "GLI/GLI-1-seg.nii", "W39_Segm.nii")
        found = find_inference_scans(str(tmp_path), None, MODALITIES)
    one, two = (f"{tmp_path}/{CASE.format(n)}/{CASE.format(n)}" for n in (1, 2))
    assert [{"image": scan["image"]} for scan in found] == [
        {"image": [f"{one}_{modality}.nii.gz" for modality in MODALITIES]},
        {"image": [f"{two}_{modality}.nii" for modality in MODALITIES]},
        {"image": [f"{tmp_path}/GLI/GLI-1-{modality}.nii" for modality in MODALITIES]},
        {"image": f"{tmp_path}/four_channels.nii.gz"},
    ]
    assert not caplog.records


def test_scans_without_all_channels_are_named(tmp_path):
    brats_case(tmp_path, 1)
    brats_case(tmp_path, 2, "seg", "t1")
    brats_case(tmp_path, 3, "seg", "t2", "flair")
    with pytest.raises(ScanError) as error:
        find_inference_scans(str(tmp_path), None, MODALITIES)
    _, first, second = str(error.value).split("\n")
    assert "Training_002 has no t1: found" in first
    assert "Training_003 has no t2 and no flair: found" in second


def test_incomplete_scans_and_missing_files_are_left_out_if_asked(tmp_path):
    brats_case(tmp_path, 1, "t1")
    for modality in MODALITIES:
        write_nifti(tmp_path / f"whole_{modality}.nii.gz")
    scans = InferenceScans(str(tmp_path), None, MODALITIES, 4, "true", 0, str(tmp_path / "seen.json"))
    assert scans.left_out == []  # not searched for yet
    assert [scan["output"] for scan in scans.usable] == ["whole_t1"]
    assert len(scans.left_out) == 1 and "has no t1: found" in scans.left_out[0]
    path = write_json(tmp_path / "list.json", {"test": ["whole_t1.nii.gz", "gone.nii"]})
    scans = InferenceScans(str(tmp_path), str(path), None, 1, True, 0, str(tmp_path / "seen.json"))
    assert [scan["output"] for scan in scans.usable] == ["whole_t1"]
    assert scans.left_out == [f"{tmp_path}/gone.nii: does not exist"]
    path = write_json(tmp_path / "list.json", {"test": ["gone.nii"]})
    with pytest.raises(ScanError, match=r"none of 1 scans can be used:\n.*gone\.nii: does not exist"):
        _ = InferenceScans(str(tmp_path), str(path), None, 1, True, 0, str(tmp_path / "seen.json")).usable


def test_the_test_scans_of_a_datalist_are_segmented(listed_set):
    path = write_json(listed_set / "list.json", {"test": [*listed(3), "img/1.nii"]})
    found = find_inference_scans(str(listed_set), str(path), MODALITIES)
    assert found == [
        {"image": f"{listed_set}/img/3.nii", "output": "3"},
        {"image": f"{listed_set}/img/1.nii", "output": "1"},
    ]
    path = write_json(listed_set / "list.json", {"training": ["img/1.nii"]})
    with pytest.raises(ScanError, match=r"found no scan in the section 'test', expected at least one"):
        find_inference_scans(str(listed_set), str(path))


# --------------------------------------------------------------------------------------------------- classes


def test_absent_classes():
    scans = [Scan("a", 1, (1, 1, 1), (1.0, 1.0, 1.0), 0, 1, None, labels) for labels in ((0, 1), (0,), ())]
    classes = {"TC": [1, 4], "WT": [1, 2, 4], "ET": [4], "edema": [2]}
    assert absent_classes(scans, classes) == ["ET", "edema"]
    assert absent_classes([], classes) == list(classes)


def test_a_section_to_evaluate_must_be_one_and_hold_cases():
    cases = TrainingCases([{"image": "a", "label": "b"}], [{"image": "c", "label": "d"}], [])
    assert cases.section("validation") == cases.validation
    for name, found in (("tests", "'tests'"), ("test", "no case in 'test'"), ("section", "'section'")):
        with pytest.raises(ScanError, match=f"evaluated: found {found}, expected training or validation"):
            cases.section(name)
