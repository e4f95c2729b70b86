"""Studies without training: their runs are written by hand, or by commands that write the same."""

from __future__ import annotations

import csv
import json
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import pytest

from benchmarks.study.findings import Findings
from benchmarks.study.plan import Run, plan
from benchmarks.study.runs import folder_of, is_done, settings
from benchmarks.study.settings import Study, open_study

CLASSES = ("anterior", "posterior")
MACHINE = {
    **{"device": "CPU", "processor": "a processor", "cores": "2", "memory": "8 GB"},
    **{"python": "3.11", "torch": "2.6", "monai": "1.5", "commit": "0123456789ab"},
}
Dice = Callable[[Run], float]


@pytest.fixture
def dataset(tmp_path: Path) -> Path:
    """The 210 cases of the hippocampus by their names alone: a plan reads no voxel."""
    folder = tmp_path / "Task04_Hippocampus"
    for part in ("imagesTr", "labelsTr"):
        (folder / part).mkdir(parents=True)
        for number in range(210):
            (folder / part / f"hippocampus_{number:03d}.nii.gz").touch()
    return folder


@pytest.fixture
def begin(dataset: Path, tmp_path: Path) -> Callable[..., Study]:
    """Begins a study, or continues it."""

    def open_it(preset: str = "laptop", **options: Any) -> Study:
        asked = {"methods": None, "label_fractions": None, "seeds": None, "tables": None, "jobs": 1, **options}
        return open_study(str(tmp_path / "study"), str(dataset), preset, "hippocampus", **asked)

    return open_it


@pytest.fixture
def end() -> Callable[[Study, Run, float], None]:
    """Leaves the folder of a run as if it had ended well, with a Dice."""
    return finish


@pytest.fixture
def end_all() -> Callable[..., None]:
    """Ends every run of a study, or those that `only` is true of."""

    def fill(study: Study, dice: Dice, only: Callable[[Run], bool] = lambda run: True) -> None:
        while waiting := [
            run
            for run in plan(study, Findings(study).validation)
            if run.known and only(run) and not is_done(study, run)
        ]:
            for run in waiting:
                finish(study, run, dice(run))

    return fill


def finish(study: Study, run: Run, dice: float = 0.0, pace: float = 0.5) -> None:
    """Validation Dice rises in equal steps to `dice`; two test cases have it, 0.02 apart in their classes' means."""
    folder = folder_of(study, run.id)
    folder.mkdir(parents=True, exist_ok=True)
    if run.kind == "finetune":
        every = run.options["checkpoint_interval"]  # epochs
        rows = [{"epoch": n, "loss": 1.0, "val_mean_dice": ""} for n in range(1, run.epochs + 1)]
        for row in rows[every - 1 :: every]:
            row["val_mean_dice"] = dice * row["epoch"] / run.epochs
        write_csv(folder / "metrics.csv", rows)
    if run.kind == "test":
        write_test(folder, {"case_1": (dice - 0.03, dice + 0.01), "case_2": (dice - 0.01, dice + 0.03)})
    record = {
        "settings": settings(run),
        "steps": run.steps,
        "seconds": 10 + pace * run.steps,
        "seconds_per_step": pace if run.steps else None,
        "peak_memory": 700_000_000,
        "peak_gpu_memory": None,
        "resumed": False,
        "jobs": 1,
        "machine": MACHINE,
    }
    (folder / "done.json").write_text(json.dumps(record))


def write_test(folder: Path, cases: Mapping[str, tuple[float, float]]) -> None:
    """Write what a test writes: case → Dice of both classes."""
    rows = [(case, name, dice) for case, both in cases.items() for name, dice in zip(CLASSES, both, strict=True)]
    write_csv(folder / "evaluation_cases.csv", [{"case": c, "class": n, "dice": d, "hd95_mm": 2.0} for c, n, d in rows])
    columns = [*zip(*cases.values(), strict=True), [sum(both) / 2 for both in cases.values()]]
    means = {name: sum(column) / len(column) for name, column in zip((*CLASSES, "mean"), columns, strict=True)}
    others = {"hd95_mm_mean": 2.0, "cases": len(cases), "missed": 0}
    write_csv(folder / "evaluation.csv", [{"class": n, "dice_mean": mean, **others} for n, mean in means.items()])


def write_csv(path: Path, rows: list[dict[str, Any]]) -> None:
    with path.open("w", newline="") as file:
        writer = csv.DictWriter(file, list(rows[0]))
        writer.writeheader()
        writer.writerows(rows)
