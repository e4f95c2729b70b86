"""The configs of the five bundles: what they mean; keys and metadata as their clients expect them."""

from __future__ import annotations

import itertools
import json

import pytest
import torch
from monai.networks.nets import UNETR, BasicUNet, SwinUNETR

from tools.data.classes import label_values, own_values

from .bundles import NAMES, ROOT, bundle, read

NETWORKS = {"swin_unetr": SwinUNETR, "unetr": UNETR}
SIZES = (  # of the networks
    *("unet_features", "swin_feature_size"),
    *("unetr_feature_size", "vit_hidden_size", "vit_mlp_size", "vit_heads"),
)
EVERY_BUNDLE = pytest.mark.parametrize("name", NAMES)

# of an image on its way into the network, and of the network: training and inference agree on them
OF_INFERENCE = {
    *("modalities", "in_channels", "classes", "activation", "network_def", "roi_size", "stride", "device", *SIZES),
    *("spacing", "percentiles", "window", "foreground", "intensity"),
}
# a class that is one side of a pair, by a word of its name, and the axis along which it must not be flipped
SIDES = {"left": 0, "right": 0, "anterior": 1, "posterior": 1}

# the contract with clients, documentation and other bundles: do not rename
TRAIN_KEYS = {
    *("bundle_root", "dataset_dir", "datalist", "label_fraction", "pretrained", "output_dir", "ckpt_dir"),
    *("device", "amp", "seed", "epochs", "batch_size", "roi_size", "learning_rate", "val_interval"),
    *("num_workers", "cache", "resume", "network_def", "network", "train", "validate"),
    *("initialize", "training", "run"),
}
INFERENCE_KEYS = {
    *("bundle_root", "dataset_dir", "datalist", "output_dir", "ckpt_path", "device", "amp", "roi_size"),
    *("overlap", "sw_batch_size", "num_workers", "network_def", "network", "preprocessing", "dataset"),
    *("dataloader", "inferer", "postprocessing", "handlers", "evaluator", "initialize", "inferring", "run"),
}


@EVERY_BUNDLE
def test_no_flip_takes_a_class_to_the_other_side(name):
    """Flipped along this axis, a left kidney would lie where right kidneys are, and still be called left."""
    train = read(name, "train")
    sided = {SIDES[word] for class_name in train["classes"] for word in class_name.split("_") if word in SIDES}
    flipped_in_training = {axis for axis, probability in enumerate(train["flip_probability"]) if probability > 0}
    assert not sided & flipped_in_training
    assert not sided & set(read(name, "flips")["flip_axes"])


@EVERY_BUNDLE
def test_training_and_inference_agree_on_the_same_image_and_network(name):
    train, inference = read(name, "train"), read(name, "inference")
    shared = OF_INFERENCE & train.keys()
    assert {k: inference.get(k) for k in shared} == {k: train[k] for k in shared}


@EVERY_BUNDLE
def test_overlays_combine_in_any_order(name):
    for network, base in itertools.product(NETWORKS, ("train", "inference")):
        small, other = read(name, "small"), read(name, network)
        assert not any("#" in key or key.startswith("+") for key in (*small, *other))
        values = {**read(name, base), **small, **other}
        assert values == {**read(name, base), **other, **small}


@pytest.mark.parametrize("overlays", [(), ("small",), *((n, s) for n in NETWORKS for s in ("small", None))], ids=str)
@EVERY_BUNDLE
def test_windows_fit_the_network(name, overlays, parse):
    overlays = [overlay for overlay in overlays if overlay]
    train, inference = (parse(name, [config, *overlays]) for config in ("train", "inference"))
    roi, stride = train.get_parsed_content("roi_size"), train.get_parsed_content("stride")
    assert all(side % stride == 0 and side >= 2 * stride for side in roi)
    assert inference.get_parsed_content("roi_size") == roi
    assert inference.get_parsed_content("spacing") == train.get_parsed_content("spacing")
    if "small" in overlays:  # for the time it takes
        network = train.get_parsed_content("network_def")
        assert isinstance(network, NETWORKS.get(overlays[0], BasicUNet))
        inference.get_parsed_content("network_def").load_state_dict(network.state_dict())


