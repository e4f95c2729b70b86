"""What happens before the first training step: find the scans, refuse what cannot work, say what will be done."""

from __future__ import annotations

import os
import shutil
import sys
from collections.abc import Sequence
from copy import deepcopy
from dataclasses import dataclass, field
from math import ceil, prod
from pathlib import Path
from types import TracebackType
from typing import Any

import ignite.distributed as idist
import torch
from torch import nn

from tools.config import truth
from tools.datasets import CACHES
from tools.handlers import newest_checkpoint
from tools.inspection import Scan, axis_ranges, inspect_scans
from tools.scans import ScanError, find_scans, read_datalist, split_scans
from tools.weights import WeightsError, check_weights


@dataclass(frozen=True)
class TrainingScans:
    """The scans of a run, as items for a data set."""

    training: list[dict[str, Any]]
    validation: list[dict[str, Any]]
    left_out: list[Scan] = field(default_factory=list)  # unreadable, with the reason


def find_training_scans(
    dataset_dir: str,
    datalist: str | None,
    channels: int,
    val_fraction: float,
    seed: int,
    skip_unreadable: bool,
    workers: int,
    remember: str,
) -> TrainingScans:
    """Scans of a folder or of a data list, split into training and validation; the same on all ranks.

    Args:
        dataset_dir: folder that is searched, or that the paths of the data list are relative to.
        datalist: JSON with `training` and optionally `validation`, or None.
        channels: that each scan must have.
        val_fraction: share that is kept for validation, if the data list has no `validation`.
        seed: of the split.
        skip_unreadable: read all scans now, and leave out those that cannot be used.
        workers: that read scans.
        remember: file with what earlier starts found, so that unchanged scans are not read again.

    Raises:
        ScanError: nothing found, or a list or split that cannot be made.
    """
    training = read_datalist(datalist, dataset_dir, "training") if datalist else find_scans(dataset_dir)
    validation = read_datalist(datalist, dataset_dir, "validation") if datalist else []
    left_out: list[Scan] = []
    if truth(skip_unreadable):
        training, bad = _usable(training, channels, workers, remember)
        validation, bad_validation = _usable(validation, channels, workers, remember)
        left_out = bad + bad_validation
    if not validation:
        training, validation = split_scans(training, val_fraction, seed)
    return TrainingScans(training, validation, left_out)


def _usable(
    items: list[dict[str, Any]], channels: int, workers: int, remember: str
) -> tuple[list[dict[str, Any]], list[Scan]]:
    scans = _inspect(items, channels, workers, remember)
    usable = [item for item, scan in zip(items, scans, strict=True) if scan.problem is None]
    return usable, [scan for scan in scans if scan.problem is not None]


def _inspect(
    items: Sequence[dict[str, Any]],
    channels: int,
    workers: int,
    remember: str,
    label_values: Sequence[int] | None = None,
) -> list[Scan]:
    with idist.one_rank_first():  # the others find its results remembered
        return inspect_scans(items, channels, workers, Path(remember), label_values)


def require_usable(
    items: Sequence[dict[str, Any]],
    channels: int,
    workers: int,
    remember: str,
    label_values: Sequence[int] | None = None,
) -> list[Scan]:
    """What is known of the scans, all of which can be used.

    Args:
        items: scans, with or without `label`.
        channels: that each scan must have.
        workers: that read scans.
        remember: file with what earlier starts found, so that unchanged scans are not read again.
        label_values: values that a label may hold beside 0; None: labels are not looked at.

    Raises:
        ScanError: naming the unusable scans, each with its reason.
    """
    if not items:
        raise ScanError("found no scan to work on, expected at least one in dataset_dir, or in the datalist's section")
    items = [{"image": item["image"]} for item in items] if label_values is None else items
    scans = _inspect(items, channels, workers, remember, label_values)
    bad = [scan for scan in scans if scan.problem is not None]
    if bad:
        listed = "\n".join(f"  {_name(scan)}: {scan.problem}" for scan in bad[:10])
        more = f"\n  … and {len(bad) - 10} more" if len(bad) > 10 else ""
        way_out = (
            "`python -m tools check` lists all and writes a data list without them; "
            "`--skip_unreadable true` trains without them"
            if label_values is None
            else "`python -m tools check --bundle BUNDLE` lists all and writes a data list without them"
        )
        raise ScanError(f"{len(bad)} of {len(scans)} scans cannot be used:\n{listed}{more}\n{way_out}")
    return scans


