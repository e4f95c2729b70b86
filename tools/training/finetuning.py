"""Fine-tuning for segmentation: parameter groups, freezing of the encoder, and checks before the first step."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from ignite.engine import Engine, Events
from monai.engines import SupervisedTrainer
from monai.engines.utils import IterationEvents
from torch import nn

from tools.common.tables import print_table
from tools.common.text import bytes_text, size_text
from tools.common.windows import require_roi
from tools.data.classes import Classes, absent_classes, class_text, label_values, require_activation
from tools.data.inspection import Scan
from tools.data.preparation import Preparation
from tools.data.runs import channel_lines, require_usable
from tools.training.requirements import require_cache_room, require_resumable, scan_lines, training_memory
from tools.weights.transfer import Transfer, is_encoder


def parameter_groups(
    transfer: Transfer, learning_rate: float, weight_decay: float, pretrained_lr_multiplier: float
) -> list[dict[str, Any]]:
    """Return the optimizer's parameter groups: what is loaded from a file, and the rest.

    Without a file the groups are those of one that fills all that was asked for, so that a run that began with one can
    be resumed without it.

    Args:
        transfer: network, and which parts of it were loaded.
        learning_rate: learning rate of all other parameters, and of all if nothing was loaded.
        weight_decay: weight decay of all parameters.
        pretrained_lr_multiplier: factor for what was loaded; less than 1 keeps it closer to its pre-trained weights.

    Raises:
        ValueError: the multiplier, the rate or the decay is negative, or no number.
    """
    values = {"pretrained_lr_multiplier": pretrained_lr_multiplier}
    values |= {"learning_rate": learning_rate, "weight_decay": weight_decay}  # AdamW does not check those of groups
    for key, value in values.items():
        if not isinstance(value, int | float) or not value >= 0:
            raise ValueError(f"{key}: found {value!r}, expected a number, 0 or more")
    groups: dict[bool, list[nn.Parameter]] = {True: [], False: []}
    for name, parameter in transfer.network.named_parameters():
        groups[name in transfer.loaded].append(parameter)
    factor = 1.0 if transfer.report.source is None else pretrained_lr_multiplier
    return [
        {"params": groups[True], "lr": learning_rate * factor, "weight_decay": weight_decay},
        {"params": groups[False], "lr": learning_rate, "weight_decay": weight_decay},
    ]


class FreezeEncoder:
    """Freezes the encoder for the first epochs, while a new decoder or output layer adapts to it.

    The encoder's gradients are removed before the optimizer's step. (`requires_grad = False` would be cheaper, but
    `DistributedDataParallel` reads it only once, at the start.)

    Args:
        network: `BasicUNet`, `SwinUNETR` or `UNETR`.
        epochs: number of epochs; 0 freezes nothing.
    """

    def __init__(self, network: nn.Module, epochs: int) -> None:
        self.parameters = [parameter for name, parameter in network.named_parameters() if is_encoder(name)]
        self.epochs = epochs

    def attach(self, engine: Engine) -> None:
        """Attach to the trainer."""
        engine.add_event_handler(IterationEvents.BACKWARD_COMPLETED, self)

    def __call__(self, engine: Engine) -> None:
        """Remove the encoder's gradients, if it is frozen in this epoch."""
        if engine.state.epoch <= self.epochs:
            for parameter in self.parameters:
                parameter.grad = None


