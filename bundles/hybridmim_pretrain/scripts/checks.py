"""Checks before pre-training, and its start table."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from monai.transforms import Transform
from torch import nn

from tools.common.tables import print_table
from tools.common.text import bytes_text, size_text
from tools.data.inspection import Scan
from tools.data.preparation import Preparation
from tools.data.runs import require_usable
from tools.losses import ContrastiveLoss, HybridMIMLoss, MaskedL1Loss
from tools.training.requirements import require_cache_room, require_resumable, scan_lines, training_memory
from tools.weights.transfer import Transfer, TransferReport

from .hybridmim import PretrainStep
from .simclr import SimCLRStep
from .steps import ReconstructionStep


def start_pretraining(
    training: list[dict[str, Any]],
    validation: list[dict[str, Any]],
    left_out: list[Scan],
    channels: int,
    workers: int,
    remember: str,
    max_scan_gb: float,
    hounsfield: bool | str,
    step: PretrainStep | ReconstructionStep | SimCLRStep,
    loss: HybridMIMLoss | MaskedL1Loss | ContrastiveLoss,
    backbone: nn.Module,
    mask: Transform,
    crops: int,
    crops_per_volume: int,
    world_size: int,
    cache: str,
    cache_dir: str,
    prepared: Preparation,
    transfer: Transfer,
    resume_from: str | None,
) -> None:
    """Check that pre-training can run, then print the start table.

    Args:
        training: items of the training data.
        validation: items of the validation data.
        left_out: excluded scans, for the table.
        channels: number of input channels of the network.
        workers: number of processes that read scans.
        remember: JSON file with the results of earlier checks.
        max_scan_gb: the largest file that is read, by its voxels.
        hounsfield: whether scans whose values cannot be HU are warned of.
        step: training step with the network.
        loss: loss function.
        backbone: network that is saved as `backbone.pt`.
        mask: last random transform; for methods with masking, the transform that draws the masks.
        crops: number of crops per batch and process.
        crops_per_volume: number of crops per scan.
        world_size: number of processes.
        cache: `none`, `memory` or `disk`.
        cache_dir: folder of the disk cache.
        prepared: how scans are prepared.
        transfer: report of the weights that the run starts from.
        resume_from: folder of training checkpoints, or None for a new run.

    Raises:
        ScanError: scans are unusable.
        WeightsError: the checkpoint to resume from is missing or belongs to another network.
        CardError: the run to resume prepared scans in another way.
        OSError: the disk or the memory is too small for the cache.
        ValueError: the batch or the number of scans is too small, or the backbone is not part of the trained network.
    """
    _check_backbone(step.network_def, backbone)
    crops = min(crops, len(training) // world_size * crops_per_volume)
    _check_batch(len(training), len(validation), crops, world_size, step.contrastive)
    resumed = require_resumable(resume_from, step.network_def, prepared) if resume_from else None
    items = [*training, *validation]
    scans = require_usable(items, channels, workers, remember, max_scan_gb=max_scan_gb, hounsfield=hounsfield)
    cached = require_cache_room(scans, cache, cache_dir, prepared.spacing)

    network, g = step.network_def, step.geometry
    size = {module: sum(p.numel() for p in module.parameters()) for module in (network, backbone)}
    image = torch.rand(crops * step.images_per_crop, channels, *g.roi_size, device="meta")
    patches = torch.zeros(crops, 1, *(r // p for r, p in zip(g.roi_size, g.patch_size, strict=True)), dtype=torch.bool)
    memory = training_memory(step, image, patches)
    print_table(
        [
            *scan_lines(scans[: len(training)], scans[len(training) :], left_out),
            ("crops", f"{size_text(g.roi_size)}, {crops} in a batch of each of {world_size} process(es)"),
            *prepared.lines,
            *step.lines(mask),
            ("loss", ", ".join(f"{weight:g} {name}" for name, weight in loss.weights.items())),
            (
                "network",
                f"{type(backbone).__name__}, {size[backbone] / 1e6:.2f} M parameters, "
                f"heads {(size[network] - size[backbone]) / 1e6:.2f} M",
            ),
            (
                "memory",
                f"about {bytes_text(memory)} per process for training in 32 bit, plus {bytes_text(cached)} of cache",
            ),
            *_weight_lines(transfer.report, resumed),
        ]
    )


def _weight_lines(report: TransferReport, resumed: Path | None) -> list[tuple[str, str]]:
    if resumed is not None:
        return [("weights", f"resumed from {resumed}")]
    if report.source is None:
        return [("weights", "new, at random")]
    return [("weights", f"started from {report.source}"), *report.lines()[1:]]


def _check_backbone(network: nn.Module, backbone: nn.Module) -> None:
    if not {*backbone.parameters()} <= {*network.parameters()}:
        raise ValueError(
            f"backbone: found a {type(backbone).__name__} that the {type(network).__name__} does not train; these "
            "overlays do not go together (mae.yaml brings a network of its own)"
        )


def _check_batch(training: int, validation: int, crops: int, world_size: int, contrastive: bool) -> None:
    for name, found in (("training", training), ("validation", validation)):
        if found < world_size:
            raise ValueError(
                f"{found} {name} scan(s) for {world_size} process(es); expected at least one for each process"
            )
    if contrastive and crops * world_size < 2:
        raise ValueError(
            f"batch_size × crops_per_volume × processes is {crops} crop: the contrastive term has nothing to compare "
            "it with; expected at least 2 (raise batch_size or crops_per_volume), or, for HybridMIM, --weight_cl 0"
        )
