"""Finds cases for segmentation and pairs their images and labels.

Files are found by name only; `tools.data.inspection` reads them.
"""

from __future__ import annotations

import logging
import re
from collections import Counter, defaultdict
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from tools.data.datalists import datalist_items, is_nnunet, load_datalist, read_datalist
from tools.data.kinds import kind_of
from tools.data.outputs import name_outputs, output_root
from tools.data.rasters import voxel_file
from tools.data.scans import (
    EXTENSIONS,
    ScanError,
    contents_text,
    find_scans,
    kinds_text,
    paths_of,
    require_folder,
    scan_paths,
    stem_of,
    walk,
)

logger = logging.getLogger(__name__)

Case = dict[str, Any]  # {"image": path, or a list with one path per channel; "label": path}

SECTIONS = ("training", "validation", "test")
NIFTI = (".nii", ".nii.gz")
SAME_CHANNEL = (("t1", "t1n"), ("t1ce", "t1c", "t1gd"), ("t2", "t2w"), ("flair", "t2f"))  # names in BraTS, by year
FOLDERS = (("imagesTr", "labelsTr"), ("images", "labels"))
CHANNEL = re.compile(r"(.+)_(\d{4})")  # in nnU-Net, the name of a case and the number of the channel
SEGMENTATION = re.compile(r"[_-]segm?$", re.IGNORECASE)  # Segm: one case of BraTS 2020


@dataclass(frozen=True)
class Pairing:
    """The cases in a folder, and the problems with its other files."""

    cases: list[Case] = field(default_factory=list)
    problems: list[str] = field(default_factory=list)  # one sentence each


# ---------------------------------------------------------------------------------------------- finding cases


def find_cases(dataset_dir: str | Path, layout: str, modalities: Sequence[str] | None = None) -> list[Case]:
    """Find the cases of a data set in its published layout.

    Layouts:
        btcv: images `img0001.nii.gz` and labels `label0001.nii.gz` at any depth, paired by number. Folders in which no
            image has a label are test sets, which are skipped.
        brats: `X_MODALITY.nii.gz` for each modality and `X_seg.nii.gz` in one folder, at any depth. Folders of several
            cases without any label are test sets, which are skipped.
        msd: the `training` entries of `dataset.json`; if it lists none (nnU-Net) or is missing, files of the same name
            in `imagesTr` and `labelsTr`, or `images` and `labels`. As in nnU-Net, the name of an image may end in the
            number of its channel: X_0000 and X_0001 belong to the label X.

    Args:
        dataset_dir: folder of the data set; the paths of the cases start with it.
        layout: one of the above.
        modalities: names of the channels in order; for brats.

    Returns:
        The cases, sorted by the path of their image.

    Raises:
        ScanError: the folder or the layout does not exist, there is no case, or files have no counterpart; the message
            lists all of them.
    """
    found = pair_cases(dataset_dir, layout, modalities)
    if found.problems:
        listed = "\n".join(f"  {problem}" for problem in found.problems)
        raise ScanError(f"dataset_dir: {dataset_dir}: {len(found.problems)} problem(s) with its cases:\n{listed}")
    return found.cases


def pair_cases(dataset_dir: str | Path, layout: str, modalities: Sequence[str] | None = None) -> Pairing:
    """Do as `find_cases`, but return the problems with files; raise only if there is neither a case nor a problem."""
    if layout not in LAYOUTS:
        raise ScanError(f"layout: found {layout!r}, expected one of {', '.join(LAYOUTS)}")
    root = require_folder(dataset_dir)
    pair, expected = LAYOUTS[layout]
    found = pair(root, modalities)
    if not found.cases and not found.problems:
        raise ScanError(f"dataset_dir: found no labelled case but {contents_text(root)} in {root}, expected {expected}")
    _say_passed_over(root, found)
    return Pairing(sorted(found.cases, key=paths_of), found.problems)


