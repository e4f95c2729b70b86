"""Finds, checks and splits the scans and cases of a run; called from configs."""

from __future__ import annotations

import logging
import shlex
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property, partial
from pathlib import Path
from typing import Any

import ignite.distributed as idist

from tools.common.ranks import in_shares
from tools.common.text import first_lines, parse_bool
from tools.data.cases import SECTIONS, Case, find_cases, find_inference_scans, pair_inference_scans
from tools.data.datalists import datalist_items, read_datalist
from tools.data.hounsfield import doubtful_values
from tools.data.inspection import MAX_SCAN_GB, Scan, inspect_scans, save_scans
from tools.data.scans import ScanError, find_scans, paths_of, root_of
from tools.data.splits import label_subset, sort_cases, split_by_layout, split_scans

logger = logging.getLogger(__name__)


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
    dicom_series: str = "refuse",
    max_scan_gb: float = MAX_SCAN_GB,
) -> TrainingScans:
    """Find the scans of a folder or of a data list, split into training and validation; the same on all ranks.

    Args:
        dataset_dir: folder that is searched, or base folder of the paths in the data list.
        datalist: JSON file with `training` and optionally `validation`, or None.
        channels: number of channels that each scan must have.
        val_fraction: fraction of the scans for validation; not used if the data list has `validation`.
        seed: random seed of the split.
        skip_unreadable: whether to read all scans now and exclude unusable ones.
        workers: number of processes that read scans.
        remember: JSON file with the results of earlier checks, so that unchanged scans are not read again.
        dicom_series: what is done with a folder of several DICOM series, as in `find_scans`.
        max_scan_gb: the largest file that is read, by its voxels.

    Raises:
        ScanError: there is no scan, the list is not readable, or the split is impossible.
    """
    training = read_datalist(datalist, dataset_dir, "training") if datalist else find_scans(dataset_dir, dicom_series)
    validation = read_datalist(datalist, dataset_dir, "validation") if datalist else []
    left_out: list[Scan] = []
    if parse_bool(skip_unreadable):
        training, bad = _usable(training, channels, workers, remember, max_scan_gb)
        validation, bad_validation = _usable(validation, channels, workers, remember, max_scan_gb)
        left_out = bad + bad_validation
    if not validation:
        training, validation = split_scans(training, val_fraction, seed)
    return TrainingScans(training, validation, left_out)


def _usable(
    items: list[dict[str, Any]], channels: int, workers: int, remember: str, max_scan_gb: float
) -> tuple[list[dict[str, Any]], list[Scan]]:
    scans = _inspect(items, channels, workers, remember, None, max_scan_gb)
    usable = [item for item, scan in zip(items, scans, strict=True) if scan.problem is None]
    return usable, [scan for scan in scans if scan.problem is not None]


@dataclass
class InferenceScans:
    """The scans to segment, with the names of their results, as in `find_inference_scans`; found when first needed.

    Attributes:
        dataset_dir: folder of scans, or base folder of the paths in the data list.
        datalist: JSON file whose `test` scans are used, or None.
        modalities: names of the channels in order, if each has a separate file.
        channels: number of channels that each scan must have.
        skip_unreadable: whether to read all scans when they are found, and to leave the unusable ones out.
        workers: number of processes that read scans.
        remember: JSON file with the results of earlier checks.
        dicom_series: what is done with a folder of several DICOM series, as in `find_scans`.
        max_scan_gb: the largest file that is read, by its voxels.
        left_out: the unusable scans, each with the reason.
    """

    dataset_dir: str
    datalist: str | None
    modalities: Sequence[str] | None
    channels: int
    skip_unreadable: bool
    workers: int
    remember: str
    dicom_series: str = "refuse"
    max_scan_gb: float = MAX_SCAN_GB
    left_out: list[str] = field(default_factory=list, init=False)

    @cached_property
    def usable(self) -> list[dict[str, Any]]:
        """The scans.

        Raises:
            ScanError: there is no usable scan, the data list is not readable, or, without `skip_unreadable`, channels
                of a scan are missing.
        """
        where = self.dataset_dir, self.datalist, self.modalities, self.dicom_series
        if not parse_bool(self.skip_unreadable):
            return find_inference_scans(*where)
        found = pair_inference_scans(*where)
        usable, bad = _usable(found.cases, self.channels, self.workers, self.remember, self.max_scan_gb)
        self.left_out = [*found.problems, *(f"{scan.name}: {scan.problem}" for scan in bad)]
        if not usable:
            raise ScanError(f"none of {len(self.left_out)} scans can be used:\n{first_lines(self.left_out)}")
        return usable


