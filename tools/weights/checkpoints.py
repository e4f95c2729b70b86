"""Reads weights from checkpoints and checks that they fit a network."""

from __future__ import annotations

import warnings
from collections.abc import Mapping
from contextlib import suppress
from pathlib import Path
from zipfile import ZipFile, is_zipfile

import torch
from torch import Tensor, nn
from torch.serialization import get_unsafe_globals_in_checkpoint

from tools.common.cards import card_path, read_card, require_own
from tools.common.text import bytes_text
from tools.weights.networks import describe_network, different, network_text, overlays_for, way_to

# keys of the weights in training checkpoints: ours and MONAI's, most others, nnU-Net, and self-distillation
CONTAINERS = ("model", "state_dict", "network_weights", "net", "student")
LARGEST_EXPANSION = 20  # of a file; torch does not compress, and a re-packed file of weights shrinks little


class WeightsError(ValueError):
    """A checkpoint that cannot be read, or does not fit the network."""


def read_weights(path: str | Path) -> dict[str, Tensor]:
    """Read the state dict in a file: bare, or under one of the keys `CONTAINERS` as in a training checkpoint.

    Raises:
        WeightsError: the file is missing, is not a checkpoint, or contains no weights.
    """
    return read_checkpoint(path)[1]


def read_checkpoint(path: str | Path) -> tuple[str | None, dict[str, Tensor]]:
    """Read the state dict in a file; also return its key (None: the state dict is bare).

    Raises:
        WeightsError: as in `read_weights`.
    """
    path = Path(path)
    if not path.is_file():
        raise WeightsError(f"{path}: {'is a folder' if path.is_dir() else 'no such checkpoint'}")
    try:
        _check_archive(path)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # of torch, on old formats
            content = torch.load(path, map_location="cpu", weights_only=True)
    except WeightsError:
        raise
    except Exception as error:  # of any kind, by a damaged file
        # without torch's text, which is long and recommends to load the file anyway
        raise WeightsError(f"{path}: {_unreadable(path, error)}") from error
    if _is_state(content):
        return None, _sound(path, content)
    keys = content if isinstance(content, Mapping) else {}
    for key in CONTAINERS:
        if _is_state(keys.get(key)):
            return key, _sound(path, keys[key])
    listed = f" with the keys {_some([str(key) for key in keys])}" if keys else ""
    raise WeightsError(
        f"{path}: expected a state dict (or one under the key {', '.join(f'`{key}`' for key in CONTAINERS)}), "
        f"found {type(content).__name__}{listed}"
    )


def _unreadable(path: Path, error: Exception) -> str:
    """Why torch cannot read a file, and what to do about it."""
    foreign: list[str] = []
    with suppress(Exception):  # the same damage
        foreign = sorted(get_unsafe_globals_in_checkpoint(path))
    if not foreign:
        return f"not a checkpoint that torch.load(weights_only=True) can read ({type(error).__name__})"
    return (
        f"holds Python objects beside its weights ({_some(foreign)}), which could run code when they are loaded. "
        "If you trust the file, save its weights alone, where the package of these objects is installed: "
        "`content = torch.load(PATH, weights_only=False, map_location='cpu'); torch.save(content['state_dict'], NEW)` "
        "(in place of `state_dict`, the key of its weights; for a whole network, `content.state_dict()`)"
    )


def _check_archive(path: Path) -> None:
    """Refuse an archive that claims to unpack to many times its size, or is not what was written."""
    if not is_zipfile(path):
        return
    with ZipFile(path) as archive:
        claimed = sum(member.file_size for member in archive.infolist())
        if claimed > LARGEST_EXPANSION * path.stat().st_size:
            raise WeightsError(
                f"{path}: found an archive of {bytes_text(path.stat().st_size)} that unpacks to {bytes_text(claimed)}, "
                "expected a checkpoint, which is hardly compressed"
            )
        # torch stores the CRC-32 of every tensor and does not read it
        if damaged := archive.testzip():
            raise WeightsError(f"{path}: damaged: {damaged} in it does not have the checksum that it was written with")


def _is_state(content: object) -> bool:
    return (
        isinstance(content, Mapping)
        and bool(content)
        and all(isinstance(name, str) and isinstance(tensor, Tensor) for name, tensor in content.items())
    )


