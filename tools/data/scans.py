"""Finds scans by their names; `tools.data.inspection` reads them."""

from __future__ import annotations

import logging
import os
import re
from collections.abc import Iterator
from io import FileIO
from pathlib import Path

logger = logging.getLogger(__name__)

EXTENSIONS = (".nii", ".nii.gz", ".mha", ".mhd", ".nrrd")
RAW = (".raw", ".zraw")  # the voxels of a .mhd


class ScanError(ValueError):
    """Scans or a data list are wrong; the message says what was found and what was expected."""


# ---------------------------------------------------------------------------------------------- finding scans


def find_scans(dataset_dir: str | Path) -> list[dict]:
    """Find every scan below a folder: files with one of `EXTENSIONS`, and folders with a DICOM series.

    Hidden files and folders are skipped, for instance `._scan.nii.gz` of macOS.

    Returns:
        One `{"image": path}` per scan, sorted by path. Paths start with the argument `dataset_dir`.

    Raises:
        ScanError: the folder does not exist or contains no scan.
    """
    scans = scan_paths(dataset_dir)
    _warn_of_labels(scans, Path(dataset_dir))
    return [{"image": path} for path in scans]


def scan_paths(dataset_dir: str | Path) -> list[str]:
    """Return the sorted paths of `find_scans`, without its warning about labels."""
    root = require_folder(dataset_dir)
    scans: list[str] = []
    others = 0
    for folder, names in walk(root):
        rest = [name for name in names if not name.lower().endswith(EXTENSIONS)]
        scans += [str(folder / name) for name in names if name.lower().endswith(EXTENSIONS)]
        if any(is_dicom(folder, name) for name in rest):
            scans.append(str(folder))
        else:
            others += len(rest)
    if not scans:
        raise ScanError(
            f"dataset_dir: found no scan in {root} but {others} other files, expected files that end in "
            f"{', '.join(EXTENSIONS)} or folders that hold a DICOM series"
        )
    return sorted(scans)


def require_folder(dataset_dir: str | Path) -> Path:
    """Return the folder of a data set as a path.

    Raises:
        ScanError: the folder does not exist.
    """
    root = Path(dataset_dir)
    if not root.is_dir():
        found = "is a file" if root.exists() else "does not exist"
        raise ScanError(f"dataset_dir: {root} {found}, expected a folder of scans")
    return root


def walk(root: Path) -> Iterator[tuple[Path, list[str]]]:
    """Yield every visible folder once, with the names of its visible files; follows links."""
    seen = set()
    for folder, subfolders, names in os.walk(root, followlinks=True, onerror=lambda e: logger.warning("%s", e)):
        status = Path(folder).stat()
        if (status.st_dev, status.st_ino) in seen:
            subfolders.clear()
            continue
        seen.add((status.st_dev, status.st_ino))
        subfolders[:] = sorted(name for name in subfolders if not name.startswith("."))
        yield Path(folder), [name for name in names if not name.startswith(".")]


def is_dicom(folder: Path, name: str) -> bool:
    """Whether a file of the folder is DICOM, by its first bytes."""
    if name.upper() == "DICOMDIR" or name.lower().endswith(RAW):  # DICOMDIR is a table of contents
        return False
    try:
        with FileIO(f"{folder}{os.sep}{name}") as file:  # Path takes twice the time for 100,000 files
            return file.read(132)[128:] == b"DICM"
    except OSError:
        return False


def _warn_of_labels(scans: list[str], root: Path) -> None:
    pattern = re.compile(r"label|mask|segmentation|[_./-]seg([_./-]|$)", re.IGNORECASE)
    labels = [path for path in scans if pattern.search(path[len(str(root)) :])]
    if labels:
        logger.warning(
            "%d of the %d scans found in %s look like labels by their names (first: %s), but are used as scans. "
            "Pass a folder that contains only images, or a datalist.",
            len(labels),
            len(scans),
            root,
            labels[0],
        )


def stem_of(path: str | Path) -> str:
    """Name of a scan's file without its extension, or name of a DICOM folder."""
    name = Path(path).name
    extension = next((extension for extension in EXTENSIONS if name.lower().endswith(extension)), "")
    return name[: len(name) - len(extension)]


def contents_text(folder: Path) -> str:
    """Name the first files and folders of a folder."""
    names = sorted(f"{path.name}/" if path.is_dir() else path.name for path in folder.iterdir())
    return ", ".join(names[:10]) + (f" and {len(names) - 10} more" if len(names) > 10 else "") if names else "nothing"


# ----------------------------------------------------------------------------------------- reading data lists


def paths_of(item: dict) -> list[str]:
    """Image files of an item: one, or one per channel."""
    image = item["image"]
    return [str(path) for path in image] if isinstance(image, list | tuple) else [str(image)]


def files_of(item: dict) -> list[str]:
    """Image files of an item, and its label if it has one."""
    return paths_of(item) + ([str(item["label"])] if "label" in item else [])


def root_of(items: list[dict]) -> str:
    """Return the deepest folder that contains all scans."""
    return os.path.commonpath([Path(path).absolute().parent for item in items for path in paths_of(item)])
