"""Metrics of known shapes against what can be told by hand or by brute force, and the handler on real files."""

from __future__ import annotations

import math

import nibabel as nib
import numpy as np
import pytest
import torch
from monai.data import DataLoader, Dataset
from monai.engines import SupervisedEvaluator
from monai.metrics import compute_hausdorff_distance, compute_surface_dice
from monai.transforms import Compose, LoadImaged, Orientationd, Spacingd
from PIL import Image
from scipy.ndimage import binary_dilation

from tools.common.tables import read_metrics
from tools.data.scans import ScanError
from tools.results.evaluation import CaseMetrics, _Case, _gathered, case_metrics
from tools.results.label_maps import ToLabelMapd

SPACING = (2.5, 0.7, 3.0)


def box(low, high, size=(20, 18, 16)):
    mask = torch.zeros(size, dtype=torch.bool)
    mask[tuple(slice(a, b) for a, b in zip(low, high, strict=True))] = True
    return mask


def blob(generator, size=(14, 12, 10)):
    """Several lumps, some of which touch the border."""
    seeds = generator.random(size) < 0.004
    seeds[tuple(generator.integers(0, size))] = True
    return torch.from_numpy(binary_dilation(seeds, iterations=2))


def measure(pred, label, spacing=SPACING, tolerance=1.0, empty="skip"):
    found = case_metrics(pred[None], label[None], spacing, tolerance, empty)
    return {name: value.item() for name, value in found.items()}


# ------------------------------------------------------------------------------------------------- one case


@pytest.mark.parametrize(("axis", "voxels", "distance"), [(0, 2, 5.0), (1, 3, 2.1), (2, 1, 3.0)])
def test_a_shifted_box_is_as_far_as_it_was_shifted(axis, voxels, distance):
    low, high = [4, 4, 4], [12, 12, 12]
    label = box(low, high)
    low[axis], high[axis] = low[axis] + voxels, high[axis] + voxels
    found = measure(box(low, high), label, tolerance=distance)
    assert found["dice"] == pytest.approx(1 - voxels / 8)
    assert found["hd95"] == pytest.approx(distance)
    assert found["nsd"] == 1.0
    assert measure(box(low, high), label, tolerance=0.95 * distance)["nsd"] < 1


def test_masks_that_touch_the_border_have_a_surface_there():
    label, pred = box((0, 0, 0), (20, 18, 16)), box((0, 0, 0), (18, 18, 16))
    found = measure(pred, label, tolerance=4.9)
    # the two planes at one end, 5 and 2.5 mm apart from the shorter box, are more than 5 % of the surface voxels
    assert found["hd95"] == pytest.approx(5.0)
    assert found["nsd"] < 1
    assert measure(label, label) == {"dice": 1.0, "hd95": 0.0, "nsd": 1.0, "missed": False}


def test_surfaces_count_by_their_area():
    """One face of a flat slab moves by a thick slice: by area 0.69 of the surfaces agree, by number of voxels half."""
    size = (46, 46, 10)
    label, pred = box((3, 3, 3), (43, 43, 6), size), box((3, 3, 3), (43, 43, 7), size)
    found = measure(pred, label, spacing=(1, 1, 4), tolerance=1.5)["nsd"]
    both = 4 * 40 * 40 + 4 * 40 * (3 + 4) * 4  # mm²
    # the tops, but for the rim of the lower one, which is near the sides of the other; half a slice of the sides
    off = 40 * 40 + 38 * 38 + 4 * 40 * 2
    assert found == pytest.approx(1 - off / both, abs=0.02)


def test_a_spacing_in_single_precision_does_not_miss_the_tolerance():
    label, pred = box((4, 4, 4), (12, 12, 12)), box((5, 4, 4), (13, 12, 12))
    assert measure(pred, label, spacing=(1.0000002, 1, 1), tolerance=1.0)["nsd"] == 1.0


@pytest.mark.parametrize("seed", range(6))
def test_distances_are_those_of_monai(seed):
    """MONAI's own are too slow and too large for whole scans."""
    generator = np.random.default_rng(seed)
    pred, label = blob(generator), blob(generator)
    both, options = (pred[None, None], label[None, None]), {"include_background": True, "spacing": SPACING}
    hd95 = compute_hausdorff_distance(*both, percentile=95, **options).item()
    for tolerance in (0.0, 0.9, 3.1, 8.0):
        nsd = compute_surface_dice(*both, [tolerance + 1e-3], use_subvoxels=True, **options).item()
        found = measure(pred, label, tolerance=tolerance)
        assert (found["hd95"], found["nsd"]) == pytest.approx((hd95, nsd), rel=1e-5)