def require_cache_room(
    scans: Sequence[Scan],
    cache: str,
    cache_dir: str | Path,
    spacing: Sequence[float] | None = None,
    labels: bool = False,
) -> int:
    """Bytes that the cached scans will take, as 32-bit floats, and their labels, as bytes, if they have any.

    An upper estimate: cropping to the foreground makes most scans smaller, padding makes small ones larger.

    Raises:
        OSError: the disk of `cache_dir` (cache: disk) or the memory of this machine (cache: memory) is too small.
        ValueError: `cache` is none of the known words.
    """
    need = sum((4 * scan.channels + labels) * prod(scan.shape) * _resampling(scan, spacing) for scan in scans)
    folder = Path(cache_dir).absolute()
    if cache == "disk":
        folder.mkdir(parents=True, exist_ok=True)
        room = shutil.disk_usage(folder).free + sum(f.stat().st_size for f in folder.glob("*.pt"))
        what = f"cache_dir {folder}: the disk has"
    elif cache == "memory":
        need *= idist.get_nproc_per_node()  # each process keeps all scans
        room = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
        what = "cache: memory: this machine has"
    elif cache in CACHES:
        return 0
    else:
        raise ValueError(f"cache must be one of {', '.join(CACHES)}; found {cache!r}")
    if need > room:
        raise OSError(
            f"{what} {size_text(room)}, {len(scans)} scans need about {size_text(need)}; "
            "choose another cache_dir, or --cache none"
        )
    return ceil(need)


def _resampling(scan: Scan, spacing: Sequence[float] | None) -> float:
    return 1.0 if spacing is None else prod(scan.spacing) / prod(spacing)


def require_resumable(ckpt_dir: str | Path, network: nn.Module) -> Path:
    """The newest training checkpoint, which fits the network.

    Raises:
        WeightsError: there is none, or it is of another network.
    """
    path = newest_checkpoint(ckpt_dir)
    if path is None:
        raise WeightsError(f"resume: no checkpoint_epoch=N.pt in ckpt_dir {ckpt_dir}")
    check_weights(path, network)
    return path


def training_memory(network: nn.Module, *inputs: torch.Tensor) -> int:
    """Bytes that a training step keeps at least: weights, gradients, Adam's moments and saved activations.

    The forward pass runs with shapes only, so it costs no memory and little time.

    Args:
        network: in training mode, on any device.
        inputs: of its forward, on the CPU.
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


def explain_errors() -> None:
    """End an uncaught error with its cause: config parsers wrap it in messages that name only the component."""

    def explain(kind: type[BaseException], error: BaseException, traceback: TracebackType | None) -> None:
        sys.__excepthook__(kind, error, traceback)
        error = root_cause(error)
        print(f"\n{type(error).__name__}: {error}", file=sys.stderr)

    sys.excepthook = explain


def root_cause(error: BaseException) -> BaseException:
    """The error that config parsers wrapped, each in a `RuntimeError` of its own."""
    while type(error) is RuntimeError and error.__cause__ is not None:
        error = error.__cause__
    return error


def say(lines: Sequence[tuple[str, str]]) -> None:
    """Print the start table (rank 0 only)."""
    if idist.get_rank() == 0:
        width = max(len(name) for name, _ in lines)
        print("\n".join(f"  {name:<{width}}  {text}" for name, text in lines), flush=True)


def scan_lines(training: Sequence[Scan], validation: Sequence[Scan], left_out: Sequence[Scan]) -> list[tuple[str, str]]:
    """Rows of the start table that are about the scans."""
    scans = [*training, *validation]
    lines = [
        ("scans", f"{len(training)} for training, {len(validation)} for validation"),
        ("shape", f"{axis_ranges([s.shape for s in scans])} voxels"),
        ("spacing", f"{axis_ranges([s.spacing for s in scans])} mm"),
        ("intensity", f"{min(s.low for s in scans):.5g} … {max(s.high for s in scans):.5g}"),
    ]
    if left_out:
        lines.append(("left out", str(len(left_out))))
    return lines + [("", f"{_name(scan)}: {scan.problem}") for scan in left_out[:10]]


def _name(scan: Scan) -> str:
    return ", ".join(scan.image) if isinstance(scan.image, list) else str(scan.image)


def size_text(size: float) -> str:
    """Bytes in a readable unit."""
    for unit in ("B", "kB", "MB"):
        if size < 1000:
            return f"{size:.3g} {unit}"
        size /= 1000
    return f"{size:.3g} GB"
