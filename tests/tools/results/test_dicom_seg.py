"""DICOM segmentations: the same voxels as the label map, on the slices and in the study of the series."""

from __future__ import annotations

import subprocess
import sys

import nibabel as nib
import numpy as np
import pydicom
import pytest
import torch
import yaml
from monai.networks.nets import BasicUNet
from pydicom.sr.codedict import codes

from image_files import write_dicom, write_nifti
from tools.shipping.verify import BUNDLES

hd = pytest.importorskip("highdicom", reason='needs highdicom: pip install "hybridmim-bundles[dicom]"')
BUNDLE = BUNDLES / "hybridmim_btcv_seg"
FEATURES = [4, 4, 8, 8, 16, 4]
CLASSES = yaml.safe_load((BUNDLE / "configs/inference.yaml").read_text("utf-8"))["classes"]
PATIENT = {
    "PatientID": "p7",
    "PatientName": "A^B",
    "PatientBirthDate": "",
    "PatientSex": "O",
    "StudyDate": "20260102",
    "StudyTime": "101112",
    "StudyID": "s1",
    "AccessionNumber": "",
    "ReferringPhysicianName": "",
    "FrameOfReferenceUID": "1.2.3.4",
}


@pytest.fixture(scope="module")
def results(tmp_path_factory):
    """Folder of scans (a series, from the feet to the head and tilted, and a NIfTI file), and what inference writes."""
    root = tmp_path_factory.mktemp("dicom_seg")
    turn = np.cos(0.3), np.sin(0.3)
    series = write_dicom(
        root / "scans/series", slices=7, ImageOrientationPatient=[turn[0], turn[1], 0, -turn[1], turn[0], 0], **PATIENT
    )
    for number, file in enumerate(sorted(series.iterdir())):
        data = pydicom.dcmread(file)
        data.ImagePositionPatient, data.InstanceNumber = [5, -8, -3 * number], 7 - number
        data.save_as(file)
    write_nifti(root / "scans/volume.nii.gz")
    torch.manual_seed(0)
    network = BasicUNet(3, 1, len(CLASSES) + 1, FEATURES)
    torch.nn.init.normal_(network.final_conv.weight, std=5)
    torch.save(network.state_dict(), root / "model.pt")
    configs = [f"{BUNDLE}/configs/{name}.yaml" for name in ("inference", "dicom_seg")]
    line = [sys.executable, "-m", "monai.bundle", "run", "inferring", "--config_file", str(configs)]
    line += ["--bundle_root", str(BUNDLE), "--dataset_dir", str(root / "scans"), "--output_dir", str(root / "out")]
    line += ["--ckpt_path", str(root / "model.pt"), "--unet_features", str(FEATURES), "--roi_size", "[32,32,32]"]
    done = subprocess.run(line, capture_output=True, text=True, timeout=600)
    assert done.returncode == 0, done.stderr
    return root, done.stdout


def test_it_holds_the_label_map_voxel_for_voxel(results):
    root, _ = results
    image = nib.load(root / "out/series/series_seg.nii.gz")
    labels = np.asarray(image.dataobj)
    segmentation = hd.seg.segread(root / "out/series/series_seg.dcm")
    assert len(np.unique(labels)) > 3
    # place in the label map of every pixel of every frame, by the positions that both files give
    seen = np.zeros_like(labels)
    to_voxel = np.linalg.inv(image.affine)
    shared = segmentation.SharedFunctionalGroupsSequence[0]
    orientation = np.array(shared.PlaneOrientationSequence[0].ImageOrientationPatient, float).reshape(2, 3)
    between_rows, between_columns = map(float, shared.PixelMeasuresSequence[0].PixelSpacing)
    values = [value for (value,) in CLASSES.values()]
    pixels = segmentation.pixel_array.reshape(-1, segmentation.Rows, segmentation.Columns)
    for frame, group in zip(pixels, segmentation.PerFrameFunctionalGroupsSequence, strict=True):
        position = np.array(group.PlanePositionSequence[0].ImagePositionPatient, float)
        rows, columns = np.nonzero(frame)
        points = (
            position
            + np.outer(columns * between_columns, orientation[0])
            + np.outer(rows * between_rows, orientation[1])
        )
        points = np.c_[points * [-1, -1, 1], np.ones(len(points))] @ to_voxel.T  # DICOM's axes to NIfTI's
        number = group.SegmentIdentificationSequence[0].ReferencedSegmentNumber
        places = points[:, :3].round().astype(int)
        assert np.abs(points[:, :3] - places).max(initial=0) < 1e-3
        seen[tuple(places.T)] = values[number - 1]
    assert np.array_equal(seen, labels)


def test_it_belongs_to_the_series(results):
    root, _ = results
    segmentation = hd.seg.segread(root / "out/series/series_seg.dcm")
    slices = {data.SOPInstanceUID: data for data in map(pydicom.dcmread, (root / "scans/series").iterdir())}
    source = next(iter(slices.values()))
    for key in ("StudyInstanceUID", "FrameOfReferenceUID", "PatientID", "PatientName", "StudyDate"):
        assert segmentation[key].value == source[key].value
    assert segmentation.SeriesInstanceUID != source.SeriesInstanceUID
    referenced = segmentation.ReferencedSeriesSequence[0]
    assert referenced.SeriesInstanceUID == source.SeriesInstanceUID
    assert {item.ReferencedSOPInstanceUID for item in referenced.ReferencedInstanceSequence} == slices.keys()
    for group in segmentation.PerFrameFunctionalGroupsSequence:
        uid = group.DerivationImageSequence[0].SourceImageSequence[0].ReferencedSOPInstanceUID
        assert group.PlanePositionSequence[0].ImagePositionPatient == slices[uid].ImagePositionPatient


def test_segments_have_the_names_and_codes_of_the_classes(results):
    segmentation = hd.seg.segread(results[0] / "out/series/series_seg.dcm")
    assert [segment.SegmentLabel for segment in segmentation.SegmentSequence] == [n.replace("_", " ") for n in CLASSES]
    kidney = segmentation.SegmentSequence[list(CLASSES).index("left_kidney")]
    assert kidney.SegmentedPropertyTypeCodeSequence[0] == codes.SCT.Kidney
    side = kidney.SegmentedPropertyTypeCodeSequence[0].SegmentedPropertyTypeModifierCodeSequence[0]
    assert (side.CodeValue, side.CodeMeaning) == (codes.SCT.Left.value, codes.SCT.Left.meaning)


def test_a_scan_that_is_no_series_is_named_and_segmented(results):
    root, said = results
    assert "no DICOM segmentation of" in said and "volume.nii.gz" in said
    assert (root / "out/volume/volume_seg.nii.gz").is_file()
    assert not list((root / "out/volume").glob("*.dcm"))


@pytest.mark.parametrize(
    "file", sorted(BUNDLES.glob("*/configs/dicom_seg.yaml")), ids=lambda file: file.parents[1].name
)
def test_codes_and_meanings_are_those_of_the_standard(file):
    known = {(code.value, code.meaning) for code in map(codes.SCT.__getattr__, codes.SCT.dir())}
    overlay = yaml.safe_load(file.read_text("utf-8"))
    assert (
        overlay["coded_terms"].keys()
        == yaml.safe_load(file.with_name("inference.yaml").read_text("utf-8"))["classes"].keys()
    )
    used = {(str(code), meaning) for terms in overlay["coded_terms"].values() for code, meaning in terms.values()}
    assert used <= known
