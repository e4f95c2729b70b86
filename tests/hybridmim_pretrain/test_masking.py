"""The mask transform: exact ratio, both levels of the hierarchy, seeds, and sizes that do not fit."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from monai.data import DataLoader, Dataset
from monai.transforms import Compose

from scripts.masking import (
    ApplyMaskd,
    FixedDrawd,
    Geometry,
    RandPatchMaskd,
    apply_mask,
    max_entropy_counts,
)

PAPER = Geometry((96, 96, 96), (32, 32, 32), (16, 16, 16), (64, 64, 64), 16)
FINE = Geometry((96, 96, 96), (32, 32, 32), (8, 8, 8), (64, 64, 64), 16)
ANISOTROPIC = Geometry((48, 64, 96), (16, 32, 32), (8, 16, 4), (32, 32, 64), 16)


def masks(geometry, n, seed=0, **kwargs):
    transform = RandPatchMaskd(geometry, **kwargs)
    transform.set_random_state(seed)
    image = torch.ones(1, *geometry.roi_size)
    return torch.stack([transform({"image": image})["mask"] for _ in range(n)])


def counts(mask, geometry):
    """Masked patches of each region, by looping over regions."""
    m = geometry.patches_per_region
    grid = [r // s for r, s in zip(geometry.roi_size, geometry.region_size, strict=True)]
    return [
        int(mask[0, i * m[0] : (i + 1) * m[0], j * m[1] : (j + 1) * m[1], k * m[2] : (k + 1) * m[2]].sum())
        for i, j, k in np.ndindex(*grid)
    ]


@pytest.mark.parametrize("scheme", ["two_level", "uniform"])
@pytest.mark.parametrize("ratio", [0.1, 0.4, 0.75, 0.95])
@pytest.mark.parametrize("geometry", [PAPER, FINE, ANISOTROPIC])
def test_total_is_exact(geometry, ratio, scheme):
    drawn = masks(geometry, 20, mask_ratio=ratio, mask_scheme=scheme)
    assert drawn.dtype == torch.bool
    assert drawn.shape[2:] == tuple(r // p for r, p in zip(geometry.roi_size, geometry.patch_size, strict=True))
    assert set(drawn.sum((1, 2, 3, 4)).tolist()) == {round(ratio * drawn[0].numel())}


def test_two_levels_give_every_count_about_alike():
    found = np.bincount([c for mask in masks(PAPER, 300) for c in counts(mask, PAPER)], minlength=9)
    share = found / found.sum()
    assert share.min() > 0.04  # of nine counts
    assert share @ np.arange(9) == pytest.approx(86 / 27)
    uniform = np.bincount(
        [c for mask in masks(PAPER, 300, mask_scheme="uniform") for c in counts(mask, PAPER)], minlength=9
    )
    assert uniform[0] / uniform.sum() < 0.03  # the middle counts dominate there
    entropy = [-(p[p > 0] * np.log(p[p > 0])).sum() for p in (share, uniform / uniform.sum())]
    assert entropy[0] > entropy[1] + 0.2


def test_every_patch_is_masked_equally_often():
    often = masks(PAPER, 400).float().mean(0)
    assert (often - 86 / 216).abs().max() < 0.12  # five standard deviations


@pytest.mark.parametrize("ratio", [0.01, 0.25, 0.5, 0.9])
def test_max_entropy_counts_have_the_mean(ratio):
    p = max_entropy_counts(8, ratio)
    assert p.sum() == pytest.approx(1)
    assert p @ np.arange(9) == pytest.approx(8 * ratio)
    assert p.min() > 0
    assert np.ptp(np.diff(np.log(p))) < 1e-6  # log-linear: the form of the highest entropy for a given mean


def test_a_seed_reproduces_the_masks():
    assert torch.equal(masks(PAPER, 3, seed=5), masks(PAPER, 3, seed=5))
    assert not torch.equal(masks(PAPER, 3, seed=5), masks(PAPER, 3, seed=6))


@pytest.mark.parametrize("workers", [0, 2])
def test_a_seed_reproduces_the_masks_of_a_loader(workers):
    def epoch(seed):
        torch.manual_seed(seed)
        items = [{"image": torch.ones(1, *PAPER.roi_size)} for _ in range(6)]
        loader = DataLoader(Dataset(items, RandPatchMaskd(PAPER)), batch_size=3, num_workers=workers)
        return torch.cat([batch["mask"] for batch in loader])

    first = epoch(1)
    assert torch.equal(first, epoch(1))
    assert not torch.equal(first, epoch(2))
    assert len({mask.numpy().tobytes() for mask in first}) == 6  # workers draw different masks


def test_fixed_draw_is_the_same_for_the_same_scan():
    def scan(name):
        return {"image": torch.ones(1, *PAPER.roi_size), "file": name}

    fixed = FixedDrawd([RandPatchMaskd(PAPER)], seed=3)
    first = fixed(scan("/a/one.nii.gz"))["mask"]
    fixed(scan("/a/two.nii.gz"))
    assert torch.equal(first, fixed(scan("/elsewhere/one.nii.gz"))["mask"])
    assert not torch.equal(first, fixed(scan("/a/two.nii.gz"))["mask"])
    assert not torch.equal(first, FixedDrawd([RandPatchMaskd(PAPER)], seed=4)(scan("/a/one.nii.gz"))["mask"])
    # seeding the data set (as workers do) changes nothing
    outer = Compose([fixed]).set_random_state(99)
    assert torch.equal(first, outer(scan("/a/one.nii.gz"))["mask"])


def test_apply_mask_fills_all_channels_of_the_masked_patches_only():
    image = torch.rand(2, 3, *ANISOTROPIC.roi_size) + 0.1
    mask = masks(ANISOTROPIC, 2)
    hidden = apply_mask(image, mask, fill=-1.0)
    p = ANISOTROPIC.patch_size
    for i, j, k in np.ndindex(*mask.shape[2:]):
        part = (..., *(slice(n * s, (n + 1) * s) for n, s in zip((i, j, k), p, strict=True)))
        for b in range(2):
            expected = torch.full_like(image[b][part], -1) if mask[b, 0, i, j, k] else image[b][part]
            assert torch.equal(hidden[b][part], expected)
    single = ApplyMaskd(fill=-1.0)({"image": image[0], "mask": mask[0]})
    assert torch.equal(single["image"], hidden[0])


def test_a_volume_that_is_no_multiple_of_the_region_is_refused():
    with pytest.raises(ValueError, match=r"image: shape \[96, 96, 80\] must be a multiple of region_size"):
        RandPatchMaskd(PAPER)({"image": torch.ones(1, 96, 96, 80)})
