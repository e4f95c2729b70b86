"""`run inferring` on scans of every kind: the label map lies where the scan lies, voxel for voxel."""

from __future__ import annotations

import json
import re

import fire
import nibabel as nib
import numpy as np
import pytest
import torch
from monai.transforms import LoadImage
from threshold_network import Thresholds

from image_files import cut, write_dicom, write_itk, write_nifti
from tools.commands.check import check
from tools.common.errors import root_cause
from tools.results.inference import LEFT_OUT

from .bundles import ROOT, bundle

BOUNDS = [-0.1, 0.25, 0.5, 0.75, 1.1]  # of intensities −175…250 HU, scaled to 0…1: background and three classes
CLASSES = {"dark": [1], "grey": [2], "bright": [3]}
HU = {0: -100, 1: -15, 2: 90, 3: 200}


@pytest.fixture
def segment(workflow, tmp_path):
    """Runs the BTCV bundle's inference with a network that thresholds; gives the files that it wrote."""
    network = Thresholds(BOUNDS)
    torch.save(network.state_dict(), tmp_path / "model.pt")

    def run(folder, **overrides):
        options = {
            "classes": CLASSES,
            "network_def": {"_target_": "threshold_network.Thresholds", "bounds": BOUNDS},
            "roi_size": [32, 32, 32],
            "spacing": "$None",
            **overrides,
        }
        out = tmp_path / "out"
        workflow(
            *("btcv", "infer", ["inference"]),
            dataset_dir=str(folder),
            output_dir=str(out),
            ckpt_path=str(tmp_path / "model.pt"),
            ckpt_dir=None,
            **options,
        ).run()
        return {path.relative_to(out).as_posix(): path for path in out.rglob("*_seg.nii.gz")}

    return run


