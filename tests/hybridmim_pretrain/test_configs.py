"""The configs: overlays combine, names keep their contracts, and every variant takes training steps."""

from __future__ import annotations

import functools
import itertools
import json
import math
import operator
import re

import pytest
import torch
from monai.bundle import ConfigParser
from monai.networks.nets import BasicUNet, SwinUNETR
from monai.transforms import ScaleIntensityRanged, ScaleIntensityRangePercentilesd

from scripts.backbones import SwinUNETRBackbone, UNetBackbone
from tools.common import mixed_precision
from tools.common.tables import read_metrics
from tools.losses import HybridMIMLoss

from .bundle import BUNDLE, ROOT, TINY, TINY_INFERENCE, two_and_one

OVERLAYS = ("swin_unetr", "mri", "small")
METHODS = ("mae", "simmim", "simclr")
SETS = [overlays for n in range(4) for overlays in itertools.combinations(OVERLAYS, n)]
# MAE has a network of its own
WITH_METHODS = [("mae", "small"), ("simmim", "small", "swin_unetr"), ("simclr", "small", "swin_unetr")]

# the contract with clients, documentation and other bundles: do not rename
TRAIN_KEYS = {
    *("bundle_root", "dataset_dir", "datalist", "output_dir", "ckpt_dir", "device", "amp", "seed", "epochs"),
    *("batch_size", "crops_per_volume", "roi_size", "region_size", "patch_size", "mask_ratio", "mask_scheme"),
    *("decode_size", "learning_rate", "weight_decay", "warmup_epochs", "val_fraction", "val_interval"),
    *("num_workers", "cache", "resume", "network_def", "network", "train", "validate", "initialize"),
    *("training", "run"),
}
INFERENCE_KEYS = {
    *("bundle_root", "dataset_dir", "datalist", "output_dir", "ckpt_path", "device", "amp", "roi_size"),
    *("overlap", "sw_batch_size", "num_workers", "network_def", "network", "preprocessing", "dataset"),
    *("dataloader", "inferer", "postprocessing", "handlers", "evaluator", "initialize", "inferring", "run"),
}
# what inference must do as training did
SHARED_KEYS = {
    *("roi_size", "region_size", "patch_size", "decode_size", "mask_ratio", "mask_scheme", "mask_fill"),
    *("in_channels", "stride", "unet_features", "swin_feature_size", "swin_window_size", "swin_use_v2"),
    *(
        "vit_hidden_size",
        "vit_mlp_size",
        "vit_heads",
        "mae_decoder_size",
        "mae_decoder_layers",
        "mae_decoder_heads",
        "dropout",
        "dropout_stages",
    ),
    *("unet", "vit", "method_backbone", "backbone", "geometry", "network_def", "spacing", "window"),
    *("intensity", "seed", "bundle_root", "path", "dataset_dir", "datalist", "output_dir"),
}


@functools.cache
def read(name):
    return ConfigParser.load_config_file(ROOT / BUNDLE / f"configs/{name}.yaml")


def metadata():
    return json.loads((ROOT / BUNDLE / "configs/metadata.json").read_text())


# ------------------------------------------------------------------------------------------------- the contracts


@pytest.mark.parametrize(("name", "keys"), [("train", TRAIN_KEYS), ("inference", INFERENCE_KEYS)])
def test_the_names_of_the_contract_are_there(name, keys):
    assert set(keys) <= set(read(name))


@pytest.mark.parametrize("name", [*OVERLAYS, "vit", *METHODS, "published", "multi_gpu_train", "evaluate"])
def test_an_overlay_sets_known_names_only(name):
    overlay = read(name)
    known = {*read("train"), *read("inference")}
    text = (ROOT / BUNDLE / f"configs/{name}.yaml").read_text()
    own = {key for key in overlay if re.search(rf"@{key}\b", text)}  # the overlay itself refers to it
    own |= {"evaluate": {"validate#handlers", "evaluating"}, "multi_gpu_train": {"finalize"}}.get(name, set())
    assert set(overlay) <= known | own


def test_inference_repeats_the_values_of_training():
    train, inference = read("train"), read("inference")
    assert {key: inference[key] for key in SHARED_KEYS} == {key: train[key] for key in SHARED_KEYS}


def test_defaults_of_the_paper():
    train = read("train")
    assert (train["roi_size"], train["region_size"], train["patch_size"]) == ([96] * 3, [32] * 3, [16] * 3)
    assert (train["learning_rate"], train["weight_decay"], train["mask_ratio"]) == (1e-4, 1e-3, 0.4)
    weights = [(train | read("published"))[f"weight_{term}"] for term in ("pr", "num", "loc", "con", "cl")]
    assert weights == [1.0, 0.1, 0.1, 0.01, 0.1]


