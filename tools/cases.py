"""Cases for segmentation, that is scans with their labels: finds and pairs them, and splits them.

Files are found by name alone; looking into them is in `tools.inspection`.
"""

from __future__ import annotations

import logging
import random
import re
from collections import Counter, defaultdict
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import groupby
from pathlib import Path
from typing import Any

from tools.inspection import Scan
from tools.scans import (
    EXTENSIONS,
    ScanError,
    contents_text,
    datalist_items,
    find_scans,
    paths_of,
    read_datalist,
    require_folder,
    root_of,
    scan_paths,
    stem_of,
    walk,
)

logger = logging.getLogger(__name__)

Case = dict[str, Any]  # {"image": path or paths, one for each channel; "label": path}

SECTIONS = ("training", "validation", "test")
NIFTI = (".nii", ".nii.gz")
BTCV_TRAINING = (*range(1, 11), *range(21, 35))  # numbers of the usual split, as most papers report it
BTCV_VALIDATION = tuple(range(35, 41))
SEGMENTATION = re.compile(r"[_-]segm?$", re.IGNORECASE)  # Segm: one case of BraTS 2020


@dataclass(frozen=True)
class Pairing:
    """What a folder holds: cases, and what keeps other files from being one."""

    cases: list[Case] = field(default_factory=list)
    problems: list[str] = field(default_factory=list)  # one sentence each


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


# ---------------------------------------------------------------------------------------------- finding cases


def find_cases(dataset_dir: str | Path, layout: str, modalities: Sequence[str] | None = None) -> list[Case]:
    """Find the cases of a data set in the layout in which it is published.

    Layouts:
        btcv: images `img0001.nii.gz` and labels `label0001.nii.gz` at any depth, paired by number. Images in a
            folder none of whose images has a label are test scans, which are left out.
        brats: `X_MODALITY.nii.gz` for each modality and `X_seg.nii.gz` in one folder, at any depth. Cases that lie
            beside one another, of which none has a label, are a test set, which is left out.
        msd: the `training` entries of `dataset.json`; without it, files of the same name in `imagesTr` and
            `labelsTr`.

    Args:
        dataset_dir: folder of the data set. Paths of the cases start with it as it was given.
        layout: one of the above.
        modalities: names of the channels in their order; for brats.

    Returns:
        The cases, sorted by the path of their image.

    Raises:
        ScanError: no such folder or layout, no case, or files without their counterpart; names all of them.
    """
    found = pair_cases(dataset_dir, layout, modalities)
    if found.problems:
        listed = "\n".join(f"  {problem}" for problem in found.problems)
        raise ScanError(f"dataset_dir: {dataset_dir}: {len(found.problems)} problem(s) with its cases:\n{listed}")
    return found.cases


def pair_cases(dataset_dir: str | Path, layout: str, modalities: Sequence[str] | None = None) -> Pairing:
    """Do as `find_cases`, but return what is wrong with files; raise if there is no case and nothing is wrong."""
    if layout not in LAYOUTS:
        raise ScanError(f"layout: found {layout!r}, expected one of {', '.join(LAYOUTS)}")
    root = require_folder(dataset_dir)
    pair, expected = LAYOUTS[layout]
    found = pair(root, modalities)
    if not found.cases and not found.problems:
        raise ScanError(f"dataset_dir: found no labelled case but {contents_text(root)} in {root}, expected {expected}")
    return Pairing(sorted(found.cases, key=paths_of), found.problems)


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
    """Name folders of scans without labels, which are published beside the others for a challenge's test."""
    folders = defaultdict(list)
    for path in scans:
        folders[path.parent].append(path)
    for folder, paths in sorted(folders.items()):
        logger.warning("%s: %d scans without labels are left out, as a test set", folder, len(paths))


def _pair_brats(root: Path, modalities: Sequence[str] | None) -> Pairing:
    if not modalities:
        raise ScanError(f"modalities: found {modalities!r}, expected names of the channels, as [t1, t1ce, t2, flair]")
    nifti = [folder / name for folder, names in walk(root) for name in sorted(names) if name.endswith(NIFTI)]
    groups, rest = _by_modality(nifti, [*modalities, "seg"])
    siblings = defaultdict(list)  # cases that lie beside one another, each in its folder
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
    """Group files by what comes before their modality, as in `X_t1`.

    Returns:
        Path of the group (`folder/X`) → modality → files; and the files that end in no modality.
    """
    groups: dict[Path, dict[str, list[Path]]] = defaultdict(lambda: defaultdict(list))
    rest = []
    endings = "|".join(map(re.escape, sorted(modalities, key=len, reverse=True)))
    for path in paths:
        if match := re.fullmatch(rf"(.+?)[_-]({endings})", stem_of(path)):
            groups[path.parent / match[1]][match[2]].append(path)
        else:
            rest.append(path)
    return groups, rest


