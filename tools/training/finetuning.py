"""Fine-tuning for segmentation: parameter groups, a frozen encoder, and what happens before the first step."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from ignite.engine import Engine
from monai.engines.utils import IterationEvents
from torch import nn

from tools.common.tables import print_table
from tools.common.text import bytes_text, size_text
from tools.common.windows import require_roi
from tools.data.classes import Classes, absent_classes, class_text, label_values, require_activation
from tools.data.inspection import Scan
from tools.data.runs import channel_lines, require_usable
from tools.training.requirements import require_cache_room, require_resumable, scan_lines, training_memory
from tools.weights.transfer import Transfer, is_encoder


def parameter_groups(
    network: nn.Module, learning_rate: float, weight_decay: float, encoder_lr_multiplier: float
) -> list[dict[str, Any]]:
    """Groups for the optimizer: the encoder at `learning_rate × encoder_lr_multiplier`, and the rest.

    Args:
        network: `BasicUNet`, `SwinUNETR` or `UNETR`.
        learning_rate: of all but the encoder.
        weight_decay: of all.
        encoder_lr_multiplier: less than 1 keeps the encoder closer to its pre-trained weights.

    Raises:
        ValueError: the multiplier is negative.
    """
    if encoder_lr_multiplier < 0:
        raise ValueError(f"encoder_lr_multiplier: found {encoder_lr_multiplier}, expected 0 or more")
    groups: dict[bool, list[nn.Parameter]] = {True: [], False: []}
    for name, parameter in network.named_parameters():
        groups[is_encoder(name)].append(parameter)
    return [
        {"params": groups[True], "lr": learning_rate * encoder_lr_multiplier, "weight_decay": weight_decay},
        {"params": groups[False], "lr": learning_rate, "weight_decay": weight_decay},
    ]


class FreezeEncoder:
    """Leaves the encoder as it is for the first epochs, while a new decoder or output layer adapts to it.

    The encoder's gradients are dropped before the optimizer's step. (Parameters that need no gradient would be
    cheaper, but `DistributedDataParallel` fixes at its start which ones do.)

    Args:
        network: `BasicUNet`, `SwinUNETR` or `UNETR`.
        epochs: how many; 0 freezes nothing.
    """

    def __init__(self, network: nn.Module, epochs: int) -> None:
        self.parameters = [parameter for name, parameter in network.named_parameters() if is_encoder(name)]
        self.epochs = epochs

    def attach(self, engine: Engine) -> None:
        """Attach to the trainer."""
        engine.add_event_handler(IterationEvents.BACKWARD_COMPLETED, self)

    def __call__(self, engine: Engine) -> None:
        """Drop the gradients of this step, if it is in one of these epochs."""
        if engine.state.epoch <= self.epochs:
            for parameter in self.parameters:
                parameter.grad = None


def start_finetuning(
    training: list[dict[str, Any]],
    validation: list[dict[str, Any]],
    channels: int,
    modalities: Sequence[str] | None,
    classes: Classes,
    activation: str,
    label_fraction: float,
    workers: int,
    remember: str,
    transfer: Transfer,
    roi_size: Sequence[int],
    stride: int,
    crops: int,
    freeze_encoder_epochs: int,
    encoder_lr_multiplier: float,
    world_size: int,
    cache: str,
    cache_dir: str,
    spacing: Sequence[float] | None,
    resume_from: str | None,
) -> None:
    """Refuse what cannot work, then print what will be done.

    Args:
        training: cases, each with `image` and `label`.
        validation: cases.
        channels: of the network's input.
        modalities: names of the channels in their order, or None.
        classes: name → label values.
        activation: softmax or sigmoid.
        label_fraction: share of all training cases that `training` is; only printed here.
        workers: that read cases.
        remember: file of the cases that were checked before.
        transfer: the network, and what was loaded into it.
        roi_size: of a crop, voxels.
        stride: of the network's bottleneck, voxels.
        crops: in a batch of one process.
        freeze_encoder_epochs: epochs with a frozen encoder; only printed here.
        encoder_lr_multiplier: the encoder's learning rate over that of the rest; only printed here.
        world_size: number of processes.
        cache: none, memory or disk.
        cache_dir: of the disk cache.
        spacing: mm, that scans are resampled to, or None.
        resume_from: folder of training checkpoints, or None for a fresh start.

    Raises:
        ScanError: cases cannot be used.
        WeightsError: the checkpoint to resume from is missing or of another network.
        OSError: no room for the cache.
        ValueError: the window does not fit the network, the classes do not fit the activation, or there are fewer
            cases than processes.
    """
    require_roi(roi_size, stride)
    require_activation(activation, classes)
    for name, found in (("training", len(training)), ("validation", len(validation))):
        if found < world_size:
            raise ValueError(f"{found} {name} case(s) for {world_size} process(es); expected at least one for each")
    network = transfer.network
    resumed = require_resumable(resume_from, network) if resume_from else None
    scans = require_usable([*training, *validation], channels, workers, remember, label_values(classes))
    cached = require_cache_room(scans, cache, cache_dir, spacing, labels=True)
    memory = training_memory(network, torch.rand(crops, channels, *roi_size, device="meta"))
    slower = f"; encoder at {encoder_lr_multiplier:g} of the learning rate" if encoder_lr_multiplier != 1 else ""
    frozen = f"; encoder frozen for {freeze_encoder_epochs} epoch(s)" if freeze_encoder_epochs else ""
    print_table(
        [
            *scan_lines(scans[: len(training)], scans[len(training) :], []),
            *channel_lines(training[0], modalities),
            ("labels", f"{_share_text(label_fraction)}; {class_text(classes)}"),
            *_warnings(scans[: len(training)], classes),
            ("crops", f"{size_text(roi_size)}, {crops} in a batch of each of {world_size} process(es)"),
            (
                "network",
                f"{type(network).__name__}, {sum(p.numel() for p in network.parameters()) / 1e6:.2f} M parameters"
                f"{slower}{frozen}",
            ),
            (
                "memory",
                f"about {bytes_text(memory)} per process for training in 32 bit, plus {bytes_text(cached)} of cache",
            ),
            *([("weights", f"resumed from {resumed}")] if resumed else transfer.report.lines()),
        ]
    )


def _share_text(fraction: float) -> str:
    return "all training cases" if fraction == 1 else f"{fraction:g} of the training cases"


def _warnings(scans: Sequence[Scan], classes: Classes) -> list[tuple[str, str]]:
    absent = absent_classes(scans, classes)
    return [("WARNING", f"no training case holds {', '.join(absent)}: this cannot be learnt")] if absent else []
