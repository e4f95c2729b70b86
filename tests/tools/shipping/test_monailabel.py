"""Bundles on their way into MONAI Label's app; tests/label has the server itself."""

from __future__ import annotations

import shutil
import subprocess
from importlib.util import find_spec

import nibabel as nib
import numpy as np
import pytest
import torch
from monai.bundle import ConfigParser
from monai.networks.nets import BasicUNet

from image_files import write_dicom
from tools.common.cards import save_weights
from tools.data.loading import open_scan
from tools.data.scans import ScanError
from tools.shipping import monailabel
from tools.shipping.monailabel import add_bundle, convert_dicom, require_bundle, serve
from tools.shipping.release import merge_overlay
from tools.shipping.verify import BUNDLES
from tools.weights.checkpoints import WeightsError
from tools.weights.networks import describe_network

FEATURES = [4, 4, 8, 8, 16, 4]
CONFIG = """
network_def:
  _target_: BasicUNet
  spatial_dims: 3
  out_channels: 2
  features: [4, 4, 8, 8, 16, 4]
"""


@pytest.fixture
def bundle(tmp_path):
    """A folder with what a bundle must have."""
    folder = tmp_path / "bundles/some_seg"
    for file, content in (("metadata.json", "{}"), ("inference.yaml", CONFIG), ("train.yaml", "network_def: {}")):
        (folder / "configs").mkdir(parents=True, exist_ok=True)
        (folder / "configs" / file).write_text(content)
    (folder / "models").mkdir()
    torch.save(BasicUNet(3, 1, 2, FEATURES).state_dict(), folder / "models/model.pt")
    return folder


@pytest.fixture
def app(tmp_path):
    (tmp_path / "apps/monaibundle/model").mkdir(parents=True)
    return tmp_path / "apps/monaibundle"


def files(folder):
    return {path.relative_to(folder).as_posix() for path in folder.rglob("*") if path.is_file()}


def files_and_folders(folder):
    return {path.relative_to(folder).as_posix() for path in folder.rglob("*")}


def test_copies_a_bundle_without_what_its_runs_wrote(bundle, app):
    there = files(bundle)
    for file in ("eval/metrics.csv", "eval/cache/1.pt", "models/checkpoint_epoch=5.pt", "configs/.hidden"):
        (bundle / file).parent.mkdir(parents=True, exist_ok=True)
        (bundle / file).write_text("x")
    assert add_bundle(bundle, app) == "some_seg"
    assert files(app / "model") == {f"some_seg/{file}" for file in there}


def test_a_copy_trains_on_with_the_preparation_of_its_weights(app, tmp_path):
    bundle = tmp_path / "hybridmim_spleen_seg"
    shutil.copytree(BUNDLES / bundle.name / "configs", bundle / "configs")
    inference = bundle / "configs/inference.yaml"
    inference.write_text(merge_overlay(inference.read_text("utf-8"), f"unet_features: {FEATURES}\n"), "utf-8")
    network = BasicUNet(3, 1, 2, FEATURES)
    intensity = {"scaling": "window", "range": [-1000, 1000], "to": [0.001, 1.0]}
    preparation = {"orientation": "RAS", "spacing": None, "intensity": intensity, "foreground_above": 0.25}
    card = {"network": describe_network(network), "preparation": preparation, "roi_size": [32] * 3, "versions": {}}
    save_weights(bundle / "models/model.pt", network.state_dict(), card)
    add_bundle(bundle, app)
    copy = app / "model" / bundle.name
    parser = ConfigParser()
    parser.read_config(copy / "configs/train.yaml")
    parser.update({"bundle_root": str(copy), "unet_features": FEATURES})
    assert parser.get_parsed_content("prepared").plain() == preparation
    loaded = parser.get_parsed_content("transfer").network
    assert torch.equal(loaded.down_4.convs.conv_1.conv.weight, network.down_4.convs.conv_1.conv.weight)
    assert "\npreprocessing: own" in (bundle / "configs/train.yaml").read_text("utf-8")  # the original


