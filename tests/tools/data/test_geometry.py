"""Results lie where their scan lies, for nibabel and for ITK, whatever forms the header of the scan has."""

from __future__ import annotations

import re

import itk
import nibabel as nib
import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from monai.data import MetaTensor

from image_files import write_itk
from tools.data.geometry import disagreement, result_header
from tools.data.loading import LoadScan
from tools.results.saving import SaveResultd

SHAPE = (5, 6, 7)
CORNERS = np.array(list(np.ndindex(2, 2, 2))) * (np.array(SHAPE) - 1)


def affine(turn=0.0, spacing=(1.0, 2.0, 3.0), origin=(10.0, -20.0, 5.0), shear=0.0):
    c, s = np.cos(turn), np.sin(turn)
    matrix = np.eye(4)
    matrix[:3, :3] = np.array([[c, -s, 0], [s, c, 0], [0, 0, 1]]) @ np.diag(spacing)
    matrix[1, 2] += shear
    matrix[:3, 3] = origin
    return matrix


def write_forms(path, sform=None, qform=None, codes=(2, 1), pixdim=None, unit="mm", kind=nib.Nifti1Image):
    """A NIfTI file with these forms in its header."""
    voxels = np.arange(np.prod(SHAPE), dtype=np.int16).reshape(SHAPE)
    header = kind.header_class()
    header.set_data_dtype(np.int16)
    for form, matrix in ((header.set_sform, sform), (header.set_qform, qform)):
        form(affine() if matrix is None else matrix, 1)
    header["sform_code"], header["qform_code"] = codes
    header.set_xyzt_units(unit)
    if pixdim is not None:
        header["pixdim"][1:4] = pixdim
    nib.save(kind(voxels, None, header), path)
    return path


def places_of_itk(path):
    """Corners in world coordinates, LPS; None if ITK refuses the file."""
    try:
        image = itk.imread(str(path))
    except RuntimeError:
        return None
    return np.array([list(image.TransformIndexToPhysicalPoint(corner.tolist())) for corner in CORNERS])


def places_of_nibabel(path):
    return nib.affines.apply_affine(nib.load(path).affine, CORNERS)


def save_result(scan, folder):
    """Save a label map on the voxels of a scan, as inference does."""
    image = LoadScan()(scan)
    labels = MetaTensor((image > 10).to(torch.uint8).as_tensor(), meta=image.meta)
    SaveResultd("pred", folder, "seg", np.uint8)({"pred": labels, "output": "sub/scan"})
    path = folder / "sub/scan/scan_seg.nii.gz"
    np.testing.assert_array_equal(np.asarray(nib.load(path).dataobj), labels[0].numpy())
    assert nib.load(path).get_data_dtype() == np.uint8
    return path


def require_same_place(scan, result):
    np.testing.assert_allclose(places_of_nibabel(result), places_of_nibabel(scan), atol=1e-4)
    found, expected = places_of_itk(result), places_of_itk(scan)
    if expected is not None:  # ITK reads no NIfTI-2
        assert found is not None
        np.testing.assert_allclose(found, expected, atol=1e-3)


KINDS = {
    "both forms agree": {},
    "an sform of 12 parameters beside the old qform": {
        "sform": affine(0.1, (1.1, 1.9, 3.2), shear=0.4),
        "codes": (4, 1),
    },
    "sform and qform in different places": {"sform": affine(origin=(30, -20, 5)), "codes": (2, 1)},
    "a qform alone": {"qform": affine(0.3), "codes": (0, 1)},
    "an sform alone": {"sform": affine(0.3), "codes": (1, 0)},
    "a sheared sform alone": {"sform": affine(0.3, shear=0.5), "codes": (1, 0)},
    "no form": {"codes": (0, 0)},
    "pixdim against both forms": {"pixdim": (1.2, 2.0, 3.0), "codes": (1, 1)},
    "pixdim against the sform": {"sform": affine(spacing=(0.8, 2, 3)), "codes": (1, 1), "pixdim": (1, 2, 3)},
    "metres": {"sform": affine(spacing=(1e-3, 2e-3, 3e-3)), "codes": (2, 0), "unit": "meter"},
    "NIfTI-2": {"sform": affine(0.2), "codes": (3, 0), "kind": nib.Nifti2Image},
}


