"""Finds scans, reads data lists of them, and splits them into training and validation.

Looking into the scans is in `tools.inspection`.
"""

from __future__ import annotations

import json
import logging
import os
import random
import re
from collections.abc import Iterator
from io import FileIO
from pathlib import Path

logger = logging.getLogger(__name__)

EXTENSIONS = (".nii", ".nii.gz", ".mha", ".mhd", ".nrrd")
RAW = (".raw", ".zraw")  # the voxels of a .mhd


class ScanError(ValueError):
    """Scans, or a list of them, are not what was expected; the message says what was found."""


# ---------------------------------------------------------------------------------------------- finding scans


def find_scans(dataset_dir: str | Path) -> list[dict]:
    """Find every scan below a folder: files with one of `EXTENSIONS`, and folders that hold a DICOM series.

    Hidden files and folders are left out, macOS's `._scan.nii.gz` among them.

    Returns:
        One `{"image": path}` for each scan, sorted by path. Paths start with `dataset_dir` as it was given.

    Raises:
        ScanError: there is no such folder, or no scan in it.
    """
    scans = scan_paths(dataset_dir)
    _warn_of_labels(scans, Path(dataset_dir))
    return [{"image": path} for path in scans]


def scan_paths(dataset_dir: str | Path) -> list[str]:
    """Do as `find_scans`, without a word about labels among the scans; return the sorted paths."""
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
    """Return the folder of a data set.

    Raises:
        ScanError: there is none.
    """
    root = Path(dataset_dir)
    if not root.is_dir():
        found = "is a file" if root.exists() else "does not exist"
        raise ScanError(f"dataset_dir: {root} {found}, expected a folder of scans")
    return root


def walk(root: Path) -> Iterator[tuple[Path, list[str]]]:
    """Yield every folder that is not hidden with the names of its files; follows links, each folder once."""
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
        with FileIO(f"{folder}{os.sep}{name}") as file:  # for 100,000 files: Path takes twice the time
            return file.read(132)[128:] == b"DICM"
    except OSError:
        return False


