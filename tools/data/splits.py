"""Divides scans and cases into training, validation and test, identically on every machine."""

from __future__ import annotations

import logging
import random
import re
from collections import Counter
from itertools import groupby
from pathlib import Path

from tools.data.cases import Case
from tools.data.scans import ScanError, paths_of, root_of, stem_of

logger = logging.getLogger(__name__)

BTCV_TRAINING = (*range(1, 11), *range(21, 35))  # numbers of the standard split, which most papers use
BTCV_VALIDATION = tuple(range(35, 41))


def split_cases(
    cases: list[Case], folds: int, fold: int, seed: int, test_cases: int = 0
) -> tuple[list[Case], list[Case], list[Case]]:
    """Divide cases into training, validation and test.

    The cases are shuffled. The first `test_cases` are the test cases, for every fold; every `folds`-th of the others is
    a validation case. The split depends only on the files and the seed, not on their folder or the order of `cases`.

    Args:
        cases: all cases.
        folds: number of folds, at least 2.
        fold: number of the validation fold, from 0.
        seed: random seed of the order.
        test_cases: number of test cases.

    Returns:
        Training, validation and test cases, each sorted by path.

    Raises:
        ScanError: a number is out of range, there are too few cases, or a case is listed twice.
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
    return sort_cases(training), sort_cases(validation), sort_cases(test)


def _shuffled(cases: list[Case], seed: int) -> list[Case]:
    return random.Random(seed).sample(sort_cases(cases), len(cases))


def sort_cases(cases: list[Case]) -> list[Case]:
    """Sort cases by path relative to their common folder, so that its location does not matter.

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
    """Return the standard split of BTCV's 30 labelled cases: 24 for training, img0035 to img0040 for validation.

    Raises:
        ScanError: the cases are not exactly those 30.
    """
    by_number = {_btcv_number(case): case for case in cases}
    usual = sorted(BTCV_TRAINING + BTCV_VALIDATION)
    missing = [number for number in usual if number not in by_number]
    others = [Path(paths_of(case)[0]).name for number, case in by_number.items() if number not in usual]
    if missing or others or len(cases) > len(usual):
        raise ScanError(
            f"the standard split of BTCV needs img0001-0010 and img0021-0040: found {len(cases)} cases, missing "
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
    """Do as `split_cases`; `fold` None means the standard split of btcv, or fold 0 if there is none."""
    if fold is None and layout == "btcv" and not test_cases:
        try:
            return *btcv_split(cases), []
        except ScanError as error:
            logger.warning("%s. Fold 0 of %d is used.", error, folds)
    return split_cases(cases, folds, fold or 0, seed, test_cases)


def label_subset(training: list[Case], fraction: float, seed: int) -> list[Case]:
    """Select a fraction of the training cases, at least one; with one seed, a smaller fraction is a subset of a larger.

    Raises:
        ScanError: `fraction` is not above 0 and at most 1.
    """
    if not 0 < fraction <= 1:
        raise ScanError(f"label_fraction: found {fraction}, expected a number above 0, at most 1")
    count = max(1, round(fraction * len(training)))
    return sort_cases(_shuffled(training, seed)[:count])


def split_scans(items: list[dict], val_fraction: float, seed: int) -> tuple[list[dict], list[dict]]:
    """Divide scans into training and validation, at least one each.

    The split depends only on the set of scans and the seed, not on the order of `items`. A scan that is listed twice is
    in one part only.

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