@dataclass(frozen=True)
class TrainingCases:
    """The cases of a run, as items for a data set."""

    training: list[Case]
    validation: list[Case]
    test: list[Case]

    def section(self, name: str) -> list[Case]:
        """Return the cases of a section.

        Raises:
            ScanError: the section does not exist or is empty.
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
    """Find and split the cases of a data set or of a data list; the same on all ranks.

    Args:
        dataset_dir: folder of the data set, or base folder of the paths in the data list.
        datalist: JSON file with `training` and optionally `validation` and `test`, or None.
        layout: layout of `dataset_dir`, as in `find_cases`; not used with a data list.
        modalities: names of the channels, for the layout brats.
        fold: number of the validation fold; not used if the data list has `validation`. None: as in `split_by_layout`.
        folds: number of folds.
        split_seed: random seed of the folds.
        label_fraction: fraction of the training cases to use.
        seed: random seed that selects this fraction.

    Returns:
        The cases. `test` has the test cases of the data list that have a label.

    Raises:
        ScanError: there is no case, files have no counterpart, the list is not readable, or the split is impossible.
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
    """Read a section of a data list in which every entry needs a label.

    Raises:
        ScanError: as in `read_datalist`, or entries have no label; the message lists them.
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
        logger.warning("%d cases are used for both training and evaluation (first: %s)", len(both), both[0])


def _inspect(
    items: Sequence[dict[str, Any]],
    channels: int,
    workers: int,
    remember: str,
    label_values: Sequence[int] | None,
    max_scan_gb: float,
) -> list[Scan]:
    look = partial(
        inspect_scans,
        channels=channels,
        workers=workers,
        remember=Path(remember),
        label_values=label_values,
        max_scan_gb=max_scan_gb,
    )
    scans = in_shares(look, items)
    if idist.get_rank() == 0 and idist.get_world_size() > 1:  # processes that saved at once may have lost some
        save_scans(items, scans, channels, Path(remember), label_values)
    return scans


def require_usable(
    items: Sequence[dict[str, Any]],
    channels: int,
    workers: int,
    remember: str,
    label_values: Sequence[int] | None = None,
    max_scan_gb: float = MAX_SCAN_GB,
    hounsfield: bool | str = False,
) -> list[Scan]:
    """Check that all scans are usable and return their properties.

    Args:
        items: scans, with or without `label`.
        channels: number of channels that each scan must have.
        workers: number of processes that read scans.
        remember: JSON file with the results of earlier checks, so that unchanged scans are not read again.
        label_values: label values that are allowed in addition to 0; None: labels are not read.
        max_scan_gb: the largest file that is read, by its voxels.
        hounsfield: whether the values should be HU; scans whose values cannot be are warned of.

    Raises:
        ScanError: scans are unusable; the message lists them with the reasons.
    """
    if not items:
        raise ScanError("found no scan to work on, expected at least one in dataset_dir, or in the datalist's section")
    items = [{"image": item["image"]} for item in items] if label_values is None else items
    scans = _inspect(items, channels, workers, remember, label_values, max_scan_gb)
    bad = [scan for scan in scans if scan.problem is not None]
    if bad:
        listed = first_lines(f"{scan.name}: {scan.problem}" for scan in bad)
        way_out = (
            "`python -m tools check --bundle BUNDLE` lists all and writes a data list without them"
            if any("label" in item for item in items)
            else f"`{_check_command(items, channels)}` lists all; `--skip_unreadable true` goes on without them"
        )
        raise ScanError(f"{len(bad)} of {len(scans)} scans cannot be used:\n{listed}\n{way_out}")
    _warn_of_doubts(scans)
    if parse_bool(hounsfield) and idist.get_rank() == 0:
        for line in doubtful_values(scans):
            logger.warning("%s", line)
    return scans


def _check_command(items: Sequence[dict[str, Any]], channels: int) -> str:
    """Command that checks scans without labels; where each channel has a file, it reads each as a scan."""
    own = channels if len(paths_of(items[0])) == 1 else 1
    folder = shlex.quote(root_of(items))
    return f"python -m tools check --dataset_dir {folder}" + (f" --channels {own}" if own > 1 else "")


def _warn_of_doubts(scans: Sequence[Scan]) -> None:
    """Name the scans whose headers contradict themselves about their place, once (rank 0)."""
    doubts = [f"{scan.name}: {scan.doubt}" for scan in scans if scan.doubt]
    if doubts and idist.get_rank() == 0:
        logger.warning("%d scans have headers that leave their place in doubt:\n%s", len(doubts), first_lines(doubts))


def channel_lines(case: Mapping[str, Any], modalities: Sequence[str] | None) -> list[tuple[str, str]]:
    """Rows of the start table with the file, or the volume of a 4D file, of each channel, to check their order."""
    if not modalities:
        return []
    paths = paths_of(case)
    if len(paths) == len(modalities):
        return [("channels", ", ".join(f"{n} {path}" for n, path in zip(modalities, paths, strict=True)))]
    return [("channels", f"{', '.join(modalities)}: the volumes of {paths[0]} must be in this order")]
