"""What the features of an encoder depend on: scans or masks."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from ignite.engine import Engine
from torch import nn

from scripts.backbones import UNetBackbone
from scripts.features import FeatureStudy, colours, nearest_is_same, study_features, variance_shares
from scripts.hybridmim import HybridMIM, PretrainStep
from scripts.masking import Geometry, RandPatchMaskd
from tools.losses import expand_mask

GEOMETRY = Geometry((32, 32, 32), (16, 16, 16), (8, 8, 8), (32, 32, 32), 16)


@pytest.fixture
def batch():
    torch.manual_seed(0)
    draw = RandPatchMaskd(GEOMETRY).set_random_state(0)
    image = torch.rand(4, 1, *GEOMETRY.roi_size) * 0.9 + 0.05
    return image, torch.stack([draw({"image": x})["mask"] for x in image])


class Encoder(nn.Module):
    """Features in which the scan has one weight, and the mask another."""

    def __init__(self, scan, mask):
        super().__init__()
        self.scan, self.mask = scan, mask

    def encode(self, image, mask):
        both = self.scan * image + self.mask * expand_mask(mask, image.shape[2:]).float()
        return [both, nn.functional.avg_pool3d(both, 8)]


@pytest.mark.parametrize(("scan", "mask"), [(1, 0), (0, 1)])
def test_features_of_the_scan_or_of_the_mask_alone(batch, scan, mask):
    found = study_features(Encoder(scan, mask), *batch)
    for stride in (1, 8):
        assert found[f"scan_variance_{stride}"] == pytest.approx(scan, abs=1e-6)
        assert found[f"mask_variance_{stride}"] == pytest.approx(mask, abs=1e-6)
    assert found["scan_mask_chance"] == 0.25


def test_shares_of_an_encoder_are_those_of_a_two_way_analysis_of_variance(batch):
    image, mask = batch
    step = PretrainStep(HybridMIM(UNetBackbone(1, (4, 4, 8, 8, 8, 4)), GEOMETRY), GEOMETRY, mask_fill="zero").eval()
    found = study_features(step, image, mask)
    with torch.no_grad():
        table = [[step.encode(x[None], m[None]) for m in mask] for x in image]
    for level, stride in enumerate((1, 2, 4, 8, 16)):
        f = np.array([[cell[level].flatten().double().numpy() for cell in row] for row in table])  # [scans, masks, F]
        whole = ((f - f.mean((0, 1))) ** 2).sum()
        by_scan = 4 * ((f.mean(1) - f.mean((0, 1))) ** 2).sum() / whole
        by_mask = 4 * ((f.mean(0) - f.mean((0, 1))) ** 2).sum() / whole
        assert found[f"scan_variance_{stride}"] == pytest.approx(by_scan, rel=1e-4)
        assert found[f"mask_variance_{stride}"] == pytest.approx(by_mask, rel=1e-4)


def test_equal_features_have_no_variance_to_share():
    zero = torch.zeros(())
    assert variance_shares(zero, torch.zeros(2, 3), zero, 2, 2) == (0, 0)


def test_retrieval_asks_for_the_same_scan_under_another_mask():
    scans = torch.eye(3)[:, None].expand(3, 2, 3)  # [scans, masks, F]: every scan has a direction of its own
    assert nearest_is_same(scans) == 1
    assert nearest_is_same(scans.roll(1, 0)) == 1
    mixed = torch.stack([torch.eye(3), torch.eye(3)[[0, 2, 1]]], 1)  # two of three change places under the other mask
    assert nearest_is_same(mixed) == pytest.approx(1 / 3)


def test_colours_are_the_first_principal_components():
    """Three blocks of features along one axis are three distinct colours, enlarged to the voxels of the crop."""
    features = torch.zeros(5, 3, 2, 2)
    for block in range(3):
        features[block, block] = 1 + block
    found = colours(features, (12, 8, 8))
    assert found.shape == (3, 12, 8, 8)
    assert found.min() >= 0 and found.max() <= 1
    blocks = found.view(3, 3, 4, 8, 8).transpose(0, 1).flatten(2)  # [blocks, colours, voxels]
    assert all((block == block[:, :1]).all() for block in blocks)
    assert len({tuple(block[:, 0].tolist()) for block in blocks}) == 3


class OfMasks(PretrainStep):
    """Its features are the mask and nothing else."""

    def encode(self, image, mask):
        return Encoder(0, 1).encode(image, mask)


@pytest.mark.parametrize(("kind", "times"), [(OfMasks, 1), (PretrainStep, 0)])
def test_a_code_of_the_mask_is_said_once(batch, capsys, tmp_path, kind, times):
    image, mask = batch
    step = kind(HybridMIM(UNetBackbone(1, (4, 4, 8, 8, 8, 4)), GEOMETRY), GEOMETRY, mask_fill="foreign").eval()
    validator = Engine(lambda engine, data: [{"image": image, "mask": mask}])
    FeatureStudy(step, 1, tmp_path, "off").attach(validator)
    for _ in range(3):
        validator.run([{"file": ["a.nii.gz"] * 4, "spacing": torch.ones(4, 3)}])
    printed = capsys.readouterr().out
    assert printed.count("the encoder has become a code of the mask") == times
    assert ("features at 1/8, 100% follows the masks and 0% the scans" in printed) == bool(times)
    assert validator.state.metrics["scan_mask_chance"] == 0.25
    assert (tmp_path / "features_epoch=0001.png").read_bytes()[:4] == b"\x89PNG"


def test_a_single_scan_has_no_shares_but_a_picture(batch, tmp_path):
    image, mask = (part[:1] for part in batch)
    step = PretrainStep(HybridMIM(UNetBackbone(1, (4, 4, 8, 8, 8, 4)), GEOMETRY), GEOMETRY).eval()
    validator = Engine(lambda engine, data: [{"image": image, "mask": mask}])
    FeatureStudy(step, 1, tmp_path, "off").attach(validator)
    validator.run([{"file": ["a.nii.gz"], "spacing": torch.ones(1, 3)}])
    assert not validator.state.metrics
    assert (tmp_path / "features_epoch=0001.png").exists()
