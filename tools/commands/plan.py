"""`python -m tools plan`: writes an overlay for pre-training that fits a folder of scans and this machine."""

from __future__ import annotations

import os
import shlex
from pathlib import Path
from typing import Any

import torch
import yaml
from monai.bundle import ConfigParser

from tools.commands.new_bundle import channels_of, linear_memory, modality_of, plan_text
from tools.common.files import atomic_path
from tools.common.text import first_lines, parse_bool
from tools.data.datalists import read_datalist
from tools.data.fingerprint import fingerprint
from tools.data.inspection import MAX_SCAN_GB, inspect_scans
from tools.data.scans import ScanError, find_scans
from tools.data.store import KEEP_FREE, disk_room, memory_root
from tools.shipping.verify import BUNDLES
from tools.training.planning import REGION, REGION_SMALL, Memory, plan_pretraining
from tools.training.requirements import training_memory

LEAST_SCANS = 2  # one to train, one to validate


def plan(
    dataset_dir: str,
    output: str = "plan.yaml",
    datalist: str | None = None,
    modality: str | None = None,
    small: bool = False,
    memory_gb: float | None = None,
    bundle: str | Path = BUNDLES / "hybridmim_pretrain",
    workers: int = 4,
    dicom_series: str = "refuse",
    max_scan_gb: float = MAX_SCAN_GB,
) -> None:
    """Write an overlay for pre-training: voxel size, crop, intensities, batch and workers; print why.

    Args:
        dataset_dir: folder of scans; with a data list, the base folder of its paths.
        output: YAML file to write.
        datalist: JSON file with `training`, instead of all scans in the folder.
        modality: CT or MR; None: by the values of the scans.
        small: whether the overlay is used after small.yaml, for a CPU.
        memory_gb: memory that a training step may take; None: of the GPU, or half of what is free without one.
        bundle: folder of the bundle for pre-training.
        workers: number of processes that read.
        dicom_series: a folder of several DICOM series: `refuse` it, take `each` as a scan, or the `largest` alone.
        max_scan_gb: the largest file that is read, by its voxels.

    Raises:
        ScanError: there are too few usable scans, or their values contradict the modality.
        ValueError: the memory is too small.
    """
    small = parse_bool(small)
    items = read_datalist(datalist, dataset_dir, "training") if datalist else find_scans(dataset_dir, dicom_series)
    channels = channels_of(items[0]["image"])
    scans = inspect_scans(items, channels, workers, max_scan_gb=max_scan_gb)
    bad = [f"{scan.name}: {scan.problem}" for scan in scans if scan.problem is not None]
    if len(scans) - len(bad) < LEAST_SCANS:
        raise ScanError(
            f"dataset_dir: found {len(scans) - len(bad)} usable scans in {dataset_dir}, expected at least "
            f"{LEAST_SCANS}, one to train and one to validate\n{first_lines(bad)}"
        )
    if bad:
        print(f"{len(bad)} of {len(scans)} scans are left out, and stop a training without --skip_unreadable true:")
        print(first_lines(bad))
    good = [(item, scan) for item, scan in zip(items, scans, strict=True) if scan.problem is None]
    kind = modality_of(modality, {}, [scan for _, scan in good])
    cases = fingerprint([item for item, _ in good], kind == "CT", workers)
    room = disk_room(memory_root(), KEEP_FREE)
    memory = _memory(Path(bundle), channels, small, memory_gb)
    values, rows = plan_pretraining(cases, kind == "CT", memory, os.cpu_count() or 1, room, small)
    values["in_channels"] = channels
    percentiles = "" if kind == "CT" else Path(bundle, "configs/mri.yaml").read_text(encoding="utf-8")
    with atomic_path(output) as path:
        path.write_text(_overlay(Path(dataset_dir), len(good), values, percentiles), encoding="utf-8")
    print(plan_text(rows))
    names = ["train", *(["small"] if small else [])]
    files = [f"{_short(Path(bundle))}/configs/{name}.yaml" for name in names] + [output]
    listed = f" --datalist {shlex.quote(datalist)}" if datalist else ""
    print(
        f"\nwritten: {output}. Then:\n  python -m monai.bundle run training --config_file "
        f'"[{",".join(repr(file) for file in files)}]" --bundle_root {_short(Path(bundle))} '
        f"--dataset_dir {shlex.quote(dataset_dir)}{listed}"
    )


def _short(path: Path) -> Path:
    return path.relative_to(Path.cwd()) if path.is_relative_to(Path.cwd()) else path


def _memory(bundle: Path, channels: int, small: bool, memory_gb: float | None) -> Memory:
    """Memory of a step of pre-training, with all its views."""
    region = REGION_SMALL if small else REGION

    def step(side: int) -> int:
        parser = ConfigParser()
        parser.read_config([bundle / f"configs/{name}.yaml" for name in ("train", *(["small"] if small else []))])
        parser.update({"bundle_root": str(bundle), "in_channels": channels, "roi_size": [side] * 3})
        built = parser.get_parsed_content("step")
        image = torch.rand(built.images_per_crop, channels, *[side] * 3, device="meta")
        patches = torch.zeros(1, 1, *(side // patch for patch in built.geometry.patch_size), dtype=torch.bool)
        return training_memory(built, image, patches)

    return linear_memory(step, region, memory_gb)


def _overlay(root: Path, scans: int, values: dict[str, Any], percentiles: str) -> str:
    """Text of the overlay; scaling by percentiles is that of mri.yaml."""
    own = {key: value for key, value in values.items() if f"\n{key}:" not in percentiles}
    lines = yaml.safe_dump(own, sort_keys=False, default_flow_style=None)
    head = f"# Overlay for pre-training on {scans} scans of {root.resolve().name!r}. The rules: docs/planning.md.\n"
    return head + lines + percentiles
