"""Evaluation of segmentations: Dice, HD95 and normalised surface Dice of each case, tables and pictures.

Everything is measured in the geometry of the label file, with distances in mm. This module computes surface distances
itself, because MONAI, MedPy and `surface-distance` fill the whole bounding box: for a class with a stray voxel in the
far corner of a scan of 512×512×300, it takes 10 and 16 s and less than 0.4 GB.
"""

from __future__ import annotations

import math
import os
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from itertools import permutations, product
from pathlib import Path

import ignite.distributed as idist
import numpy as np
import torch
from ignite.engine import Engine, Events
from monai.data import affine_to_spacing
from monai.metrics.utils import get_code_to_measure_table
from monai.transforms import Orientation
from monai.utils import convert_to_tensor
from scipy.ndimage import binary_erosion
from scipy.spatial import KDTree
from torch import Tensor

from tools.common.tables import aligned, write_rows
from tools.data.classes import Classes
from tools.data.loading import LoadScan
from tools.data.outputs import case_names
from tools.data.scans import ScanError
from tools.losses import class_masks
from tools.results.figures import segmentation_figure

EMPTY = ("skip", "brats")
BRATS_WORST = math.hypot(240, 240, 155)  # mm: the diagonal of its volumes, 373.13
ROUNDING = 1e-3  # mm; headers hold single precision, where 1 mm may be 1.0000001 and miss a tolerance of 1 mm
METRICS = {"dice": "Dice", "hd95": "HD95 (mm)", "nsd": "NSD at {:g} mm"}  # key: heading in the printed table
COLUMNS = {"dice": "dice", "hd95": "hd95_mm", "nsd": "nsd"}  # key: name in the CSV files


# ------------------------------------------------------------------------------------------------- one case


def case_metrics(
    pred: Tensor, label: Tensor, spacing: Sequence[float], tolerance: float, empty: str
) -> dict[str, np.ndarray]:
    """Compute the metrics of one segmentation.

    - Dice: twice the number of common voxels over the sum of both.
    - HD95, mm, as in MONAI: 95th percentile of the distances from the surface voxels (those with a face neighbour
      outside) of one mask to the nearest of the other, in both directions; the larger of the two.
    - NSD, 0 to 1: the fraction of both surfaces that is within the tolerance of the other surface. A surface consists
      of elements between eight voxels, each with its area in mm², so that thick slices have the correct weight.

    A class without a voxel in the label, the prediction or both has no surface distance. It gets these values instead:

    | `empty` | neither | only predicted | only in the label (missed) |
    | --- | --- | --- | --- |
    | `skip`: organs | NaN in all three: not counted | Dice 0, HD95 NaN, NSD 0 | Dice 0, HD95 NaN, NSD 0 |
    | `brats`: as in the challenge | Dice 1, HD95 0, NSD 1 | Dice 0, HD95 373.13, NSD 0 | the same |

    Args:
        pred: bool masks [K, H, W, D].
        label: bool masks [K, H, W, D].
        spacing: voxel size in mm along H, W and D.
        tolerance: tolerance of NSD, mm.
        empty: `skip` or `brats`.

    Returns:
        `dice`, `hd95`, `nsd`, float [K], and `missed`, bool [K].
    """
    neither, one_only = {"skip": (math.nan,) * 3, "brats": (1, 0, 1)}, {"skip": math.nan, "brats": BRATS_WORST}

    def measured(mask: Tensor, truth: Tensor) -> tuple[float, float, float, bool]:
        found, there = bool(mask.any()), bool(truth.any())
        if found and there:
            return *_measure(mask, truth, spacing, tolerance), False
        return *((0, one_only[empty], 0) if found or there else neither[empty]), there

    with ThreadPoolExecutor(os.cpu_count()) as pool:  # in Torch, NumPy and SciPy, threads do not wait for each other
        rows = list(pool.map(measured, pred, label))
    dice, hd95, nsd, missed = np.array(rows, dtype=float).T
    return {"dice": dice, "hd95": hd95, "nsd": nsd, "missed": missed.astype(bool)}


