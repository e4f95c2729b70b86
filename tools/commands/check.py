"""Reads every scan of a folder or data list and lists all that are unusable for training, with the reasons.

With a bundle, also reads the labels, as in the training of the bundle.
"""

from __future__ import annotations

import os
import shlex
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from monai.bundle import ConfigParser

from tools.common.files import write_json
from tools.common.text import axis_ranges, parse_bool
from tools.data.cases import pair_cases, pair_inference_scans
from tools.data.classes import Classes, absent_classes, label_values, other_year_of_brats
from tools.data.datalists import datalist_items, load_datalist
from tools.data.hounsfield import doubtful_values
from tools.data.inspection import MAX_SCAN_GB, Scan, inspect_scans
from tools.data.runs import channel_lines
from tools.data.scans import ScanError, files_of
from tools.data.splits import split_by_layout

COUNTS = {"training": "numTraining", "validation": "numValidation", "test": "numTest"}  # Decathlon's keys
SETTINGS = ("in_channels", "classes", "layout", "modalities", "fold", "folds", "split_seed")  # keys of a bundle


@dataclass(frozen=True)
class _Found:
    """The scans to read.

    Attributes:
        content: data list, or a list of the scans in the folder in this form.
        items: scans of each section, in the order of `content`.
        root: base folder of the paths of `content`.
        training: scans that a bundle will train on.
        problems: problems with the names of files, each in one sentence.
    """

    content: dict[str, Any]
    items: dict[str, list[dict]]
    root: Path
    training: list[dict] = field(default_factory=list)
    problems: list[str] = field(default_factory=list)


def check(
    dataset_dir: str | None = None,
    datalist: str | None = None,
    channels: int | None = None,
    output: str | None = None,
    workers: int = 4,
    bundle: str | None = None,
    dicom_series: str = "refuse",
    max_scan_gb: float = MAX_SCAN_GB,
    hounsfield: bool | None = None,
    modalities: Sequence[str] | None = None,
    classes: Classes | None = None,
) -> None:
    """Read every scan; print the unusable ones with the reasons, and a summary.

    Args:
        dataset_dir: folder of scans; with a data list, the base folder of its relative paths.
        datalist: Decathlon-style JSON file, whose `training`, `validation` and `test` are read.
        channels: number of input channels of the network; None: one, or one for each of the modalities.
        output: JSON file to write: a data list without the unusable scans.
        workers: number of processes that read; 0 reads in this process.
        bundle: folder of a segmentation bundle: every case needs a label, which is read too. The expected data are
            taken from its `configs/train.yaml`, and `channels` is ignored.
        dicom_series: a folder of several DICOM series: `refuse` it, take `each` as a scan, or the `largest` alone.
        max_scan_gb: the largest file that is read, by its voxels.
        hounsfield: whether the scans are CT in HU, to warn of those whose values cannot be; None: as the bundle says,
            without one for a single channel.
        modalities: names of the channels, if each has a separate file, as "[t1,t1ce,t2,flair]"; instead of the
            bundle's.
        classes: class name → label values, as "{TC:[1,3],WT:[1,2,3],ET:[3]}"; instead of the bundle's.

    Raises:
        ScanError: there is neither a folder nor a data list, it contains no scan, or none is usable for `output`.
        SystemExit: status 1, if some scans are unusable and there is no `output`.
    """
    if datalist is None and dataset_dir is None:
        raise ScanError("check: found neither --dataset_dir nor --datalist, expected one of them")
    settings = None if bundle is None else _settings(Path(bundle))
    if settings is None:
        channels = channels or len(modalities or [1])
    else:
        settings |= {k: v for k, v in {"modalities": modalities, "classes": classes}.items() if v is not None}
    found = _find(dataset_dir, datalist, settings, modalities, dicom_series)
    items = [item for part in found.items.values() for item in part]
    if settings is None:
        scans = inspect_scans(items, channels, workers, max_scan_gb=max_scan_gb)
    else:
        values = label_values(settings["classes"])
        scans = inspect_scans(items, settings["in_channels"], workers, None, values, max_scan_gb)
        scans = _require_labels(found.items, scans)
    bad = [scan for scan in scans if scan.problem is not None]
    problems = found.problems + [f"{scan.name}: {scan.problem}" for scan in bad]
    lines = [] if settings is None else _bundle_lines(found, scans, settings)
    if hounsfield is None:
        hounsfield = (channels or len(modalities or [1])) == 1 if settings is None else settings["hounsfield"]
    if parse_bool(hounsfield):
        lines += [f"WARNING    {line}" for line in doubtful_values(scans)]
    print("\n".join([*problems, summary(scans), *lines]))
    if output is not None:
        _write(output, _good_entries(found.content, found.items, scans), found.root)
    elif problems:
        raise SystemExit(1)


