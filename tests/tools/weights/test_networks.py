"""Networks in the words of the configs, and what their cards refuse."""

from __future__ import annotations

import re
import subprocess
import sys

import pytest
import torch
from monai.networks.nets import UNETR, BasicUNet, SwinUNETR, ViT

from scripts.backbones import SwinUNETRBackbone, UNetBackbone
from scripts.hybridmim import HybridMIM
from scripts.mae import MAE, MAEEncoder
from scripts.masking import Geometry
from tools.common.cards import CardError, save_weights
from tools.shipping.verify import BUNDLES, build_network
from tools.weights.checkpoints import WeightsError, check_weights
from tools.weights.export import load_torchscript
from tools.weights.networks import describe_network
from tools.weights.transfer import inspect, load_pretrained, load_start

FEATURES = [4, 4, 8, 8, 16, 12]
GEOMETRY = Geometry(roi_size=[32] * 3, region_size=[16] * 3, patch_size=[8] * 3, decode_size=[32] * 3, stride=16)
PREPARATION = {
    "orientation": "RAS",
    "spacing": None,
    "intensity": {"scaling": "z_score"},
    "foreground_above": None,
}


@pytest.fixture(autouse=True)
def seeded():
    torch.manual_seed(0)


def unet(channels=1, classes=2, features=FEATURES):
    return BasicUNet(3, channels, classes, features)


def vit(heads=2, hidden=24):
    return ViT(1, (32, 32, 32), 16, hidden, 36, num_heads=heads)


def unetr(heads=2):
    return UNETR(1, 2, (32, 32, 32), feature_size=6, hidden_size=24, mlp_dim=36, num_heads=heads)


def saved(path, network, described=None):
    card = {"network": describe_network(described or network), "preparation": PREPARATION}
    save_weights(path, network.state_dict(), {**card, "roi_size": [32] * 3, "versions": {}})
    return str(path)


VIT = {"in_channels": 1, "vit_hidden_size": 24, "vit_mlp_size": 36, "vit_heads": 2}
SWIN = {"swin_feature_size": 24, "swin_window_size": 7, "swin_use_v2": False}
SWIN_4 = {**SWIN, "swin_window_size": 4}
SWIN_V2 = {**SWIN, "swin_use_v2": True}
DESCRIBED = [
    (unet(3), {"name": "UNet", "in_channels": 3, "unet_features": FEATURES}),
    (UNetBackbone(2, FEATURES), {"name": "UNet", "in_channels": 2, "unet_features": FEATURES}),
    (HybridMIM(UNetBackbone(1, FEATURES), GEOMETRY), {"name": "UNet", "in_channels": 1, "unet_features": FEATURES}),
    (SwinUNETR(4, 2, feature_size=24), {"name": "SwinUNETR", "in_channels": 4, **SWIN}),
    (SwinUNETR(4, 2, feature_size=24, use_v2=True), {"name": "SwinUNETR", "in_channels": 4, **SWIN_V2}),
    (SwinUNETR(4, 2, feature_size=24, window_size=4), {"name": "SwinUNETR", "in_channels": 4, **SWIN_4}),
    (vit(), {"name": "ViT", **VIT}),
    (unetr(), {"name": "UNETR", "unetr_feature_size": 6, **VIT}),
    (torch.nn.Linear(1, 1), {"name": "Linear"}),
]


@pytest.mark.parametrize(("network", "described"), DESCRIBED, ids=[type(network).__name__ for network, _ in DESCRIBED])
def test_networks_have_the_sizes_that_build_them(network, described):
    assert describe_network(network) == described


def test_the_encoder_of_an_mae_is_a_vit():
    sizes = {"hidden_size": 24, "mlp_size": 36, "heads": 2, "decoder_size": 12, "decoder_heads": 3}
    mae = MAE([32] * 3, 1, **sizes)
    assert describe_network(mae) == describe_network(MAEEncoder(mae)) == {"name": "ViT", **VIT}


# --------------------------------------------------------------------------------------------- another network