def _measure(pred: Tensor, label: Tensor, spacing: Sequence[float], tolerance: float) -> tuple[float, float, float]:
    """Dice, HD95 and NSD of two bool masks [H, W, D] that both have voxels."""
    box = _box(pred | label)  # a volume of 512 x 512 x 300 takes many times longer
    pred, label = pred[box].cpu().numpy(), label[box].cpu().numpy()
    dice = 2 * int((pred & label).sum()) / (int(pred.sum()) + int(label.sum()))
    return dice, _hd95(pred, label, spacing), _surface_dice(pred, label, spacing, tolerance)


def _box(mask: Tensor) -> tuple[slice, ...]:
    """Return the bounding box of a mask [H, W, D]."""
    planes = (mask.any(dim=2).any(dim=1), mask.any(dim=2).any(dim=0), mask.any(dim=1).any(dim=0))
    ends = (plane.nonzero().flatten().tolist() for plane in planes)
    return tuple(slice(found[0], found[-1] + 1) for found in ends)


def _hd95(pred: np.ndarray, label: np.ndarray, spacing: Sequence[float]) -> float:
    """HD95 in mm, equal to MONAI's `compute_hausdorff_distance`, which takes 3 to 16 times as long and up to 7 GB."""
    points = [np.argwhere(mask & ~binary_erosion(mask)) * np.asarray(spacing) for mask in (pred, label)]
    return max(
        float(np.percentile(KDTree(theirs, leafsize=32).query(ours)[0], 95)) for ours, theirs in permutations(points)
    )


def _surface_dice(pred: np.ndarray, label: np.ndarray, spacing: Sequence[float], tolerance: float) -> float:
    """NSD, equal to MONAI's `compute_surface_dice` with `use_subvoxels`, which takes 3 times as long and 7 GB."""
    (points, areas), (label_points, label_areas) = _surface(pred, spacing), _surface(label, spacing)
    near = areas[_within(points, label_points, tolerance)].sum()
    near += label_areas[_within(label_points, points, tolerance)].sum()
    return float(near / (areas.sum() + label_areas.sum()))


def _surface(mask: np.ndarray, spacing: Sequence[float]) -> tuple[np.ndarray, np.ndarray]:
    """Find the surface elements of a mask [H, W, D]: corners of voxels of which some, but not all, are in the mask.

    Returns:
        Positions [N, 3] in mm and areas [N] in mm² of the elements.
    """
    padded = np.pad(mask, 1).astype(np.uint8)
    code = np.zeros([size + 1 for size in mask.shape], np.uint8)  # which of the eight are in the mask
    for bit, corner in enumerate(product((1, 0), repeat=3)):  # in the order of MONAI's table
        code |= padded[tuple(slice(start, start + n) for start, n in zip(corner, code.shape, strict=True))] << bit
    places = np.nonzero((code > 0) & (code < 255))
    table, _ = get_code_to_measure_table(list(spacing))
    return np.stack(places, axis=1) * np.asarray(spacing), np.asarray(table, dtype=float)[code[places]]


def _within(points: np.ndarray, others: np.ndarray, tolerance: float) -> np.ndarray:
    """Whether one of the others is within the tolerance of each point [N, 3], all in mm."""
    distances, _ = KDTree(others, leafsize=32).query(points, distance_upper_bound=tolerance + ROUNDING)
    return np.isfinite(distances)


# ----------------------------------------------------------------------------------------------- all cases


@dataclass(frozen=True)
class _Case:
    """The results of one case.

    Attributes:
        image: path of its (first) image file.
        label: path of its label file.
        metrics: result of `case_metrics`.
        score: mean Dice over the classes that count; NaN if there are none.
    """

    image: str
    label: str
    metrics: dict[str, np.ndarray]
    score: float


