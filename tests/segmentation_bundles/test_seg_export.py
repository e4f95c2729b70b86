"""TorchScript and ONNX files compute what PyTorch computes, on real scans, and refuse what they were not made for."""

from __future__ import annotations

import json
import re
import shutil
from functools import cache

import nibabel as nib
import numpy as np
import onnxruntime
import pytest
import torch
from monai.bundle import ConfigParser, ckpt_export, onnx_export
from monai.data import load_net_with_metadata
from monai.networks import nets
from monai.transforms import ResizeWithPadOrCrop

from tools.common.errors import root_cause

from .bundles import ROOT, TINY, bundle, config_files

DIFFERENCE = 1e-4
# one stage of SwinUNETR with shifted windows, whose masks a trace keeps
DEPTHS = [1, 1, 2, 1]
SCANS = {"hippocampus": "Task04_Hippocampus/imagesTr/hippocampus_001.nii.gz", "btcv": "ct_abdomen/ct.nii.gz"}


def options(network):
    return {**TINY, "network_def#depths": DEPTHS} if network == "swin_unetr" else dict(TINY)


def configs(network, *overlays):
    return ["inference", *([] if network == "unet" else [network]), *overlays]


def tracing(network, parser):
    """SwinUNETR cannot be scripted."""
    shape = [1, parser.get_parsed_content("in_channels"), *parser.get_parsed_content("roi_size")]
    return {"use_trace": True, "input_shape": shape} if network == "swin_unetr" else {}


def parse(name, network):
    parser = ConfigParser()
    parser.read_config([ROOT / file for file in config_files(name, configs(network))])
    parser.update({"bundle_root": str(ROOT / bundle(name)), **options(network)})
    return parser


def window_of(parser, scan, size=None):
    """The middle of a scan, as the bundle's own preprocessing makes it: [1, C, H, W, D]."""
    image = parser.get_parsed_content("preprocessing")({"image": str(scan)})["image"]
    return ResizeWithPadOrCrop(size or parser.get_parsed_content("roi_size"))(image).as_tensor()[None]


@pytest.fixture(scope="module")
def weights(tmp_path_factory):
    """`weights("btcv", "unet")`: file of the weights of a tiny network, which gives every class somewhere."""

    @cache
    def make(name, network):
        with torch.random.fork_rng():
            torch.manual_seed(0)
            state = parse(name, network).get_parsed_content("network_def").state_dict()
        list(state.values())[-1].zero_()  # the bias that would prefer a class
        path = tmp_path_factory.mktemp(f"{name}_{network}") / "model.pt"
        torch.save(state, path)
        return path

    return make


@pytest.fixture(scope="module")
def exported(command, weights):
    """`exported("btcv", "unet")`: TorchScript file beside the weights; the hippocampus UNet's by the command line."""

    @cache
    def make(name, network):
        parser, path = parse(name, network), weights(name, network)
        given = {"net_id": "network_def", "config_file": config_files(name, configs(network))}
        given |= {"bundle_root": bundle(name), "ckpt_file": str(path), "filepath": str(path.with_suffix(".ts"))}
        given |= {**options(network), **tracing(network, parser)}
        if (name, network) == ("hippocampus", "unet"):
            command("-m", "monai.bundle", "ckpt_export", **given)
        else:
            ckpt_export(**given, converter_kwargs={"check_trace": False} if network == "swin_unetr" else None)
        return path.with_suffix(".ts")

    return make


@pytest.fixture
def expected(weights):
    """`expected("btcv", "unet", image)`: the output of MONAI's own network, which loads the weights strictly."""

    def compute(name, network, image):
        plain = parse(name, network).get_parsed_content("network_def")
        if network == "swin_unetr":
            plain = nets.SwinUNETR(image.shape[1], plain.out.conv.out_channels, feature_size=12, depths=DEPTHS)
        plain.load_state_dict(torch.load(weights(name, network), weights_only=True))
        with torch.no_grad():
            logits = plain.eval()(image)
        assert logits.std() > 0.05  # else a difference would not be seen
        return logits

    return compute


@pytest.mark.parametrize(
    ("name", "network"),
    [("hippocampus", "unet"), ("hippocampus", "swin_unetr"), ("hippocampus", "unetr"), ("btcv", "unet")],
)
def test_torchscript_computes_what_pytorch_computes(name, network, exported, expected, shared_data):
    loaded, meta, extra = load_net_with_metadata(
        str(exported(name, network)), more_extra_files=[f"{config}.json" for config in configs(network)]
    )
    own = json.loads((ROOT / bundle(name) / "configs/metadata.json").read_text())
    assert meta == {key: value for key, value in own.items() if key != "optional_packages_version"}  # MONAI merges it
    for config, text in extra.items():
        assert json.loads(text) == ConfigParser.load_config_file(
            ROOT / bundle(name) / "configs" / config.replace(".json", ".yaml")
        )
    parser = parse(name, network)
    images = [window_of(parser, shared_data / SCANS[name])]
    if network == "unet":  # takes any window
        images.append(window_of(parser, shared_data / SCANS[name], [32, 48, 64]))
    for image in images:
        with torch.no_grad():
            # two windows at once, where one was traced
            found = loaded(torch.cat([image.flip(2), image]))[1:]
        assert float((found - expected(name, network, image)).abs().max()) <= DIFFERENCE


@pytest.mark.parametrize("network", ["unet", "swin_unetr"])
def test_a_file_names_no_device(network, exported):
    """It was exported on a CPU: a device in it would keep it there."""
    graph = str(torch.jit.load(exported("hippocampus", network)).inlined_graph)
    assert not re.findall(r": Device = prim::Constant", graph)


