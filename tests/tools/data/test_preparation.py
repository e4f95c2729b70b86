"""How scans are prepared: described in a card, built from it, and compared."""

from __future__ import annotations

import json
from dataclasses import replace

import numpy as np
import pytest
import torch
import yaml
from monai.transforms import NormalizeIntensityd, ScaleIntensityRanged, ScaleIntensityRangePercentilesd

from tools.common.cards import CardError, save_weights
from tools.data.preparation import ABOVE_MASKS, Preparation, prepare_as_trained, prepare_training
from tools.data.transforms import Above, Nonzero
from tools.shipping.verify import BUNDLES

WINDOW = ScaleIntensityRanged("image", -175, 250, 0.0, 1.0, clip=True)
WIDE = ScaleIntensityRanged("image", -1000, 1000, 0.001, 1.0, clip=True)
PERCENTILES = ScaleIntensityRangePercentilesd("image", 0.5, 99.5, 0.001, 1.0, clip=True, channel_wise=True)
Z_SCORE = NormalizeIntensityd("image", nonzero=True, channel_wise=True)

OWN = Preparation([1.5, 1.5, 2.0], WINDOW, Above(0.0))


def weights_of(folder, preparation, name="backbone.pt", **changes):
    plain = json.loads(json.dumps({**preparation.plain(), **changes}))
    card = {"network": {"name": "UNet"}, "preparation": plain, "roi_size": [32] * 3, "versions": {}}
    save_weights(folder / name, {"a": torch.ones(1)}, card)
    return str(folder / name)


def training(weights, choice="own", own=OWN):
    return prepare_training(own.spacing, own.intensity, own.foreground, weights, choice)


@pytest.mark.parametrize(
    "before",
    [
        Preparation(None, WIDE, Above(0.25)),
        Preparation([1.0, 1.0, 3.0], PERCENTILES, Above(0.01)),
        Preparation([1, 2, 3], Z_SCORE, Nonzero()),
    ],
    ids=["window", "percentiles", "z_score"],
)
def test_what_is_taken_over_prepares_scans_as_before(tmp_path, before):
    found = training(weights_of(tmp_path, before), "as_pretrained")
    assert found.spacing == before.spacing
    scan = torch.as_tensor(np.random.default_rng(0).normal(0, 700, (2, 9, 9, 9)), dtype=torch.float32)
    scan[:, :3] = 0
    expected, image = (p.intensity({"image": scan.clone()})["image"] for p in (before, found))
    torch.testing.assert_close(image, expected, rtol=0, atol=0)
    assert torch.equal(found.foreground(image), before.foreground(expected))
    assert (found.plain(), found.lines[0][1][:17]) == (before.plain(), "as in pre-trainin")


def test_own_values_stay_and_differences_are_told_with_both(tmp_path):
    path = weights_of(tmp_path, Preparation(None, WIDE, Above(0.25)))
    found = training(path)
    assert (found.spacing, found.intensity, found.foreground) == (OWN.spacing, WINDOW, OWN.foreground)
    told = [text for name, text in found.lines if name == "WARNING"]
    card = tmp_path / "backbone.json"
    offer = "--preprocessing as_pretrained takes it over"
    assert told == [
        f"spacing: voxels of 1.5×1.5×2.0 mm here, voxels as in the file in pre-training ({card}); {offer}",
        "intensity: window [-175, 250] → [0.0, 1.0] here, window [-1000, 1000] → [0.001, 1.0] in pre-training "
        f"({card}); {offer}",
    ]
    assert offer not in str(training(path, None).lines)  # pre-training has no such key


def test_what_is_the_same_is_no_difference(tmp_path):
    assert [name for name, _ in training(weights_of(tmp_path, OWN)).lines] == ["preparation"]


@pytest.mark.parametrize(("least", "most", "told"), [(0.001, 1.0, 0), (0.01, 1.0, 1), (0.0, 0.9, 1)])
def test_what_keeps_intensities_above_the_masks_of_pre_training_is_no_difference(tmp_path, least, most, told):
    before = replace(OWN, intensity=ScaleIntensityRanged("image", -175, 250, least, most, clip=True))
    lines = training(weights_of(tmp_path, before)).lines
    assert [text.split(":")[0] for name, text in lines if name == "WARNING"] == ["intensity"] * told


@pytest.mark.parametrize("config", ["train", "mri"])
def test_it_is_what_the_bundle_of_pre_training_leaves_to_masks(config):
    text = (BUNDLES / f"hybridmim_pretrain/configs/{config}.yaml").read_text(encoding="utf-8")
    assert yaml.safe_load(text)["intensity"]["b_min"] == ABOVE_MASKS