def labelled(shape, seed=0):
    """Label map with a box of each class, and its CT."""
    rng = np.random.default_rng(seed)
    label = np.zeros(shape, np.uint8)
    for value in (1, 2, 3):
        low = [int(rng.integers(0, size // 2)) for size in shape]
        label[tuple(slice(start, start + max(size // 3, 2)) for start, size in zip(low, shape, strict=True))] = value
    return label, np.vectorize(HU.get)(label).astype(np.int16)


def affine(axes, spacing, degrees):
    a = np.radians(degrees)
    turn = np.array([[np.cos(a), 0, np.sin(a)], [0, 1, 0], [-np.sin(a), 0, np.cos(a)]])
    matrix = np.eye(4)
    matrix[:3, :3] = turn @ nib.orientations.inv_ornt_aff(nib.orientations.axcodes2ornt(axes), (1, 1, 1))[:3, :3].T
    matrix[:3, :3] *= spacing
    matrix[:3, 3] = 31, -12, 5
    return matrix


@pytest.mark.parametrize(
    ("shape", "axes", "spacing", "degrees"),
    [
        pytest.param((40, 44, 36), "RAS", (1, 1, 1), 0, id="plain"),
        pytest.param((40, 44, 36), "PIL", (1.1, 0.9, 1.3), 0, id="odd orientation"),
        pytest.param((40, 44, 36), "LPS", (1, 1, 1), 25, id="oblique"),
        pytest.param((12, 15, 9), "RAS", (1, 1, 1), 0, id="smaller than the window"),
        pytest.param((60, 50, 8), "ASL", (0.7, 0.7, 6), 10, id="thick slices"),
    ],
)
def test_label_maps_have_the_geometry_of_the_scan(segment, tmp_path, shape, axes, spacing, degrees):
    label, ct = labelled(shape)
    (tmp_path / "scans/deep").mkdir(parents=True)
    nib.save(nib.Nifti1Image(ct, affine(axes, spacing, degrees)), tmp_path / "scans/deep/scan.nii.gz")
    written = segment(tmp_path / "scans")
    assert list(written) == ["deep/scan/scan_seg.nii.gz"]  # folders are kept
    found, scan = nib.load(written["deep/scan/scan_seg.nii.gz"]), nib.load(tmp_path / "scans/deep/scan.nii.gz")
    np.testing.assert_allclose(found.affine, scan.affine, atol=1e-5)
    assert found.get_data_dtype() == np.uint8
    np.testing.assert_array_equal(np.asarray(found.dataobj), label)


def test_resampled_to_coarser_voxels_and_back(segment, tmp_path):
    label, ct = labelled((60, 64, 56))
    (tmp_path / "scans").mkdir()
    nib.save(nib.Nifti1Image(ct, affine("LPS", (1, 1, 1), 15)), tmp_path / "scans/scan.nii.gz")
    (path,) = segment(tmp_path / "scans", spacing=[1.5, 1.5, 1.5]).values()
    found = np.asarray(nib.load(path).dataobj)
    assert found.shape == label.shape
    for value in (1, 2, 3):
        a, b = found == value, label == value
        assert 2 * (a & b).sum() / (a.sum() + b.sum()) > 0.8, value


def test_dicom_series_and_other_formats(segment, tmp_path):
    pytest.importorskip("pydicom")
    write_dicom(tmp_path / "scans/patient/series", slices=6)
    written = segment(tmp_path / "scans")
    (path,) = written.values()
    scan = LoadImage(image_only=True, ensure_channel_first=True)(tmp_path / "scans/patient/series")
    found = nib.load(path)
    assert found.shape == tuple(scan.shape[1:])
    np.testing.assert_allclose(found.affine, scan.affine, atol=1e-5)
    scaled = np.clip((scan[0].numpy() + 175) / 425, 0, 1)
    expected = np.digitize(scaled, BOUNDS[1:-1])
    clear = np.abs(scaled[..., None] - np.array(BOUNDS)).min(-1) > 1e-3
    np.testing.assert_array_equal(np.asarray(found.dataobj)[clear], expected[clear])


def test_scans_of_similar_names_have_results_of_their_own(segment, tmp_path):
    """They share a name up to the extension, or up to the last dot of a folder's."""
    scans = tmp_path / "scans"
    for name in ("1.2.840.1", "1.2.840.2"):
        write_dicom(scans / name)
    contents = [labelled((12, 13, 14), seed) for seed in (0, 1)]
    write_nifti(scans / "case.nii.gz", contents[0][1])
    write_itk(scans / "case.mha", contents[1][1])
    written = segment(scans)
    names = ["1.2.840.1", "1.2.840.2", "case_mha", "case_nii_gz"]
    assert sorted(written) == [f"{name}/{name}_seg.nii.gz" for name in names]
    for name, (label, _) in zip(("case_nii_gz", "case_mha"), contents, strict=True):
        np.testing.assert_array_equal(np.asarray(nib.load(written[f"{name}/{name}_seg.nii.gz"]).dataobj), label)


def test_a_data_list_leads_nowhere_else(segment, tmp_path):
    _, ct = labelled((12, 13, 14))
    (tmp_path / "elsewhere").mkdir(), (tmp_path / "lists").mkdir()
    for name in ("a", "b"):
        write_nifti(tmp_path / f"elsewhere/{name}.nii.gz", ct)
    entries = ["../elsewhere/a.nii.gz", "../lists/../elsewhere/b.nii.gz", "../elsewhere/../elsewhere/./a.nii.gz"]
    (tmp_path / "lists/list.json").write_text(json.dumps({"test": entries}))
    written = segment(tmp_path / "lists", datalist=str(tmp_path / "lists/list.json"))
    assert sorted(written) == ["a_nii_gz/a_nii_gz_seg.nii.gz", "a_nii_gz_2/a_nii_gz_2_seg.nii.gz", "b/b_seg.nii.gz"]
    assert sorted(tmp_path.rglob("*_seg.nii.gz")) == sorted(written.values())


def test_a_header_that_contradicts_itself_is_kept_and_told(segment, tmp_path, caplog):
    label, ct = labelled((12, 13, 14))
    image = nib.Nifti1Image(ct, affine("LPS", (1, 1, 2), 10))
    image.set_sform(image.affine, code="aligned")
    elsewhere = affine("LPS", (1, 1, 2), 10)
    elsewhere[:3, 3] += 0, 30, 40
    image.set_qform(elsewhere, code="scanner")
    (tmp_path / "scans").mkdir()
    nib.save(image, tmp_path / "scans/scan.nii.gz")
    (path,) = segment(tmp_path / "scans").values()
    found = nib.load(path)
    np.testing.assert_array_equal(np.asarray(found.dataobj), label)
    for form in ("get_sform", "get_qform"):
        (matrix, code), (expected, expected_code) = (getattr(f, form)(coded=True) for f in (found, image))
        np.testing.assert_allclose(matrix, expected, atol=1e-5)
        assert code == expected_code
    (warning,) = [text for text in caplog.messages if "place in doubt" in text]
    assert "scan.nii.gz: its sform (used) and its qform are up to 50 mm apart" in warning


def test_one_bad_scan_does_not_stop_the_others(segment, tmp_path, capsys):
    label, ct = labelled((12, 13, 14))
    (tmp_path / "scans").mkdir()
    write_nifti(tmp_path / "scans/good.nii.gz", ct)
    cut(write_nifti(tmp_path / "scans/cut.nii.gz", ct))
    with pytest.raises(RuntimeError) as refused:
        segment(tmp_path / "scans")
    said = str(root_cause(refused.value))
    assert "1 of 2 scans cannot be used" in said and "`--skip_unreadable true` goes on without them" in said
    (command,) = re.findall(r"`python -m tools (check .*?)`", said)
    with pytest.raises(SystemExit):  # it works where there is no label
        fire.Fire({"check": check}, command=f"{command} --workers 0")
    assert "scans      1 readable, 1 unreadable" in capsys.readouterr().out

    with pytest.raises(SystemExit) as ended:
        segment(tmp_path / "scans", skip_unreadable="true")
    assert ended.value.code == LEFT_OUT == 3
    (path,) = (tmp_path / "out").rglob("*_seg.nii.gz")
    np.testing.assert_array_equal(np.asarray(nib.load(path).dataobj), label)
    said = capsys.readouterr().out
    assert "left out, because they cannot be used: 1\n" in said and f"{tmp_path}/scans/cut.nii.gz: " in said


def test_brats_as_four_files_or_one(workflow, samples, tmp_path):
    """A case gives the same label map whichever way its channels are stored."""
    case = sorted(path for path in samples("brats").iterdir() if path.is_dir())[0]
    files = [case / f"{case.name}_{m}.nii.gz" for m in ("t1", "t1ce", "t2", "flair")]
    (tmp_path / "four").mkdir(), (tmp_path / "one").mkdir()
    for file in [*files, case / f"{case.name}_seg.nii.gz"]:
        (tmp_path / "four" / file.name).write_bytes(file.read_bytes())
    images = [nib.load(file) for file in files]
    volume = np.stack([np.asarray(image.dataobj) for image in images], axis=-1)
    nib.save(nib.Nifti1Image(volume, images[0].affine), tmp_path / "one/case.nii.gz")

    options = {"unet_features": [4, 4, 8, 8, 16, 4], "roi_size": [32, 32, 32], "spacing": [4, 4, 4]}
    torch.manual_seed(0)
    network = workflow("brats", "infer", ["inference"], ckpt_dir=None, **options).parser
    torch.save(network.get_parsed_content("network_def").state_dict(), tmp_path / "model.pt")
    maps = []
    for kind in ("four", "one"):
        workflow(
            *("brats", "infer", ["inference"]),
            dataset_dir=str(tmp_path / kind),
            output_dir=str(tmp_path / "out" / kind),
            ckpt_path=str(tmp_path / "model.pt"),
            ckpt_dir=None,
            save_probabilities=True,
            **options,
        ).run()
        (path,) = (tmp_path / "out" / kind).rglob("*_seg.nii.gz")
        (prob,) = (tmp_path / "out" / kind).rglob("*_prob.nii.gz")
        assert nib.load(prob).shape == (*images[0].shape, 3)
        maps.append(np.asarray(nib.load(path).dataobj))
    assert set(np.unique(maps[0])) <= {0, 1, 2, 4} and maps[0].any()
    np.testing.assert_array_equal(maps[0], maps[1])


def test_inference_needs_neither_itk_nor_matplotlib(command):
    """Everything that `inference.yaml` names can be imported without them."""
    text = (ROOT / bundle("btcv") / "configs/inference.yaml").read_text()
    named = re.findall(r"from (tools[\w.]+) import|_target_: (tools[\w.]+)\.\w+", text)
    modules = ", ".join(sorted({module for pair in named for module in pair if module}))
    command("-c", f"import sys; sys.modules |= dict.fromkeys(['itk', 'matplotlib']); import {modules}")