def _pair_msd(root: Path, modalities: Sequence[str] | None) -> Pairing:
    images, labels = (_files_of_folder(root / name) for name in ("imagesTr", "labelsTr"))
    if not (root / "dataset.json").is_file():
        return _pair_by_name(images, labels)
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


def _pair_by_name(images: list[Path], labels: list[Path]) -> Pairing:
    found = Pairing()
    by_name = {stem_of(path): path for path in labels}
    names = {stem_of(path) for path in images}
    for path in images:
        label = by_name.get(stem_of(path))
        if label is None:
            found.problems.append(f"{path} has no label, expected {path.name} in labelsTr")
        else:
            found.cases.append({"image": str(path), "label": str(label)})
    for path in labels:
        if stem_of(path) not in names:
            found.problems.append(f"{path} has no image, expected {path.name} in imagesTr")
    return found


LAYOUTS: dict[str, tuple[Callable[[Path, Sequence[str] | None], Pairing], str]] = {
    "btcv": (_pair_btcv, "img0001.nii.gz with label0001.nii.gz, and so on, at any depth"),
    "brats": (_pair_brats, "folders X with X_MODALITY.nii.gz for each modality, and X_seg.nii.gz"),
    "msd": (_pair_msd, "dataset.json, or files of the same names in imagesTr and labelsTr"),
}


# -------------------------------------------------------------------------------------------- splitting cases


def split_cases(
    cases: list[Case], folds: int, fold: int, seed: int, test_cases: int = 0
) -> tuple[list[Case], list[Case], list[Case]]:
    """Divide cases into training, validation and test.

    The cases are put into a random order. The first `test_cases` of it are for the test, the same for every fold;
    of the others, every `folds`-th validates. The same files and seed give the same parts, wherever they lie and
    whatever the order of `cases`.

    Args:
        cases: all of them.
        folds: number of parts, at least 2, of which one validates.
        fold: which one, counted from 0.
        seed: of the order.
        test_cases: how many to keep for the test.

    Returns:
        Training, validation and test cases, each sorted by path.

    Raises:
        ScanError: numbers out of range, fewer cases than they need, or a case that is listed twice.
    """
    if folds < 2:
        raise ScanError(f"folds: found {folds}, expected at least 2")
    if not 0 <= fold < folds:
        raise ScanError(f"fold: found {fold}, expected one of 0 to {folds - 1}")
    if test_cases < 0:
        raise ScanError(f"test_cases: found {test_cases}, expected 0 or more")
    order = _shuffled(cases, seed)
    test, rest = order[:test_cases], order[test_cases:]
    validation = rest[fold::folds]
    training = [case for number, case in enumerate(rest) if number % folds != fold]
    if not training or not validation:
        raise ScanError(
            f"found {len(cases)} cases, of which {test_cases} for the test and fold {fold} of {folds} leave "
            f"{len(training)} to train and {len(validation)} to validate, expected at least 1 each"
        )
    return _sorted(training), _sorted(validation), _sorted(test)


def _shuffled(cases: list[Case], seed: int) -> list[Case]:
    return random.Random(seed).sample(_sorted(cases), len(cases))


def _sorted(cases: list[Case]) -> list[Case]:
    """Sort by path relative to the common folder, whose own place must not matter.

    Raises:
        ScanError: a case is listed twice.
    """
    if not cases:
        return []
    root = root_of(cases)
    names = [[Path(path).absolute().relative_to(root).as_posix() for path in paths_of(case)] for case in cases]
    twice = [name for name, number in Counter(", ".join(name) for name in names).items() if number > 1]
    if twice:
        raise ScanError(f"{root}: found {'; '.join(twice)} more than once among the cases, expected each once")
    return [case for _, case in sorted(zip(names, cases, strict=True), key=lambda pair: pair[0])]


def btcv_split(cases: list[Case]) -> tuple[list[Case], list[Case]]:
    """The split of BTCV's 30 labelled cases that most papers report: 24 to train, img0035 to img0040 to validate.

    Raises:
        ScanError: the cases are not exactly those 30.
    """
    by_number = {_btcv_number(case): case for case in cases}
    usual = sorted(BTCV_TRAINING + BTCV_VALIDATION)
    missing = [number for number in usual if number not in by_number]
    others = [Path(paths_of(case)[0]).name for number, case in by_number.items() if number not in usual]
    if missing or others or len(cases) > len(usual):
        raise ScanError(
            f"the usual split of BTCV needs img0001-0010 and img0021-0040: found {len(cases)} cases, missing "
            f"{_ranges(missing) or 'none'}, others {', '.join(others) or 'none'}; expected exactly those, or a fold"
        )
    return [by_number[number] for number in BTCV_TRAINING], [by_number[number] for number in BTCV_VALIDATION]