@pytest.mark.parametrize("forms", KINDS.values(), ids=KINDS)
def test_the_result_lies_where_the_scan_lies(tmp_path, forms):
    scan = write_forms(tmp_path / "scan.nii.gz", **forms)
    result = save_result(scan, tmp_path)
    require_same_place(scan, result)
    found, expected = nib.load(result).header, nib.load(scan).header
    for field in ("sform_code", "qform_code", "xyzt_units", "srow_x", "srow_y", "srow_z", "quatern_c", "qoffset_x"):
        np.testing.assert_allclose(found[field], expected[field], rtol=1e-6, err_msg=field)
    np.testing.assert_allclose(found["pixdim"][:4], expected["pixdim"][:4], rtol=1e-6)


@pytest.mark.parametrize("case", ["affine_replaced", "sform_qform"])
def test_results_of_real_scans_lie_where_they_lie(shared_data, tmp_path, case):
    (scan,) = (shared_data / "field_cases" / case / "scans").glob("*.nii.gz")
    header = result_header(scan, np.eye(4), nib.load(scan).shape)
    path = tmp_path / "seg.nii.gz"
    nib.save(nib.Nifti1Image(np.zeros(nib.load(scan).shape, np.uint8), None, header), path)
    require_same_place(scan, path)


ANGLES = st.floats(-3.2, 3.2)
SIZES = st.floats(0.3, 8).map(lambda size: float(np.float32(size)))
AFFINES = st.builds(
    affine, ANGLES, st.tuples(SIZES, SIZES, SIZES), st.tuples(*[st.floats(-300, 300)] * 3), st.just(0.0)
)
SHEARED = st.builds(affine, ANGLES, st.tuples(SIZES, SIZES, SIZES), st.just((0.0, 0.0, 0.0)), st.floats(-2, 2))


@settings(max_examples=50)
@given(
    sform=AFFINES | SHEARED,
    qform=AFFINES,
    codes=st.tuples(st.integers(0, 5), st.integers(0, 5)),
    unit=st.sampled_from(["unknown", "mm", "meter", "micron"]),
    kind=st.sampled_from([nib.Nifti1Image, nib.Nifti2Image]),
)
def test_any_forms_come_back(tmp_path_factory, sform, qform, codes, unit, kind):
    scan = write_forms(tmp_path_factory.getbasetemp() / "any.nii", sform, qform, codes, None, unit, kind)
    header = result_header(scan, np.eye(4), SHAPE)
    result = scan.with_name("any_seg.nii")
    nib.save(nib.Nifti1Image(np.zeros(SHAPE, np.uint8), None, header), result)
    require_same_place(scan, result)


@settings(max_examples=50)
@given(matrix=AFFINES | SHEARED)
def test_a_result_of_another_format_lies_in_one_place(tmp_path_factory, matrix):
    """A qform cannot hold a sheared matrix: ITK refuses the file in place of showing it elsewhere."""
    path = tmp_path_factory.getbasetemp() / "other.nii"
    nib.save(nib.Nifti1Image(np.zeros(SHAPE, np.uint8), None, result_header("series", matrix, SHAPE)), path)
    expected = nib.affines.apply_affine(matrix, CORNERS)
    np.testing.assert_allclose(places_of_nibabel(path), expected, atol=1e-3)
    found = places_of_itk(path)
    voxel = np.linalg.norm(matrix[:3, :3], axis=0).max()
    assert found is None or np.abs(found * [-1, -1, 1] - expected).max() < 0.25 * voxel


def test_the_result_of_a_metaimage_lies_where_it_lies(tmp_path):
    scan = write_itk(tmp_path / "scan.mha", np.arange(np.prod(SHAPE), dtype=np.int16).reshape(SHAPE))
    result = save_result(scan, tmp_path)
    np.testing.assert_allclose(places_of_itk(result), places_of_itk(scan), atol=1e-4)


