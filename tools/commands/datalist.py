"""Writes data lists for the four public CT sets of HybridMIM's pre-training, and for labelled data sets.

A data list is a Decathlon-style JSON file with relative paths, so that it works on any machine.
"""

from __future__ import annotations

import os
import shlex
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from fnmatch import fnmatch
from pathlib import Path
from typing import Any

from tools.common.files import write_json
from tools.data.cases import Case, find_cases
from tools.data.datalists import load_datalist
from tools.data.rasters import voxel_file
from tools.data.scans import ScanError, contents_text, files_of, paths_of
from tools.data.splits import label_subset, split_by_layout
from tools.samples.anatomy import ABDOMEN_LABELS, BRAIN_LABELS, CHANNELS


@dataclass(frozen=True)
class Layout:
    """Location of the scans in a published data set.

    Attributes:
        option: name of the command's option.
        name: name of the data set.
        folders: patterns of folder names; a folder may be at any depth.
        files: pattern of the scans in such a folder, which must not match labels.
    """

    option: str
    name: str
    folders: tuple[str, ...]
    files: str

    def __str__(self) -> str:
        return " or ".join(f"{folder}/{self.files}" for folder in self.folders)


LAYOUTS = (
    Layout("luna16", "LUNA16", ("subset[0-9]",), "*.mhd"),  # not seg-lungs-LUNA16/*.mhd
    Layout("flare21", "FLARE2021", ("TrainingImg", "ValidationImg"), "*.nii.gz"),
    Layout("covid19", "COVID-19-20", ("Train", "Validation"), "*_ct.nii.gz"),  # not *_seg.nii.gz
    Layout("atm22", "ATM22", ("imagesTr",), "*.nii.gz"),
)


def pretrain(
    output: str,
    luna16: str | None = None,
    flare21: str | None = None,
    covid19: str | None = None,
    atm22: str | None = None,
) -> None:
    """Write the data list for pre-training from any of the paper's four CT sets, and print the number of scans.

    Args:
        output: JSON file to write.
        luna16: folder of LUNA16 (`subset0` to `subset9`).
        flare21: folder of FLARE2021 (`TrainingImg`, `ValidationImg`).
        covid19: folder of COVID-19-20 (`Train`, `Validation`).
        atm22: folder of ATM22 (`imagesTr`, also inside `TrainBatch1` and the like).

    Raises:
        ScanError: there is no option, or a folder without scans in the layout of its data set.
    """
    given = {"luna16": luna16, "flare21": flare21, "covid19": covid19, "atm22": atm22}
    folders = {option: Path(folder).absolute() for option, folder in given.items() if folder is not None}
    if not folders:
        raise ScanError(f"datalist: found no data set, expected at least one of --{', --'.join(given)}")
    scans = {layout: find(layout, folders[layout.option]) for layout in LAYOUTS if layout.option in folders}
    root = _common_folder(list(folders.values()))
    write_json(output, _pretrain_content(scans, root))
    for layout, paths in scans.items():
        print(f"{layout.name:12}{len(paths):6} scans in {folders[layout.option]}")
    print(f"{'together':12}{sum(map(len, scans.values())):6} scans, listed in {output} relative to {root}")
    _say_how_to_train(output, root)


def find(layout: Layout, folder: Path) -> list[Path]:
    """Find the scans of a data set, sorted; skip and print those without voxels.

    Raises:
        ScanError: the folder does not exist or contains no scan.
    """
    if not folder.is_dir():
        state = "is a file" if folder.exists() else "does not exist"
        raise ScanError(f"--{layout.option}: {folder} {state}, expected the folder of {layout.name}")
    found = sorted(path for place in _places(layout, folder) for path in _scans(layout, place))
    without_voxels = [path for path in found if not voxel_file(path).exists()]
    for path in without_voxels:
        print(f"Left out: {path} has no voxels, its data file {voxel_file(path)} does not exist")
    scans = sorted(set(found) - set(without_voxels))
    if not scans:
        raise ScanError(f"--{layout.option}: found {contents_text(folder)} in {folder}, expected scans at {layout}")
    return scans


def _places(layout: Layout, folder: Path) -> Iterator[Path]:
    for place, subfolders, _ in os.walk(folder, followlinks=True):
        subfolders[:] = [name for name in subfolders if not name.startswith(".")]
        if any(fnmatch(Path(place).name, pattern) for pattern in layout.folders):
            yield Path(place)


def _scans(layout: Layout, place: Path) -> list[Path]:
    return [path for path in place.glob(layout.files) if path.is_file() and not path.name.startswith(".")]


def _common_folder(folders: list[Path]) -> Path:
    try:
        return Path(os.path.commonpath(folders))
    except ValueError as error:  # two drives of Windows
        raise ScanError(f"datalist: found {', '.join(map(str, folders))}, expected folders on one drive") from error