@pytest.mark.parametrize("lacking", ["weights", "card"])
def test_nothing_is_taken_over_from_nowhere(tmp_path, lacking):
    torch.save({"a": torch.ones(1)}, tmp_path / "backbone.pt")
    path = None if lacking == "weights" else str(tmp_path / "backbone.pt")
    told = "pretrained is null" if lacking == "weights" else f"{tmp_path / 'backbone.json'} does not exist"
    with pytest.raises(CardError, match=f"preprocessing: found as_pretrained, but {told}; expected --pretrained"):
        training(path, "as_pretrained")
    assert training(path).plain() == OWN.plain()


BAD = {
    "orientation": ({"orientation": "LPS"}, r"preparation\.orientation: found 'LPS', expected 'RAS'"),
    "spacing": ({"spacing": [1, 2]}, r"preparation\.spacing: found \[1, 2\], expected 3 numbers"),
    "range": ({"intensity": {"scaling": "window"}}, r"preparation\.intensity\.range: found None, expected 2 numbers"),
    "scaling": ({"intensity": {"scaling": "Mine"}}, r"preparation\.intensity\.scaling: found 'Mine', expected window"),
    "foreground": ({"foreground_above": "Mine"}, r"preparation\.foreground_above: found 'Mine', expected a number"),
}


@pytest.mark.parametrize(("change", "told"), BAD.values(), ids=BAD)
def test_what_cannot_be_taken_over_is_refused_with_the_way_out(tmp_path, change, told):
    path = weights_of(tmp_path, OWN, **change)
    with pytest.raises(CardError, match=told) as error:
        training(path, "as_pretrained")
    assert str(tmp_path / "backbone.json") in str(error.value) and "--preprocessing own" in str(error.value)
    assert training(path).plain() == OWN.plain()


def test_a_transform_that_no_card_describes_has_its_name():
    for own in (ScaleIntensityRanged("image", 0, 1, 0, 1, clip=False), NormalizeIntensityd("image", subtrahend=1)):
        assert Preparation(None, own, len).plain()["intensity"] == {"scaling": type(own).__name__}


def test_what_no_card_describes_is_used_again_with_the_same_config(tmp_path):
    own = Preparation(None, WIDE, lambda image: image > 3)
    path = weights_of(tmp_path, own, "model.pt")
    assert prepare_as_trained(own, path).foreground is own.foreground
    with pytest.raises(CardError, match=r"foreground_above: found 'function'"):
        prepare_as_trained(OWN, path)


def test_segmentation_prepares_scans_as_the_weights_were_trained(tmp_path):
    before = Preparation(None, WIDE, Above(0.25))
    path = weights_of(tmp_path, before, "model.pt")
    found = prepare_as_trained(OWN, path)
    assert found.plain() == before.plain()
    assert [text for name, text in found.lines if not name] == [
        "not this config's spacing, voxels of 1.5×1.5×2.0 mm (--preparation own)",
        "not this config's intensity, window [-175, 250] → [0.0, 1.0] (--preparation own)",
    ]
    own = prepare_as_trained(OWN, path, "own")
    assert own.plain() == OWN.plain()
    assert [name for name, _ in own.lines] == ["preparation", "WARNING", "WARNING"]
    without = prepare_as_trained(OWN, tmp_path / "other.pt")
    assert without.plain() == OWN.plain() and f"{tmp_path / 'other.json'} does not exist" in without.lines[0][1]


def test_windows_of_another_size_than_the_crops_of_training_are_warned_of(tmp_path):
    path = weights_of(tmp_path, OWN, "model.pt")
    for choice in ("as_trained", "own"):
        (warning,) = prepare_as_trained(OWN, path, choice, [64, 48, 48]).lines[1:]
        assert warning == (
            "WARNING",
            'windows of 64×48×48, crops of 32×32×32 in training: results can be much worse (--roi_size "[32, 32, 32]")',
        )
        for same in ([32, 32, 32], 32):
            assert prepare_as_trained(OWN, path, choice, same).lines[1:] == []


def test_unknown_choices_are_refused(tmp_path):
    with pytest.raises(ValueError, match="preprocessing: found 'pretrained', expected own or as_pretrained"):
        training(None, "pretrained")
    with pytest.raises(ValueError, match="preparation: found True, expected as_trained or own"):
        prepare_as_trained(OWN, tmp_path / "model.pt", True)


def test_a_run_is_resumed_as_it_began(tmp_path):
    path = weights_of(tmp_path, OWN, "model.pt")
    OWN.require_same(path)
    OWN.require_same(tmp_path / "without.pt")
    other = Preparation([1.5, 1.5, 2.0], WINDOW, Above(0.1))
    with pytest.raises(CardError, match=r"resume: found .* foreground above 0\.1, expected .* foreground above 0\.0"):
        other.require_same(path)
