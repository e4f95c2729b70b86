"""What fine-tuning does with pre-trained weights, labels and bad input."""

from __future__ import annotations

import re
import shutil

import nibabel as nib
import numpy as np
import pytest
import torch
from ignite.engine import Events
from monai.networks.nets import BasicUNet, ViT

from tools.commands.check import check
from tools.common import mixed_precision
from tools.common.errors import root_cause
from tools.common.windows import require_roi
from tools.data.scans import ScanError
from tools.training.finetuning import parameter_groups
from tools.weights.checkpoints import WeightsError
from tools.weights.transfer import is_encoder, load_pretrained

from .bundles import ROOT, TINY_TRAINING, bundle, sizes

OPTIONS = {**TINY_TRAINING, **sizes("hippocampus", "unet"), "cache": "none", "epochs": 1}


@pytest.fixture
def train(workflow, samples):
    def create(**overrides):
        options = {**OPTIONS, "dataset_dir": str(samples("hippocampus")), **overrides}
        return workflow("hippocampus", "train", ["train"], **options)

    return create


@pytest.fixture
def backbone(tmp_path):
    """Weights as pre-training writes them: as many output as input channels."""
    torch.manual_seed(7)
    network = BasicUNet(3, 1, 1, OPTIONS["unet_features"])
    torch.save(network.state_dict(), tmp_path / "backbone.pt")
    return tmp_path / "backbone.pt", network.state_dict()


def test_pretrained_weights_are_in_the_network_that_trains(train, backbone):
    path, weights = backbone
    run = train(pretrained=str(path))
    trained = run.parser.get_parsed_content("train#trainer").network.state_dict()
    fresh = train().parser.get_parsed_content("train#trainer").network.state_dict()
    for name, tensor in trained.items():
        source = weights if is_encoder(name) else fresh
        assert torch.equal(tensor, source[name]), name


def test_it_trains_and_validates_in_bfloat16(train, monkeypatch):
    """Slowly, where the processor has no instructions for it."""
    monkeypatch.setattr(mixed_precision, "has_bfloat16", lambda device: True)
    run, seen = train(), {True: set(), False: set()}

    def look(module, args, out):
        if not out.is_meta:  # the estimate of the memory is for 32 bit
            seen[module.training].add(out.dtype)

    run.network_def.register_forward_hook(look)
    run.run()
    assert seen == {True: {torch.bfloat16}, False: {torch.bfloat16}}
    assert all(p.dtype == torch.float32 and p.isfinite().all() for p in run.network_def.parameters())


def test_a_pretrained_vit_is_in_the_unetr_that_trains(workflow, samples, tmp_path):
    weights = ViT(1, (32, 16, 64), 16, OPTIONS["vit_hidden_size"], OPTIONS["vit_mlp_size"], num_heads=2).state_dict()
    torch.save(weights, tmp_path / "backbone.pt")
    run = workflow(
        *("hippocampus", "train", ["train", "unetr"]),
        **{**OPTIONS, "dataset_dir": str(samples("hippocampus"))},
        pretrained=str(tmp_path / "backbone.pt"),
        pretrained_roi_size=[32, 16, 64],
    )
    trained = run.parser.get_parsed_content("train#trainer").network.state_dict()
    positions = "patch_embedding.position_embeddings"
    assert all(torch.equal(trained[f"vit.{name}"], weights[name]) for name in weights.keys() - {positions})
    adapted = {t.name: t.why for t in run.parser.get_parsed_content("transfer").report.tensors if t.fate == "adapted"}
    assert adapted == {f"vit.{positions}": "position embeddings of 2×1×4 tokens → 2×2×2"}
    encoder, rest = run.parser.get_parsed_content("train#optimizer").param_groups
    assert (len(encoder["params"]), len(rest["params"])) == (len(weights), len(trained) - len(weights))


def test_weights_of_another_size_stop_the_run(train, backbone):
    path, _ = backbone
    with pytest.raises(RuntimeError) as error:
        train(pretrained=str(path), unet_features=[8, 8, 16, 16, 32, 8]).run()
    cause = root_cause(error.value)
    assert isinstance(cause, WeightsError) and "pretrained_min_fraction" in str(cause)


def test_a_frozen_encoder_stays_as_it_is_and_then_learns(train, backbone):
    path, _ = backbone
    run = train(pretrained=str(path), freeze_encoder_epochs=1, epochs=2)
    trainer = run.parser.get_parsed_content("train#trainer")
    states = [{k: v.clone() for k, v in trainer.network.state_dict().items()}]
    trainer.add_event_handler(
        Events.EPOCH_COMPLETED,
        lambda: states.append({k: v.clone() for k, v in trainer.network.state_dict().items()}),
    )
    trainer.run()
    weights = [k for k in states[0] if k.endswith("conv.weight")]

    def changed(before, after):
        return {k for k in weights if not torch.equal(states[before][k], states[after][k])}

    assert changed(0, 1) == {k for k in weights if not is_encoder(k)}
    assert changed(1, 2) == set(weights)