def _settings(bundle: Path) -> dict[str, Any]:
    """Read the settings of a segmentation bundle that describe its data.

    Raises:
        ScanError: the bundle does not exist, or is not for segmentation.
    """
    config = bundle / "configs/train.yaml"
    if not config.is_file():
        raise ScanError(f"--bundle: {config} does not exist, expected the folder of a bundle for segmentation")
    parser = ConfigParser(ConfigParser.load_config_file(config))
    missing = [key for key in SETTINGS if key not in parser]
    if missing:
        raise ScanError(f"--bundle: {config} has no {', '.join(missing)}, expected a bundle for segmentation")
    return {key: parser.get_parsed_content(key) for key in SETTINGS} | {"hounsfield": parser.get("hounsfield", False)}


def _find(
    dataset_dir: str | None,
    datalist: str | None,
    settings: dict[str, Any] | None,
    modalities: Sequence[str] | None,
    dicom_series: str,
) -> _Found:
    """Find the scans, with labels if there are settings of a bundle."""
    if datalist is not None:
        root = Path(datalist).parent if dataset_dir is None else Path(dataset_dir)
        content, problems = load_datalist(datalist), []
        items = {section: datalist_items(datalist, dataset_dir, section, settings is not None) for section in COUNTS}
    else:
        root = Path(dataset_dir)
        if settings is None:
            pairing = pair_inference_scans(root, None, modalities, dicom_series)
        else:
            pairing = pair_cases(root, settings["layout"], settings["modalities"])
        cases, problems = pairing.cases, list(pairing.problems)
        content = {"name": root.absolute().name, "training": [_entry(case, root) for case in cases]}
        items = {"training": cases}
    if settings is None:
        return _Found(content, items, root, problems=problems)
    training = items["training"]
    if not items.get("validation"):
        try:
            split = [settings[key] for key in ("layout", "fold", "folds", "split_seed")]
            training, _, _ = split_by_layout(training, *split)
        except ScanError as error:
            problems.append(str(error))
    return _Found(content, items, root, training, problems)


def _require_labels(items: dict[str, list[dict]], scans: list[Scan]) -> list[Scan]:
    """Mark scans without a label as unusable, except test scans; scans are in the order of the items."""
    needed = [section != "test" and "label" not in item for section, part in items.items() for item in part]
    fault = "has no label in the data list, expected one to train with"
    return [
        replace(scan, problem=fault) if none and scan.problem is None else scan
        for none, scan in zip(needed, scans, strict=True)
    ]


def _entry(case: dict, root: Path) -> dict:
    """Entry of a data list for a case."""
    paths = [Path(os.path.relpath(path, root)).as_posix() for path in files_of(case)]
    label = {"label": paths.pop()} if "label" in case else {}
    return {"image": paths if isinstance(case["image"], list) else paths[0], **label}


def _bundle_lines(found: _Found, scans: list[Scan], settings: dict[str, Any]) -> list[str]:
    """Report the number of checked labels, the file of each channel, and classes that no training case contains."""
    labelled = [scan for scan in scans if scan.labels]
    values = sorted({value for scan in labelled for value in scan.labels})
    lines = [("labels", f"{len(labelled)} checked, values {', '.join(map(str, values)) or 'none'}")]
    first = found.items["training"][:1]
    lines += [line for case in first for line in channel_lines(case, settings["modalities"])]
    trained = [scan for item, scan in zip(found.items["training"], scans, strict=False) if item in found.training]
    absent = absent_classes(trained, settings["classes"])
    if absent:
        lines.append(("WARNING", f"no training case holds {', '.join(absent)}: this cannot be learnt"))
    if hint := other_year_of_brats(scans, settings["classes"]):
        lines.append(("WARNING", hint))
    return [f"{name:11}{text}" for name, text in lines]


def summary(scans: Sequence[Scan]) -> str:
    """Format the number of readable scans, the ranges of shape, spacing and intensity, and doubts about their place."""
    good = [scan for scan in scans if scan.problem is None]
    lines = [f"scans      {len(good)} readable, {len(scans) - len(good)} unreadable"]
    if good:
        low, high = min(scan.low for scan in good), max(scan.high for scan in good)
        lines += [
            f"shape      {axis_ranges([scan.shape for scan in good])} voxels",
            f"spacing    {axis_ranges([scan.spacing for scan in good])} mm",
            f"intensity  {low:g} to {high:g}",
            *(f"WARNING    {scan.name}: {scan.doubt}" for scan in good if scan.doubt),
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
    write_json(output, content)
    print(f"Train with: --datalist {shlex.quote(str(output))} --dataset_dir {shlex.quote(str(root.absolute()))}")
