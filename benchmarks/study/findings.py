"""What the runs of a study have found, read from their folders; everything that a report says comes from here."""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import numpy as np

from benchmarks.study.plan import Arm, Row, Run, candidates, chosen_rate, finetuning, length, pretraining, rows, testing
from benchmarks.study.runs import Record, folder_of, read_record
from benchmarks.study.settings import Study
from benchmarks.study.statistics import Estimate, estimate, first_reached, mean_difference
from tools.common.tables import read_metrics, write_rows

MEAN = "mean"  # over classes, in the place of a class
RESULTS = "results.csv"
VALIDATION = "val_mean_dice"


class Reached(NamedTuple):
    """When a fine-tuning reached a Dice: in steps and epochs of training, and the seconds of these steps."""

    steps: int
    epochs: int
    seconds: float


@dataclass
class Findings:
    """Results of a study as far as it is done.

    Everything is asked for by arm and label fraction; the fine-tunings meant are those at the arm's chosen rate.
    """

    study: Study
    _records: dict[str, Record | None] = field(default_factory=dict)
    _curves: dict[str, list[tuple[int, float]]] = field(default_factory=dict)
    _tables: dict[str, list[dict[str, str]]] = field(default_factory=dict)

    # ------------------------------------------------------------------------------------------- by run

    def record(self, run_id: str) -> Record | None:
        """Of a finished run."""
        if run_id not in self._records:
            self._records[run_id] = read_record(self.study, run_id)
        return self._records[run_id]

    def curve(self, run_id: str) -> list[tuple[int, float]]:
        """(Epoch, validation Dice) of a finished fine-tuning."""
        if run_id not in self._curves:
            table = read_metrics(folder_of(self.study, run_id) / "metrics.csv") if self.record(run_id) else []
            self._curves[run_id] = [(int(r["epoch"]), float(r[VALIDATION])) for r in table if r.get(VALIDATION)]
        return self._curves[run_id]

    def validation(self, run_id: str) -> float | None:
        """The best validation Dice of a finished fine-tuning, which is that of its model.pt."""
        return max((dice for _, dice in self.curve(run_id)), default=None)

    def _table(self, run_id: str, name: str) -> list[dict[str, str]]:
        """Rows of a CSV that a finished test wrote."""
        if self.record(run_id) is None:
            return []
        path = folder_of(self.study, run_id) / name
        if str(path) not in self._tables:
            self._tables[str(path)] = read_metrics(path)
        return self._tables[str(path)]

    # ------------------------------------------------------------------------------------------- by arm

    def rate(self, arm: Arm, fraction: float) -> float | None:
        """The chosen learning rate."""
        return chosen_rate(self.study, arm, fraction, self.validation)

    def candidates(self, arm: Arm, fraction: float) -> dict[float, float | None]:
        """Every rate of the grid with its best validation Dice, the mean over the seeds."""
        return candidates(self.study, arm, fraction, self.validation)

    def finetunings(self, arm: Arm, fraction: float) -> dict[int, str]:
        """IDs of the finished fine-tunings, by seed."""
        return self._finished(finetuning, arm, fraction)

    def tests(self, arm: Arm, fraction: float) -> dict[int, str]:
        """IDs of the finished tests, by seed."""
        return self._finished(testing, arm, fraction)

    def _finished(self, make: Callable[..., Run], arm: Arm, fraction: float) -> dict[int, str]:
        rate = self.rate(arm, fraction)
        if rate is None:
            return {}
        ids = {seed: make(self.study, arm, fraction, seed, rate).id for seed in self.study.asked.seeds}
        return {seed: run_id for seed, run_id in ids.items() if self.record(run_id)}

    def classes(self) -> list[str]:
        """Names of the classes, in the order of the bundle."""
        for row in self.finetuned_rows():
            for fraction in row.fractions:
                for run_id in self.tests(row.arm, fraction).values():
                    return [line["class"] for line in self._table(run_id, "evaluation.csv") if line["class"] != MEAN]
        return []

    def dice(self, arm: Arm, fraction: float, name: str = MEAN) -> Estimate | None:
        """Test Dice of a class, or its mean over classes."""
        found = [
            _number(line["dice_mean"])
            for run_id in self.tests(arm, fraction).values()
            for line in self._table(run_id, "evaluation.csv")
            if line["class"] == name
        ]
        return estimate(found)

    def difference(self, arm: Arm, other: Arm, fraction: float) -> Estimate | None:
        """Test Dice of an arm minus that of another, paired: over the same cases, seed by seed."""
        theirs = self.tests(other, fraction)
        seeds = {seed: run_id for seed, run_id in self.tests(arm, fraction).items() if seed in theirs}
        return estimate([mean_difference(self._cases(i), self._cases(theirs[seed])) for seed, i in seeds.items()])

    def _cases(self, run_id: str) -> dict[str, float]:
        """Mean Dice of each test case over its classes; those that are in neither label nor prediction do not count."""
        by_case: dict[str, list[float]] = defaultdict(list)
        for line in self._table(run_id, "evaluation_cases.csv"):
            if line["dice"]:
                by_case[line["case"]].append(float(line["dice"]))
        return {case: float(np.mean(values)) for case, values in by_case.items()}

    def curves(self, arm: Arm, fraction: float) -> dict[int, list[tuple[int, float]]]:
        """(Step, validation Dice) of the finished fine-tunings, by seed."""
        steps, epochs = length(self.study, fraction)
        return {
            seed: [(epoch * steps // epochs, dice) for epoch, dice in self.curve(run_id)]
            for seed, run_id in self.finetunings(arm, fraction).items()
        }

    def reached(self, arm: Arm, fraction: float) -> dict[int, Reached | None]:
        """By seed: when the arm reached the Dice that training from scratch ended with; None: it never did."""
        ours, scratch = self.curves(arm, fraction), self.curves(arm.baseline, fraction)
        ids = self.finetunings(arm, fraction)
        steps, epochs = length(self.study, fraction)
        found: dict[int, Reached | None] = {}
        for seed in ours.keys() & scratch.keys():
            step = first_reached(ours[seed], scratch[seed][-1][1])
            pace = self.record(ids[seed])["seconds_per_step"] or math.nan
            found[seed] = None if step is None else Reached(step, step * epochs // steps, step * pace)
        return dict(sorted(found.items()))

    def pretrainings(self, arm: Arm) -> dict[int, Record]:
        """Records of the finished pre-trainings, by seed."""
        found = {seed: self.record(pretraining(self.study, arm, seed).id) for seed in self.study.asked.seeds}
        return {seed: record for seed, record in found.items() if record}

    def pretraining_seconds(self, arm: Arm) -> Estimate | None:
        """Of all training steps of a pre-training; 0 from scratch."""
        if arm.method == "scratch":
            return Estimate(0.0, None, 1)
        return estimate([seconds(record) for record in self.pretrainings(arm).values()])

    def finetuned_rows(self) -> list[Row]:
        """The rows of all tables that have label fractions, each arm and set of fractions once."""
        found: dict[tuple[Arm, tuple[float, ...]], Row] = {}
        for table in self.study.asked.tables:
            for row in rows(self.study, table):
                if row.fractions:
                    found.setdefault((row.arm, row.fractions), row)
        return list(found.values())

    def arms(self) -> Iterator[tuple[Arm, float]]:
        """Every arm with every label fraction at which it is fine-tuned, each once."""
        return iter(dict.fromkeys((row.arm, fraction) for row in self.finetuned_rows() for fraction in row.fractions))

    # ----------------------------------------------------------------------------------------- results.csv

    def write_results(self) -> None:
        """Write results.csv: a row for each test and class."""
        lines = [
            line
            for arm, fraction in self.arms()
            for seed, run_id in self.tests(arm, fraction).items()
            for line in self._results(arm, fraction, seed, run_id)
        ]
        write_rows(self.study.output_dir / RESULTS, lines)

    def _results(self, arm: Arm, fraction: float, seed: int, run_id: str) -> Iterator[dict[str, Any]]:
        tuned = self.finetunings(arm, fraction)[seed]
        record = self.record(tuned)
        pretrained = None if arm.method == "scratch" else pretraining(self.study, arm, seed).id
        cost = seconds(self.record(pretrained)) if pretrained else 0
        for line in self._table(run_id, "evaluation.csv"):
            yield {
                "run": run_id,
                "network": arm.network,
                "method": arm.method,
                "pretraining": options_text(arm.pretraining),
                "finetuning": options_text(arm.finetuning),
                "label_fraction": fraction,
                "labelled_cases": self.study.labelled(fraction),
                "seed": seed,
                "learning_rate": self.rate(arm, fraction),
                "class": line["class"],
                "dice": line["dice_mean"],
                "hd95_mm": line["hd95_mm_mean"],
                "cases": line["cases"],
                "missed": line["missed"],
                "steps": record["steps"],
                "seconds": "" if record["resumed"] else record["seconds"],  # then it is the last part's
                "seconds_per_step": record["seconds_per_step"],
                "pretraining_run": pretrained or "",
                "pretraining_seconds": "" if math.isnan(cost) else round(cost, 1),
                "best_validation_dice": self.validation(tuned),
                "validation_curve": f"runs/{tuned}/metrics.csv",
            }


def seconds(record: Record) -> float:
    """Of all training steps of a run: reading, validation and the start of the process are not among them."""
    return record["steps"] * (record["seconds_per_step"] or math.nan)


def _number(text: str) -> float:
    return float(text) if text else math.nan


def options_text(options: Iterable[tuple[str, Any]]) -> str:
    """Options of an arm, as in `decode_size [32, 32, 32], weight_cl 0`."""
    return ", ".join(f"{key} {list(value) if isinstance(value, tuple) else value}" for key, value in options)