@pytest.mark.parametrize(
    ("empty", "neither", "one_only"),
    [("skip", (math.nan, math.nan, math.nan), math.nan), ("brats", (1, 0, 1), 373.12866)],
)
def test_empty_masks(empty, neither, one_only):
    something, nothing = box((4, 4, 4), (12, 12, 12)), box((0, 0, 0), (0, 0, 0))
    pred = torch.stack([nothing, something, nothing, something])
    label = torch.stack([nothing, nothing, something, something])
    found = case_metrics(pred, label, SPACING, 1.0, empty)
    np.testing.assert_allclose(found["dice"], [neither[0], 0, 0, 1])
    np.testing.assert_allclose(found["hd95"], [neither[1], one_only, one_only, 0], rtol=1e-6)
    np.testing.assert_allclose(found["nsd"], [neither[2], 0, 0, 1])
    assert found["missed"].tolist() == [False, False, True, False]


# ------------------------------------------------------------------------------------------------ handler

CLASSES = {"core": [2], "whole": [1, 2], "absent": [7]}


class Threshold(torch.nn.Module):
    """Finds the classes by intensity: a network that is right, but for what resampling changes."""

    def forward(self, image):
        return torch.cat([image - 1.5, image - 0.5, image - 10], dim=1)


def write_case(folder, name, affine, size=(22, 20, 14), centre=(11, 10, 7), radii=(18.0, 11.0), shown=None):
    """A ball in a ball, with an image that shows 0, 1 and 2, maybe by other radii (mm) than the label's."""
    grid = np.stack(np.meshgrid(*(np.arange(n) for n in size), indexing="ij"), axis=-1)
    distance = np.linalg.norm((grid - centre) @ affine[:3, :3].T, axis=-1)
    label = sum((distance < radius).astype(np.uint8) for radius in radii)
    image = sum((distance < radius).astype(np.float32) for radius in shown or radii)
    for part, array in (("images", image), ("labels", label)):
        (folder / part).mkdir(exist_ok=True, parents=True)
        nib.save(nib.Nifti1Image(array, affine), folder / part / f"{name}.nii.gz")
    return {key: str(folder / f"{key}s" / f"{name}.nii.gz") for key in ("image", "label")}


def oblique(spacing=(2.0, 2.5, 4.0), angle=0.2):
    """Axes that run left, posterior and superior, turned by an angle (radians) about the first."""
    turn = np.array([[1, 0, 0], [0, math.cos(angle), -math.sin(angle)], [0, math.sin(angle), math.cos(angle)]])
    affine = np.eye(4)
    affine[:3, :3] = turn @ np.diag([-1, -1, 1]) @ np.diag(spacing)
    affine[:3, 3] = 30, -12, 7
    return affine


def swapped(spacing=(1.5, 3.0, 2.0)):
    """Axes that run superior, right, posterior."""
    affine = np.eye(4)
    affine[:3, :3] = np.array([[0, 1, 0], [0, 0, -1], [1, 0, 0]]) @ np.diag(spacing)
    return affine


def evaluate(cases, output_dir, **kwargs):
    labels = (("L", "R"), ("P", "A"), ("I", "S"))
    preprocessing = Compose(
        [
            LoadImaged(["image", "label"], ensure_channel_first=True),
            Orientationd("image", "RAS", labels=labels),
            Spacingd("image", (1.5, 1.5, 1.5), mode="bilinear"),
        ]
    )
    evaluator = SupervisedEvaluator(
        device=torch.device("cpu"),
        val_data_loader=DataLoader(Dataset(cases, preprocessing), batch_size=1),
        network=Threshold(),
        postprocessing=ToLabelMapd(CLASSES, "sigmoid", preprocessing),
        val_handlers=[CaseMetrics(CLASSES, output_dir, tolerance=2.0, **kwargs)],
    )
    evaluator.run()
    return evaluator.state.metrics


@pytest.fixture(scope="module")
def evaluated(tmp_path_factory):
    """Three cases, one of which is listed twice; `b` shows less than its label says, `c` misses the core."""
    folder = tmp_path_factory.mktemp("evaluated")
    figures = folder / "out/figures/evaluation"
    figures.mkdir(parents=True)
    (figures / "worst_of_another_evaluation.png").touch()
    cases = [
        write_case(folder, "case_b", swapped(), shown=(14.4, 8.8)),
        write_case(folder, "case_a", oblique()),
        write_case(folder, "case_c", np.diag([2.0, 2.0, 2.0, 1.0]), shown=(5.0, 0.0)),
    ]
    return cases, folder / "out", evaluate([*cases, cases[0]], folder / "out")


