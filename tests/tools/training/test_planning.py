"""The planner's rules hold for any data; each property is a sentence of docs/planning.md."""

from __future__ import annotations

from dataclasses import replace
from math import prod

import numpy as np
import pytest
from hypothesis import assume, given
from hypothesis import strategies as st
from monai.data.utils import dense_patch_slices

from tools.common.windows import require_roi
from tools.data.fingerprint import Case
from tools.training.planning import (
    AXES,
    LEAST_VOXELS,
    Memory,
    batch,
    coarsened,
    crop_size,
    crop_voxels,
    epochs,
    is_cut_out,
    no_flips,
    plan_pretraining,
    plan_segmentation,
    target_spacing,
    training_cases,
    validation_overlap,
    window,
    windows,
)

GB = 1e9
SPACING = st.lists(st.floats(0.3, 6.0), min_size=3, max_size=3)
BODY = st.lists(st.floats(30.0, 900.0), min_size=3, max_size=3)  # mm
STRIDE = st.sampled_from([16, 32])


def case(spacing=(1.0, 1.0, 1.0), body=(100.0, 100.0, 100.0), centres=None, volumes=None, filled=1.0, low=0, high=100):
    volumes = volumes or {1: 5000.0}
    shape = tuple(max(2, round(mm / side)) for mm, side in zip(body, spacing, strict=True))
    centres = centres or dict.fromkeys(volumes, (50.0, 50.0, 50.0))
    return Case(shape, spacing, body, filled, np.linspace(low, high, 1001).tolist(), volumes, centres)


# ------------------------------------------------------------------------------------------------- voxels and crops


@given(st.lists(SPACING, min_size=1, max_size=9), BODY)
def test_a_voxel_is_no_smaller_or_larger_than_those_of_the_scans(spacings, body):
    found = np.asarray(target_spacing(spacings, body))
    assert (found >= np.min(spacings, axis=0) - 1e-9).all()
    assert (found <= np.max(spacings, axis=0) + 1e-9).all()


def test_isotropic_scans_keep_their_median_and_thick_slices_get_thinner():
    assert target_spacing([[1, 1, 1], [1, 1, 2], [1, 1, 9]], [200, 200, 200]) == [1, 1, 2]
    thick = [[1, 1, side] for side in (2, 5, 6, 7, 8)]
    assert target_spacing(thick, [300, 300, 150]) == pytest.approx([1, 1, 3.2])  # the 10th percentile
    assert target_spacing(thick, [300, 300, 3000])[2] == 6  # many slices: the median


@given(SPACING, BODY, st.integers(32**3, 160**3), st.floats(50, 1e6))
def test_voxels_grow_only_as_far_as_the_smallest_class_keeps_its_form(spacing, body, most, smallest):
    found = np.asarray(coarsened(spacing, body, most, smallest))
    assert (found >= np.asarray(spacing) - 0.0051).all()  # rounded
    grown = found.prod() > 1.05 * np.prod(spacing)
    if grown:
        assert smallest / found.prod() >= 0.95 * LEAST_VOXELS
    elif prod(mm / side for mm, side in zip(body, spacing, strict=True)) > 4.5 * most:
        assert smallest / np.prod(spacing) < 1.15 * LEAST_VOXELS  # nothing else keeps them small


def test_fine_axes_grow_first():
    assert coarsened([0.7, 0.7, 5.0], [400, 400, 500], 96**3, 1e6)[2] == 5.0


@given(SPACING, BODY, STRIDE, st.integers(64**3, 200**3))
def test_crops_fit_the_network_the_memory_and_the_case(spacing, body, stride, most):
    crop = crop_size(spacing, body, stride, most)
    require_roi(crop, stride)
    assert prod(crop) <= most
    size = [mm / side for mm, side in zip(body, spacing, strict=True)]
    assert all(c == 2 * stride or c < s + stride for c, s in zip(crop, size, strict=True))


@given(SPACING, BODY, STRIDE, st.integers(64**3, 200**3), st.integers(64**3, 200**3))
def test_more_memory_never_makes_a_crop_smaller(spacing, body, stride, one, other):
    small, large = (crop_size(spacing, body, stride, most) for most in sorted((one, other)))
    assert all(s <= c for s, c in zip(small, large, strict=True))


