"""The five segmentation bundles as tests use them: tiny networks, windows and spacings on the sample data."""

from __future__ import annotations

from functools import cache
from pathlib import Path
from typing import Any

import yaml

ROOT = Path(__file__).resolve().parents[2]
NAMES = ("btcv", "brats", "liver", "spleen", "hippocampus")

# every class is still there at these spacings
SPACING = {"btcv": [5, 5, 5], "liver": [5, 5, 5], "spleen": [5, 5, 5], "brats": [4, 4, 4], "hippocampus": None}
TINY = {
    **{"unet_features": [4, 4, 8, 8, 16, 4], "swin_feature_size": 12},
    **{"unetr_feature_size": 4, "vit_hidden_size": 24, "vit_mlp_size": 24, "vit_heads": 2},
    "num_workers": 0,
}
TINY_TRAINING = {
    **TINY,
    "epochs": 2,
    "batch_size": 2,
    "crops_per_volume": 1,
    **{"val_interval": 1, "val_share": 1},
    "checkpoint_interval": 1,
    "warmup_epochs": 0,
    "cache": "memory",
}


def bundle(name: str) -> str:
    """Folder of a bundle, relative to the repository's root."""
    return f"bundles/hybridmim_{name}_seg"


def config_files(name: str, configs: tuple[str, ...] | list[str], cwd: Path = ROOT) -> list[str]:
    """Paths of configs, relative to the folder in which the command runs."""
    folder = f"{bundle(name)}/configs" if cwd == ROOT else "configs"
    return [f"{folder}/{config}.yaml" for config in configs]


@cache
def read(name: str, config: str) -> dict[str, Any]:
    """A config as it stands in its file."""
    return yaml.safe_load((ROOT / bundle(name) / "configs" / f"{config}.yaml").read_text())


def sizes(name: str, network: str) -> dict[str, Any]:
    """Window and spacing: 32³ for UNet and UNETR, 64³ for SwinUNETR."""
    return {"roi_size": [64, 64, 64] if network == "swin_unetr" else [32, 32, 32], "spacing": SPACING[name]}


def places(folder: Path) -> dict[str, str]:
    """Where a run writes, so that nothing lands in the bundle's own folder."""
    return {"output_dir": str(folder / "out"), "ckpt_dir": str(folder / "models")}
