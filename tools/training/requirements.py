"""Checks before the first training step, and their rows of the start table."""

from __future__ import annotations

from collections.abc import Sequence
from copy import deepcopy
from math import ceil, prod
from pathlib import Path

import torch
from torch import nn

from tools.common.files import disk_room
from tools.common.text import axis_ranges, bytes_text
from tools.data.datasets import CACHES
from tools.data.inspection import Scan
from tools.data.preparation import Preparation
from tools.data.store import KEEP_FREE, memory_root
from tools.weights.checkpoints import WeightsError, check_weights
from tools.weights.training_checkpoints import newest_checkpoint

# Bytes of a voxel in the store, of each channel: measured 0.2 to 1.0, 0.3 to 1.6 and 0.003 to 0.03 on CT and MR
EXACT_VOXEL = 1.0
RESAMPLED_VOXEL = 1.5
LABEL_VOXEL = 0.03


def require_cache_room(
    scans: Sequence[Scan],
    cache: str,
    cache_dir: str | Path,
    spacing: Sequence[float] | None = None,
    labels: bool = False,
) -> int:
    """Check that the cache fits, and return its size in bytes.

    A rough estimate, from what was measured on CT and MR of three sources: cropping to the foreground makes most scans
    smaller, padding makes small scans larger.

    Raises:
        OSError: the disk of `cache_dir` (cache: disk) or the memory of this machine (cache: memory) is too small.
        ValueError: `cache` is unknown.
    """
    voxel = EXACT_VOXEL if spacing is None else RESAMPLED_VOXEL
    need = sum(
        (voxel * scan.channels + LABEL_VOXEL * labels) * prod(scan.shape) * _resampling(scan, spacing) for scan in scans
    )
    if cache == "disk":
        folder = Path(cache_dir).absolute()
        folder.mkdir(parents=True, exist_ok=True)
        room = disk_room(folder) + sum(f.stat().st_size for f in folder.glob("*.b2nd"))
        what = f"cache_dir {folder}: the disk has"
    elif cache == "memory":
        room = disk_room(memory_root(), KEEP_FREE)
        what = f"cache: memory: {memory_root()} has"
    elif cache in CACHES:
        return 0
    else:
        raise ValueError(f"cache must be one of {', '.join(CACHES)}; found {cache!r}")
    if need > room:
        raise OSError(
            f"{what} {bytes_text(room)}, {len(scans)} scans need about {bytes_text(need)}; "
            "choose another cache_dir, or --cache none"
        )
    return ceil(need)


def _resampling(scan: Scan, spacing: Sequence[float] | None) -> float:
    return 1.0 if spacing is None else prod(scan.spacing) / prod(spacing)


def require_resumable(ckpt_dir: str | Path, network: nn.Module, prepared: Preparation) -> Path:
    """Return the newest training checkpoint and check that it fits the network, and scans are prepared as before.

    Raises:
        WeightsError: there is no checkpoint, or it belongs to another network.
        CardError: by the card of `model.pt`, scans were prepared in another way.
    """
    path = newest_checkpoint(ckpt_dir)
    if path is None:
        raise WeightsError(f"resume: no checkpoint_epoch=N.pt in ckpt_dir {ckpt_dir}")
    check_weights(path, network)
    prepared.require_same(Path(ckpt_dir, "model.pt"))
    return path


def training_memory(network: nn.Module, *inputs: torch.Tensor) -> int:
    """Minimum memory of a training step, bytes: weights, gradients, Adam's moments and saved activations.

    The forward pass runs with shapes only, so it needs no memory and little time.

    Args:
        network: network in training mode, on any device.
        inputs: arguments of its `forward`, on the CPU.
    """
    saved: dict[int, torch.UntypedStorage] = {}

    def keep(tensor: torch.Tensor) -> torch.Tensor:
        storage = tensor.untyped_storage()
        saved[storage._cdata] = storage
        return tensor

    network = deepcopy(network).to("meta")
    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        network(*(x.to("meta") for x in inputs))
    parameters = sum(p.numel() * p.element_size() for p in network.parameters())
    return 4 * parameters + sum(storage.nbytes() for storage in saved.values())


def scan_lines(training: Sequence[Scan], validation: Sequence[Scan], left_out: Sequence[Scan]) -> list[tuple[str, str]]:
    """Rows of the start table for the scans."""
    scans = [*training, *validation]
    lines = [
        ("scans", f"{len(training)} for training, {len(validation)} for validation"),
        ("shape", f"{axis_ranges([s.shape for s in scans])} voxels"),
        ("spacing", f"{axis_ranges([s.spacing for s in scans])} mm"),
        ("intensity", f"{min(s.low for s in scans):.5g} … {max(s.high for s in scans):.5g}"),
    ]
    if left_out:
        lines.append(("left out", str(len(left_out))))
    return lines + [("", f"{scan.name}: {scan.problem}") for scan in left_out[:10]]