@pytest.mark.parametrize(
    ("parts", "slow"),
    [
        ({}, ("conv_0", "down_")),
        ({"pretrained_parts": "all"}, ("conv_0", "down_", "upcat_")),
        ({"pretrained_parts": "all", "pretrained_decoder_levels": 1}, ("conv_0", "down_", "upcat_4")),
    ],
    ids=["encoder", "all", "one level"],
)
@pytest.mark.parametrize("loads", [True, False], ids=["weights", "scratch"])
def test_what_was_loaded_learns_at_its_own_rate(train, backbone, parts, slow, loads):
    path, _ = backbone
    weights = {"pretrained": str(path)} if loads else {}
    run = train(**weights, **parts, learning_rate=0.02, warmup_epochs=0, pretrained_lr_multiplier=0.25)
    rates = {
        id(parameter): group["lr"]
        for group in run.parser.get_parsed_content("train#optimizer").param_groups
        for parameter in group["params"]
    }
    for name, parameter in run.parser.get_parsed_content("network_def").named_parameters():
        assert rates.pop(id(parameter)) == (0.02 * 0.25 if loads and name.startswith(slow) else 0.02), name
    assert not rates


def test_what_a_file_could_not_fill_learns_at_the_full_rate(tmp_path):
    torch.save(BasicUNet(3, 3, 1, [2] * 6).state_dict(), tmp_path / "backbone.pt")
    transfer = load_pretrained(BasicUNet(3, 2, 2, [2] * 6), str(tmp_path / "backbone.pt"), parts="all")
    _, rest = parameter_groups(transfer, 0.02, 0, 0)
    full = {id(parameter) for parameter in rest["params"]}
    names = {name for name, parameter in transfer.network.named_parameters() if id(parameter) in full}
    assert names == {"conv_0.conv_0.conv.weight", "final_conv.weight", "final_conv.bias"}


def test_a_run_that_loaded_weights_is_resumed_without_their_file(train, backbone):
    path, _ = backbone
    options = {"pretrained_parts": "all", "pretrained_lr_multiplier": 0.25, "warmup_epochs": 0}
    train(pretrained=str(path), epochs=1, **options).run()
    run = train(epochs=2, resume=True, resume_changed=True, **options)
    run.run()
    loaded, rest = run.parser.get_parsed_content("train#optimizer").param_groups
    assert loaded["initial_lr"] == 0.25 * rest["initial_lr"]


@pytest.mark.parametrize("multiplier", [-1, float("nan"), "slow", None])
def test_a_rate_of_what_was_loaded_that_is_none_is_refused(multiplier):
    network = BasicUNet(features=(2, 2, 2, 2, 2, 2))
    with pytest.raises(ValueError, match=f"pretrained_lr_multiplier: found {multiplier!r}, expected"):
        parameter_groups(load_pretrained(network, None), 1e-3, 0, multiplier)


@pytest.mark.parametrize(("roi", "stride"), [([16, 32, 32], 16), ([48, 40, 48], 16), ([64, 64, 32], 32)])
def test_windows_that_the_network_cannot_take_are_refused(roi, stride):
    with pytest.raises(ValueError, match=f"roi_size: found .*, expected multiples of {stride} voxels"):
        require_roi(roi, stride)


# --------------------------------------------------------------------------------------------------- bad input


@pytest.fixture
def labels(samples, tmp_path):
    """Labels of a copy of the sample data, to damage."""
    shutil.copytree(samples("hippocampus"), tmp_path / "data")
    return sorted((tmp_path / "data/labelsTr").glob("*.nii.gz"))


def rewrite(path, change):
    image = nib.load(path)
    array, affine = change(np.array(image.dataobj), image.affine.copy())
    nib.save(nib.Nifti1Image(array, affine), path)


def shifted(array, affine):
    affine[:3, 3] += 20
    return array, affine


def other_value(array, affine):
    array[:2] = 7
    return array, affine


DAMAGE = {
    r"shape": lambda a, m: (a[:-2], m),
    r"lies elsewhere in space": shifted,
    r"LAS": lambda a, m: (a, m @ np.diag([-1, 1, 1, 1])),
    r"values? 7|7 ": other_value,
}


def test_everything_that_is_wrong_is_told_at_once_by_the_start_and_by_check(train, labels, capsys):
    for label, change in zip(labels, DAMAGE.values(), strict=False):
        rewrite(label, change)
    data = str(labels[0].parents[1])
    with pytest.raises(RuntimeError) as error:
        train(dataset_dir=data).run()
    cause = root_cause(error.value)
    assert isinstance(cause, ScanError)
    with pytest.raises(SystemExit):
        check(bundle=str(ROOT / bundle("hippocampus")), dataset_dir=data, workers=0)
    for told in (str(cause), capsys.readouterr().out):
        for label, words in zip(labels, DAMAGE, strict=False):
            assert re.search(f"{label.name}.*({words})", told), told


def test_a_class_that_no_training_case_holds_is_told(train, labels, capsys):
    for label in labels:
        rewrite(label, lambda a, m: (np.where(a == 2, 0, a).astype(np.uint8), m))
    train(dataset_dir=str(labels[0].parents[1])).run()
    assert "no training case holds posterior" in capsys.readouterr().out


def test_classes_that_are_not_the_channels_stop_the_start(train):
    with pytest.raises(RuntimeError) as error:
        train(classes={"posterior": [2], "anterior": [1]}).run()
    assert "label values that count from 1 in their order" in str(root_cause(error.value))


def test_clients_may_replace_the_data_of_a_run(train, samples, tmp_path):
    """As MONAI Label does: no dataset_dir, data as lists, handlers of its own in front."""
    data = samples("hippocampus")
    cases = [{"image": str(p), "label": str(data / "labelsTr" / p.name)} for p in sorted((data / "imagesTr").iterdir())]
    run = train(
        dataset_dir="nowhere",
        device="cpu",
        **{"train#dataset#data": cases[:3], "validate#dataset#data": cases[3:], "train#trainer#max_epochs": 1},
    )
    run.run()
    assert (tmp_path / "models/model.pt").is_file()