# ------------------------------------------------------------------------------------------------- the metadata


def test_metadata_pins_what_requirements_pins():
    meta = metadata()
    requirements = ROOT / "requirements.txt"
    if not requirements.is_file():
        pytest.skip("there is no requirements.txt")
    pinned = dict(re.findall(r"^([\w-]+)==(\S+)", requirements.read_text(), re.MULTILINE))
    assert meta["required_packages_version"] == meta["optional_packages_version"]
    versions = meta["required_packages_version"] | {
        "monai": meta["monai_version"],
        "torch": meta["pytorch_version"],
        "numpy": meta["numpy_version"],
    }
    assert versions == {name: pinned.get(name) for name in versions}


def test_metadata_describes_the_default_network():
    data, train = metadata()["network_data_format"], read("train")
    for part in (data["inputs"]["image"], data["outputs"]["pred"]):
        assert part["spatial_shape"] == train["roi_size"]
        assert part["num_channels"] == train["in_channels"]


# -------------------------------------------------------------------------------------------------- the overlays


def expected_sizes(overlays):
    if "small" not in overlays:
        return (96, 96, 96), (32, 32, 32), (16, 16, 16), (64, 64, 64)
    if "swin_unetr" in overlays:
        return (64, 64, 64), (32, 32, 32), (16, 16, 16), (64, 64, 64)
    return (48, 64, 48), (16, 16, 16), (8, 8, 8), (32, 32, 32)