class CaseMetrics:
    """Measures all cases in the geometry of their files, reports the results, and draws the worst and the best case.

    Written to `output_dir`: `evaluation_cases.csv` (a row for each case and class; NaN is an empty cell),
    `evaluation.csv` (a row for each class and `mean`) and `figures/evaluation/{worst,best}_<case>.png`, by the mean
    Dice of the case. To the engine's metrics: `mean_dice`, and `dice_`, `hd95_` and `nsd_` with each class's name.

    Means and standard deviations (of a sample: n − 1) are over the cases that count; `mean` is over the means of the
    cases over classes. With `skip`, missed classes have no HD95, which makes it look better: so `missed` counts them.

    Args:
        classes: class name → label values.
        output_dir: folder to write to.
        tolerance: tolerance of NSD, mm.
        empty: how classes without a voxel are counted, see `case_metrics`.

    Raises:
        ValueError: `tolerance` is negative, or `empty` is unknown.
    """

    def __init__(self, classes: Classes, output_dir: str | Path, tolerance: float, empty: str = "skip") -> None:
        if empty not in EMPTY:
            raise ValueError(f"empty: found {empty!r}, expected one of {', '.join(EMPTY)}")
        if not 0 <= tolerance < math.inf:
            raise ValueError(f"tolerance: found {tolerance}, expected mm, 0 or more")
        self.classes = dict(classes)
        self.output_dir = Path(output_dir)
        self.figure_dir = self.output_dir / "figures" / "evaluation"
        self.tolerance = tolerance
        self.empty = empty

    def attach(self, engine: Engine) -> None:
        """Attach to an evaluator.

        The engine's output is a list of dicts with the label maps [1, H, W, D] `pred` and `label` (a MetaTensor), both
        in the geometry of the label file; its batch is a list of dicts with the MetaTensors `image` and `label`.
        """
        engine.add_event_handler(Events.STARTED, self._reset)
        engine.add_event_handler(Events.ITERATION_COMPLETED, self._add)
        engine.add_event_handler(Events.COMPLETED, self._finish)

    def _reset(self) -> None:
        self._cases: list[_Case] = []
        self._pictured: dict[str, tuple[_Case, Tensor]] = {}  # worst, best: with its predicted label map
        if idist.get_rank() == 0:  # remove the pictures of earlier evaluations
            for path in [*self.figure_dir.glob("worst_*.png"), *self.figure_dir.glob("best_*.png")]:
                path.unlink()

    def _add(self, engine: Engine) -> None:
        for item, output in zip(engine.state.batch, engine.state.output, strict=True):
            image, path = (str(item[key].meta["filename_or_obj"]) for key in ("image", "label"))
            pred, label = (convert_to_tensor(output[key], track_meta=False) for key in ("pred", "label"))
            if pred.shape != label.shape:
                raise ScanError(
                    f"{path}: found a label of shape {tuple(label.shape[1:])}, expected {tuple(pred.shape[1:])} as "
                    f"its image {image} has"
                )
            masks, truth = class_masks(pred, self.classes), class_masks(label, self.classes)
            spacing = affine_to_spacing(output["label"].affine).tolist()
            metrics = case_metrics(masks, truth, spacing, self.tolerance, self.empty)
            case = _Case(image, path, metrics, _mean(metrics["dice"]))
            self._cases.append(case)
            for which, chosen in _worst_and_best([case, *(kept for kept, _ in self._pictured.values())]).items():
                if chosen is case:
                    self._pictured[which] = (case, pred.cpu())

    def _finish(self, engine: Engine) -> None:
        cases = _gathered(self._cases)
        names = case_names([(case.image, case.label) for case in cases])
        cases, names = zip(*sorted(zip(cases, names, strict=True), key=lambda pair: pair[1]), strict=True)
        summary = self._summary(cases)
        engine.state.metrics["mean_dice"] = summary[-1]["dice_mean"]
        for name, row in zip(self.classes, summary, strict=False):
            engine.state.metrics.update({f"{metric}_{name}": row[f"{COLUMNS[metric]}_mean"] for metric in METRICS})
        for which, chosen in _worst_and_best(cases).items():
            if which in self._pictured and self._pictured[which][0].image == chosen.image:
                self._draw(which, names[cases.index(chosen)], *self._pictured[which])
        if idist.get_rank() == 0:
            _write_csv(self.output_dir / "evaluation_cases.csv", self._case_rows(cases, names))
            _write_csv(self.output_dir / "evaluation.csv", summary)
            print(self._table(summary))
            print(f"written to {self.output_dir}")

    def _case_rows(self, cases: Sequence[_Case], names: Sequence[str]) -> list[dict[str, str | float]]:
        return [
            {"case": name, "class": label, **{COLUMNS[metric]: case.metrics[metric][k] for metric in METRICS}}
            for case, name in zip(cases, names, strict=True)
            for k, label in enumerate(self.classes)
        ]

    def _summary(self, cases: Sequence[_Case]) -> list[dict[str, str | float]]:
        """Rows of `evaluation.csv`."""
        values = {metric: np.array([case.metrics[metric] for case in cases]) for metric in (*METRICS, "missed")}
        rows = []
        for k, name in enumerate([*self.classes, "mean"]):
            row: dict[str, str | float] = {"class": name}
            for metric in METRICS:
                table = values[metric]  # [cases, K]
                column = np.array([_mean(case) for case in table]) if name == "mean" else table[:, k]
                row |= {f"{COLUMNS[metric]}_mean": _mean(column), f"{COLUMNS[metric]}_std": _deviation(column)}
                if metric == "dice":
                    counted = int(np.isfinite(column).sum())
            missed = values["missed"].sum() if name == "mean" else values["missed"][:, k].sum()
            rows.append({**row, "cases": counted, "missed": int(missed)})
        return rows

    def _table(self, summary: Sequence[Mapping[str, str | float]]) -> str:
        """Text of aligned columns."""
        head = ["class", *(title.format(self.tolerance) for title in METRICS.values()), "cases", "missed"]
        lines = [head]
        for row in summary:
            numbers = [
                _plus_minus(row[f"{column}_mean"], row[f"{column}_std"], 2 if metric == "hd95" else 3)
                for metric, column in COLUMNS.items()
            ]
            lines.append([row["class"], *numbers, str(row["cases"]), str(row["missed"])])
        return aligned(lines, numbers=True)

    def _draw(self, which: str, name: str, case: _Case, pred: Tensor) -> None:
        """Draw a case from its files, because the evaluator's image may be resampled and cropped."""
        load = LoadScan()
        image, label = load(case.image), load(case.label)
        together = torch.cat([label, image[:1], pred])  # takes the label's affine
        # labels: the default will change
        turned = Orientation("RAS", labels=(("L", "R"), ("P", "A"), ("I", "S")))(together)
        label, image, pred = convert_to_tensor(turned, track_meta=False)[:, None]
        segmentation_figure(
            self.figure_dir / f"{which}_{name}.png",
            image[0],
            {"label": class_masks(label, self.classes), "prediction": class_masks(pred, self.classes)},
            names=list(self.classes),
            title=f"{which} case: {name}, mean Dice {case.score:.3f}",
            spacing=tuple(affine_to_spacing(turned.affine).tolist()),
        )