def _say_passed_over(root: Path, found: Pairing) -> None:
    """Count the files that are in no case, by kind; `imagesTs` and `dataset.json` have other uses."""
    paths = [Path(path) for case in found.cases for path in (*paths_of(case), case["label"])]
    taken = {*paths, *map(voxel_file, paths)}
    others = Counter(
        kind_of(name)
        for folder, names in walk(root)
        for name in names
        if folder / name not in taken and folder.name != "imagesTs" and name != "dataset.json"
    )
    if others:
        logger.warning("%s: %d files are in no case: %s", root, others.total(), kinds_text(others))


def _pair_btcv(root: Path, modalities: Sequence[str] | None) -> Pairing:
    files: dict[str, dict[int, list[Path]]] = {"img": defaultdict(list), "label": defaultdict(list)}
    for folder, names in walk(root):
        for name in sorted(names):
            if match := re.fullmatch(r"(img|label)(\d+)\.nii(\.gz)?", name):
                files[match[1]][int(match[2])].append(folder / name)
    images, labels = files["img"], files["label"]
    labelled = {path.parent for number in images.keys() & labels.keys() for path in images[number]}
    left_out = [path for number in images.keys() - labels.keys() for path in images[number]]
    _say_left_out([path for path in left_out if path.parent not in labelled])
    found = Pairing()
    for path in sorted(path for path in left_out if path.parent in labelled):
        found.problems.append(f"{path} has no label, expected {path.name.replace('img', 'label')}")
    for number in sorted(labels.keys() - images.keys()):
        for path in labels[number]:
            found.problems.append(f"{path} has no image, expected {path.name.replace('label', 'img')}")
    for number in sorted(images.keys() & labels.keys()):
        both = images[number], labels[number]
        found.problems.extend(_ambiguous(paths) for paths in both if len(paths) > 1)
        found.cases.append({"image": str(both[0][0]), "label": str(both[1][0])})
    return found


def _ambiguous(paths: Iterable[Path]) -> str:
    return f"{' and '.join(map(str, paths))} are the same part of one case, expected one file"


def _say_left_out(scans: Iterable[Path]) -> None:
    """Log the folders of scans without labels: the test sets of challenges."""
    folders = defaultdict(list)
    for path in scans:
        folders[path.parent].append(path)
    for folder, paths in sorted(folders.items()):
        logger.warning("%s: %d scans without labels are left out: they seem to be a test set", folder, len(paths))


def _pair_brats(root: Path, modalities: Sequence[str] | None) -> Pairing:
    if not modalities:
        raise ScanError(f"modalities: found {modalities!r}, expected names of the channels, as [t1, t1ce, t2, flair]")
    nifti = [folder / name for folder, names in walk(root) for name in sorted(names) if name.endswith(NIFTI)]
    groups, rest = _by_modality(nifti, [*modalities, "seg"])
    siblings = defaultdict(list)  # cases in the same parent folder, each in its own folder
    for case in groups:
        siblings[case.parent.parent].append(case)
    unlabelled = [group for group in siblings.values() if not any("seg" in groups[case] for case in group)]
    test = {case for group in unlabelled if len(group) > 1 for case in group}
    _say_left_out(case.parent for case in test)
    found = Pairing()
    for case, parts in sorted(groups.items()):
        if case in test:
            continue
        missing = [part for part in (*modalities, "seg") if part not in parts]
        if missing:
            others = [*(path for paths in parts.values() for path in paths), *rest]
            names = ", ".join(path.name for path in others if path.parent == case.parent)
            expected = " and ".join(f"{case.name}_{part}.nii.gz" for part in missing)
            found.problems.append(f"{case} has no {_kinds(missing)}: expected {expected}, found {names}")
        found.problems.extend(_ambiguous(paths) for paths in parts.values() if len(paths) > 1)
        if not missing:
            images = [str(parts[modality][0]) for modality in modalities]
            found.cases.append({"image": images, "label": str(parts["seg"][0])})
    return found


def _kinds(parts: Sequence[str]) -> str:
    return " and no ".join("label" if part == "seg" else part for part in parts)


