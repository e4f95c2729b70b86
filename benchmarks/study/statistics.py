"""The few statistics of a study. Seeds are the samples: every interval is over seeds, never over cases."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
from scipy.stats import t

CONFIDENCE = 0.95


@dataclass(frozen=True)
class Estimate:
    """A mean over seeds.

    Attributes:
        mean: of the seeds' values.
        half_width: of the 95 % interval by Student's t; None with one seed, which tells nothing about others.
        seeds: how many.
    """

    mean: float
    half_width: float | None
    seeds: int


def estimate(values: Sequence[float]) -> Estimate | None:
    """The mean of one value for each seed, with its interval; None if there is no value."""
    known = np.array([value for value in values if math.isfinite(value)], dtype=float)
    n = known.size
    if n == 0:
        return None
    quantile = float(t.ppf((1 + CONFIDENCE) / 2, n - 1)) if n > 1 else None
    half_width = None if quantile is None else quantile * float(known.std(ddof=1)) / math.sqrt(n)
    return Estimate(float(known.mean()), half_width, n)


def mean_difference(first: Mapping[str, float], second: Mapping[str, float]) -> float:
    """Mean over the cases that both have of first - second; NaN if there is none."""
    differences = [first[case] - second[case] for case in first if case in second]
    known = [difference for difference in differences if math.isfinite(difference)]
    return float(np.mean(known)) if known else math.nan


def first_reached(curve: Sequence[tuple[int, float]], target: float) -> int | None:
    """The first step at which a curve of (step, value) is at the target or above; None if it never is."""
    return next((step for step, value in curve if value >= target), None)