@EVERY_BUNDLE
def test_networks_fit_what_pre_training_makes(name, parse):
    """Small and full sizes are those of the pre-training bundle."""
    import yaml

    pretrain = {
        c: yaml.safe_load((ROOT / f"bundles/hybridmim_pretrain/configs/{c}.yaml").read_text())
        for c in ("train", "small")
    }
    for config in ("train", "small"):
        for key in set(SIZES) - {"unetr_feature_size"}:  # of the decoder, which no pre-training makes
            assert read(name, config)[key] == pretrain[config][key]


@EVERY_BUNDLE
def test_keys_of_the_contract(name):
    assert read(name, "train").keys() >= TRAIN_KEYS
    assert read(name, "inference").keys() >= INFERENCE_KEYS


@EVERY_BUNDLE
def test_overlays_set_keys_that_exist(name):
    train, evaluate, inference = (read(name, config) for config in ("train", "evaluate", "inference"))
    for config in (*NETWORKS, "small"):
        assert read(name, config).keys() <= train.keys()
    assert read(name, "flips").keys() == {"flip_axes"} <= inference.keys() & evaluate.keys()
    assert set(read(name, "multi_gpu_train")) - train.keys() == {"finalize"}
    assert read(name, "torchscript").keys() == {"ckpt_path", "network", "inferring"} <= inference.keys()


@EVERY_BUNDLE
def test_a_torchscript_file_is_taken_with_any_overlay(name):
    """No other overlay of inference sets its keys, so their order does not matter; its file brings the weights."""
    overlay, inference = read(name, "torchscript"), read(name, "inference")
    for config in (*NETWORKS, "small", "flips"):
        assert not overlay.keys() & read(name, config).keys()
    load, *rest = inference["inferring"]
    assert load.startswith("$load_weights(")
    assert overlay["inferring"] == ["@network", *rest]


@EVERY_BUNDLE
def test_metadata_agrees_with_the_network(name, parse):
    meta = json.loads((ROOT / bundle(name) / "configs/metadata.json").read_text())["network_data_format"]
    parser = parse(name, ["inference"])
    classes = parser.get_parsed_content("classes")
    image, pred = meta["inputs"]["image"], meta["outputs"]["pred"]
    assert image["num_channels"] == len(image["channel_def"]) == parser.get_parsed_content("in_channels")
    assert image["spatial_shape"] == pred["spatial_shape"] == parser.get_parsed_content("roi_size")
    # MONAI Label takes the keys for the label values of the map that inference writes
    assert [int(value) for value in pred["channel_def"]] == [0, *label_values(classes)]
    assert len(own_values(classes)) == len(classes)
    with torch.no_grad():
        out = parse(name, ["inference", "small"]).get_parsed_content("network_def")(
            torch.rand(1, image["num_channels"], 32, 32, 32)
        )
    assert out.shape[1] == pred["num_channels"]


@pytest.mark.parametrize("run", ["train", "inference"])
def test_a_key_sets_the_window_of_attention(parse, run):
    config = parse("btcv", [run, "swin_unetr"], swin_feature_size=12, swin_window_size=4)
    attention = config.get_parsed_content("network_def").swinViT.layers1[0].blocks[0].attn
    assert tuple(attention.window_size) == (4, 4, 4)


@pytest.mark.parametrize("run", ["train", "inference"])
def test_a_key_builds_the_second_version_of_swin_unetr(parse, run):
    for asked, has in (("true", True), ("false", False)):
        network = parse("btcv", [run, "swin_unetr"], swin_feature_size=12, swin_use_v2=asked).get_parsed_content(
            "network_def"
        )
        assert any("layers1c." in name for name in network.state_dict()) == has
