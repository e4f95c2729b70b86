"""Checkpoints that do not fit are refused, with what was found and expected."""

from __future__ import annotations

import pytest
import torch
from monai.networks.nets import UNETR, BasicUNet, MaskedAutoEncoderViT, SwinUNETR, ViT

from tools.common.text import parse_bool
from tools.weights.checkpoints import WeightsError, load_weights, read_weights

FEATURES = (4, 4, 8, 8, 16, 4)


@pytest.mark.parametrize(
    "wrap",
    [
        lambda state: state,
        lambda state: {"optimizer": {"lr": 1}, "model": state},
        lambda state: {"state_dict": state, "epoch": 3},
        lambda state: {"net": "basic", "student": state, "teacher": {}},
    ],
)
def test_reads_bare_and_training_checkpoints(tmp_path, wrap):
    network, other = BasicUNet(3, 1, 1, FEATURES), BasicUNet(3, 1, 1, FEATURES)
    torch.save(wrap(network.state_dict()), tmp_path / "model.pt")
    load_weights(tmp_path / "model.pt", other)
    assert all(torch.equal(a, b) for a, b in zip(network.parameters(), other.parameters(), strict=True))


@pytest.mark.parametrize(
    ("found", "parts"),
    [
        (lambda: SwinUNETR(1, 1, feature_size=12), ["look like a SwinUNETR", "1 input channel", "are not in this"]),
        (
            lambda: UNETR(1, 1, 32, 4, 12, 12, 2),
            ["look like a UNETR with 1 input channel(s) and 12 features", "not in this"],
        ),
        (lambda: ViT(4, 32, 16, 12, 12, 1, 2), ["look like a ViT with 4 input channel(s) and 12 features"]),
        (
            lambda: MaskedAutoEncoderViT(1, 32, 16, 12, 12, 1, 2, decoder_hidden_size=12),
            ["look like a masked autoencoder (MaskedAutoEncoderViT) with 1 input channel(s) and 12 features"],
        ),
        (lambda: BasicUNet(3, 1, 1, (8, 8, 8, 8, 16, 8)), ["look like a UNet", "8 features", "have another shape"]),
        (lambda: BasicUNet(3, 4, 4, FEATURES), ["4 input channel", "[4, 4, 3, 3, 3], expected [4, 1, 3, 3, 3]"]),
    ],
)
def test_other_networks_are_refused(tmp_path, found, parts):
    path = tmp_path / "model.pt"
    torch.save(found().state_dict(), path)
    network = BasicUNet(3, 1, 1, FEATURES)
    before = {name: tensor.clone() for name, tensor in network.state_dict().items()}
    with pytest.raises(WeightsError) as error:
        load_weights(path, network)
    for part in [str(path), "not the weights of a UNet (BasicUNet) with 1 input channel(s) and 4 features", *parts]:
        assert part in str(error.value)
    assert all(torch.equal(tensor, before[name]) for name, tensor in network.state_dict().items())


def test_a_unetr_of_another_window_is_refused(tmp_path):
    torch.save(UNETR(1, 1, 48, 4, 12, 12, 2).state_dict(), tmp_path / "model.pt")
    with pytest.raises(
        WeightsError, match=r"position_embeddings \[1, 27, 12\], expected \[1, 8, 12\].*roi_size of a UNETR"
    ):
        load_weights(tmp_path / "model.pt", UNETR(1, 1, 32, 4, 12, 12, 2))


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (None, "no such checkpoint"),
        (b"", "not a checkpoint that torch.load"),
        (b"not a checkpoint", "not a checkpoint that torch.load"),
        ([1, 2], "expected a state dict .* found list"),
        ({"epoch": 3}, "expected a state dict .* found dict with the keys epoch"),
        ({"model": {"lr": 1}}, "expected a state dict .* found dict with the keys model"),
        ({}, "expected a state dict .* found dict"),
    ],
)
def test_files_without_weights_are_refused(tmp_path, content, message):
    path = tmp_path / "model.pt"
    if isinstance(content, bytes):
        path.write_bytes(content)
    elif content is not None:
        torch.save(content, path)
    with pytest.raises(WeightsError, match=message) as error:
        read_weights(path)
    assert str(path) in str(error.value)


def test_truth_reads_what_the_command_line_gives():
    assert [parse_bool(v) for v in (True, False, "true", "False")] == [True, False, True, False]
    with pytest.raises(ValueError, match="found 'yes', expected true or false"):
        parse_bool("yes")
