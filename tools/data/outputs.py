"""Decides what the results of each scan are called, before anything runs.

No two scans share a name, and no name leads out of the folder of the results.
"""

from __future__ import annotations

import os
import re
import unicodedata
from collections import Counter
from collections.abc import Mapping, Sequence
from itertools import takewhile
from pathlib import Path
from typing import Any

from tools.data.scans import is_dicom, paths_of, stem_of

LONGEST = 200  # bytes of a name, so that endings fit: most file systems allow 255


def name_outputs(scans: Sequence[Mapping[str, Any]], root: str | Path | None = None) -> list[dict[str, Any]]:
    """Add `output` to each scan: the name of its results, below any folder.

    This is its path below `root`, without the extension of its (first) file; for a scan elsewhere, only its name. Names
    that would be equal, also for file systems that do not tell cases apart, get the extension as well (`case_nii_gz`,
    `case_mha`); if they still are, `_2`, `_3` and so on.

    Args:
        scans: items, as `{"image": path}`.
        root: folder of all scans; None for the deepest that contains them.
    """
    paths = [_normal(paths_of(scan)[0]) for scan in scans]
    root = _common_folder(paths) if root is None else _normal(root)
    below = [path.relative_to(root) if root in path.parents else Path(path.name or "scan") for path in paths]
    stems = [path.with_name(_cut(stem_of(path))).as_posix() for path in below]
    whole = [path.with_name(_cut(_whole_name(path))).as_posix() for path in below]
    shared = Counter(map(_folded, stems))
    names = [long if shared[_folded(short)] > 1 else short for short, long in zip(stems, whole, strict=True)]
    return [{**scan, "output": name} for scan, name in zip(scans, _numbered(names), strict=True)]


def output_root(dataset_dir: str | Path) -> Path:
    """Root folder for `name_outputs`: the folder of scans, or the parent of a folder that is a DICOM series itself."""
    folder = Path(dataset_dir).absolute()  # the parent of "." is "."
    series = folder.is_dir() and any(is_dicom(folder, file.name) for file in folder.iterdir() if file.is_file())
    return folder.parent if series else folder


def output_name(item: Mapping[str, Any], path: str | Path) -> str:
    """Name of the results of a scan; one that a client passes without a name is called as its file."""
    return item.get("output") or _cut(stem_of(path))


def case_names(paths: Sequence[tuple[str, str]]) -> list[str]:
    """Return short, unique names of cases.

    The first of these that is unique for all cases: the common start of the names of image and label file
    (`BraTS20_001` of `BraTS20_001_t1.nii.gz` and `BraTS20_001_seg.nii.gz`), the image's name without extension, the
    name of its folder, its whole path.

    Args:
        paths: image (the first of several channel files) and label of each case.
    """
    images = [Path(image) for image, _ in paths]
    choices = (
        [_common_start(stem_of(image), stem_of(label)) for image, label in paths],
        [stem_of(image) for image in images],
        [image.absolute().parent.name for image in images],
        ["_".join(image.parts).lstrip("/_") for image in images],
    )
    chosen = next((c for c in choices if all(c) and len({*map(_folded, c)}) == len(c)), choices[-1])
    return _numbered([_cut(name) for name in chosen])


def _common_start(image: str, label: str) -> str:
    """Return the common start of two names, in whole words: `scan_1` and `seg_1` have none."""
    pairs = zip(*(re.split(r"([_.-])", name) for name in (image, label)), strict=False)
    return "".join(word for word, _ in takewhile(lambda pair: pair[0] == pair[1], pairs)).rstrip("_.-")


def _normal(path: str | Path) -> Path:
    """Absolute path without `..`; links keep their names."""
    return Path(os.path.normpath(Path(path).expanduser().absolute()))


def _common_folder(paths: Sequence[Path]) -> Path:
    try:
        return Path(os.path.commonpath([path.parent for path in paths]))
    except ValueError:  # no scan, or drives of Windows
        return Path()


def _whole_name(path: Path) -> str:
    """Name of a file with its extension as a part of the name: `case_nii_gz`."""
    stem = stem_of(path)
    return stem + path.name[len(stem) :].replace(".", "_")


def _cut(name: str) -> str:
    """A name that is short enough and no `..`, which the stem of `...nii.gz` would be."""
    name = os.fsencode(name)[:LONGEST].decode(errors="ignore")
    return name if name.strip(".") else f"scan{name}"


def _folded(name: str) -> str:
    """A name as a file system sees it that does not tell upper from lower case or composed letters apart."""
    return unicodedata.normalize("NFC", name).casefold()


def _numbered(names: Sequence[str]) -> list[str]:
    """Make names distinct: the second of equal ones ends in `_2`, and so on."""
    taken, all_names = set(), {*map(_folded, names)}
    distinct = []
    for name in names:
        number, new = 1, name
        while _folded(new) in taken or (number > 1 and _folded(new) in all_names):
            number += 1
            new = f"{name}_{number}"
        taken.add(_folded(new))
        distinct.append(new)
    return distinct
