"""Data lists for the four public CT sets that HybridMIM was pre-trained on.

A data list is a Decathlon-style JSON file with relative paths, so that it can be shared and read anywhere.
"""

from __future__ import annotations

import json
import os
import shlex
from collections.abc import Iterator
from dataclasses import dataclass
from fnmatch import fnmatch
from pathlib import Path

from tools.files import atomic_path
from tools.inspection import raw_file
from tools.scans import ScanError


@dataclass(frozen=True)
class Layout:
    """Where a data set, as its authors publish it, keeps its scans.

    Attributes:
        option: name of the command's option.
        name: name of the data set.
        folders: patterns of the folders' names; a folder may lie at any depth.
        files: pattern of the scans in such a folder; what it must not take are labels.
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
    """Write the data list for pre-training from any of the paper's four CT sets, and print what it holds.

    Args:
        output: the JSON file to write.
        luna16: folder of LUNA16 (`subset0` to `subset9`).
        flare21: folder of FLARE2021 (`TrainingImg`, `ValidationImg`).
        covid19: folder of COVID-19-20 (`Train`, `Validation`).
        atm22: folder of ATM22 (`imagesTr`, also inside `TrainBatch1` and the like).

    Raises:
        ScanError: no set given, or a folder that holds no scan where its set keeps them.
    """
    given = {"luna16": luna16, "flare21": flare21, "covid19": covid19, "atm22": atm22}
    folders = {option: Path(folder).absolute() for option, folder in given.items() if folder is not None}
    if not folders:
        raise ScanError(f"datalist: found no data set, expected at least one of --{', --'.join(given)}")
    scans = {layout: find(layout, folders[layout.option]) for layout in LAYOUTS if layout.option in folders}
    root = _common_folder(list(folders.values()))
    _write(output, scans, root)
    for layout, paths in scans.items():
        print(f"{layout.name:12}{len(paths):6} scans in {folders[layout.option]}")
    print(f"{'together':12}{sum(map(len, scans.values())):6} scans, listed in {output} relative to {root}")
    print(f"Train with: --datalist {shlex.quote(str(output))} --dataset_dir {shlex.quote(str(root))}")


def find(layout: Layout, folder: Path) -> list[Path]:
    """Find the scans of a data set, sorted; print those without voxels, and leave them out.

    Raises:
        ScanError: no such folder, or no scan in it.
    """
    if not folder.is_dir():
        state = "is a file" if folder.exists() else "does not exist"
        raise ScanError(f"--{layout.option}: {folder} {state}, expected the folder of {layout.name}")
    found = sorted(path for place in _places(layout, folder) for path in _scans(layout, place))
    without_voxels = [path for path in found if (raw := raw_file(path)) is not None and not raw.exists()]
    for path in without_voxels:
        print(f"Left out: {path} has no voxels, its data file {raw_file(path)} does not exist")
    scans = sorted(set(found) - set(without_voxels))
    if not scans:
        raise ScanError(f"--{layout.option}: found {_contents(folder)} in {folder}, expected scans at {layout}")
    return scans


def _places(layout: Layout, folder: Path) -> Iterator[Path]:
    for place, subfolders, _ in os.walk(folder, followlinks=True):
        subfolders[:] = [name for name in subfolders if not name.startswith(".")]
        if any(fnmatch(Path(place).name, pattern) for pattern in layout.folders):
            yield Path(place)


def _scans(layout: Layout, place: Path) -> list[Path]:
    return [path for path in place.glob(layout.files) if path.is_file() and not path.name.startswith(".")]


def _contents(folder: Path) -> str:
    names = sorted(f"{path.name}/" if path.is_dir() else path.name for path in folder.iterdir())
    return ", ".join(names[:10]) + (f" and {len(names) - 10} more" if len(names) > 10 else "") if names else "nothing"


def _common_folder(folders: list[Path]) -> Path:
    try:
        return Path(os.path.commonpath(folders))
    except ValueError as error:  # two drives of Windows
        raise ScanError(f"datalist: found {', '.join(map(str, folders))}, expected folders on one drive") from error


def _write(output: str, scans: dict[Layout, list[Path]], root: Path) -> None:
    training = [{"image": path.relative_to(root).as_posix()} for paths in scans.values() for path in paths]
    content = {
        "name": "hybridmim_pretrain",
        "description": f"CT scans for pre-training: {', '.join(layout.name for layout in scans)}",
        "numTraining": len(training),
        "sources": {layout.option: len(paths) for layout, paths in scans.items()},
        "training": training,
    }
    with atomic_path(output) as temporary:
        temporary.write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8")