def _ranges(numbers: list[int]) -> str:
    """Write sorted numbers as `img0005-0010, img0039`."""
    runs = [[n for _, n in run] for _, run in groupby(enumerate(numbers), key=lambda pair: pair[1] - pair[0])]
    return ", ".join(f"img{run[0]:04d}" + (f"-{run[-1]:04d}" if len(run) > 1 else "") for run in runs)


def _btcv_number(case: Case) -> int | None:
    match = re.fullmatch(r"img(\d+)", stem_of(paths_of(case)[0]))
    return int(match[1]) if match else None


def split_by_layout(
    cases: list[Case], layout: str, fold: int | None, folds: int, seed: int, test_cases: int = 0
) -> tuple[list[Case], list[Case], list[Case]]:
    """Do as `split_cases`; `fold` None is the usual split of btcv, and fold 0 where there is none."""
    if fold is None and layout == "btcv" and not test_cases:
        try:
            return *btcv_split(cases), []
        except ScanError as error:
            logger.warning("%s. Fold 0 of %d is taken.", error, folds)
    return split_cases(cases, folds, fold or 0, seed, test_cases)


def label_subset(training: list[Case], fraction: float, seed: int) -> list[Case]:
    """Take a share of the training cases, at least one; smaller shares are parts of larger ones of the same seed.

    Raises:
        ScanError: `fraction` is not above 0 and at most 1.
    """
    if not 0 < fraction <= 1:
        raise ScanError(f"label_fraction: found {fraction}, expected a number above 0, at most 1")
    count = max(1, round(fraction * len(training)))
    return _sorted(_shuffled(training, seed)[:count])


# --------------------------------------------------------------------------------------------- for the bundles


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
        layout: of `dataset_dir`, as in `find_cases`; not looked at with a data list.
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
    return TrainingCases(label_subset(training, label_fraction, seed), _sorted(validation), _sorted(test))


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


def find_inference_scans(
    dataset_dir: str, datalist: str | None, modalities: Sequence[str] | None = None
) -> list[dict[str, Any]]:
    """Find scans to segment; labels are not needed.

    Args:
        dataset_dir: folder of scans, or that the paths of the data list are relative to.
        datalist: JSON whose `test` is taken, or None.
        modalities: names of the channels in their order, if each is a file of its own: files whose names end in
            them (`X_t1.nii.gz`) become one scan, those that end in `_seg` are left out, and others stay scans of
            their own (4D files).

    Returns:
        One `{"image": path or paths}` for each scan, sorted by path.

    Raises:
        ScanError: nothing found, a data list that cannot be read, or scans without all their channels.
    """
    if datalist:
        scans = read_datalist(datalist, dataset_dir, "test")
        if not scans:
            raise ScanError(f"{datalist}: found no scan in the section 'test', expected at least one")
        return scans
    if not modalities:
        return find_scans(dataset_dir)
    paths = [Path(path) for path in scan_paths(dataset_dir) if not SEGMENTATION.search(stem_of(path))]
    groups, rest = _by_modality(paths, modalities)
    problems = []
    for case, parts in groups.items():
        missing = [modality for modality in modalities if modality not in parts]
        if missing:
            found = ", ".join(path.name for files in parts.values() for path in files)
            problems.append(f"{case} has no {_kinds(missing)}: found {found}, expected all of {', '.join(modalities)}")
        problems.extend(_ambiguous(files) for files in parts.values() if len(files) > 1)
    if problems:
        listed = "\n".join(f"  {problem}" for problem in problems)
        raise ScanError(f"dataset_dir: {dataset_dir}: {len(problems)} problem(s) with its scans:\n{listed}")
    scans = [{"image": [str(parts[modality][0]) for modality in modalities]} for parts in groups.values()]
    return sorted([*scans, *({"image": str(path)} for path in rest)], key=paths_of)


def absent_classes(scans: Iterable[Scan], classes: Mapping[str, Sequence[int]]) -> list[str]:
    """Names of the classes of which no scan's label holds a voxel."""
    present = {value for scan in scans for value in scan.labels}
    return [name for name, values in classes.items() if present.isdisjoint(values)]