def _by_modality(
    paths: Iterable[Path], modalities: Sequence[str]
) -> tuple[dict[Path, dict[str, list[Path]]], list[Path]]:
    """Group files by the part of their name before the modality, as in `X_t1`, or its name in another year of BraTS.

    Returns:
        Path of the group (`folder/X`) → modality → files; and the files whose names end in no modality.
    """
    groups: dict[Path, dict[str, list[Path]]] = defaultdict(lambda: defaultdict(list))
    rest = []
    meaning = {other: name for name in modalities for other in _other_names(name) if other not in modalities}
    meaning |= {name: name for name in modalities}
    endings = "|".join(map(re.escape, sorted(meaning, key=len, reverse=True)))
    renamed = set()
    for path in paths:
        if match := re.fullmatch(rf"(.+?)[_-]({endings})", stem_of(path)):
            groups[path.parent / match[1]][meaning[match[2]]].append(path)
            renamed |= {match[2]} - {meaning[match[2]]}
        else:
            rest.append(path)
    if renamed:
        said = ", ".join(f"{other} as {meaning[other]}" for other in sorted(renamed))
        logger.warning("channels are named as in another year of BraTS: %s", said)
    return groups, rest


def _other_names(modality: str) -> Sequence[str]:
    return next((names for names in SAME_CHANNEL if modality in names), ())


def _pair_msd(root: Path, modalities: Sequence[str] | None) -> Pairing:
    folders = next((pair for pair in FOLDERS if any((root / name).is_dir() for name in pair)), FOLDERS[0])
    images, labels = (_files_of_folder(root / name) for name in folders)
    if not (root / "dataset.json").is_file() or is_nnunet(load_datalist(root / "dataset.json")):
        return _pair_by_name(images, labels, *folders)
    found = Pairing()
    listed = datalist_items(root / "dataset.json", root, "training", labels=True)
    for case in listed:
        missing = [path for path in (*paths_of(case), case.get("label")) if path and not Path(path).exists()]
        found.problems.extend(f"{path} does not exist, but dataset.json lists it" for path in missing)
        if "label" not in case:
            found.problems.append(f"{', '.join(paths_of(case))} has no label in dataset.json, expected 'label'")
        elif not missing:
            found.cases.append(case)
    known = {Path(path) for case in listed for path in (*paths_of(case), case.get("label")) if path}
    for path in [*images, *labels]:
        if path not in known:
            found.problems.append(f"{path} has no entry in dataset.json, expected one (or give a datalist)")
    return found


def _files_of_folder(folder: Path) -> list[Path]:
    paths = sorted(folder.iterdir()) if folder.is_dir() else []
    return [path for path in paths if path.name.lower().endswith(EXTENSIONS) and not path.name.startswith(".")]


def _first_names(paths: Sequence[Path]) -> str:
    return ", ".join(path.name for path in paths[:3]) + ", …" * (len(paths) > 3)


def _pair_by_name(images: list[Path], labels: list[Path], image_folder: str, label_folder: str) -> Pairing:
    found = Pairing()
    if not labels:
        return found
    by_name = {stem_of(path): path for path in labels}
    cases: dict[str, dict[str, list[Path]]] = defaultdict(lambda: defaultdict(list))  # name → channel → files
    for path in images:
        match = CHANNEL.fullmatch(stem_of(path))
        numbered = match is not None and stem_of(path) not in by_name and match[1] in by_name
        name, channel = match.groups() if numbered else (stem_of(path), "")
        cases[name][channel].append(path)
    if images and not cases.keys() & by_name.keys():
        found.problems.append(
            f"no image and label share a name: found {_first_names(images)} in {image_folder} and "
            f"{_first_names(labels)} in {label_folder}, expected the label X.nii.gz of each image X.nii.gz (or of "
            "X_0000.nii.gz, X_0001.nii.gz …): rename them, or give a datalist"
        )
        return found
    channels = sorted({channel for name in cases.keys() & by_name.keys() for channel in cases[name]})
    for name, files in cases.items():
        paths = [path for channel in sorted(files) for path in files[channel]]
        missing = [channel for channel in channels if channel not in files]
        if name not in by_name:
            found.problems.extend(f"{path} has no label, expected {path.name} in {label_folder}" for path in paths)
        elif missing:
            expected = " and ".join(f"{name}_{channel}" if channel else name for channel in missing)
            names = ", ".join(path.name for path in paths)
            found.problems.append(f"{name} lacks channels that others have: found {names}, expected {expected} too")
        elif len(paths) > len(channels):
            found.problems.extend(_ambiguous(twice) for twice in files.values() if len(twice) > 1)
        else:
            image = [str(path) for path in paths]
            found.cases.append({"image": image if len(image) > 1 else image[0], "label": str(by_name[name])})
    for path in labels:
        if stem_of(path) not in cases:
            found.problems.append(f"{path} has no image, expected {path.name} in {image_folder}")
    return found