@given(st.integers(1, 40), st.integers(1, 500), st.floats(1e4, 1e8))
def test_a_batch_fits_into_memory(room, cases, case_voxels):
    crop = [64, 64, 64]
    each, crops = batch(crop, room * prod(crop), case_voxels, cases)
    assert 1 <= each <= cases
    assert crops >= 1
    assert each * crops <= room
    assert each * crops <= 4


def test_a_batch_is_no_large_part_of_few_small_cases():
    assert prod(batch([64] * 3, 100 * 64**3, 1e8, 500)) == 4
    assert prod(batch([64] * 3, 100 * 64**3, 64**3, 5)) == 2
    assert prod(batch([64] * 3, 100 * 64**3, 1e8, 500, most=2)) == 2


def test_a_budget_below_the_smallest_crop_says_how_much_is_needed():
    assert crop_voxels(Memory(1 * GB, 3000, 2 * GB), 16, 128**3) == 166_666  # two fit
    assert crop_voxels(Memory(1 * GB, 3000, 1.1 * GB), 16, 128**3) == 32**3  # one fits
    with pytest.raises(
        ValueError, match=r"memory_gb: found 1\.05 GB, expected at least 1\.1 GB for a batch of 1 crop\(s\) of 32×32×32"
    ):
        crop_voxels(Memory(1 * GB, 3000, 1.05 * GB), 16, 128**3)


@given(st.lists(st.integers(20, 200), min_size=3, max_size=3), st.sampled_from([0.1, 0.25, 0.5]))
def test_windows_are_counted_as_monai_slides_them(size, overlap):
    crop = [32, 48, 64]
    padded = [max(s, c) for s, c in zip(size, crop, strict=True)]
    slid = dense_patch_slices(padded, crop, [int(c * (1 - overlap)) for c in crop])
    assert windows(size, crop, overlap) == len(slid)


def test_validation_takes_few_windows():
    assert validation_overlap([96, 96, 96], [96, 96, 96]) == 0.5
    assert windows([400, 400, 200], [96, 96, 96], validation_overlap([400, 400, 200], [96, 96, 96])) <= 80