def test_cases_are_measured_in_the_geometry_of_their_files(evaluated):
    _, out, _ = evaluated
    rows = {(row["case"], row["class"]): row for row in read_metrics(out / "evaluation_cases.csv")}
    assert list(rows) == [(f"case_{c}", name) for c in "abc" for name in CLASSES]
    assert float(rows["case_a", "whole"]["dice"]) > 0.9
    assert float(rows["case_a", "core"]["dice"]) > 0.85
    # radii of 14.4 and 18 mm; of 0.8 mm³ there are 0.512, which gives a Dice of 0.68
    assert float(rows["case_b", "whole"]["hd95_mm"]) == pytest.approx(3.6, abs=1.5)
    assert float(rows["case_b", "whole"]["dice"]) == pytest.approx(2 * 0.512 / 1.512, abs=0.06)
    assert rows["case_c", "core"] == {"case": "case_c", "class": "core", "dice": "0", "hd95_mm": "", "nsd": "0"}
    assert all(rows[f"case_{c}", "absent"]["dice"] == "" for c in "abc")


def test_the_summary_is_over_cases(evaluated):
    _, out, metrics = evaluated
    cases = read_metrics(out / "evaluation_cases.csv")
    summary = {row["class"]: row for row in read_metrics(out / "evaluation.csv")}
    assert list(summary) == [*CLASSES, "mean"]
    for name in ("core", "whole"):
        for column, metric in (("dice", "dice"), ("hd95_mm", "hd95"), ("nsd", "nsd")):
            values = [float(row[column]) for row in cases if row["class"] == name and row[column]]
            assert float(summary[name][f"{column}_mean"]) == pytest.approx(np.mean(values), rel=1e-4)
            assert float(summary[name][f"{column}_std"]) == pytest.approx(np.std(values, ddof=1), rel=1e-4)
            assert metrics[f"{metric}_{name}"] == pytest.approx(np.mean(values), rel=1e-4)
        assert summary[name]["cases"] == "3"
    assert (summary["core"]["missed"], summary["whole"]["missed"], summary["mean"]["missed"]) == ("1", "0", "1")
    assert (summary["absent"]["dice_mean"], summary["absent"]["cases"]) == ("", "0")
    assert math.isnan(metrics["dice_absent"])
    means = [np.mean([float(r["dice"]) for r in cases if r["case"] == f"case_{c}" and r["dice"]]) for c in "abc"]
    assert metrics["mean_dice"] == pytest.approx(np.mean(means), rel=1e-4)
    assert float(summary["mean"]["dice_std"]) == pytest.approx(np.std(means, ddof=1), rel=1e-4)


def test_the_worst_and_the_best_case_are_drawn(evaluated):
    _, out, _ = evaluated
    figures = out / "figures/evaluation"
    assert sorted(path.name for path in figures.iterdir()) == ["best_case_a.png", "worst_case_c.png"]
    assert all(Image.open(path).width == 1650 for path in figures.iterdir())


def test_the_order_of_the_cases_does_not_matter(evaluated, tmp_path):
    cases, out, _ = evaluated
    evaluate(cases[::-1], tmp_path)
    for name in ("evaluation.csv", "evaluation_cases.csv"):
        assert (tmp_path / name).read_text() == (out / name).read_text()


def test_the_printed_table_is_aligned(evaluated, tmp_path, capsys):
    cases, _, _ = evaluated
    evaluate(cases[:1], tmp_path, empty="brats")
    evaluate(cases, tmp_path)
    lines = [line for line in capsys.readouterr().out.splitlines() if line.startswith(("class", *CLASSES, "mean"))]
    assert len(lines) == 10
    assert "NSD at 2 mm" in lines[0]
    assert " ± " not in lines[2]  # a single case has no deviation
    assert "1.000" in lines[3] and "0.00" in lines[3]  # absent, in the challenge's way
    assert len({len(line) for line in lines[5:]}) == 1
    assert " ± " in lines[6]


def test_a_label_of_another_shape(tmp_path):
    case = write_case(tmp_path, "case", oblique())
    other = write_case(tmp_path / "other", "case", oblique(), size=(22, 20, 13))
    with pytest.raises(ScanError, match=r"other/labels/case.nii.gz.*\(22, 20, 13\).*expected \(22, 20, 14\)"):
        evaluate([{**case, "label": other["label"]}], tmp_path / "out")


def test_no_class_in_any_case(tmp_path):
    """Nothing is counted, and no picture is drawn."""
    case = write_case(tmp_path, "case", oblique(), radii=(0.0, 0.0))
    assert math.isnan(evaluate([case], tmp_path / "out")["mean_dice"])
    assert sorted(path.name for path in (tmp_path / "out").iterdir()) == ["evaluation.csv", "evaluation_cases.csv"]


@pytest.mark.parametrize("wrong", [{"empty": "zero"}, {"tolerance": -1.0}, {"tolerance": math.nan}])
def test_wrong_settings(wrong, tmp_path):
    with pytest.raises(ValueError, match=next(iter(wrong))):
        CaseMetrics(CLASSES, tmp_path, **{"tolerance": 1.0, **wrong})


def test_a_case_of_two_processes_counts_once():
    case = _Case("i/a.nii", "l/a.nii", {}, 0.5)
    assert _gathered([case, _Case("i/a.nii", "l/a.nii", {}, 0.5)]) == [case]
