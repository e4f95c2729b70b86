"""Reads every scan of a folder or data list and says which cannot be trained on, and why, all at once."""

from __future__ import annotations

import json
import os
import shlex
from collections.abc import Sequence
from pathlib import Path

from tools.files import atomic_path
from tools.inspection import Scan, axis_ranges, inspect_scans
from tools.scans import ScanError, datalist_items, find_scans, load_datalist

COUNTS = {"training": "numTraining", "validation": "numValidation", "test": "numTest"}  # Decathlon's keys


def check(
    dataset_dir: str | None = None,
    datalist: str | None = None,
    channels: int = 1,
    output: str | None = None,
    workers: int = 4,
) -> None:
    """Read every scan; print which cannot be trained on, the reason for each, and a summary.

    Args:
        dataset_dir: folder of scans; with a data list, the folder that its relative paths start from.
        datalist: Decathlon-style JSON file, whose `training`, `validation` and `test` are read.
        channels: number of channels that the network takes.
        output: JSON file to write: a data list without the scans that cannot be trained on.
        workers: processes that read; 0 reads in this one.

    Raises:
        ScanError: neither folder nor data list given, no scan in it, or none left for `output`.
        SystemExit: status 1, if some scans cannot be trained on and there is no `output`.
    """
    if datalist is not None:
        root = Path(datalist).parent if dataset_dir is None else Path(dataset_dir)
        content = load_datalist(datalist)
        items = {section: datalist_items(datalist, dataset_dir, section) for section in COUNTS}
    elif dataset_dir is not None:
        root = Path(dataset_dir)
        items = {"training": find_scans(root)}
        paths = [Path(os.path.relpath(item["image"], root)).as_posix() for item in items["training"]]
        content = {"name": root.absolute().name, "training": [{"image": path} for path in paths]}
    else:
        raise ScanError("check: found neither --dataset_dir nor --datalist, expected one of them")

    scans = inspect_scans([item for part in items.values() for item in part], channels, workers)
    bad = [scan for scan in scans if scan.problem is not None]
    for scan in bad:
        print(f"{scan.image if isinstance(scan.image, str) else ', '.join(scan.image)}: {scan.problem}")
    print(summary(scans))
    if output is not None:
        _write(output, _good_entries(content, items, scans), root)
    elif bad:
        raise SystemExit(1)


def summary(scans: Sequence[Scan]) -> str:
    """Say in a few lines how many scans are readable, and the ranges of shape, spacing and intensity."""
    good = [scan for scan in scans if scan.problem is None]
    lines = [f"scans      {len(good)} readable, {len(scans) - len(good)} unreadable"]
    if good:
        low, high = min(scan.low for scan in good), max(scan.high for scan in good)
        lines += [
            f"shape      {axis_ranges([scan.shape for scan in good])} voxels",
            f"spacing    {axis_ranges([scan.spacing for scan in good])} mm",
            f"intensity  {low:g} to {high:g}",
        ]
    return "\n".join(lines)


def _good_entries(content: dict, items: dict[str, list[dict]], scans: list[Scan]) -> dict:
    """Copy a data list without the entries whose scan has a problem; scans are in the order of the items."""
    good = dict(content)
    remaining = iter(scans)
    for section, part in items.items():
        if section in content:
            entries = zip(content[section], [next(remaining) for _ in part], strict=True)
            good[section] = [entry for entry, scan in entries if scan.problem is None]
            good[COUNTS[section]] = len(good[section])
    return good


def _write(output: str, content: dict, root: Path) -> None:
    if not content["training"]:
        raise ScanError(f"check: found no readable scan to train on, expected at least one to write {output}")
    with atomic_path(output) as temporary:
        temporary.write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8")
    print(f"Train with: --datalist {shlex.quote(str(output))} --dataset_dir {shlex.quote(str(root.absolute()))}")
