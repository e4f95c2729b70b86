"""Bundles on their way into MONAI Label's app; tests/label has the server itself."""

from __future__ import annotations

from importlib.util import find_spec

import pytest
import torch
from monai.networks.nets import BasicUNet

from tools.shipping.monailabel import add_bundle, require_bundle, serve
from tools.weights.checkpoints import WeightsError

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


def test_copies_a_bundle_without_what_its_runs_wrote(bundle, app):
    there = files(bundle)
    for file in ("eval/metrics.csv", "eval/cache/1.pt", "models/checkpoint_epoch=5.pt", "configs/.hidden"):
        (bundle / file).parent.mkdir(parents=True, exist_ok=True)
        (bundle / file).write_text("x")
    assert add_bundle(bundle, app) == "some_seg"
    assert files(app / "model") == {f"some_seg/{file}" for file in there}


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


@pytest.mark.skipif(find_spec("monailabel") is not None, reason="MONAI Label is installed")
def test_without_monai_label(tmp_path, bundle):
    with pytest.raises(ValueError, match=r"no package monailabel; docs/monailabel\.md"):
        serve(str(tmp_path), str(tmp_path), str(bundle))