def _pretrain_content(scans: dict[Layout, list[Path]], root: Path) -> dict[str, Any]:
    training = [{"image": path.relative_to(root).as_posix()} for paths in scans.values() for path in paths]
    return {
        "name": "hybridmim_pretrain",
        "description": f"CT scans for pre-training: {', '.join(layout.name for layout in scans)}",
        "numTraining": len(training),
        "sources": {layout.option: len(paths) for layout, paths in scans.items()},
        "training": training,
    }


def _say_how_to_train(output: str, root: Path) -> None:
    print(f"Train with: --datalist {shlex.quote(str(output))} --dataset_dir {shlex.quote(str(root))}")


# ----------------------------------------------------------------------------------------------- labelled sets


def btcv(
    dataset_dir: str,
    output: str,
    fold: int | None = None,
    folds: int = 5,
    seed: int = 0,
    test_cases: int = 0,
    label_fraction: float = 1.0,
) -> None:
    """Write the data list of BTCV (`img0001.nii.gz` with `label0001.nii.gz`), and print the number of cases.

    This is the split that a bundle uses for `dataset_dir` with the same settings.

    Args:
        dataset_dir: folder of the data set.
        output: JSON file to write.
        fold: number of the validation fold, from 0. None: the standard split (24 training cases; img0035 to img0040 for
            validation), or fold 0 if the cases differ.
        folds: number of folds.
        seed: random seed of the folds and of `label_fraction`.
        test_cases: number of test cases; above 0, the standard split is not used.
        label_fraction: fraction of the training cases, above 0, at most 1.

    Raises:
        ScanError: there is no case, files have no counterpart, or the split is impossible.
    """
    settings = {"fold": fold, "folds": folds, "seed": seed, "test_cases": test_cases}
    _labelled("btcv", dataset_dir, output, None, settings, label_fraction)


def brats(
    dataset_dir: str,
    output: str,
    fold: int = 0,
    folds: int = 5,
    seed: int = 0,
    test_cases: int = 0,
    label_fraction: float = 1.0,
) -> None:
    """Write the data list of BraTS (`X/X_t1.nii.gz`, t1ce, t2, flair, seg); arguments and errors as `btcv`.

    The channels of each image are t1, t1ce, t2, flair, in this order.
    """
    settings = {"fold": fold, "folds": folds, "seed": seed, "test_cases": test_cases}
    _labelled("brats", dataset_dir, output, CHANNELS, settings, label_fraction)


def msd(
    dataset_dir: str,
    output: str,
    fold: int = 0,
    folds: int = 5,
    seed: int = 0,
    test_cases: int = 0,
    label_fraction: float = 1.0,
) -> None:
    """Write the data list of a task of the Decathlon (`dataset.json`); arguments and errors as `btcv`."""
    settings = {"fold": fold, "folds": folds, "seed": seed, "test_cases": test_cases}
    _labelled("msd", dataset_dir, output, None, settings, label_fraction)


def _labelled(
    layout: str,
    dataset_dir: str,
    output: str,
    modalities: Sequence[str] | None,
    settings: dict[str, int | None],
    label_fraction: float,
) -> None:
    cases = find_cases(dataset_dir, layout, modalities)
    training, validation, test = split_by_layout(cases, layout, **settings)
    training = label_subset(training, label_fraction, settings["seed"])
    root = Path(dataset_dir)
    parts = {"training": training, "validation": validation, "test": test}
    settings["label_fraction"] = label_fraction
    content = {
        "name": root.absolute().name,
        "description": f"Layout {layout}; {', '.join(f'{name} {value}' for name, value in settings.items())}",
        **_labels(layout, root),
        "numTraining": len(training),
        "numValidation": len(validation),
        "numTest": len(test),
        **{name: [_relative(case, root) for case in part] for name, part in parts.items()},
    }
    write_json(output, content)
    for name, part in parts.items():
        first = ", ".join(Path(paths_of(case)[0]).name for case in part[:3])
        print(f"{name:12}{len(part):6} cases{': ' * bool(part)}{first}{', …' * (len(part) > 3)}")
    print(f"{'together':12}{sum(map(len, parts.values())):6} of {len(cases)} cases, listed in {output}")
    _say_how_to_train(output, root.absolute())


def _labels(layout: str, root: Path) -> dict[str, Mapping[str, str]]:
    """Entry `labels` of the data list (label value → name), if the names are known."""
    if layout == "msd":
        description = root / "dataset.json"
        content = load_datalist(description) if description.is_file() else {}
        return {"labels": content["labels"]} if "labels" in content else {}
    names = {0: "background", **(ABDOMEN_LABELS if layout == "btcv" else BRAIN_LABELS)}
    return {"labels": {str(value): name for value, name in names.items()}}


def _relative(case: Case, root: Path) -> Case:
    *images, label = [Path(path).relative_to(root).as_posix() for path in files_of(case)]
    return {"image": images if isinstance(case["image"], list) else images[0], "label": label}