def test_keeps_what_the_app_has(bundle, app):
    add_bundle(bundle, app)
    trained = BasicUNet(3, 1, 2, FEATURES).state_dict()
    torch.save(trained, app / "model/some_seg/models/model.pt")
    assert add_bundle(bundle, app) == "some_seg"
    kept = torch.load(app / "model/some_seg/models/model.pt", weights_only=True)
    assert all(torch.equal(kept[key], trained[key]) for key in trained)


def test_names_the_files_that_a_bundle_lacks(bundle):
    (bundle / "models/model.pt").unlink()
    (bundle / "configs/train.yaml").unlink()
    with pytest.raises(ValueError, match=r"some_seg: found no configs/train\.yaml, models/model\.pt"):
        require_bundle(bundle)


def test_refuses_weights_that_need_an_overlay(bundle, app):
    torch.save(BasicUNet(3, 1, 2, [8, 8, 8, 8, 16, 8]).state_dict(), bundle / "models/model.pt")
    with pytest.raises(WeightsError, match="are not the weights of a UNet"):
        add_bundle(bundle, app)
    assert not files(app)


def test_a_refused_start_leaves_no_app(tmp_path, bundle, monkeypatch):
    monkeypatch.setattr(monailabel, "require_monailabel", lambda: None)  # is in an environment of its own
    torch.save(BasicUNet(3, 1, 2, [8, 8, 8, 8, 16, 8]).state_dict(), bundle / "models/model.pt")
    with pytest.raises(WeightsError, match="MONAI Label reads no overlays: `hybridmim release"):
        serve(str(tmp_path / "apps"), str(tmp_path), str(bundle))
    assert not (tmp_path / "apps").exists()


@pytest.mark.parametrize("there", [False, True])
def test_an_app_that_could_not_be_written_is_removed(tmp_path, bundle, monkeypatch, there):
    def write_half(words, check):
        (tmp_path / "apps/monaibundle/lib").mkdir(parents=True)
        raise subprocess.CalledProcessError(1, words)

    monkeypatch.setattr(monailabel, "require_monailabel", lambda: None)
    monkeypatch.setattr(subprocess, "run", write_half)
    if there:
        (tmp_path / "apps/mine").mkdir(parents=True)
    with pytest.raises(subprocess.CalledProcessError):
        serve(str(tmp_path / "apps"), str(tmp_path), str(bundle))
    assert files_and_folders(tmp_path / "apps") == ({"mine"} if there else set())


def test_dicom_series_among_the_studies_are_converted_once(tmp_path, capsys):
    for name in ("b", "a"):
        write_dicom(tmp_path / name)
    write_dicom(tmp_path / ".hidden")
    (tmp_path / "labels").mkdir()
    assert convert_dicom(tmp_path, convert=False) == [] and files(tmp_path).isdisjoint({"a.nii.gz", "b.nii.gz"})
    assert capsys.readouterr().out.endswith("`--convert true` writes NIfTI:\n  a\n  b\n")
    assert convert_dicom(tmp_path, convert=True) == [tmp_path / "a.nii.gz", tmp_path / "b.nii.gz"]
    series, file = open_scan(tmp_path / "a"), nib.load(tmp_path / "a.nii.gz")
    np.testing.assert_array_equal(np.asarray(file.dataobj), np.asarray(series.dataobj))
    np.testing.assert_allclose(file.affine, series.affine)
    assert np.asarray(file.dataobj).std() > 1
    assert convert_dicom(tmp_path, convert=True) == []


def test_a_series_that_cannot_be_converted_is_named(tmp_path):
    first = sorted(write_dicom(tmp_path / "a").iterdir())[2]
    first.unlink()  # a slice is missing
    with pytest.raises(ScanError, match=rf"{tmp_path}/a: "):
        convert_dicom(tmp_path, convert=True)
    assert not (tmp_path / "a.nii.gz").exists()


@pytest.mark.skipif(find_spec("monailabel") is not None, reason="MONAI Label is installed")
def test_without_monai_label(tmp_path, bundle):
    with pytest.raises(ValueError, match=r"no package monailabel; docs/monailabel\.md"):
        serve(str(tmp_path), str(tmp_path), str(bundle))
