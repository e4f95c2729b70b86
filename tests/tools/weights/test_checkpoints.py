"""Checkpoints that do not fit are refused, with what was found and expected."""

from __future__ import annotations

import argparse
import pathlib
import re
from zipfile import ZIP_DEFLATED, ZipFile

import numpy as np
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


WEIGHTS = {"a.weight": torch.arange(6.0).reshape(2, 3), "a.bias": torch.ones(2)}


@pytest.mark.parametrize(
    ("other", "named"),
    [
        (argparse.Namespace(lr=1e-4), "argparse.Namespace"),
        (pathlib.PurePosixPath("/x"), "pathlib.PurePosixPath"),
        (np.float64(0.8), "numpy"),
        (torch.nn.Linear(1, 1), "torch.nn.modules.linear.Linear"),
    ],
)
def test_objects_beside_the_weights_are_named_with_a_way_to_save_the_weights_alone(tmp_path, other, named):
    torch.save({"state_dict": WEIGHTS, "other": other}, tmp_path / "old.pt")
    with pytest.raises(WeightsError, match="holds Python objects beside its weights") as error:
        read_weights(tmp_path / "old.pt")
    assert named in str(error.value)
    way_out = re.search(r"`(content = .*?)`", str(error.value))[1]
    exec(way_out, {"torch": torch, "PATH": tmp_path / "old.pt", "NEW": tmp_path / "new.pt"})
    assert read_weights(tmp_path / "new.pt").keys() == WEIGHTS.keys()


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ({**WEIGHTS, "b": torch.zeros(1).expand(10**12)}, "found tensors of .* in a file of"),
        ({**WEIGHTS, "b": torch.zeros(3, 3).to_sparse()}, "b is no plain tensor of real numbers .*sparse"),
        ({**WEIGHTS, "b": torch.zeros(3, device="meta")}, "b is no plain tensor of real numbers .*meta"),
        ({**WEIGHTS, "b": torch.zeros(3, dtype=torch.complex64)}, "b is no plain tensor of real numbers .*complex64"),
        ({0: torch.zeros(1)}, "expected a state dict"),
    ],
)
def test_tensors_that_no_network_has_are_refused(tmp_path, content, message):
    torch.save(content, tmp_path / "model.pt")
    with pytest.raises(WeightsError, match=message):
        read_weights(tmp_path / "model.pt")


def test_an_archive_of_absurd_expansion_is_refused_before_it_is_unpacked(tmp_path):
    with ZipFile(tmp_path / "model.pt", "w", ZIP_DEFLATED) as archive:
        archive.writestr("model/data.pkl", bytes(10_000_000))
    with pytest.raises(WeightsError, match=r"found an archive of .* kB that unpacks to 10 MB"):
        read_weights(tmp_path / "model.pt")


def mutated(content, seed):
    """A checkpoint with a few bytes changed, cut, doubled or inserted."""
    rng = np.random.default_rng(seed)
    data = bytearray(content)
    for _ in range(int(rng.integers(1, 6))):
        where, size = int(rng.integers(len(data))), int(rng.integers(1, 40))
        kind = rng.integers(4)
        if kind == 0:
            data[where] ^= 1 << int(rng.integers(8))
        elif kind == 1:
            data[where : where + size] = bytes(size)
        elif kind == 2:
            data[where:where] = rng.bytes(size)
        else:
            del data[where : where + size]
    return bytes(data) or b"x"


@pytest.mark.parametrize("legacy", [False, True], ids=["zip", "legacy"])
def test_a_damaged_checkpoint_is_read_or_refused_by_name(tmp_path, legacy):
    """600 in all: no error of a library."""
    content = {"epoch": 3, "model": BasicUNet(3, features=(1, 1, 1, 1, 1, 1)).state_dict(), "optimizer": {"lr": 1.0}}
    torch.save(content, tmp_path / "whole.pt", _use_new_zipfile_serialization=not legacy)
    whole, path, refused = (tmp_path / "whole.pt").read_bytes(), tmp_path / "model.pt", 0
    for seed in range(300):
        path.write_bytes(mutated(whole, seed))
        try:
            state = read_weights(path)
        except WeightsError as error:
            assert str(error).startswith(f"{path}: "), seed
            refused += 1
        else:
            assert all(isinstance(tensor, torch.Tensor) for tensor in state.values()), seed
    assert refused > 30


def test_truth_reads_what_the_command_line_gives():
    assert [parse_bool(v) for v in (True, False, "true", "False")] == [True, False, True, False]
    with pytest.raises(ValueError, match="found 'yes', expected true or false"):
        parse_bool("yes")
