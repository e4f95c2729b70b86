"""What a network is, in the words of the configs: its name, channels and sizes."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from torch import nn

# name, and the first convolution
NETWORKS = {
    "SwinUNETR": "swinViT.patch_embed.proj.weight",
    "UNet": "conv_0.conv_0.conv.weight",
    "UNETR": "vit.patch_embedding.patch_embeddings.weight",
    "ViT": "patch_embedding.patch_embeddings.weight",
}
OVERLAYS = ("configs/swin_unetr.yaml", "configs/unetr.yaml", "configs/small.yaml")
ENCODERS = {"UNETR": "ViT"}  # network → the network that is its encoder


def describe_network(network: nn.Module) -> dict[str, Any]:
    """Return `name`, and channels and sizes by their config keys, of a network or of the one inside it."""
    shapes = {name: tensor.shape for name, tensor in network.state_dict().items()}
    for kind, first in NETWORKS.items():
        found = next((name for name in shapes if name.endswith(first)), None)
        if found is not None:
            own = {name.removeprefix(found.removesuffix(first)): shape for name, shape in shapes.items()}
            return {"name": kind, "in_channels": own[first][1], **_sizes(kind, own, network)}
    return {"name": type(network).__name__}


def _sizes(kind: str, shapes: Mapping[str, Any], network: nn.Module) -> dict[str, Any]:
    if kind == "SwinUNETR":
        return {
            "swin_feature_size": shapes[NETWORKS[kind]][0],
            "swin_use_v2": any(name.startswith("swinViT.layers1c.") for name in shapes),
        }
    if kind == "UNet":
        stages = [f"down_{number}.convs.conv_0.conv.weight" for number in (1, 2, 3, 4)]
        encoder = [shapes[name][0] for name in (NETWORKS[kind], *stages)]
        return {"unet_features": [*encoder, shapes["final_conv.weight"][1]]}
    vit = NETWORKS[kind].removesuffix(NETWORKS["ViT"])
    decoder = {"unetr_feature_size": shapes["out.conv.conv.weight"][1]} if kind == "UNETR" else {}
    return {
        **decoder,
        "vit_hidden_size": shapes[NETWORKS[kind]][0],
        "vit_mlp_size": shapes[f"{vit}blocks.0.mlp.linear1.weight"][0],
        # the weights do not show this
        "vit_heads": next(module.num_heads for module in network.modules() if hasattr(module, "num_heads")),
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


def way_to(network: Mapping[str, Any], expected: Mapping[str, Any]) -> str:
    """What to type so that a config that builds `expected` builds `network`."""
    options = [f'--{key} "{value}"' for key, value in different(network, expected).items() if key != "name"]
    return f"Choose the overlays and sizes that it was trained with: {', '.join([*OVERLAYS, *options])}"