@pytest.mark.parametrize("base", ["train", "inference"])
@pytest.mark.parametrize("overlays", SETS, ids="+".join)
def test_overlays_combine(parse, ct_scans, base, overlays):
    # a small SwinUNETR, for the time it takes
    parser = parse([base, *overlays], **({"swin_feature_size": 12} if "swin_unetr" in overlays else {}))

    geometry = parser.get_parsed_content("geometry")
    sizes = (geometry.roi_size, geometry.region_size, geometry.patch_size, geometry.decode_size)
    assert sizes == expected_sizes(overlays)

    backbone = parser.get_parsed_content("network_def").backbone
    assert type(backbone) is (SwinUNETRBackbone if "swin_unetr" in overlays else UNetBackbone)
    assert geometry.stride == backbone.stride
    if isinstance(backbone, UNetBackbone):
        width = 16 if "small" in overlays else 64
        assert backbone.state_dict()["conv_0.conv_0.conv.weight"].shape[:2] == (width, 1)

    intensity = parser.get_parsed_content("intensity")
    assert type(intensity) is (ScaleIntensityRangePercentilesd if "mri" in overlays else ScaleIntensityRanged)

    transform = parser.get_parsed_content("train#preprocessing" if base == "train" else "preprocessing")
    item = transform({"image": str(ct_scans / "ct_0.nii.gz")})
    for data in item if isinstance(item, list) else [item]:
        shape = data["image"].shape[1:]
        assert shape == geometry.roi_size if base == "train" else min(shape) >= min(geometry.roi_size)
        grid = [s // p for s, p in zip(shape, geometry.patch_size, strict=True)]
        assert data["mask"].shape == (1, *grid)
        assert int(data["mask"].sum()) == round(0.4 * math.prod(grid))
        assert base == "inference" or data["image"].min() == 0  # padding
        assert 0.9 < data["image"].max() <= 1


def test_every_order_of_overlays_gives_the_same_values():
    for overlays in [*SETS, *WITH_METHODS]:
        assert not any("#" in key or key.startswith("+") for name in overlays for key in read(name)), overlays
        for base in ("train", "inference"):
            orders = itertools.permutations(map(read, overlays))
            first, *others = [functools.reduce(operator.or_, order, read(base)) for order in orders]
            assert all(values == first for values in others), overlays


def test_mri_crops_to_what_is_brighter_than_the_background(parse):
    assert parse(["train", "mri"])["foreground_above"] < parse(["train"])["foreground_above"]


def test_published_settings_and_the_default(parse):
    """The loss's own defaults are the published weights; by default the other terms are a tenth of them."""
    published, usual = parse(["train", "published", "small"]), parse(["train", "small"])
    weights = {parser: parser.get_parsed_content("loss").weights for parser in (published, usual)}
    assert weights[published] == HybridMIMLoss().weights
    assert weights[usual] == {name: w if name == "loss_pr" else w / 10 for name, w in weights[published].items()}
    steps = [(step.mask_fill, step.views) for step in (p.get_parsed_content("step") for p in (published, usual))]
    assert steps == [("zero", "dropout"), ("zero", "other_masks")]


# --------------------------------------------------------------------------------------- a few steps of each kind


def take_steps(flow, steps):
    """Train one epoch, after which no parameter is what it was."""
    before = {name: p.clone() for name, p in flow.network_def.named_parameters()}
    flow.run()
    flow.finalize()
    assert flow.trainer.state.iteration == steps
    assert [name for name, p in flow.network_def.named_parameters() if torch.equal(before[name], p)] == []


def check_results(folder, plain_network):
    (row,) = read_metrics(folder / "out/metrics.csv")
    assert all(math.isfinite(float(value)) for value in row.values())
    weights = torch.load(folder / "models/backbone.pt", weights_only=True)
    plain_network.load_state_dict(weights, strict=True)


@pytest.mark.parametrize("channels", [1, 2])
@pytest.mark.parametrize("overlays", [(), ("mri",)], ids="+".join)
def test_unet_takes_two_steps(workflow, tmp_path, ct_scans, mr_scans, overlays, channels):
    options = {**TINY, "in_channels": channels, "epochs": 1, "warmup_epochs": 0}
    if channels == 2 and not overlays:  # a window that holds all
        options |= {"window": [0, 2_000_000], "foreground_above": 0.0}
    scans = ct_scans if channels == 1 else mr_scans
    take_steps(workflow("train", ["train", *overlays], dataset_dir=str(scans), **options), 2)
    check_results(tmp_path, BasicUNet(3, channels, channels, TINY["unet_features"]))


def test_unet_takes_two_steps_in_bfloat16(workflow, tmp_path, ct_scans, monkeypatch):
    """Slowly, where the processor has no instructions for it."""
    monkeypatch.setattr(mixed_precision, "has_bfloat16", lambda device: True)
    flow = workflow("train", ["train"], dataset_dir=str(ct_scans), **{**TINY, "epochs": 1, "warmup_epochs": 0})
    seen = set()

    def look(module, args, out):
        if not out.is_meta:  # the estimate of the memory is for 32 bit
            seen.add(out.dtype)

    flow.network_def.backbone.down_1.register_forward_hook(look)
    take_steps(flow, 2)
    assert seen == {torch.bfloat16}  # in training and validation
    check_results(tmp_path, BasicUNet(3, 1, 1, TINY["unet_features"]))


def test_a_device_may_be_given_as_text(parse, ct_scans):
    parser = parse(["train", "small"], dataset_dir=str(ct_scans), device="cpu", cache="none", **TINY)
    assert parser.get_parsed_content("train#dataloader").pin_memory is False
    assert parser.get_parsed_content("validate#evaluator").state.device == torch.device("cpu")


@pytest.mark.parametrize("amp", ["auto", "off"])
def test_inference_and_training_use_the_same_type(parse, ct_scans, amp, monkeypatch):
    """Weights that were trained in bfloat16 may be beyond the range of float16."""
    monkeypatch.setattr(mixed_precision, "has_bfloat16", lambda device: True)
    options = {"dataset_dir": str(ct_scans), "amp": amp, "device": "cpu"}
    inference = parse(["inference", "small"], **options, **TINY_INFERENCE).get_parsed_content("inferer")
    training = parse(["train", "small"], **options, **TINY)
    used = [inference, *(training.get_parsed_content(f"{part}#inferer") for part in ("train", "validate"))]
    found = {(inferer.autocast._enabled, inferer.autocast.fast_dtype) for inferer in used}
    assert found == {(True, torch.bfloat16) if amp == "auto" else (False, torch.float32)}


def test_swin_unetr_takes_a_step(workflow, tmp_path, mr_scans):
    options = {"in_channels": 2, "epochs": 1, "warmup_epochs": 0, "batch_size": 2, "val_interval": 1}
    options |= {"dataset_dir": str(mr_scans), "datalist": two_and_one(tmp_path, "mr")}
    take_steps(workflow("train", ["train", "mri", "swin_unetr", "small"], **options), 1)
    check_results(tmp_path, SwinUNETR(2, 2, feature_size=12))


def test_inference_takes_two_channels(workflow, tmp_path, mr_scans):
    flow = workflow("infer", ["inference", "mri", "small"], dataset_dir=str(mr_scans), in_channels=2, **TINY_INFERENCE)
    torch.save(flow.network_def.state_dict(), tmp_path / "model.pt")
    flow.parser["ckpt_path"] = str(tmp_path / "model.pt")
    flow.initialize()
    flow.run()
    assert len(list((tmp_path / "out").rglob("*_reconstruction.nii.gz"))) == 6
