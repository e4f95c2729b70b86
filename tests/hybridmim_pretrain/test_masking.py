"""The mask transform: exact ratio, both levels of the hierarchy, seeds, and sizes that do not fit."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from monai.data import DataLoader, Dataset
from monai.transforms import Compose

from scripts.masking import (
    MASK_FILLS,
    ApplyMaskd,
    FixedDrawd,
    Geometry,
    RandPatchMaskd,
    apply_mask,
    max_entropy_counts,
    require_fill,
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


def masked_parts(mask, size):
    """Which voxels are masked, by brute force over the patches: bool [B, *size]."""
    found = torch.zeros(len(mask), *size, dtype=torch.bool)
    p = [s // g for s, g in zip(size, mask.shape[2:], strict=True)]
    for b, i, j, k in np.argwhere(mask[:, 0].numpy()):
        found[b, i * p[0] : (i + 1) * p[0], j * p[1] : (j + 1) * p[1], k * p[2] : (k + 1) * p[2]] = True
    return found


@pytest.mark.parametrize("fill", MASK_FILLS)
def test_apply_mask_changes_all_channels_of_the_masked_patches_only(fill):
    image = torch.rand(2, 3, *ANISOTROPIC.roi_size) + 0.1
    mask = masks(ANISOTROPIC, 2)
    changed = apply_mask(image, mask, fill) != image
    assert torch.equal(changed, masked_parts(mask, image.shape[2:])[:, None].expand_as(image))


def test_what_stands_in_masked_patches():
    image = torch.rand(4, 2, *ANISOTROPIC.roi_size) * 0.5 + 0.1
    image[..., :8] = 0  # padding
    mask = masks(ANISOTROPIC, 4)
    hidden = masked_parts(mask, image.shape[2:])[:, None].expand_as(image)
    assert (apply_mask(image, mask, "zero")[hidden] == 0).all()
    # two crops of each of two scans: the fill is from the other scan, at the same place
    other = apply_mask(image, mask, "foreign", shift=2)
    assert torch.equal(other[hidden], image[[2, 3, 0, 1]][hidden])
    assert torch.equal(apply_mask(image, mask, "foreign", shift=-1)[hidden], image[[1, 2, 3, 0]][hidden])
    # two crops of the only scan, and a single crop
    assert torch.equal(apply_mask(image[:2], mask[:2], "foreign", shift=2)[hidden[:2]], image[[1, 0]][hidden[:2]])
    assert torch.equal(apply_mask(image[:1], mask[:1], "foreign")[hidden[:1]], image[:1].flip(2, 3, 4)[hidden[:1]])
    for number in range(4):
        for channel in range(2):
            inside = hidden[number, channel]
            visible = image[number, channel][~inside & (image[number, channel] > 0)]
            mean = apply_mask(image, mask, "mean")[number, channel][inside]
            torch.testing.assert_close(mean, visible.mean().expand_as(mean))
            noise = apply_mask(image, mask, "noise")[number, channel][inside]
            assert abs(noise.mean() - visible.mean()) < 0.02
            assert abs(noise.std() / visible.std(unbiased=False) - 1) < 0.1


def test_inference_masks_a_scan_by_itself():
    image, mask = torch.rand(1, *ANISOTROPIC.roi_size), masks(ANISOTROPIC, 1)
    found = ApplyMaskd(fill="foreign")({"image": image, "mask": mask[0]})["image"]
    assert torch.equal(found[None], apply_mask(image[None], mask, "foreign"))


def test_an_unknown_fill_is_refused():
    with pytest.raises(ValueError, match=r"mask_fill: found 0\.0, expected one of foreign, zero, mean, noise"):
        require_fill(0.0)


def test_a_volume_that_is_no_multiple_of_the_region_is_refused():
    with pytest.raises(ValueError, match=r"image: shape \[96, 96, 80\] must be a multiple of region_size"):
        RandPatchMaskd(PAPER)({"image": torch.ones(1, 96, 96, 80)})
