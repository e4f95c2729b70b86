"""One preparation from pre-training to segmentation: what the cards of the weights say is what the networks see."""

from __future__ import annotations

import json
import shutil

import nibabel as nib
import numpy as np
import pytest
import torch
from monai.bundle import ConfigParser
from monai.networks.nets import BasicUNet
from monai.transforms import Compose
from phantom import make_phantom, save_in

from tools.common.cards import CardError, read_card, require_own, save_weights
from tools.common.errors import root_cause
from tools.common.tables import read_metrics
from tools.training.cards import training_card

from .bundles import ROOT, TINY, TINY_TRAINING, places, read

PRETRAIN = ROOT / "bundles/hybridmim_pretrain"
FEATURES = TINY["unet_features"]


def pretraining(overlays=(), **overrides):
    parser = ConfigParser()
    parser.read_config([PRETRAIN / f"configs/{name}.yaml" for name in ("train", *overlays)])
    parser.update({"bundle_root": str(PRETRAIN), "unet_features": FEATURES, "roi_size": [32, 32, 32], **overrides})
    return parser


def backbone_of(parser, folder):
    """`backbone.pt` with its card, as this pre-training writes them."""
    torch.manual_seed(7)
    channels, prepared = (parser.get_parsed_content(key) for key in ("in_channels", "prepared"))
    network = BasicUNet(3, channels, channels, FEATURES)
    card = training_card(network, prepared, [32, 32, 32], 3, PRETRAIN, method={"name": "HybridMIM"})
    save_weights(folder / "backbone.pt", network.state_dict(), card)
    return str(folder / "backbone.pt")


# name, overlays of pre-training, its values, intensities of a voxel of a level: -1 air, 0 body, …
CASES = [
    ("spleen", (), {"spacing": [1.5, 1.2, 2.0], "window": [-900, 700]}, lambda level, _: -1000 + 350 * (level + 1)),
    ("brats", ("mri",), {"in_channels": 4, "percentiles": [2, 97]}, lambda level, c: (level + 1) * (50 + 10 * c)),
]


@pytest.mark.parametrize(("name", "overlays", "values", "intensity"), CASES, ids=["spleen", "brats"])
def test_training_evaluation_and_inference_see_what_pre_training_saw(
    name, overlays, values, intensity, parse, tmp_path
):
    before = pretraining(overlays, **values, roi_size=[8, 8, 8])
    channels = values.get("in_channels", 1)
    phantom = make_phantom([1, 2, 4], intensity, channels)
    files = [save_in("LPS", phantom.image[c].astype(np.int16), tmp_path / f"{c}.nii.gz") for c in range(channels)]
    label = save_in("LPS", phantom.label, tmp_path / "label.nii.gz")
    case = {"image": [str(f) for f in files] if channels > 1 else str(files[0]), "label": str(label)}
    expected = np.asarray(Compose(before.get_parsed_content("load"))(dict(case))["image"])

    path = backbone_of(before, tmp_path)
    options = {"unet_features": FEATURES, "roi_size": [32, 32, 32], "pretrained": path}
    train = parse(name, ["train"], **options, preprocessing="as_pretrained")
    found = train.get_parsed_content("validate#preprocessing")(dict(case))
    np.testing.assert_array_equal(np.asarray(found["image"]), expected)
    assert found["label"].shape[1:] == expected.shape[1:]
    own = parse(name, ["train"], **options).get_parsed_content("validate#preprocessing")(dict(case))
    assert own["image"].shape != expected.shape or not np.allclose(np.asarray(own["image"]), expected)

    network, prepared = (train.get_parsed_content(key) for key in ("network_def", "prepared"))
    folder = ROOT / f"bundles/hybridmim_{name}_seg"
    save_weights(
        tmp_path / "models/model.pt", network.state_dict(), training_card(network, prepared, [32] * 3, 1, folder)
    )
    options = {"unet_features": FEATURES, "ckpt_path": str(tmp_path / "models/model.pt")}
    for configs, key in ((["train", "evaluate"], "validate#preprocessing"), (["inference"], "preprocessing")):
        found = parse(name, configs, **options).get_parsed_content(key)(dict(case))
        np.testing.assert_array_equal(np.asarray(found["image"]), expected)
        kept = parse(name, configs, **options, preparation="own").get_parsed_content(key)(dict(case))
        np.testing.assert_array_equal(np.asarray(kept["image"]), np.asarray(own["image"]))


# ------------------------------------------------------------------------------------ from weights to label maps

OPTIONS = {**TINY_TRAINING, "roi_size": [32, 32, 32], "epochs": 2, "cache": "none"}
BEFORE = {"spacing": [2.0, 2.0, 2.0], "percentiles": [5, 90]}


@pytest.fixture(scope="module")
def trained(run_bundle, samples, tmp_path_factory):
    """A hippocampus run from the command line, prepared as a pre-training was: its folder, and what it printed."""
    folder = tmp_path_factory.mktemp("trained")
    path = backbone_of(pretraining(["mri"], **BEFORE), folder)
    done = run_bundle(
        *("hippocampus", "training", ["train"]),
        **{**OPTIONS, **places(folder), "dataset_dir": samples("hippocampus")},
        pretrained=path,
        preprocessing="as_pretrained",
    )
    return folder, done.stdout


