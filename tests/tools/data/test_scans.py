"""Finding scans, reading data lists, splitting."""

from __future__ import annotations

import json
import logging
from pathlib import Path

import pytest

from image_files import item, names, write_dicom
from tools.data.datalists import read_datalist
from tools.data.scans import ScanError, find_scans, root_of, stem_of
from tools.data.splits import split_scans

# ------------------------------------------------------------------------------------------------ find_scans


def test_finds_every_format_and_nothing_else(tmp_path):
    for name in ("b.nii", "a.nii.gz", "deep/er/c.mha", "d.mhd", "e.nrrd", "UPPER.NII"):
        path = tmp_path / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.touch()
    for name in ("._a.nii.gz", ".hidden/x.nii", "d.raw", "notes.txt", "dataset.json", "deep/e.zraw"):
        path = tmp_path / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(b"\0" * 128 + b"DICM" if "raw" in name else b"x")
    write_dicom(tmp_path / "series", extension="")
    (tmp_path / "series/readme.txt").touch()
    (tmp_path / "cd").mkdir()
    (tmp_path / "cd/DICOMDIR").write_bytes(b"\0" * 128 + b"DICM")

    found = names(find_scans(tmp_path), tmp_path)
    assert found == sorted(["UPPER.NII", "a.nii.gz", "b.nii", "d.mhd", "deep/er/c.mha", "e.nrrd", "series"])


def test_finds_a_series_in_the_folder_itself_and_keeps_paths_as_given(tmp_path, monkeypatch):
    write_dicom(tmp_path / "series")
    monkeypatch.chdir(tmp_path)
    assert find_scans("series") == [{"image": "series"}]
    assert find_scans(Path("series").absolute()) == [item(tmp_path / "series")]


def test_follows_links_but_not_in_circles(tmp_path):
    (tmp_path / "elsewhere").mkdir()
    (tmp_path / "elsewhere/a.nii").touch()
    (tmp_path / "data").mkdir()
    (tmp_path / "data/link").symlink_to(tmp_path / "elsewhere")
    (tmp_path / "data/circle").symlink_to(tmp_path / "data")
    assert names(find_scans(tmp_path / "data"), tmp_path / "data") == ["link/a.nii"]


def test_says_what_is_wrong_with_the_folder(tmp_path):
    (tmp_path / "a.txt").touch()
    (tmp_path / "b.json").touch()
    with pytest.raises(ScanError, match=r"nowhere does not exist, expected a folder"):
        find_scans(tmp_path / "nowhere")
    with pytest.raises(ScanError, match=r"a\.txt is a file, expected a folder"):
        find_scans(tmp_path / "a.txt")
    with pytest.raises(ScanError, match=r"no scan in .* but 2 other files \(1 \.json, 1 \.txt\), expected .*\.nii"):
        find_scans(tmp_path)


def test_warns_of_labels(tmp_path, caplog):
    for name in ("imagesTr/a.nii.gz", "labelsTr/a.nii.gz", "case/ct_seg.nii.gz", "case/ct.nii.gz"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).touch()
    with caplog.at_level(logging.WARNING):
        assert len(find_scans(tmp_path)) == 4
    assert "2 of the 4 scans" in caplog.text
    caplog.clear()
    assert len(find_scans(tmp_path / "imagesTr")) == 1
    assert not caplog.text


@pytest.mark.parametrize("name", ["a.b.nii", "a.b.nii.gz", "A/a.b.NII.GZ", "a.b.mha", "series/a.b"])
def test_stem(name):
    assert stem_of(name) == stem_of(Path(name)) == "a.b"


# --------------------------------------------------------------------------------------------- read_datalist


def write_list(tmp_path, content):
    path = tmp_path / "list.json"
    path.write_text(content if isinstance(content, str) else json.dumps(content))
    return path


def test_reads_paths_lists_and_plain_strings(tmp_path):
    data = tmp_path / "data"
    data.mkdir()
    for name in ("a.nii", "b.nii", "c.nii"):
        (data / name).touch()
    elsewhere = str(data / "c.nii")
    entries = [{"image": "a.nii", "label": "x"}, {"image": ["a.nii", "b.nii"]}, "b.nii", {"image": elsewhere}]
    path = write_list(tmp_path, {"training": entries, "test": ["./c.nii"]})
    a, b = str(data / "a.nii"), str(data / "b.nii")
    expected = [{"image": a}, {"image": [a, b]}, {"image": b}, {"image": elsewhere}]
    assert read_datalist(path, data, "training") == expected
    assert read_datalist(path, data, "test") == [{"image": elsewhere}]
    assert read_datalist(path, data, "validation") == []


def test_labels_are_kept_when_asked_for(tmp_path):
    for name in ("a.nii", "b.nii", "l.nii"):
        (tmp_path / name).touch()
    entries = [{"image": ["a.nii", "b.nii"], "label": "l.nii"}, "b.nii", {"image": "a.nii", "label": None}]
    path = write_list(tmp_path, {"training": entries})
    a, b = (str(tmp_path / name) for name in ("a.nii", "b.nii"))
    images = [{"image": [a, b]}, {"image": b}, {"image": a}]
    assert read_datalist(path, None, "training") == images
    images[0]["label"] = str(tmp_path / "l.nii")
    assert read_datalist(path, None, "training", labels=True) == images