@given(st.integers(2, 2000), st.integers(1, 4))
def test_epochs_make_as_many_steps_as_planned(cases, batch_size):
    train = training_cases(cases)
    assert 1 <= train < cases
    found = epochs(train, batch_size, 12_000)
    steps = -(-train // batch_size)
    assert found % 10 == 0
    assert 12_000 <= found * steps <= 12_000 + max(10, 20) * steps


# ------------------------------------------------------------------------------------------- intensities, mirroring


@given(st.floats(-900, 200), st.floats(5, 2000))
def test_the_window_holds_what_is_inside_of_the_labels(low, width):
    found = window([np.linspace(low, low + width, 1001)] * 3)
    assert found[0] < found[1]
    assert low - 1 <= found[0] <= low + 0.01 * width + 1
    assert low + 0.99 * width - 1 <= found[1] <= low + width + 1


def test_scans_that_are_0_around_are_cut_out():
    assert is_cut_out([0.2, 0.3, 1.0])
    assert not is_cut_out([0.9, 1.0, 0.1])


@pytest.mark.parametrize(
    ("names", "axes"),
    [
        (["left_kidney", "right_kidney"], ["left-right"]),
        (["LeftLung", "heart"], []),  # one word
        (["lung_left", "heart"], ["left-right"]),
        (["lung_l", "lung_r"], ["left-right"]),
        (["lung_l", "liver"], []),
        (["Anterior", "Posterior"], ["posterior-anterior"]),
        (["upper_lobe", "lower_lobe"], ["inferior-superior"]),
        (["left_kidney", "spleen"], ["left-right"]),  # the right one looks alike
        (["inferior_vena_cava", "spleen"], []),
        (["spleen"], []),
    ],
)
def test_names_with_a_side_forbid_to_mirror(names, axes):
    assert list(no_flips({name: [n] for n, name in enumerate(names, 1)}, [])) == axes


@pytest.mark.parametrize("axis", [0, 1, 2])
def test_classes_of_one_size_on_their_own_sides_forbid_to_mirror(axis):
    generator = np.random.default_rng(0)

    def cases(swapped):
        made = []
        for number in range(4):
            at = np.array([50.0, 50, 50]) + generator.normal(0, 2, 3)
            step = np.zeros(3)
            step[axis] = -20 if swapped and number == 2 else 20
            made.append(case(centres={1: tuple(at), 2: tuple(at + step)}, volumes={1: 500.0, 2: 700.0}))
        return made

    classes = {"one": [1], "other": [2]}
    assert list(no_flips(classes, cases(swapped=False))) == [AXES[axis]]
    assert no_flips(classes, cases(swapped=True)) == {}
    larger = [replace(one, volumes={1: 500.0, 2: 5000.0}) for one in cases(swapped=False)]
    assert no_flips(classes, larger) == {}


# ------------------------------------------------------------------------------------------------------- whole plans


@given(SPACING, BODY, st.floats(3, 60), STRIDE, st.booleans())
def test_a_plan_fits_into_the_memory(spacing, body, limit, stride, small):
    memory = Memory(0.5 * GB, 3000, limit * GB)
    cases = [case(tuple(spacing), tuple(body))] * 10
    facts, rows = plan_segmentation(cases, {"organ": [1]}, True, memory, stride, small)
    require_roi(facts["roi_size"], stride)
    crops = facts["batch_size"] * facts["crops_per_volume"]
    assert memory.fixed + memory.per_voxel * crops * prod(facts["roi_size"]) <= memory.limit
    assert all(row.found and row.decided and row.why for row in rows)
    assert crops <= (2 if small else 4)
    assert not small or prod(facts["roi_size"]) <= max(48 * 64 * 48, (2 * stride) ** 3)


@given(st.floats(2, 8), st.floats(8, 80))
def test_more_memory_never_gives_coarser_voxels(little, much):
    assume(much > little)
    cases = [case((0.8, 0.8, 1.5), (350.0, 280.0, 300.0), volumes={1: 1e6})] * 5
    plans = [
        plan_segmentation(cases, {"liver": [1]}, True, Memory(0.5 * GB, 3000, gb * GB))[0] for gb in (little, much)
    ]
    assert prod(plans[1]["spacing"]) <= prod(plans[0]["spacing"])


def test_weights_bring_their_own_preparation():
    prepared = {
        "spacing": [1.5, 1.5, 2.0],
        "intensity": {"scaling": "window", "range": [-1000, 1000], "to": [0.001, 1.0]},
        "foreground_above": 0.25,
    }
    facts, _ = plan_segmentation([case()] * 5, {"a": [1]}, True, Memory(0, 3000, 8 * GB), prepared=prepared)
    assert facts["spacing"] == [1.5, 1.5, 2.0]
    assert (facts["window"], facts["scaled_to"], facts["foreground_above"]) == ([-1000, 1000], [0.001, 1.0], 0.25)


@given(st.integers(2, 300), SPACING, BODY, st.floats(4, 60), st.booleans())
def test_a_plan_for_pre_training_fits_its_geometry_memory_and_contrast(scans, spacing, body, limit, small):
    memory = Memory(0.5 * GB, 6000, limit * GB)
    values, _ = plan_pretraining([case(tuple(spacing), tuple(body))] * scans, True, memory, 4, 1e9, small)
    region, patch = values["region_size"], values["patch_size"]
    assert all(side % r == 0 and r % p == 0 for side, r, p in zip(values["roi_size"], region, patch, strict=True))
    assert all(2 * r <= d <= side for side, r, d in zip(values["roi_size"], region, values["decode_size"], strict=True))
    crops = values["batch_size"] * values["crops_per_volume"]
    assert 2 <= crops <= 8  # the contrastive term compares them
    assert memory.fixed + memory.per_voxel * crops * prod(values["roi_size"]) <= memory.limit
    assert values["num_workers"] == 2


def test_intensities_without_a_unit_are_scaled_by_each_scan():
    memory = Memory(0, 3000, 8 * GB)
    plain, _ = plan_segmentation([case()] * 5, {"a": [1]}, False, memory)
    stripped, _ = plan_segmentation([case(filled=0.2)] * 5, {"a": [1]}, False, memory)
    assert (plain["intensity"], stripped["intensity"]) == ("percentiles", "z_score")
