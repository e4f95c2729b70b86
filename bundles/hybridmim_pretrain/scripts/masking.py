"""The two-level masking hierarchy: which patches of a crop are hidden from the network (arXiv 2303.10333).

A crop is divided into regions, a region into patches. Level one draws how many patches of each region are
masked, level two which ones. A mask has one boolean per patch; `apply_mask` hides the voxels on the device.
"""

from __future__ import annotations

import zlib
from collections.abc import Hashable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from monai.transforms import Compose, Randomizable, Transform
from scipy.optimize import brentq
from torch import Tensor

from tools.common.text import size_text
from tools.losses import expand_mask, scan_voxels

MASK_SCHEMES = ("two_level", "uniform")
MASK_FILLS = ("foreign", "zero", "mean", "noise")
Size = tuple[int, int, int]


@dataclass(frozen=True)
class Geometry:
    """Sizes of crop, region, patch and decoded box, in voxels along the three axes; checks that they are compatible.

    Raises:
        ValueError: the sizes are not compatible; the message names the key, the value and what was expected.
    """

    roi_size: Sequence[int]  # crop
    region_size: Sequence[int]  # part of the crop in which masked patches are counted and located
    patch_size: Sequence[int]  # unit of masking
    decode_size: Sequence[int]  # box of the crop that is reconstructed in training
    stride: int  # total downsampling of the network: 16 for UNet and ViT, 32 for SwinUNETR

    def __post_init__(self) -> None:
        for key in ("roi_size", "region_size", "patch_size", "decode_size"):
            size = getattr(self, key)
            if len(size) != 3 or any(int(s) != s or s < 1 for s in size):
                raise ValueError(f"{key} must be three whole numbers of voxels above 0, found {list(size)}")
            object.__setattr__(self, key, tuple(int(s) for s in size))
        self._divides("roi_size", "region_size", self.region_size)
        self._divides("region_size", "patch_size", self.patch_size)
        bottleneck = (self.stride,) * 3
        self._divides("region_size", "the bottleneck stride of the network", bottleneck)
        self._divides("decode_size", "the bottleneck stride of the network", bottleneck)
        for key in ("roi_size", "decode_size"):
            if any(s < 2 * self.stride for s in getattr(self, key)):
                raise ValueError(
                    f"{key} {list(getattr(self, key))} must span at least two voxels of the network's bottleneck, "
                    f"{2 * self.stride} voxels along each axis"
                )
        if any(d > r for d, r in zip(self.decode_size, self.roi_size, strict=True)):
            raise ValueError(f"decode_size {list(self.decode_size)} must fit into roi_size {list(self.roi_size)}")

    def _divides(self, key: str, by: str, divisor: Sequence[int]) -> None:
        size = getattr(self, key)
        if any(s % d for s, d in zip(size, divisor, strict=True)):
            raise ValueError(f"{key} {list(size)} must be a multiple of {by} {list(divisor)} along each axis")

    @property
    def patches_per_region(self) -> Size:
        """Patches along each axis of a region."""
        return tuple(r // p for r, p in zip(self.region_size, self.patch_size, strict=True))


def apply_mask(image: Tensor, mask: Tensor, fill: str = "zero", shift: int = 1) -> Tensor:
    """Hide the masked patches of image [B, C, H, W, D] in all channels; mask [B, 1, P1, P2, P3].

    Args:
        image: crops.
        mask: bool, one entry for each patch.
        fill: what stands in masked voxels. `foreign`: the same patch of another crop of the batch, so that no value
            gives it away; `zero`, as published; `mean`: of the crop's visible voxels; `noise`: of their mean and
            standard deviation.
        shift: with `foreign`, which other crop: so many back in the batch. Crops of one scan follow each other, so the
            number of crops per scan leads to another scan.
    """
    hidden = expand_mask(mask, image.shape[2:])
    if fill == "zero":
        return torch.where(hidden, 0.0, image)
    if fill == "foreign":
        return torch.where(hidden, another(image, shift), image)
    visible = scan_voxels(image) & ~hidden
    count = visible.sum((2, 3, 4), keepdim=True).clamp(min=1)
    mean = (image * visible).sum((2, 3, 4), keepdim=True) / count
    if fill == "mean":
        return torch.where(hidden, mean, image)
    deviation = (((image - mean) ** 2 * visible).sum((2, 3, 4), keepdim=True) / count).sqrt()
    return torch.where(hidden, mean + deviation * torch.randn_like(image), image)


def another(batch: Tensor, shift: int = 1) -> Tensor:
    """For each entry of a batch [B, C, …] another one: `shift` back; the one before if the batch is of one scan.

    A single entry has its mirror image.
    """
    if len(batch) == 1:
        return batch.flip(2, 3, 4)
    return batch.roll(shift if abs(shift) < len(batch) else 1, 0)


def require_fill(fill: object) -> str:
    """Return what stands in masked voxels.

    Raises:
        ValueError: there is no such choice.
    """
    if fill not in MASK_FILLS:
        raise ValueError(f"mask_fill: found {fill!r}, expected one of {', '.join(MASK_FILLS)}")
    return fill


def empty_patches(image: Tensor, patch_size: Sequence[int]) -> Tensor:
    """Patches that contain only 0 (masked or padding): [B, C, H, W, D] → bool [B, 1, P1, P2, P3]."""
    return F.max_pool3d(scan_voxels(image).float(), tuple(patch_size)) == 0


class RandPatchMaskd(Randomizable, Transform):
    """Draws a random mask for a volume and adds it as the entry `mask`.

    The image does not change; `apply_mask` hides the masked patches on the device. In both schemes, exactly
    `round(mask_ratio × patches)` patches are masked:

    - `two_level`: draws, for each region, first how many of its patches are masked, then which. The counts follow
      the distribution of highest entropy with the required mean, so that every count 0 … M occurs and predicting the
      number is a meaningful task.
    - `uniform`: draws uniformly from all patches of the volume (as the published code).

    Args:
        geometry: region and patch size (voxels).
        mask_ratio: fraction of the patches that is masked, above 0 and below 1.
        mask_scheme: `two_level` or `uniform`.
        key: entry with the volume, [C, H, W, D]; each side must be a multiple of the region size.

    Raises:
        ValueError: an argument is invalid, or the shape of a volume is not a multiple of the region size.
    """

    def __init__(
        self, geometry: Geometry, mask_ratio: float = 0.4, mask_scheme: str = "two_level", key: str = "image"
    ) -> None:
        if not 0 < mask_ratio < 1:
            raise ValueError(f"mask_ratio must be above 0 and below 1, found {mask_ratio}")
        if mask_scheme not in MASK_SCHEMES:
            raise ValueError(f"mask_scheme must be one of {', '.join(MASK_SCHEMES)}; found {mask_scheme!r}")
        self.geometry = geometry
        self.mask_ratio = mask_ratio
        self.mask_scheme = mask_scheme
        self.key = key
        self.count_probability = max_entropy_counts(int(np.prod(geometry.patches_per_region)), mask_ratio)

    def __call__(self, data: Mapping[Hashable, Tensor]) -> dict[Hashable, Tensor]:
        """Add `mask`, bool [1, P1, P2, P3]."""
        size = data[self.key].shape[1:]
        if any(s % r for s, r in zip(size, self.geometry.region_size, strict=True)):
            raise ValueError(
                f"{self.key}: shape {list(size)} must be a multiple of region_size "
                f"{list(self.geometry.region_size)} along each axis"
            )
        return {**data, "mask": torch.from_numpy(self.draw(size)[None])}

    def describe(self) -> str:
        """Return a description of the masking for the start table."""
        return f"{self.mask_scheme}, {self.mask_ratio:g} of the patches of {size_text(self.geometry.patch_size)}"

    def draw(self, size: Sequence[int]) -> np.ndarray:
        """A mask for a volume of `size` voxels: bool [P1, P2, P3]."""
        grid = [s // p for s, p in zip(size, self.geometry.patch_size, strict=True)]
        masked = round(self.mask_ratio * int(np.prod(grid)))
        if self.mask_scheme == "uniform":
            return (self._ranks(1, int(np.prod(grid))) < masked).reshape(grid)
        m = self.geometry.patches_per_region
        regions = [g // k for g, k in zip(grid, m, strict=True)]
        counts = self._draw_counts(int(np.prod(regions)), masked)
        by_region = self._ranks(len(counts), int(np.prod(m))) < counts[:, None]
        return by_region.reshape(*regions, *m).transpose(0, 3, 1, 4, 2, 5).reshape(grid)

    def _ranks(self, rows: int, columns: int) -> np.ndarray:
        """Return an independent random permutation of 0 … columns - 1 in each row."""
        return self.R.random((rows, columns)).argsort(axis=1)

    def _draw_counts(self, regions: int, total: int) -> np.ndarray:
        """Draw the number of masked patches of each region, then adjust some by 1 until the total is exact."""
        top = len(self.count_probability) - 1
        counts = self.R.choice(top + 1, size=regions, p=self.count_probability)
        while difference := total - counts.sum():
            step = 1 if difference > 0 else -1
            room = np.flatnonzero((counts + step >= 0) & (counts + step <= top))
            chosen = self.R.permutation(room)[: abs(difference)]
            counts[chosen] += step
        return counts


class ApplyMaskd(Transform):
    """Hides the masked patches of a volume [C, H, W, D] on the CPU, for inference on whole scans.

    Args:
        fill: what stands in masked voxels, as in `apply_mask`; there is no other scan, so `foreign` takes the mirror
            image.
        key: entry that is masked, with the entry `mask` that `RandPatchMaskd` added.

    Raises:
        ValueError: unknown fill.
    """

    def __init__(self, fill: str = "zero", key: str = "image") -> None:
        self.fill = require_fill(fill)
        self.key = key

    def __call__(self, data: Mapping[Hashable, Tensor]) -> dict[Hashable, Tensor]:
        """Replace the volume."""
        return {**data, self.key: apply_mask(data[self.key][None], data["mask"][None], self.fill)[0]}


def max_entropy_counts(patches: int, ratio: float) -> np.ndarray:
    """Probabilities of the counts 0 … patches with mean `ratio × patches` and the highest entropy: p(n) ∝ exp(λn)."""
    counts = np.arange(patches + 1)

    def probability(slope: float) -> np.ndarray:
        p = np.exp(slope * counts - np.max(slope * counts))
        return p / p.sum()

    # the mean increases from 0 to `patches` as the slope increases from -∞ to ∞
    slope = brentq(lambda s: probability(s) @ counts - ratio * patches, -700, 700)
    return probability(slope)


class FixedDrawd(Randomizable, Transform):
    """Random transforms with a fixed seed per scan, so that validation crops and masks never change.

    Args:
        transforms: random transforms.
        seed: combined with the name of the scan to seed the transforms.
    """

    def __init__(self, transforms: Sequence[Transform], seed: int = 0) -> None:
        self.transform = Compose(transforms)
        self.seed = seed

    def __call__(self, data: Mapping[Hashable, Tensor]) -> list | dict:
        """Apply the transforms after seeding them by the name of the scan's `file`."""
        name = Path(data["file"]).name
        self.transform.set_random_state(seed=zlib.crc32(f"{self.seed} {name}".encode()))
        return self.transform(data)