def _gathered(cases: list[_Case]) -> list[_Case]:
    """Gather the cases of all processes, each once: an uneven split repeats some."""
    return list({(case.image, case.label): case for part in idist.all_gather(cases) for case in part}.values())


def _worst_and_best(cases: Sequence[_Case]) -> dict[str, _Case]:
    """Return the worst and the best case, by score, then by path; empty if no case has a score."""
    scored = [case for case in cases if math.isfinite(case.score)]
    if not scored:
        return {}
    return {
        "worst": min(scored, key=lambda case: (case.score, case.image)),
        "best": min(scored, key=lambda case: (-case.score, case.image)),
    }


def _mean(values: np.ndarray) -> float:
    """Mean of the numbers that are not NaN; NaN if there are none."""
    known = values[~np.isnan(values)]
    return float(known.mean()) if known.size else math.nan


def _deviation(values: np.ndarray) -> float:
    """Standard deviation of the sample of numbers that are not NaN; NaN if there are fewer than two."""
    known = values[~np.isnan(values)]
    return float(known.std(ddof=1)) if known.size > 1 else math.nan


def _plus_minus(mean: float, deviation: float, digits: int) -> str:
    if math.isnan(mean):
        return "-"
    return f"{mean:.{digits}f}" + ("" if math.isnan(deviation) else f" ± {deviation:.{digits}f}")


def _write_csv(path: Path, rows: Sequence[Mapping[str, str | float]]) -> None:
    write_rows(path, [{key: _cell(value) for key, value in row.items()} for row in rows])


def _cell(value: str | float) -> str:
    if isinstance(value, str):
        return value
    return "" if math.isnan(value) else f"{value:.6g}"