def test_the_shear_of_a_registration_is_read(tmp_path):
    """MONAI's reader takes the qform in place of the sform, because pixdim agrees with the qform."""
    scan = write_forms(tmp_path / "scan.nii.gz", **KINDS["an sform of 12 parameters beside the old qform"])
    np.testing.assert_allclose(LoadScan()(scan).affine, nib.load(scan).header.get_sform(), atol=1e-5)


def test_probabilities_lie_there_too(tmp_path):
    scan = write_forms(tmp_path / "scan.nii.gz", **KINDS["sform and qform in different places"])
    image = LoadScan()(scan)
    kept = MetaTensor(torch.rand(3, *SHAPE).half(), meta=image.meta)
    SaveResultd("prob", tmp_path, "prob")({"prob": kept, "output": "scan"})
    found = nib.load(tmp_path / "scan/scan_prob.nii.gz")
    assert found.shape == (*SHAPE, 3) and found.get_data_dtype() == np.float32
    np.testing.assert_array_equal(found.get_qform(), nib.load(scan).get_qform())
    np.testing.assert_array_equal(found.get_sform(), nib.load(scan).get_sform())


def test_a_result_of_another_size_does_not_take_the_header(tmp_path):
    scan = write_forms(tmp_path / "scan.nii.gz")
    np.testing.assert_allclose(result_header(scan, affine(0.5), (3, 3, 3)).get_best_affine(), affine(0.5), atol=1e-5)


# ------------------------------------------------------------------------------------------------ contradictions


@pytest.mark.parametrize(
    ("kind", "said"),
    [
        ("both forms agree", None),
        ("a qform alone", None),
        ("an sform alone", None),
        ("a sheared sform alone", None),
        ("NIfTI-2", None),
        ("sform and qform in different places", r"its sform \(used\) and its qform are up to 20 mm apart"),
        ("no form", r"says nothing about its place \(the codes .* are 0\): left and right are a guess"),
        (
            "pixdim against the sform",
            r"its voxel size is 1 x 2 x 3 mm by pixdim and 0\.8 x 2 x 3 mm by its affine .*, which is up to 0\.8 mm",
        ),
    ],
)
def test_contradictions_are_said_in_mm(tmp_path, kind, said):
    found = disagreement(write_forms(tmp_path / "scan.nii.gz", **KINDS[kind]))
    if said is None:
        assert found is None
    else:
        assert found is not None and re.search(said, found), found


@pytest.mark.parametrize(
    ("fields", "said"),
    [
        ("space: RAS\nspace directions: (1,0,0) (0,1.5,0) (0,0,2)", None),
        ("spacings: 1 1.5 2", "its orientation (no `space`): left and right are a guess"),
        ("space: RAS", "its voxel size: 1 mm is a guess"),
    ],
)
def test_what_an_nrrd_leaves_out_is_said(tmp_path, fields, said):
    header = f"NRRD0004\ntype: short\ndimension: 3\nsizes: 4 5 6\nencoding: raw\nendian: little\n{fields}\n\n"
    (tmp_path / "scan.nrrd").write_bytes(header.encode() + bytes(240))
    assert disagreement(tmp_path / "scan.nrrd") == (said and f"says nothing about {said}")


def test_what_a_metaimage_leaves_out_is_said(tmp_path):
    path = write_itk(tmp_path / "scan.mha")
    path.write_bytes(re.sub(rb"Element(Spacing|Size) = .*\n", b"", path.read_bytes()))
    assert disagreement(path) == "says nothing about its voxel size: 1 mm is a guess"


def test_analyze_has_no_orientation(tmp_path):
    nib.save(nib.AnalyzeImage(np.zeros((4, 5, 6), np.int16), np.eye(4)), tmp_path / "scan.hdr")
    nib.save(nib.Nifti1Pair(np.zeros((4, 5, 6), np.int16), np.eye(4)), tmp_path / "pair.hdr")
    assert disagreement(tmp_path / "scan.hdr") == (
        "says nothing about its orientation (Analyze): left and right are a guess"
    )
    assert disagreement(tmp_path / "pair.hdr") is None


def test_other_formats_hold_one_place(tmp_path):
    assert disagreement(write_itk(tmp_path / "scan.mha")) is None
    assert disagreement(tmp_path / "not there.nii.gz") is None
