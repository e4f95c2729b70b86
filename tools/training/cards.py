"""The card of a training: what is saved beside its weights."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import monai
import torch
from torch import nn

from tools.data.preparation import Preparation
from tools.weights.networks import describe_network


def training_card(
    network: nn.Module,
    preparation: Preparation,
    roi_size: Sequence[int],
    scans: int,
    bundle_root: str | Path,
    **more: Any,
) -> dict[str, Any]:
    """Return what is known before the first step; `BestWeights` adds the rest.

    Args:
        network: network of the weights.
        preparation: how its scans are prepared.
        roi_size: size of a crop, voxels.
        scans: number of scans for training.
        bundle_root: folder of the bundle, whose name and version are recorded.
        more: further entries, plain data.
    """
    meta = json.loads(Path(bundle_root, "configs/metadata.json").read_text(encoding="utf-8"))
    return {
        "network": describe_network(network),
        "preparation": preparation.plain(),
        "roi_size": list(roi_size),
        **more,
        "scans": scans,
        "versions": {
            "bundle": f"{meta['name']} {meta['version']}",
            "torch": torch.__version__,
            "monai": monai.__version__,
        },
    }