def test_missing_labels_count_when_they_are_asked_for(tmp_path):
    (tmp_path / "a.nii").touch()
    path = write_list(tmp_path, {"training": [{"image": "a.nii", "label": "no.nii"}]})
    assert len(read_datalist(path, None, "training")) == 1
    with pytest.raises(ScanError, match=r"1 image or label files do not exist: .*no\.nii; expected them below"):
        read_datalist(path, None, "training", labels=True)


@pytest.mark.parametrize("label", [["a.nii"], 3, ""])
def test_a_label_is_a_path(tmp_path, label):
    path = write_list(tmp_path, {"training": [{"image": "a.nii", "label": label}]})
    with pytest.raises(ScanError, match=r"'training', entry 0 .*found the label .*, expected a path"):
        read_datalist(path, None, "training", labels=True)


def test_paths_start_from_the_datalist_without_a_folder(tmp_path):
    (tmp_path / "a.nii").touch()
    path = write_list(tmp_path, {"training": ["a.nii"]})
    assert read_datalist(path, None, "training") == [item(tmp_path / "a.nii")]


@pytest.mark.parametrize(
    "content, message",
    [
        ("{", r"list\.json: found text that is not JSON"),
        ([], r"list\.json: found list, expected an object"),
        ({"validation": []}, r"found the keys \['validation'\], expected 'training'"),
        ({"training": []}, r"'training': found an empty list, expected"),
        ({"training": {"a": 1}}, r"'training': found dict, expected a list"),
        ({"training": ["a", 5]}, r"'training', entry 1 .*found the image 5, expected a path or a list"),
        ({"training": [{"label": "a"}]}, r"entry 0 .*found the keys \['label'\], expected 'image'"),
        ({"training": [{"image": ["a", None]}]}, r"entry 0 .*\['a', None\], expected a path"),
        ({"training": [{"image": []}]}, r"entry 0 .*found the image \[\]"),
    ],
)
def test_says_what_is_wrong_with_the_datalist(tmp_path, content, message):
    with pytest.raises(ScanError, match=message):
        read_datalist(write_list(tmp_path, content), None, "training")


def test_says_that_there_is_no_datalist(tmp_path):
    with pytest.raises(ScanError, match=r"no\.json does not exist"):
        read_datalist(tmp_path / "no.json", None, "training")


def test_lists_missing_images_together(tmp_path):
    path = write_list(tmp_path, {"training": [f"{n:02}.nii" for n in range(13)] + ["list.json"]})
    with pytest.raises(ScanError, match=r"13 image files do not exist: .*09\.nii and 3 more; expected them below"):
        read_datalist(path, None, "training")


# ----------------------------------------------------------------------------------------------- split_scans


def many(count=20):
    return [{"image": f"/data/{n:02}.nii"} for n in range(count)]


def test_split_is_disjoint_and_complete():
    training, validation = split_scans(many(), 0.25, seed=1)
    assert (len(training), len(validation)) == (15, 5)
    assert sorted([*training, *validation], key=lambda entry: entry["image"]) == many()


def test_split_depends_on_the_set_and_the_seed_alone():
    assert split_scans(many()[::-1], 0.25, seed=1) == split_scans(many(), 0.25, seed=1)
    assert split_scans(many(), 0.25, seed=2) != split_scans(many(), 0.25, seed=1)


@pytest.mark.parametrize("fraction", [0.0001, 0.5, 0.9999])
def test_split_leaves_at_least_one_each(fraction):
    assert [len(part) for part in split_scans(many(2), fraction, seed=0)] == [1, 1]


def test_split_keeps_a_scan_that_is_listed_twice_on_one_side():
    training, validation = split_scans(many(6) * 2, 0.5, seed=0)
    assert (len(training), len(validation)) == (6, 6)
    assert not {entry["image"] for entry in training} & {entry["image"] for entry in validation}


def test_split_takes_lists_of_channels():
    items = [{"image": [f"{n}_t1.nii", f"{n}_t2.nii"]} for n in range(4)]
    training, validation = split_scans(items, 0.25, seed=0)
    assert len(training) == 3
    assert validation[0] in items


@pytest.mark.parametrize("fraction", [0, 1, -0.1, 1.5])
def test_split_refuses_a_fraction_outside(fraction):
    with pytest.raises(ScanError, match=rf"val_fraction: found {fraction}, expected a number between 0 and 1"):
        split_scans(many(), fraction, seed=0)


@pytest.mark.parametrize("items", [[], many(1), many(1) * 3])
def test_split_refuses_fewer_than_two_scans(items):
    with pytest.raises(ScanError, match=r"different scans, expected at least 2"):
        split_scans(items, 0.5, seed=0)


def test_the_root_holds_all_scans(tmp_path):
    paths = [tmp_path / "a/x.nii", tmp_path / "b/c/y.nii"]
    assert root_of([item(path) for path in paths]) == str(tmp_path)
    assert root_of([{"image": [str(tmp_path / "a/t1.nii"), str(tmp_path / "a/t2.nii")]}]) == str(tmp_path / "a")