def test_another_network_is_refused_with_both_named(tmp_path):
    path = saved(tmp_path / "backbone.pt", SwinUNETRBackbone(1, 12))
    for into in (lambda: load_pretrained(unet(), path), lambda: check_weights(path, unet())):
        with pytest.raises(WeightsError) as error:
            into()
        told = str(error.value)
        assert told.startswith(f"{tmp_path / 'backbone.json'}: network: found SwinUNETR (in_channels 1, swin_feature")
        assert f"expected UNet (in_channels 1, unet_features {FEATURES}), which this config builds" in told
        assert "configs/swin_unetr.yaml" in told


def test_other_sizes_are_refused_with_the_options_that_fit(tmp_path):
    path = saved(tmp_path / "backbone.pt", UNetBackbone(1, [8, 8, 8, 8, 16, 8]))
    for into in (lambda: load_pretrained(unet(), path), lambda: check_weights(path, unet(1, 1))):
        with pytest.raises(WeightsError, match=r'--unet_features "\[8, 8, 8, 8, 16, 8\]"'):
            into()
    load_pretrained(unet(features=[8, 8, 8, 8, 16, 4]), path)  # the encoder is the same


def test_other_windows_of_attention_are_refused(tmp_path):
    path = saved(tmp_path / "backbone.pt", SwinUNETRBackbone(1, 12, window_size=4))
    for into in (load_pretrained, lambda network, file: check_weights(file, network)):
        with pytest.raises(WeightsError, match=r'--swin_window_size "4"'):
            into(SwinUNETR(1, 1, feature_size=12), path)
    fitting = SwinUNETR(1, 2, feature_size=12, window_size=4)
    assert load_pretrained(fitting, path).report.filled


def test_other_heads_of_a_vit_are_refused_which_no_tensor_shows(tmp_path):
    path = saved(tmp_path / "backbone.pt", vit(heads=4))
    with pytest.raises(WeightsError, match=r'vit_heads 4\), expected UNETR .*--vit_heads "4"'):
        load_pretrained(unetr(heads=2), path)
    assert load_pretrained(unetr(heads=4), path).report.filled
    path = saved(tmp_path / "model.pt", unetr(heads=2))
    with pytest.raises(WeightsError, match=r'--vit_heads "2"'):
        check_weights(path, unetr(heads=4))
    check_weights(path, unetr(heads=2))


def test_position_embeddings_are_those_of_the_crop_that_the_card_names(tmp_path):
    network = ViT(1, (64, 32, 16), 16, 24, 36, num_heads=2)
    card = {"network": describe_network(network), "preparation": PREPARATION, "versions": {}}
    save_weights(tmp_path / "backbone.pt", network.state_dict(), {**card, "roi_size": [64, 32, 16]})
    (adapted,) = (
        t.why for t in load_pretrained(unetr(), str(tmp_path / "backbone.pt")).report.tensors if t.why[:4] == "posi"
    )
    assert adapted == "position embeddings of 4×2×1 tokens → 2×2×2"


def test_channels_may_differ_where_they_are_adapted(tmp_path):
    path = saved(tmp_path / "backbone.pt", UNetBackbone(1, FEATURES))
    assert load_pretrained(unet(4), path).report.filled == 40
    with pytest.raises(WeightsError, match='--in_channels "1"'):
        check_weights(path, unet(4, 1))


# --------------------------------------------------------------------------------------- the card of other weights


@pytest.mark.parametrize("use", ["pretrained", "init_from", "inference", "torchscript", "inspect"])
def test_the_card_of_other_weights_is_refused_wherever_weights_are_read(tmp_path, use):
    path = saved(tmp_path / "model.pt", unet())
    if use == "torchscript":
        path = str(tmp_path / "model.ts")
        torch.jit.script(unet()).save(path)
    else:
        torch.save(unet().state_dict(), path)
    uses = {
        "pretrained": lambda: load_pretrained(unet(), path),
        "init_from": lambda: load_start(HybridMIM(backbone := UNetBackbone(1, FEATURES), GEOMETRY), backbone, path),
        "inference": lambda: check_weights(path, unet()),
        "torchscript": lambda: load_torchscript(path, unet(), [32] * 3, "cpu"),
        "inspect": lambda: inspect(path),
    }
    with pytest.raises(CardError, match=r"model\.json: belongs to other weights"):
        uses[use]()


