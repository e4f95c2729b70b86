"""Reads weights from checkpoints and checks that they fit a network."""

from __future__ import annotations

import pickle
from collections.abc import Mapping
from pathlib import Path
from zipfile import is_zipfile

import torch
from torch import Tensor, nn

from tools.common.cards import card_path, read_card, require_own
from tools.weights.networks import describe_network, different, network_text, way_to

# keys of the weights in training checkpoints: ours and MONAI's, most others, nnU-Net, and self-distillation
CONTAINERS = ("model", "state_dict", "network_weights", "net", "student")


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
        raise WeightsError(f"{path}: no such checkpoint")
    try:
        content = torch.load(path, map_location="cpu", weights_only=True)
    except (RuntimeError, pickle.UnpicklingError, EOFError, ValueError) as error:
        # without torch's text, which is long and recommends to load the file anyway
        raise WeightsError(
            f"{path}: not a checkpoint that torch.load(weights_only=True) can read ({type(error).__name__})"
        ) from error
    if _is_state(content):
        return None, dict(content)
    keys = content if isinstance(content, Mapping) else {}
    for key in CONTAINERS:
        if _is_state(keys.get(key)):
            return key, dict(keys[key])
    listed = f" with the keys {_some([str(key) for key in keys])}" if keys else ""
    raise WeightsError(
        f"{path}: expected a state dict (or one under the key {', '.join(f'`{key}`' for key in CONTAINERS)}), "
        f"found {type(content).__name__}{listed}"
    )


def _is_state(content: object) -> bool:
    return isinstance(content, Mapping) and bool(content) and all(isinstance(v, Tensor) for v in content.values())


def check_weights(path: str | Path, network: nn.Module) -> dict[str, Tensor]:
    """Read the weights in a file and check that they, and their card if there is one, fit the network exactly.

    Raises:
        WeightsError: tensors are missing, unknown or have the wrong shape; the message lists them. Or the card names
            another network.
        CardError: the card is damaged, of a later version, or of other weights.
    """
    found = read_weights(path)
    require_card(path, found, network)
    require_same(path, found, network.state_dict())
    return found


def require_card(path: str | Path, state: Mapping[str, Tensor], network: nn.Module) -> None:
    """Check the card beside a file of weights, if there is one: it belongs to them, and names this network.

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
            f"{network_text(expected)}, which this config builds. {way_to(card['network'], expected)}"
        )


def require_same(path: str | Path, found: Mapping[str, Tensor], expected: Mapping[str, Tensor]) -> None:
    """Check that the tensors of a file are those of the network, by name and shape.

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
            f"{'; '.join(problems)}. Choose the overlays and sizes that the checkpoint was trained with "
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
            size = "" if stem is None else f" with {stem.shape[1]} input channel(s) and {stem.shape[0]} features"
            return kind + size
    return "another network"


def newest_checkpoint(ckpt_dir: str | Path) -> Path | None:
    """Return the complete `checkpoint_epoch=N.pt` with the highest N, if any.

    A run that was killed while saving leaves an incomplete file, which is not a valid zip archive.
    """
    found = (path for path in Path(ckpt_dir).glob("checkpoint_epoch=*.pt") if is_zipfile(path))
    return max(found, key=lambda path: int(path.stem.partition("=")[2]), default=None)
