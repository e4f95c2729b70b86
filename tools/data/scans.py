"""Finds scans by their names; `tools.data.inspection` reads them."""

from __future__ import annotations

import logging
import os
import re
from collections import Counter
from collections.abc import Iterator
from pathlib import Path

from tools.data.dicom import no_scan, read_header, series_in
from tools.data.kinds import DATA, EXTENSIONS, SERIES_NAME, UnfitError, is_dicom, kind_of

logger = logging.getLogger(__name__)

DICOM_SERIES = ("refuse", "each", "largest")  # what is done with a folder of several


class ScanError(ValueError):
    """Scans or a data list are wrong; the message says what was found and what was expected."""


# ---------------------------------------------------------------------------------------------- finding scans


def find_scans(dataset_dir: str | Path, dicom_series: str = "refuse") -> list[dict]:
    """Find every scan below a folder: files with one of `EXTENSIONS`, and DICOM series.

    Hidden files and folders are skipped, for instance `._scan.nii.gz` of macOS. One warning counts the files that are
    no scans, by kind.

    Args:
        dataset_dir: folder that is searched.
        dicom_series: what is done with a folder of several DICOM series: `refuse` takes the folder as one scan, which
            the check then refuses; `each` takes each as a scan `FOLDER/UID`; `largest` that with most slices.

    Returns:
        One `{"image": path}` per scan, sorted by path. Paths start with the argument `dataset_dir`.

    Raises:
        ScanError: the folder does not exist or contains no scan.
    """
    scans = scan_paths(dataset_dir, dicom_series)
    _warn_of_labels(scans, Path(dataset_dir))
    return [{"image": path} for path in scans]


def scan_paths(dataset_dir: str | Path, dicom_series: str = "refuse") -> list[str]:
    """Return the sorted paths of `find_scans`, without its warning about labels."""
    if dicom_series not in DICOM_SERIES:
        raise ScanError(f"dicom_series: found {dicom_series!r}, expected one of {', '.join(DICOM_SERIES)}")
    root = require_folder(dataset_dir)
    scans: list[str] = []
    others: Counter[str] = Counter()
    for folder, names in walk(root):
        taken = {name for name in names if _is_scan(folder, name, names)}
        scans += [str(folder / name) for name in taken]
        rest = [name for name in names if name not in taken]
        slices = {name for name in rest if is_dicom(folder, name)}
        scans += _series_paths(folder, sorted(slices), dicom_series, others)
        voxels = {name for name in rest if _is_data_of(name, taken)}
        others.update(kind_of(name) for name in rest if name not in slices | voxels)
    if not scans:
        raise ScanError(
            f"dataset_dir: found no scan in {root} but {others.total()} other files ({kinds_text(others)}), expected "
            f"files that end in {', '.join(EXTENSIONS)} or folders that hold a DICOM series"
        )
    if others:
        logger.warning("%s: %d files are not taken as scans: %s", root, others.total(), kinds_text(others))
    return sorted(scans)


def kinds_text(others: Counter[str]) -> str:
    """Counts of files by kind, most frequent first: `12 .img, 3 .txt`."""
    return ", ".join(f"{count} {kind}" for kind, count in others.most_common())


def _is_scan(folder: Path, name: str, names: list[str]) -> bool:
    """Whether a file is a scan by its name; a `.hdr` is one if its `.img` is there."""
    if not name.lower().endswith(EXTENSIONS):
        return False
    return not name.lower().endswith(".hdr") or any(name[:-4] + end in names for end in (".img", ".img.gz"))


def _is_data_of(name: str, taken: set[str]) -> bool:
    """Whether a file seems to hold the voxels of one of these, by its name."""
    stem = next((name[: -len(end)] for end in DATA if name.lower().endswith(end)), None)
    return stem is not None and any(f"{stem}{end}" in taken for end in (".mhd", ".nhdr", ".hdr"))


def _series_paths(folder: Path, slices: list[str], dicom_series: str, others: Counter[str]) -> list[str]:
    """Paths of the DICOM scans in a folder; counts in `others` what is none."""
    if dicom_series == "refuse":
        kinds: Counter[str] = Counter()
        for name in slices:  # up to the first image: the check reads the others
            header = read_header(folder / name)
            kind = None if header is None else no_scan(header)
            if kind is None:
                return [str(folder)]
            kinds[f"DICOM {kind}"] += 1
        others.update(kinds)
        return []
    if not slices:
        return []
    try:
        series, objects = series_in(folder)
    except UnfitError:  # the check says why
        return [str(folder)]
    others.update({f"DICOM {kind}": count for kind, count in objects.items()})
    if len(series) <= 1:
        return [str(folder)] * len(series)
    chosen = series if dicom_series == "each" else series[:1]
    passed_over = len(series) - len(chosen)
    logger.warning(
        "%s: %d DICOM series, %s: %s",
        folder,
        len(series),
        f"of which {passed_over} are not taken" if passed_over else "each a scan",
        "; ".join(map(str, series)),
    )
    return [str(folder / one.name) for one in chosen]


def series_folder(path: str | Path) -> Path:
    """Folder of one of its DICOM series, `FOLDER/UID`; of any other scan, its own path."""
    path = Path(path)
    return path.parent if SERIES_NAME.fullmatch(path.name) and not path.exists() else path


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