def test_inspect_shows_the_card(tmp_path, capsys):
    inspect(saved(tmp_path / "backbone.pt", unet()))
    shown = capsys.readouterr().out
    assert f"network      name UNet, in_channels 1, unet_features {FEATURES}" in shown
    assert "preparation  orientation RAS, spacing None" in shown
    torch.save(unet().state_dict(), tmp_path / "other.pt")
    inspect(str(tmp_path / "other.pt"))
    assert f"none: {tmp_path / 'other.json'} does not exist" in capsys.readouterr().out


# ------------------------------------------------------------------------------- pre-training that starts from weights


def hybridmim():
    backbone = UNetBackbone(1, FEATURES)
    return HybridMIM(backbone, GEOMETRY), backbone


def test_pre_training_goes_on_from_a_model_with_its_heads(tmp_path):
    (source, _), (network, backbone) = hybridmim(), hybridmim()
    torch.save(source.state_dict(), tmp_path / "model.pt")
    report = load_start(network, backbone, str(tmp_path / "model.pt")).report
    assert all(torch.equal(tensor, source.state_dict()[name]) for name, tensor in network.state_dict().items())
    assert ("heads", "6 tensors loaded") in report.lines() and not report.unused
    assert report.lines()[-1] == ("total", "encoder 40 of 40, decoder 40 of 40, output 2 of 2 tensors filled")


def test_pre_training_starts_from_a_backbone_with_new_heads(tmp_path):
    (_, source), (network, backbone) = hybridmim(), hybridmim()
    before = {name: tensor.clone() for name, tensor in network.state_dict().items()}
    torch.save(source.state_dict(), tmp_path / "backbone.pt")
    report = load_start(network, backbone, str(tmp_path / "backbone.pt")).report
    for name, tensor in network.state_dict().items():
        own = name.removeprefix("backbone.")
        assert torch.equal(tensor, before[name] if own == name else source.state_dict()[own]), name
    assert ("heads", "6 tensors new, at random") in report.lines()


def test_pre_training_starts_from_an_encoder_that_was_published(tmp_path):
    source, backbone = SwinUNETR(1, 14, feature_size=12), SwinUNETRBackbone(1, 12)
    state = {name.replace("swinViT.", "module."): t for name, t in source.swinViT.state_dict(prefix="swinViT.").items()}
    torch.save({"state_dict": state}, tmp_path / "model_swinvit.pt")
    report = load_start(backbone, backbone, str(tmp_path / "model_swinvit.pt")).report
    assert report.counts()["encoder"]["loaded"] == 126 and report.counts()["decoder"]["loaded"] == 0
    assert torch.equal(backbone.swinViT.patch_embed.proj.weight, source.swinViT.patch_embed.proj.weight)


def test_an_mae_goes_on_from_itself_and_starts_from_a_vit(tmp_path):
    sizes = {"hidden_size": 24, "mlp_size": 36, "heads": 2, "decoder_size": 12, "decoder_heads": 3}
    source, network = MAE([32] * 3, 1, **sizes), MAE([32] * 3, 1, **sizes)
    torch.save(source.state_dict(), tmp_path / "model.pt")
    load_start(network, MAEEncoder(network), str(tmp_path / "model.pt"))
    assert all(torch.equal(tensor, source.state_dict()[name]) for name, tensor in network.state_dict().items())
    encoder = vit()
    torch.save(encoder.state_dict(), tmp_path / "vit.pt")
    load_start(network, MAEEncoder(network), str(tmp_path / "vit.pt"))
    assert torch.equal(network.blocks[3].mlp.linear1.weight, encoder.blocks[3].mlp.linear1.weight)
    assert torch.equal(network.blocks[12].weight, encoder.norm.weight)