LAYOUTS: dict[str, tuple[Callable[[Path, Sequence[str] | None], Pairing], str]] = {
    "btcv": (_pair_btcv, "img0001.nii.gz with label0001.nii.gz, and so on, at any depth"),
    "brats": (_pair_brats, "folders X with X_MODALITY.nii.gz for each modality, and X_seg.nii.gz"),
    "msd": (_pair_msd, "dataset.json, or files of the same names in imagesTr and labelsTr, or images and labels"),
}


# --------------------------------------------------------------------------------------------- for the bundles


def find_inference_scans(
    dataset_dir: str, datalist: str | None, modalities: Sequence[str] | None = None, dicom_series: str = "refuse"
) -> list[dict[str, Any]]:
    """Find scans to segment; labels are not needed.

    Args:
        dataset_dir: folder of scans, or base folder of the paths in the data list.
        datalist: JSON file whose `test` scans are used, or None.
        modalities: names of the channels in order, if each has a separate file: files whose names end in them
            (`X_t1.nii.gz`) are combined to one scan, those that end in `_seg` are skipped, and each other file is a
            scan (4D files).
        dicom_series: what is done with a folder of several DICOM series, as in `find_scans`; not used with a data list
            or with modalities.

    Returns:
        One `{"image": path or paths, "output": name of its results}` per scan, as in `name_outputs`; in the order of
        the data list, or sorted by path.

    Raises:
        ScanError: there is no scan, the data list is not readable, or channels of a scan are missing.
    """
    found = pair_inference_scans(dataset_dir, datalist, modalities, dicom_series)
    if datalist:
        read_datalist(datalist, dataset_dir, "test")  # names the files that do not exist
    if found.problems:
        listed = "\n".join(f"  {problem}" for problem in found.problems)
        raise ScanError(f"dataset_dir: {dataset_dir}: {len(found.problems)} problem(s) with its scans:\n{listed}")
    return found.cases


def pair_inference_scans(
    dataset_dir: str, datalist: str | None, modalities: Sequence[str] | None = None, dicom_series: str = "refuse"
) -> Pairing:
    """Do as `find_inference_scans`, but return the problems with files."""
    if datalist:
        scans = datalist_items(datalist, dataset_dir, "test")
        if not scans:
            raise ScanError(f"{datalist}: found no scan in the section 'test', expected at least one")
        return Pairing(name_outputs(scans))
    found = _combine_channels(dataset_dir, modalities) if modalities else Pairing(find_scans(dataset_dir, dicom_series))
    return Pairing(name_outputs(found.cases, output_root(dataset_dir)), found.problems)


def _combine_channels(dataset_dir: str, modalities: Sequence[str]) -> Pairing:
    paths = [Path(path) for path in scan_paths(dataset_dir) if not SEGMENTATION.search(stem_of(path))]
    groups, rest = _by_modality(paths, modalities)
    found = Pairing([{"image": str(path)} for path in rest])
    for case, parts in groups.items():
        missing = [modality for modality in modalities if modality not in parts]
        twice = [_ambiguous(files) for files in parts.values() if len(files) > 1]
        found.problems.extend(twice)
        if missing:
            names = ", ".join(path.name for files in parts.values() for path in files)
            expected = f"expected all of {', '.join(modalities)}"
            found.problems.append(f"{case} has no {_kinds(missing)}: found {names}, {expected}")
        elif not twice:
            found.cases.append({"image": [str(parts[modality][0]) for modality in modalities]})
    return Pairing(sorted(found.cases, key=paths_of), found.problems)
