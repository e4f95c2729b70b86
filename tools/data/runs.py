"""The scans and cases of a run, as configs ask for them: found or listed, checked, and split."""

from __future__ import annotations

import logging
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import ignite.distributed as idist

from tools.common.text import parse_bool
from tools.data.cases import SECTIONS, Case, find_cases
from tools.data.datalists import datalist_items, read_datalist
from tools.data.inspection import Scan, inspect_scans
from tools.data.scans import ScanError, find_scans, is_dicom, paths_of, root_of
from tools.data.splits import label_subset, sort_cases, split_by_layout, split_scans

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class TrainingCases:
    """The cases of a run, as items for a data set."""

    training: list[Case]
    validation: list[Case]
    test: list[Case]

    def section(self, name: str) -> list[Case]:
        """The cases of a section, which must not be empty.

        Raises:
            ScanError: there is no such section, or nothing in it.
        """
        cases = getattr(self, name) if name in SECTIONS else None
        if not cases:
            found = f"{name!r}" if cases is None else f"no case in {name!r}"
            full = [section for section in SECTIONS if getattr(self, section)]
            raise ScanError(f"evaluated: found {found}, expected {' or '.join(full)} (`test` needs a data list)")
        return cases


def find_training_cases(
    dataset_dir: str,
    datalist: str | None,
    layout: str,
    modalities: Sequence[str] | None,
    fold: int | None,
    folds: int,
    split_seed: int,
    label_fraction: float,
    seed: int,
) -> TrainingCases:
    """Cases of a data set or of a data list, split; the same on all ranks.

    Args:
        dataset_dir: folder of the data set, or that the paths of the data list are relative to.
        datalist: JSON with `training` and optionally `validation` and `test`, or None.
        layout: of `dataset_dir`, as in `find_cases`; ignored with a data list.
        modalities: names of the channels, for the layout brats.
        fold: that validates, unless the data list has a `validation`. None: as in `split_by_layout`.
        folds: number of folds.
        split_seed: of the folds.
        label_fraction: share of the training cases that is taken.
        seed: of that share.

    Returns:
        The cases. `test` are those of the data list that have a label.

    Raises:
        ScanError: nothing found, files without their counterpart, or a list or split that cannot be made.
    """
    if datalist:
        training, validation = (_labelled_cases(datalist, dataset_dir, part) for part in ("training", "validation"))
        test = [case for case in datalist_items(datalist, dataset_dir, "test", labels=True) if "label" in case]
    else:
        training, validation, test = find_cases(dataset_dir, layout, modalities), [], []
    if not validation:
        training, validation, _ = split_by_layout(training, layout, fold, folds, split_seed)
    _warn_of_overlap(training, [*validation, *test])
    return TrainingCases(label_subset(training, label_fraction, seed), sort_cases(validation), sort_cases(test))


def _labelled_cases(datalist: str | Path, dataset_dir: str | Path | None, section: str) -> list[Case]:
    """Read a section of a data list, each of whose entries needs a label.

    Raises:
        ScanError: as `read_datalist`, or entries have no label; names them.
    """
    cases = read_datalist(datalist, dataset_dir, section, labels=True)
    without = [
        f"entry {number} (counted from 0, {', '.join(paths_of(case))})"
        for number, case in enumerate(cases)
        if "label" not in case
    ]
    if without:
        raise ScanError(f"{datalist}: {section!r}: no label in {', '.join(without)}, expected 'label' in every entry")
    return cases


def _warn_of_overlap(training: list[Case], others: list[Case]) -> None:
    seen = {tuple(paths_of(case)) for case in training}
    both = [", ".join(paths_of(case)) for case in others if tuple(paths_of(case)) in seen]
    if both:
        logger.warning("%d cases are trained on and evaluated, too (first: %s)", len(both), both[0])


def channel_lines(case: Mapping[str, Any], modalities: Sequence[str] | None) -> list[tuple[str, str]]:
    """Which file, or which volume of a 4D file, is taken for which channel: a wrong order is seen nowhere else."""
    if not modalities:
        return []
    paths = paths_of(case)
    if len(paths) == len(modalities):
        return [("channels", ", ".join(f"{n} {path}" for n, path in zip(modalities, paths, strict=True)))]
    return [("channels", f"{', '.join(modalities)}: the volumes of {paths[0]} must be in this order")]


def scan_root(dataset_dir: str | Path, datalist: str | Path | None) -> str:
    """Folder below which results keep the folders of the scans, found without looking for scans.

    That is `dataset_dir` (or the folder around it, if it is a DICOM series itself); with a data list, whose paths may
    lead anywhere, the deepest folder that holds all its `test` scans.
    """
    if datalist:
        return root_of(datalist_items(datalist, dataset_dir, "test"))
    folder = Path(dataset_dir)
    series = folder.is_dir() and any(is_dicom(folder, file.name) for file in folder.iterdir() if file.is_file())
    return str(folder.absolute().parent if series else folder)  # absolute: the parent of "." is "."


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
    if parse_bool(skip_unreadable):
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
        label_values: values that a label may hold beside 0; None: labels are ignored.

    Raises:
        ScanError: naming the unusable scans, each with its reason.
    """
    if not items:
        raise ScanError("found no scan to work on, expected at least one in dataset_dir, or in the datalist's section")
    items = [{"image": item["image"]} for item in items] if label_values is None else items
    scans = _inspect(items, channels, workers, remember, label_values)
    bad = [scan for scan in scans if scan.problem is not None]
    if bad:
        listed = "\n".join(f"  {scan.name}: {scan.problem}" for scan in bad[:10])
        more = f"\n  … and {len(bad) - 10} more" if len(bad) > 10 else ""
        way_out = (
            "`python -m tools check` lists all and writes a data list without them; "
            "`--skip_unreadable true` trains without them"
            if label_values is None
            else "`python -m tools check --bundle BUNDLE` lists all and writes a data list without them"
        )
        raise ScanError(f"{len(bad)} of {len(scans)} scans cannot be used:\n{listed}{more}\n{way_out}")
    return scans