def test_resuming_and_starting_from_weights_are_two_things(tmp_path):
    network, backbone = hybridmim()
    with pytest.raises(ValueError, match=r"init_from: found w\.pt, together with resume: true; expected one of them"):
        load_start(network, backbone, "w.pt", resume=True)
    assert load_start(network, backbone, None, resume=True).report.source is None


def test_weights_that_do_not_fit_leave_pre_training_as_it_was(tmp_path):
    network, backbone = hybridmim()
    before = {name: tensor.clone() for name, tensor in network.state_dict().items()}
    torch.save(unet(features=[8, 8, 8, 8, 16, 8]).state_dict(), tmp_path / "other.pt")
    with pytest.raises(WeightsError, match="of the 40 requested tensors, expected at least 90%") as error:
        load_start(network, backbone, str(tmp_path / "other.pt"))
    assert "configs/small.yaml" in str(error.value) and "--pretrained" not in str(error.value)  # keys of fine-tuning
    assert all(torch.equal(tensor, before[name]) for name, tensor in network.state_dict().items())


SMALL = [16, 16, 32, 64, 128, 16]  # unet_features of small.yaml


@pytest.mark.parametrize(
    "network, said",
    [
        (lambda: unet(1, 3, SMALL), f"These weights have unet_features {SMALL}: add small.yaml"),
        (
            lambda: SwinUNETR(1, 3, feature_size=12),
            "These weights have swin_feature_size 12, swin_window_size 7: add swin_unetr.yaml, small.yaml",
        ),
        (lambda: unet(1, 3, [8, 8, 8, 8, 16, 8]), "Choose the overlays and sizes that the checkpoint was trained with"),
    ],
    ids=["small", "small swin", "no overlay"],
)
def test_a_forgotten_overlay_is_named(network, said, tmp_path):
    folder = BUNDLES / "hybridmim_hippocampus_seg"
    torch.save(network().state_dict(), tmp_path / "model.pt")
    with pytest.raises(WeightsError, match=re.escape(said)):
        check_weights(tmp_path / "model.pt", build_network(folder), folder)


def test_sizes_that_no_overlay_has_are_named_beside_the_overlay(tmp_path):
    """By the card, whose network knows all of its sizes."""
    network = UNETR(1, 3, (32, 32, 32), feature_size=24, hidden_size=192, mlp_dim=768, num_heads=6)
    card = {"network": describe_network(network), "preparation": PREPARATION, "roi_size": [32] * 3, "versions": {}}
    save_weights(tmp_path / "model.pt", network.state_dict(), card)
    folder = BUNDLES / "hybridmim_hippocampus_seg"
    with pytest.raises(WeightsError, match=r"vit_heads 6: add unetr\.yaml, small\.yaml") as error:
        check_weights(tmp_path / "model.pt", build_network(folder), folder)
    assert "vit_heads" not in str(error.value).partition("small.yaml")[2]


@pytest.mark.parametrize(
    "words",
    [
        ["run", "inferring", "--ckpt_path", "{}/model.pt", "--dataset_dir", "{}"],
        ["ckpt_export", "--net_id", "network_def", "--ckpt_file", "{}/model.pt", "--filepath", "{}/model.ts"],
    ],
    ids=["inferring", "export"],
)
def test_inference_and_export_name_a_forgotten_overlay(words, tmp_path):
    torch.save(unet(1, 3, SMALL).state_dict(), tmp_path / "model.pt")
    root = BUNDLES / "hybridmim_hippocampus_seg"
    line = [sys.executable, "-m", "monai.bundle", *(word.format(tmp_path) for word in words)]
    line += ["--config_file", f"{root}/configs/inference.yaml", "--bundle_root", str(root)]
    done = subprocess.run(line, capture_output=True, text=True, cwd=tmp_path, timeout=300)
    assert done.returncode == 1
    assert f"These weights have unet_features {SMALL}: add small.yaml" in done.stderr.splitlines()[-1]
    assert not (tmp_path / "model.ts").exists()
