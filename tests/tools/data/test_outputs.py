"""What results are called: every scan has a name of its own, which stays in the folder of the results."""

from __future__ import annotations

import json
import os
import unicodedata
from pathlib import Path, PurePosixPath

import pytest
from hypothesis import given
from hypothesis import strategies as st

from image_files import item, write_dicom
from tools.data.datalists import datalist_items
from tools.data.outputs import LONGEST, case_names, name_outputs, output_name, output_root


def outputs(*paths, root="/data"):
    return [scan["output"] for scan in name_outputs([item(path) for path in paths], root)]


@pytest.mark.parametrize(
    ("paths", "names"),
    [
        pytest.param(["/data/a/case_1.nii.gz", "/data/b.mha"], ["a/case_1", "b"], id="subfolders are kept"),
        pytest.param(["/data/CT 1.25", "/data/CT 1.5"], ["CT 1.25", "CT 1.5"], id="dots of a folder are no extension"),
        pytest.param(["/data/a.b.nii.gz"], ["a.b"], id="only the extension is cut"),
        pytest.param(
            ["/data/case", "/data/case.mha", "/data/case.nii", "/data/case.nii.gz"],
            ["case", "case_mha", "case_nii", "case_nii_gz"],
            id="equal names get their extension",
        ),
        pytest.param(["/data/Case.nii.gz", "/data/case.nii.gz"], ["Case_nii_gz", "case_nii_gz_2"], id="Case and case"),
        pytest.param(
            ["/data/x.nii", "/data/x.mha", "/data/x_nii.nii", "/data/x_nii_2.nii"],
            ["x_nii", "x_mha", "x_nii_3", "x_nii_2"],
            id="a number that another scan has is not given",
        ),
        pytest.param(["/data/../else/a.nii", "/data/b.nii"], ["a", "b"], id="outside of the folder"),
        pytest.param(["/data/a/../b.nii", "/data/a/b.nii"], ["b", "a/b"], id="dots on the way"),
        pytest.param(["/data/...nii.gz"], ["scan.."], id="a stem that is .."),
    ],
)
def test_names(paths, names):
    assert outputs(*paths) == names


def test_a_series_that_is_the_folder_itself_is_called_as_it(tmp_path, monkeypatch):
    write_dicom(tmp_path / "1.2.840.1")
    monkeypatch.chdir(tmp_path / "1.2.840.1")
    for folder in (".", tmp_path / "1.2.840.1"):
        assert outputs(folder, root=output_root(folder)) == ["1.2.840.1"]
    assert output_root("..") == Path("..").absolute()  # no series: the folder itself


def test_a_scan_of_a_client_is_called_as_its_file():
    assert output_name({"image": "x"}, "/somewhere/a.b.nii.gz") == "a.b"
    assert output_name({"output": "p/a"}, "/somewhere/a.nii.gz") == "p/a"


WORDS = st.sampled_from(
    ["a", "A", "case", "case_nii", "case_nii_gz", "1.2.3", "1.2.4", "é", "e\u0301", "..", ".", " x", "a_2"]
)
LONG = st.integers(100, 250).map("x".__mul__)
FILES = st.builds("".join, st.tuples(WORDS | LONG, st.sampled_from(["", ".nii", ".nii.gz", ".NII.GZ", ".mha"])))
PATHS = st.builds("/".join, st.tuples(WORDS | st.just("data"), WORDS, FILES) | st.tuples(FILES))


def require_safe(names):
    """Distinct, also for file systems that fold letters; below their folder; short enough for an ending."""
    assert len({unicodedata.normalize("NFC", name).casefold() for name in names}) == len(names)
    for name in names:
        path = PurePosixPath(name)
        assert path.name and not path.is_absolute() and ".." not in path.parts, name
        assert len(os.fsencode(path.name)) <= LONGEST + len("_99")


@given(st.lists(PATHS, max_size=8), st.sampled_from(["/", "/data", "/data/a", "/else"]))
def test_no_names_are_equal_and_none_leads_out(paths, root):
    require_safe(outputs(*(f"/data/{path}" for path in paths), root=root))


@given(st.lists(PATHS, min_size=1, max_size=8), st.booleans())
def test_the_same_for_the_scans_of_a_data_list(tmp_path_factory, paths, absolute):
    file = tmp_path_factory.getbasetemp() / "list.json"
    start = "/data/" if absolute else ""
    file.write_text(json.dumps({"test": [{"image": start + path} for path in paths]}))
    scans = datalist_items(file, None, "test")
    named = name_outputs(scans)
    require_safe([scan["output"] for scan in named])
    assert [{"image": scan["image"]} for scan in named] == scans  # in their order


@given(st.lists(st.tuples(PATHS, PATHS), min_size=1, max_size=6))
def test_rows_of_an_evaluation_have_names_of_their_own(paths):
    names = case_names(paths)
    require_safe(names)
    assert not any("/" in name for name in names)


@pytest.mark.parametrize(
    ("paths", "names"),
    [
        ([("b/c_1_t1.nii.gz", "b/c_1_seg.nii.gz"), ("b/c_2_t1.nii.gz", "b/c_2_seg.nii.gz")], ["c_1", "c_2"]),
        ([("i/h_1.nii.gz", "l/h_1.nii.gz"), ("i/h_2.nii", "l/h_2.nii")], ["h_1", "h_2"]),
        ([("i/img0035.nii.gz", "l/label0035.nii.gz"), ("i/img0036.nii", "l/label0036.nii")], ["img0035", "img0036"]),
        ([("i/scan_1.mha", "l/seg_1.mha"), ("i/scan_2.mha", "l/seg_2.mha")], ["scan_1", "scan_2"]),
        ([("p1/ct.nii.gz", "p1/organs.nii.gz"), ("p2/ct.nii.gz", "p2/organs.nii.gz")], ["p1", "p2"]),
        ([("/p1/a/ct.nii", "/p1/b/x.nii"), ("/p2/a/ct.nii", "/p2/b/x.nii")], ["p1_a_ct.nii", "p2_a_ct.nii"]),
    ],
)
def test_names_tell_cases_apart(paths, names):
    assert case_names(paths) == names