# UNet by the command line and PyTorch's newer exporter, which takes a minute more, as in pre-training
@pytest.mark.parametrize("network", [pytest.param("unet", marks=pytest.mark.slow), "swin_unetr"])
def test_onnx_computes_what_pytorch_computes(network, weights, expected, command, shared_data, tmp_path):
    parser, path = parse("hippocampus", network), tmp_path / "model.onnx"
    image = window_of(parser, shared_data / SCANS["hippocampus"])
    given = {"net_id": "onnx_def", "config_file": config_files("hippocampus", configs(network))}
    given |= {"bundle_root": bundle("hippocampus"), "ckpt_file": str(weights("hippocampus", network))}
    given |= {"filepath": str(path), "use_trace": True, "input_shape": list(image.shape), **options(network)}
    if network == "unet":
        command("-m", "monai.bundle", "onnx_export", **given)
    else:
        onnx_export(**given, converter_kwargs={"dynamo": False})
    session = onnxruntime.InferenceSession(path, providers=["CPUExecutionProvider"])
    (entry,) = session.get_inputs()
    (found,) = session.run(None, {entry.name: image.numpy()})
    assert float(np.abs(found - expected("hippocampus", network, image).numpy()).max()) <= DIFFERENCE
    with pytest.raises(Exception, match="invalid dimensions"):
        session.run(None, {entry.name: torch.rand(1, 1, 64, 64, 96).numpy()})


# ------------------------------------------------------------------------------------------ inference from a file


@pytest.fixture
def scans(shared_data, tmp_path):
    (tmp_path / "scans").mkdir()
    shutil.copy(shared_data / SCANS["hippocampus"], tmp_path / "scans/scan.nii.gz")
    return tmp_path / "scans"


@pytest.fixture
def infer(workflow, scans, tmp_path):
    """Runs the hippocampus bundle's inference in this process, in 32 bit; gives the label map."""

    def run(overlays, **overrides):
        out = tmp_path / "_".join(["out", *overlays])
        workflow(
            *("hippocampus", "infer", ["inference", *overlays]),
            **{"dataset_dir": str(scans), **TINY, "output_dir": str(out), "amp": "off", **overrides},
        ).run()
        return label_map(out)

    return run


def label_map(folder):
    label = np.asarray(nib.load(folder / "scan/scan_seg.nii.gz").dataobj)
    assert len(np.unique(label)) == 3
    return label


def test_the_label_map_is_that_of_the_weights_unet(infer, exported, weights):
    expected = infer([], ckpt_path=str(weights("hippocampus", "unet")))
    found = infer(["torchscript"], ckpt_path=str(exported("hippocampus", "unet")))
    np.testing.assert_array_equal(found, expected)


def test_the_label_map_is_that_of_the_weights_swin_unetr(infer, exported, weights):
    sizes = options("swin_unetr")
    expected = infer(["swin_unetr"], ckpt_path=str(weights("hippocampus", "swin_unetr")), **sizes)
    found = infer(["torchscript", "swin_unetr"], ckpt_path=str(exported("hippocampus", "swin_unetr")), **sizes)
    np.testing.assert_array_equal(found, expected)


def test_the_label_map_is_that_of_the_weights_with_flips(infer, exported, weights):
    expected = infer(["flips"], ckpt_path=str(weights("hippocampus", "unet")))
    found = infer(["torchscript", "flips"], ckpt_path=str(exported("hippocampus", "unet")))
    np.testing.assert_array_equal(found, expected)


def test_the_default_file_is_that_of_the_export():
    overlay = ConfigParser.load_config_file(ROOT / bundle("btcv") / "configs/torchscript.yaml")
    parser = ConfigParser({"bundle_root": "somewhere", "ckpt_path": overlay["ckpt_path"]})
    assert parser.get_parsed_content("ckpt_path") == "somewhere/models/model.ts"


# ----------------------------------------------------------------------------------------------------- refusals


def test_a_traced_network_refuses_another_window_whoever_loads_it(exported):
    loaded = torch.jit.load(exported("hippocampus", "swin_unetr"))
    with pytest.raises(torch.jit.Error) as error:
        loaded(torch.rand(1, 1, 64, 96, 64))
    last = str(error.value).strip().splitlines()[-1]
    assert "window: found [64, 96, 64], expected [64, 64, 64], which this network was traced for" in last


@pytest.mark.parametrize(
    ("network", "overrides", "found"),
    [
        ("unet", {"classes": {"hippocampus": [1, 2]}}, "these are not the weights of a UNet"),
        ("unet", {"in_channels": 4}, "these are not the weights of a UNet (BasicUNet) with 4 input"),
        ("unet", {"unet_features": [8, 8, 8, 8, 16, 8]}, "these are not the weights of a UNet"),
        ("unet", {"ckpt_path": "{folder}/nosuch.ts"}, "ckpt_path: found no such file, expected TorchScript"),
        ("unet", {"ckpt_path": "{folder}/model.pt"}, "ckpt_path: found what torch.jit.load cannot read, expected"),
        ("swin_unetr", {"roi_size": [96, 64, 64]}, "roi_size: found [64, 64, 64], which it was traced for, expect"),
    ],
    ids=["classes", "channels", "sizes", "missing", "weights", "window"],
)
def test_a_file_that_does_not_fit_is_refused_before_any_scan_is_read(
    network, overrides, found, infer, exported, tmp_path
):
    path = exported("hippocampus", network)
    overrides = {**options(network), "ckpt_path": str(path), **overrides}
    overrides["ckpt_path"] = overrides["ckpt_path"].format(folder=path.parent)
    with pytest.raises(RuntimeError) as error:
        infer([*configs(network)[1:], "torchscript"], **overrides)
    assert str(root_cause(error.value)).startswith(f"{overrides['ckpt_path']}: {found}")
    assert not list(tmp_path.rglob("checked_scans.json"))  # of scans that were read
