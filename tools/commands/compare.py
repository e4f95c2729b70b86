"""Compares the evaluations of several runs on the same cases, and draws one case."""

from __future__ import annotations

from pathlib import Path

import torch
import yaml
from monai.data import MetaTensor, affine_to_spacing
from monai.transforms import Orientation

from tools.common.tables import aligned, read_metrics, write_rows
from tools.data.loading import LoadScan
from tools.data.scans import ScanError, stem_of
from tools.losses import class_masks
from tools.results.figures import segmentation_figure

CSV, PNG = "comparison.csv", "comparison.png"


def compare(output_dir: str, image: str, label: str, **runs: str) -> None:
    """Print and write the Dice of several runs for each class, and draw the segmentation of one case by each run.

    Args:
        output_dir: folder for `comparison.csv` and `comparison.png`.
        image: a scan that is in no run's training data and that each run has segmented (`run inferring`).
        label: label file of this scan.
        runs: `--NAME FOLDER` for each run: its `output_dir` with the results of `run training`, `run evaluating` (on
            the same cases) and `run inferring`. Differences are relative to the first run.

    Raises:
        ScanError: there are fewer than two runs, a result of one of these commands is missing, or the runs were
            evaluated on different classes or numbers of cases.
    """
    if len(runs) < 2:
        raise ScanError(f"compare: found {len(runs)} runs, expected two or more, each as --NAME FOLDER")
    evaluations = {
        name: read_metrics(_need(Path(folder) / "evaluation.csv", "evaluating")) for name, folder in runs.items()
    }
    tables = {name: [(row["class"], row["cases"]) for row in rows] for name, rows in evaluations.items()}
    first, *others = runs
    for other in others:
        if tables[other] != tables[first]:
            raise ScanError(
                f"compare: {other} was evaluated on other classes or cases than {first}: found (class, cases) "
                f"{tables[other]}, expected {tables[first]}"
            )
    rows = _rows(evaluations, first, others)
    write_rows(Path(output_dir) / CSV, rows)
    print(f"Dice over {rows[-1]['cases']} case(s):\n{_table(rows)}")
    _draw(Path(output_dir) / PNG, image, label, {name: Path(folder) for name, folder in runs.items()})
    print(f"written to {output_dir}: {CSV}, {PNG}")


def _need(path: Path, command: str) -> Path:
    if not path.is_file():
        raise ScanError(f"compare: {path} does not exist, expected it from `run {command}`")
    return path


def _rows(evaluations: dict[str, list[dict[str, str]]], first: str, others: list[str]) -> list[dict[str, str]]:
    rows = []
    for k, row in enumerate(evaluations[first]):
        dice = {name: evaluations[name][k]["dice_mean"] for name in (first, *others)}
        known = all(dice.values())
        rows.append(
            {
                "class": row["class"],
                **dice,
                **{f"{o} - {first}": f"{float(dice[o]) - float(dice[first]):+.4f}" if known else "" for o in others},
                "cases": row["cases"],
            }
        )
    return rows


def _table(rows: list[dict[str, str]]) -> str:
    return aligned([list(rows[0]), *([_short(cell) for cell in row.values()] for row in rows)], numbers=True)


def _short(cell: str) -> str:
    if "." not in cell:
        return cell or "-"
    return f"{float(cell):+.3f}" if cell[0] in "+-" else f"{float(cell):.3f}"


def _draw(path: Path, image: str, label: str, runs: dict[str, Path]) -> None:
    """Draw image, label and each run's segmentation, in RAS axes."""
    classes = yaml.safe_load(_need(next(iter(runs.values())) / "config.yaml", "training").read_text())["classes"]
    load = LoadScan()
    files = {"label": Path(label), **{name: _segmentation(folder, image) for name, folder in runs.items()}}
    scan = load(image)
    maps = {name: load(file) for name, file in files.items()}
    for name, found in maps.items():
        if found.shape[1:] != scan.shape[1:]:
            raise ScanError(
                f"{files[name]}: found the shape {tuple(found.shape[1:])}, expected {tuple(scan.shape[1:])} as {image}"
            )
    together = MetaTensor(torch.cat([v.as_tensor() for v in (scan[:1], *maps.values())]), affine=scan.affine)
    turned = Orientation("RAS", labels=(("L", "R"), ("P", "A"), ("I", "S")))(together)
    volumes = turned.as_tensor()
    segmentation_figure(
        path,
        volumes[0],
        {name: class_masks(volumes[k : k + 1].round(), classes) for k, name in enumerate(maps, start=1)},
        names=list(classes),
        title=f"{stem_of(image)}, in no run's training data",
        spacing=tuple(affine_to_spacing(turned.affine).tolist()),
    )


def _segmentation(folder: Path, image: str) -> Path:
    name = f"{stem_of(image)}_seg.nii.gz"
    found = sorted(folder.rglob(name))
    if len(found) != 1:
        raise ScanError(f"compare: found {len(found)} files {name} in {folder}, expected one from `run inferring`")
    return found[0]