def _warn_of_labels(scans: list[str], root: Path) -> None:
    pattern = re.compile(r"label|mask|segmentation|[_./-]seg([_./-]|$)", re.IGNORECASE)
    labels = [path for path in scans if pattern.search(path[len(str(root)) :])]
    if labels:
        logger.warning(
            "%d of the %d scans found in %s look like labels by their names (first: %s), but they are taken for "
            "scans. Give the folder that holds images only, or a datalist.",
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


def read_datalist(
    datalist: str | Path, dataset_dir: str | Path | None, section: str, labels: bool = False
) -> list[dict]:
    """Read one section of a Decathlon-style JSON file, and see that its files exist.

    Args:
        datalist: the JSON file. Entries are paths, or objects whose `image` is a path or a list of paths
            (one for each channel), and whose `label` is a path; other keys of an entry are left out.
        dataset_dir: folder that relative paths start from; None for the folder of the datalist.
        section: `training`, `validation` or `test`.
        labels: keep the labels of the entries that have one.

    Returns:
        One `{"image": path or list of paths}`, with `labels` also `"label": path`, for each entry, in the order of
        the file; an empty list if the section is missing and is not `training`.

    Raises:
        ScanError: no such file, not JSON, an entry of another form, no training entry, or missing files.
    """
    items = datalist_items(datalist, dataset_dir, section, labels)
    missing = [path for item in items for path in files_of(item) if not Path(path).exists()]
    if missing:
        first = ", ".join(missing[:10]) + (f" and {len(missing) - 10} more" if len(missing) > 10 else "")
        raise ScanError(
            f"{datalist}: {section!r}: {len(missing)} {'image or label' if labels else 'image'} files do not exist: "
            f"{first}; expected them below {_base(datalist, dataset_dir)}"
        )
    return items


def datalist_items(
    datalist: str | Path, dataset_dir: str | Path | None, section: str, labels: bool = False
) -> list[dict]:
    """Do as `read_datalist`, but take files that do not exist, too."""
    content = load_datalist(datalist)
    if section not in content:
        if section == "training":
            raise ScanError(f"{datalist}: found the keys {sorted(content)}, expected 'training' among them")
        return []
    entries = content[section]
    if not isinstance(entries, list) or (section == "training" and not entries):
        found = "an empty list" if entries == [] else type(entries).__name__
        raise ScanError(f"{datalist}: {section!r}: found {found}, expected a list of entries")
    base = _base(datalist, dataset_dir)
    items = []
    for number, entry in enumerate(entries):
        where = f"{datalist}: {section!r}, entry {number} (counted from 0)"
        items.append({"image": _entry_image(entry, base, where)})
        if labels and isinstance(entry, dict) and entry.get("label") is not None:
            items[-1]["label"] = _entry_label(entry["label"], base, where)
    return items


def load_datalist(datalist: str | Path) -> dict:
    """Read the whole JSON object of a data list.

    Raises:
        ScanError: no such file, or not a JSON object.
    """
    path = Path(datalist)
    if not path.is_file():
        raise ScanError(
            f"datalist: {path} {'is a folder' if path.is_dir() else 'does not exist'}, expected a JSON file"
        )
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:  # neither JSON nor UTF-8
        raise ScanError(f"{path}: found text that is not JSON ({error}), expected a JSON object") from error
    if not isinstance(content, dict):
        raise ScanError(f"{path}: found {type(content).__name__}, expected an object with the key 'training'")
    return content


def _base(datalist: str | Path, dataset_dir: str | Path | None) -> Path:
    return Path(datalist).parent if dataset_dir is None else Path(dataset_dir)


def _entry_image(entry: object, base: Path, where: str) -> str | list[str]:
    image = entry
    if isinstance(entry, dict):
        if "image" not in entry:
            raise ScanError(f"{where}: found the keys {sorted(entry)}, expected 'image' among them")
        image = entry["image"]
    if isinstance(image, str) and image:
        return str(base / image)
    if isinstance(image, list) and image and all(isinstance(path, str) and path for path in image):
        return [str(base / path) for path in image]
    raise ScanError(f"{where}: found the image {image!r}, expected a path or a list of paths")


def _entry_label(label: object, base: Path, where: str) -> str:
    if isinstance(label, str) and label:
        return str(base / label)
    raise ScanError(f"{where}: found the label {label!r}, expected a path")


def paths_of(item: dict) -> list[str]:
    """Image files of an item: one, or one for each channel."""
    image = item["image"]
    return [str(path) for path in image] if isinstance(image, list | tuple) else [str(image)]


def files_of(item: dict) -> list[str]:
    """Image files of an item, and its label if it has one."""
    return paths_of(item) + ([str(item["label"])] if "label" in item else [])


def root_of(items: list[dict]) -> str:
    """The deepest folder that holds all scans."""
    return os.path.commonpath([Path(path).absolute().parent for item in items for path in paths_of(item)])


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


def split_scans(items: list[dict], val_fraction: float, seed: int) -> tuple[list[dict], list[dict]]:
    """Divide scans into training and validation, at least one each.

    The same set of scans and the same seed give the same parts, whatever the order of `items`. A scan that is
    listed twice stays on one side.

    Returns:
        Training and validation items, each sorted by path.

    Raises:
        ScanError: fewer than two different scans, or `val_fraction` is not between 0 and 1.
    """
    if not 0 < val_fraction < 1:
        raise ScanError(f"val_fraction: found {val_fraction}, expected a number between 0 and 1, both excluded")
    names = sorted({tuple(paths_of(item)) for item in items})
    if len(names) < 2:
        raise ScanError(f"found {len(names)} different scans, expected at least 2: one to train and one to validate")
    count = min(max(round(val_fraction * len(names)), 1), len(names) - 1)
    chosen = set(random.Random(seed).sample(names, count))
    training = [item for item in items if tuple(paths_of(item)) not in chosen]
    validation = [item for item in items if tuple(paths_of(item)) in chosen]
    return sorted(training, key=paths_of), sorted(validation, key=paths_of)
