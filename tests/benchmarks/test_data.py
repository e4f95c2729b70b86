"""All sides of the benchmark of data sets draw the same voxels."""

from __future__ import annotations

import torch

from benchmarks.data import SIDES, draw, make_side, waiting, write_ct


def test_all_sides_draw_the_same(tmp_path):
    write_ct(tmp_path / "ct.nii.gz", (64, 60, 56))
    drawn = {}
    for side in SIDES:
        dataset = make_side(side, tmp_path / "ct.nii.gz", tmp_path / side, crop=48)
        drawn[side] = [crop for seed in (1, 2) for crop in draw(dataset, seed)]
    for crops in drawn.values():
        for crop, truth in zip(crops, drawn["no cache"], strict=True):
            assert torch.equal(torch.as_tensor(crop["image"]), torch.as_tensor(truth["image"]))
            assert torch.equal(crop["mask"], truth["mask"])
    assert len({float(crop["image"].mean()) for crop in drawn["store"]}) == 8


def test_the_loop_waits_less_than_it_takes(tmp_path):
    write_ct(tmp_path / "ct.nii.gz", (64, 60, 56))
    waited, total = waiting(tmp_path / "ct.nii.gz", tmp_path / "cache", steps=1)
    assert 0 <= waited < total