def _sound(path: Path, state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Return a state dict of plain tensors that are in the file."""
    for name, tensor in state.items():
        plain = tensor.layout == torch.strided and not tensor.is_quantized and not tensor.is_complex()
        if not plain or tensor.device.type != "cpu" or tensor.is_nested:
            raise WeightsError(
                f"{path}: {name} is no plain tensor of real numbers (found {tensor.dtype}, {tensor.layout}, "
                f"{tensor.device.type}), expected one"
            )
    claimed = sum(tensor.numel() * tensor.element_size() for tensor in state.values())
    if claimed > LARGEST_EXPANSION * path.stat().st_size:
        raise WeightsError(
            f"{path}: found tensors of {bytes_text(claimed)} in a file of {bytes_text(path.stat().st_size)}, expected "
            "their values in the file"
        )
    return dict(state)


def check_weights(path: str | Path, network: nn.Module, bundle: str | Path | None = None) -> dict[str, Tensor]:
    """Read the weights in a file and check that they, and their card if there is one, fit the network exactly.

    Args:
        path: the file.
        network: network of the config.
        bundle: folder of the bundle, whose overlays a message may name; None: that of the config that is running.

    Raises:
        WeightsError: tensors are missing, unknown or have the wrong shape; the message lists them. Or the card names
            another network.
        CardError: the card is damaged, of a later version, or of other weights.
    """
    found = read_weights(path)
    require_card(path, found, network, bundle)
    require_same(path, found, network.state_dict(), bundle)
    return found


def require_card(
    path: str | Path, state: Mapping[str, Tensor], network: nn.Module, bundle: str | Path | None = None
) -> None:
    """Check the card beside a file of weights, if there is one: it belongs to them, and names this network.

    The arguments are those of `check_weights`.

    Raises:
        WeightsError: the card names another network.
        CardError: the card is damaged, of a later version, or of other weights.
    """
    card = read_card(path)
    if card is None:
        return
    require_own(path, card, state)
    expected = describe_network(network)
    if different(card["network"], expected):
        raise WeightsError(
            f"{card_path(path)}: network: found {network_text(card['network'])}, expected "
            f"{network_text(expected)}, which this config builds. {way_to(card['network'], expected, bundle)}"
        )


def require_same(
    path: str | Path,
    found: Mapping[str, Tensor],
    expected: Mapping[str, Tensor],
    bundle: str | Path | None = None,
) -> None:
    """Check that the tensors of a file are those of the network, by name and shape; arguments as in `check_weights`.

    Raises:
        WeightsError: tensors are missing, unknown or have the wrong shape; the message lists them.
    """
    missing = [name for name in expected if name not in found]
    unknown = [name for name in found if name not in expected]
    shapes = [
        f"{name} {list(found[name].shape)}, expected {list(expected[name].shape)}"
        for name in expected
        if name in found and found[name].shape != expected[name].shape
    ]
    problems = [
        f"{len(names)} of its {len(found)} tensors {what} ({_some(names)})"
        for what, names in (("are not in this network", unknown), ("have another shape", shapes))
        if names
    ]
    if missing:
        problems.append(f"it lacks {len(missing)} of {len(expected)} ({_some(missing)})")
    if problems:
        raise WeightsError(
            f"{path}: these are not the weights of {describe(expected)}, they look like {describe(found)}: "
            f"{'; '.join(problems)}. {_advice(found, expected, bundle)}"
        )


def _advice(found: Mapping[str, Tensor], expected: Mapping[str, Tensor], bundle: str | Path | None) -> str:
    with suppress(KeyError, IndexError):  # weights that are none of our networks, or not complete
        network, own = describe_network(found), describe_network(expected)
        if overlays_for(network, own, bundle):
            return way_to(network, own, bundle)
    return (
        "Choose the overlays and sizes that the checkpoint was trained with "
        "(for instance configs/swin_unetr.yaml, configs/unetr.yaml, configs/small.yaml, the roi_size of a UNETR)"
    )


def _some(names: list[str]) -> str:
    return ", ".join(names[:3]) + (", …" if len(names) > 3 else "")


def load_weights(path: str | Path, network: nn.Module) -> None:
    """Load weights strictly.

    Raises:
        WeightsError: as in `check_weights`.
    """
    network.load_state_dict(check_weights(path, network))


def describe(state: Mapping[str, Tensor]) -> str:
    """Guess the network of these weights, for messages."""
    for kind, part, first in (
        ("a SwinUNETR", "swinViT.", "swinViT.patch_embed.proj.weight"),
        ("a UNet (BasicUNet)", "upcat_", "conv_0.conv_0.conv.weight"),
        ("the encoder of a SwinUNETR", "layers1.0.blocks.", "patch_embed.proj.weight"),
        ("a UNETR", "decoder5.", "vit.patch_embedding.patch_embeddings.weight"),
        ("a masked autoencoder (MaskedAutoEncoderViT)", "decoder_blocks.", "patch_embedding.patch_embeddings.weight"),
        ("a ViT", "patch_embedding.", "patch_embedding.patch_embeddings.weight"),
    ):
        if any(part in name for name in state):
            stem = next((tensor for name, tensor in state.items() if name.endswith(first)), None)
            kind += " v2" * (kind.endswith("SwinUNETR") and any("layers1c." in name for name in state))
            size = "" if stem is None else f" with {stem.shape[1]} input channel(s) and {stem.shape[0]} features"
            return kind + size
    return "another network"