class Finetuner(SupervisedTrainer):
    """`SupervisedTrainer` whose state has the scale of the gradients, which float16 needs.

    MONAI makes a new scaler in every `run`; what was loaded before goes into it then.
    """

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self._loaded: Mapping[str, Any] = {}
        self.add_event_handler(Events.STARTED, self._restore_scaler)

    def _restore_scaler(self) -> None:
        if self.scaler is not None and self._loaded:
            self.scaler.load_state_dict(dict(self._loaded))
        self._loaded = {}

    def state_dict(self) -> dict[str, Any]:
        """Return Ignite's state of the engine and the state of the gradient scaler, which is empty without one."""
        scaler = getattr(self, "scaler", None)  # there is none before the first `run`
        return {**super().state_dict(), "scaler": scaler.state_dict() if scaler is not None else {}}

    def load_state_dict(self, state_dict: Mapping[str, Any]) -> None:
        """Restore both; checkpoints of earlier versions have no scaler."""
        state_dict = dict(state_dict)
        self._loaded = state_dict.pop("scaler", {})
        super().load_state_dict(state_dict)


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
    max_scan_gb: float,
    hounsfield: bool | str,
    transfer: Transfer,
    roi_size: Sequence[int],
    stride: int,
    crops: int,
    freeze_encoder_epochs: int,
    pretrained_lr_multiplier: float,
    world_size: int,
    cache: str,
    cache_dir: str,
    prepared: Preparation,
    resume_from: str | None,
) -> None:
    """Check that fine-tuning can run, then print the start table.

    Args:
        training: training cases, each with `image` and `label`.
        validation: validation cases.
        channels: number of input channels of the network.
        modalities: names of the channels in order, or None.
        classes: class name → label values.
        activation: `softmax` or `sigmoid`.
        label_fraction: fraction of all training cases in `training`, for the table.
        workers: number of processes that read cases.
        remember: JSON file with the results of earlier checks.
        max_scan_gb: the largest file that is read, by its voxels.
        hounsfield: whether scans whose values cannot be HU are warned of.
        transfer: network, and report of the loaded weights.
        roi_size: crop size, voxels.
        stride: total downsampling of the network.
        crops: number of crops per batch and process.
        freeze_encoder_epochs: number of epochs with a frozen encoder, for the table.
        pretrained_lr_multiplier: factor on the learning rate of what was loaded, for the table.
        world_size: number of processes.
        cache: `none`, `memory` or `disk`.
        cache_dir: folder of the disk cache.
        prepared: how scans are prepared.
        resume_from: folder of training checkpoints, or None for a new run.

    Raises:
        ScanError: cases are unusable.
        WeightsError: the checkpoint to resume from is missing or belongs to another network.
        CardError: the run to resume prepared scans in another way.
        OSError: the disk or the memory is too small for the cache.
        ValueError: the window does not fit the network, the classes do not fit the activation, or there are fewer
            cases than processes.
    """
    require_roi(roi_size, stride)
    require_activation(activation, classes)
    for name, found in (("training", len(training)), ("validation", len(validation))):
        if found < world_size:
            raise ValueError(f"{found} {name} case(s) for {world_size} process(es); expected at least one for each")
    network = transfer.network
    resumed = require_resumable(resume_from, network, prepared) if resume_from else None
    items, values = [*training, *validation], label_values(classes)
    scans = require_usable(items, channels, workers, remember, values, max_scan_gb, hounsfield)
    cached = require_cache_room(scans, cache, cache_dir, prepared.spacing, labels=True)
    memory = training_memory(network, torch.rand(crops, channels, *roi_size, device="meta"))
    loaded = transfer.report.source is not None and pretrained_lr_multiplier != 1
    slower = f"; what is loaded at {pretrained_lr_multiplier:g} of the learning rate" if loaded else ""
    frozen = f"; encoder frozen for {freeze_encoder_epochs} epoch(s)" if freeze_encoder_epochs else ""
    print_table(
        [
            *scan_lines(scans[: len(training)], scans[len(training) :], []),
            *channel_lines(training[0], modalities),
            ("labels", f"{_share_text(label_fraction)}; {class_text(classes)}"),
            *prepared.lines,
            *_warnings(scans[: len(training)], scans[len(training) :], classes),
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


def _warnings(training: Sequence[Scan], validation: Sequence[Scan], classes: Classes) -> list[tuple[str, str]]:
    lines = []
    if absent := absent_classes(training, classes):
        lines.append(f"no training case holds {', '.join(absent)}: this cannot be learnt")
    without = [scan.name for scan in validation if len(absent_classes([scan], classes)) == len(classes)]
    if len(without) == len(validation):
        lines.append("no validation case holds any class: there is no Dice, and model.pt is that of the last epoch")
    elif without:
        lines.append(f"{len(without)} validation case(s) without any class do not count (first: {without[0]})")
    return [("WARNING", line) for line in lines]