def test_the_start_table_says_whose_preparation_it_is(trained):
    folder, said = trained
    assert f"preparation  as in pre-training ({folder / 'backbone.json'}): voxels of 2.0×2.0×2.0 mm, perc" in said
    assert f"pretrained   {folder / 'backbone.pt'} is UNet (in_channels 1, unet_features {FEATURES})" in said


def test_the_card_of_the_best_weights(trained):
    folder, _ = trained
    card = read_card(folder / "models/model.pt")
    require_own(folder / "models/model.pt", card, torch.load(folder / "models/model.pt", weights_only=True))
    assert card["network"] == {"name": "UNet", "in_channels": 1, "unet_features": FEATURES}
    assert card["preparation"]["spacing"] == [2.0, 2.0, 2.0]
    assert card["preparation"]["intensity"] == {"scaling": "percentiles", "range": [5, 90], "to": [0.001, 1.0]}
    assert card["classes"] == read("hippocampus", "train")["classes"]
    assert card["pretrained"] == {"file": "backbone.pt", "sha256": read_card(folder / "backbone.pt")["sha256"]}
    rows = read_metrics(folder / "out/metrics.csv")
    best = max(rows, key=lambda row: float(row["val_mean_dice"]))
    assert (card["epoch"], card["steps"]) == (int(best["epoch"]), int(best["epoch"]) * 2)  # 4 cases, 2 in a batch
    assert card["metrics"]["mean_dice"] == float(best["val_mean_dice"])
    assert card["scans"] == 4 and card["versions"]["bundle"].startswith("HybridMIM hippocampus")


@pytest.fixture
def segment(trained, samples, workflow, tmp_path):
    def run(name, **options):
        flow = workflow(
            *("hippocampus", "infer", ["inference"]),
            **{**TINY, "roi_size": [32, 32, 32], "dataset_dir": str(samples("hippocampus") / "imagesTr")},
            **{"ckpt_path": str(trained[0] / "models/model.pt"), "output_dir": str(tmp_path / name), **options},
            save_probabilities=True,
        )
        flow.run()
        return [np.asarray(nib.load(path).dataobj) for path in sorted((tmp_path / name).rglob("*_prob.nii.gz"))]

    return run


def test_inference_takes_over_the_preparation(segment, capsys):
    taken = segment("taken")
    said = capsys.readouterr().out
    assert "preparation  as in training (" in said and "not this config's spacing" in said
    explicit = segment("explicit", preparation="own", **BEFORE)
    other = segment("other", preparation="own")
    assert "WARNING      spacing: voxels as in the file here, voxels of 2.0×2.0×2.0 mm in training" in (
        capsys.readouterr().out
    )
    assert len(taken) == 5
    for one, same, another in zip(taken, explicit, other, strict=True):
        np.testing.assert_array_equal(one, same)
        assert not np.allclose(one, another, atol=1e-3)


def refusal(run):
    with pytest.raises(RuntimeError) as error:
        run()
    return root_cause(error.value)


def test_inference_refuses_other_classes_and_a_damaged_card(trained, segment, tmp_path):
    error = refusal(lambda: segment("a", classes={"posterior": [1], "anterior": [2]}))
    assert "classes: found {'posterior': [1], 'anterior': [2]}, expected those that" in str(error)
    assert """--classes "{'anterior': [1], 'posterior': [2]}\"""" in str(error)
    copy = shutil.copytree(trained[0] / "models", tmp_path / "models")
    (copy / "model.json").write_text("{")
    error = refusal(lambda: segment("b", ckpt_path=str(copy / "model.pt")))
    assert isinstance(error, CardError) and f"{copy / 'model.json'}: found no JSON" in str(error)
    assert not list(tmp_path.rglob("*_seg.nii.gz"))


def test_a_run_that_is_resumed_with_other_options_is_refused(trained, workflow, samples, tmp_path):
    shutil.copytree(trained[0] / "models", tmp_path / "models")
    options = {**OPTIONS, "dataset_dir": str(samples("hippocampus")), "resume": True, "epochs": 3}
    error = refusal(lambda: workflow("hippocampus", "train", ["train"], **options).run())
    assert isinstance(error, CardError)
    assert "resume: found voxels as in the file, percentiles [0.5, 99.5]" in str(error)
    assert "expected voxels of 2.0×2.0×2.0 mm, percentiles [5, 90]" in str(error)


def test_weights_of_another_preparation_are_told_and_kept(trained, workflow, samples, capsys, tmp_path):
    options = {**OPTIONS, "dataset_dir": str(samples("hippocampus")), "pretrained": str(trained[0] / "backbone.pt")}
    workflow("hippocampus", "train", ["train"], **options).run()
    said = capsys.readouterr().out
    assert "WARNING      intensity: percentiles [0.5, 99.5] → [0.001, 1.0] here, percentiles [5, 90]" in said
    card = json.loads((tmp_path / "models/model.json").read_text())
    assert card["preparation"]["spacing"] is None
