"""What a network is, in the words of the configs: its name, channels and sizes."""

from __future__ import annotations

from collections.abc import Mapping
from contextlib import suppress
from pathlib import Path
from typing import Any

import yaml
from torch import Tensor, nn

from tools.common.calling_parser import calling_parser

# name, and the first convolution
NETWORKS = {
    "SwinUNETR": "swinViT.patch_embed.proj.weight",
    "UNet": "conv_0.conv_0.conv.weight",
    "UNETR": "vit.patch_embedding.patch_embeddings.weight",
    "ViT": "patch_embedding.patch_embeddings.weight",
}
OVERLAYS = ("configs/swin_unetr.yaml", "configs/unetr.yaml", "configs/small.yaml")
OVERLAY_OF = {"SwinUNETR": "swin_unetr.yaml", "UNETR": "unetr.yaml"}
ENCODERS = {"UNETR": "ViT"}  # network → the network that is its encoder


def describe_network(network: nn.Module | Mapping[str, Tensor]) -> dict[str, Any]:
    """Return `name`, and channels and sizes by their config keys, of a network or of the one inside it.

    Of a state dict, which must be complete, the same without `vit_heads`.
    """
    state = network.state_dict() if isinstance(network, nn.Module) else network
    shapes = {name: tensor.shape for name, tensor in state.items()}
    for kind, first in NETWORKS.items():
        found = next((name for name in shapes if name.endswith(first)), None)
        if found is not None:
            own = {name.removeprefix(found.removesuffix(first)): shape for name, shape in shapes.items()}
            return {"name": kind, "in_channels": own[first][1], **_sizes(kind, own, network)}
    return {"name": type(network).__name__}


def _sizes(kind: str, shapes: Mapping[str, Any], network: nn.Module | Mapping[str, Tensor]) -> dict[str, Any]:
    if kind == "SwinUNETR":
        offsets = shapes["swinViT.layers1.0.blocks.0.attn.relative_position_bias_table"][0]  # (2 · window − 1)³
        return {
            "swin_feature_size": shapes[NETWORKS[kind]][0],
            "swin_window_size": round(offsets ** (1 / 3) + 1) // 2,
            "swin_use_v2": any(name.startswith("swinViT.layers1c.") for name in shapes),
        }
    if kind == "UNet":
        stages = [f"down_{number}.convs.conv_0.conv.weight" for number in (1, 2, 3, 4)]
        encoder = [shapes[name][0] for name in (NETWORKS[kind], *stages)]
        return {"unet_features": [*encoder, shapes["final_conv.weight"][1]]}
    vit = NETWORKS[kind].removesuffix(NETWORKS["ViT"])
    decoder = {"unetr_feature_size": shapes["out.conv.conv.weight"][1]} if kind == "UNETR" else {}
    modules = network.modules() if isinstance(network, nn.Module) else ()
    heads = [module.num_heads for module in modules if hasattr(module, "num_heads")][:1]  # not in the weights
    return {
        **decoder,
        "vit_hidden_size": shapes[NETWORKS[kind]][0],
        "vit_mlp_size": shapes[f"{vit}blocks.0.mlp.linear1.weight"][0],
        **({"vit_heads": heads[0]} if heads else {}),
    }


def network_text(network: Mapping[str, Any]) -> str:
    """A network in words, as in `UNet (in_channels 1, unet_features [16, 16, 32, 64, 128, 16])`."""
    return f"{network['name']} ({', '.join(f'{key} {value}' for key, value in network.items() if key != 'name')})"


def is_other_encoder(found: Mapping[str, Any], expected: Mapping[str, Any]) -> bool:
    """Whether the encoders differ in what shapes of tensors need not show: the kind, the version, or the heads."""
    kinds = {ENCODERS.get(network["name"], network["name"]) for network in (found, expected)}
    return len(kinds) > 1 or not {"vit_heads", "swin_use_v2"}.isdisjoint(different(found, expected))


def different(found: Mapping[str, Any], expected: Mapping[str, Any]) -> dict[str, Any]:
    """Entries of `found` that differ from those of `expected` with the same key."""
    return {key: value for key, value in found.items() if key in expected and value != expected[key]}


def way_to(network: Mapping[str, Any], expected: Mapping[str, Any], bundle: str | Path | None = None) -> str:
    """What to type so that a config that builds `expected` builds `network`.

    Args:
        network: network of the weights.
        expected: network of the config.
        bundle: folder of the bundle, whose overlays are looked through; None: that of the config that is running.
    """
    overlays = overlays_for(network, expected, bundle)
    covered = {key for overlay in overlays.values() for key in overlay}
    sizes = {key: value for key, value in different(network, expected).items() if key not in ("name", *covered)}
    options = [f'--{key} "{value}"' for key, value in sizes.items()]
    if not overlays:
        return f"Choose the overlays and sizes that it was trained with: {', '.join([*OVERLAYS, *options])}"
    shown = {key: value for key, value in network.items() if key not in ("name", "in_channels") and value is not False}
    found = ", ".join(f"{key} {value}" for key, value in shown.items())
    return f"These weights have {found}: add {', '.join([*overlays, *options])}"


def overlays_for(
    network: Mapping[str, Any], expected: Mapping[str, Any], bundle: str | Path | None = None
) -> dict[str, dict[str, Any]]:
    """The overlays of a bundle that are missing where its config builds `expected`; arguments as in `way_to`."""
    if bundle is None:
        with suppress(RuntimeError, KeyError):  # not called from a config
            bundle = calling_parser()["bundle_root"]
    files = sorted(Path(bundle, "configs").glob("*.yaml")) if bundle is not None else []
    configs = {file.name: yaml.safe_load(file.read_text(encoding="utf-8")) for file in files}
    defaults = configs.get("inference.yaml", {})
    kind = network.get("name")
    names = [OVERLAY_OF[kind]] if kind in OVERLAY_OF and kind != expected.get("name") else []
    for key, value in network.items():
        if key not in ("name", "in_channels") and value != expected.get(key, defaults.get(key)):
            names += [name for name, overlay in configs.items() if overlay.get(key) == value][:1]
    return {name: configs[name] for name in names if name in configs}
