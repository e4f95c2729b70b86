"""The losses of every bundle.

HybridMIM has three levels of learning and five terms (arXiv 2303.10333, Fig. 1):

pixel   `loss_pr`   partial region prediction: mean squared error of the masked voxels that were decoded
region  `loss_num`  how many patches of a region are masked
        `loss_loc`  which patches are masked
        `loss_con`  consistency of the two predictions
sample  `loss_cl`   matching two encodings of one crop, with different dropout, among all crops

Each term is a separate module; `HybridMIMLoss` is their weighted sum. The other losses: `MaskedL1Loss` for MAE and
SimMIM, `ContrastiveLoss` for SimCLR, `BalancedDiceCELoss` for exclusive classes, `DiceBCELoss` for overlapping ones.

The targets are computed from the mask: the mask has one entry per patch, the predictions one per region, and the
patches of a region are those inside it. Padding is ignored: intensities are in (0, 1], so a voxel that is 0 in every
channel is padding. The region level ignores patches of one intensity, such as air.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import NamedTuple

import torch
import torch.nn.functional as F
from monai.losses import DiceLoss
from monai.utils import convert_to_tensor
from torch import Tensor, nn


class Prediction(NamedTuple):
    """Predictions of one pre-training step for a batch of B crops with C channels and M patches per region.

    HybridMIM sets all fields; other methods leave those that they do not predict at None.
    """

    reconstruction: Tensor | None = None  # [B, C, h, w, d] intensities of the decoded box
    box: tuple[slice, slice, slice] | None = None  # where that box lies in the crop (voxels)
    number: Tensor | None = None  # [B, M + 1, R1, R2, R3] logits: 0 … M masked patches in each region
    location: Tensor | None = None  # [B, M, R1, R2, R3] logits: is this patch of the region masked?
    views: tuple[Tensor, Tensor] | None = None  # two [N, E] projections of N crops (of all ranks)
    visible: Tensor | None = None  # [B, C, H, W, D] what the network saw, if masked voxels were filled


def scan_voxels(image: Tensor) -> Tensor:
    """Voxels of the scan, without padding: [B, C, H, W, D] → bool [B, 1, H, W, D]."""
    return (image > 0).any(dim=1, keepdim=True)


def expand_mask(mask: Tensor, size: tuple[int, ...] | torch.Size) -> Tensor:
    """Expand a mask from patches to voxels: [B, 1, P1, P2, P3] → [B, 1, *size]."""
    for axis, length in enumerate(size, start=2):
        mask = mask.repeat_interleave(length // mask.shape[axis], dim=axis)
    return mask


def patches_by_region(patches: Tensor, regions: tuple[int, ...] | torch.Size) -> Tensor:
    """Group the entries of a patch grid by region.

    [B, 1, P1, P2, P3] → [B, M, R1, R2, R3] with M = (P1 / R1) (P2 / R2) (P3 / R3). Channel m is the m-th patch
    of the region in raster order *within the region*, last axis fastest.
    """
    (b, _, *grid), (r1, r2, r3) = patches.shape, regions
    m1, m2, m3 = (p // r for p, r in zip(grid, regions, strict=True))
    split = patches.reshape(b, r1, m1, r2, m2, r3, m3)
    return split.permute(0, 2, 4, 6, 1, 3, 5).reshape(b, m1 * m2 * m3, r1, r2, r3)


class RegionTargets(NamedTuple):
    """Targets of the region heads, and which of them are valid."""

    location: Tensor  # bool [B, M, R1, R2, R3]: the patch is masked
    number: Tensor  # int64 [B, R1, R2, R3]: number of masked patches of the region, 0 … M
    location_counts: Tensor  # bool [B, M, R1, R2, R3]: valid locations; the patch is not of one intensity
    number_counts: Tensor  # bool [B, R1, R2, R3]: valid numbers; no patch of the region is of one intensity


def region_targets(image: Tensor, mask: Tensor, regions: tuple[int, ...] | torch.Size) -> RegionTargets:
    """Targets of the region level for image [B, C, H, W, D], mask [B, 1, P1, P2, P3] and a grid of regions.

    A patch of one intensity (padding, or air, which the intensity window cuts to one value) looks the same masked or
    not, so it has no location target, and its region has no number target.
    """
    patch_size = [s // p for s, p in zip(image.shape[2:], mask.shape[2:], strict=True)]
    varied = F.max_pool3d(image, patch_size) > -F.max_pool3d(-image, patch_size)
    location, counts = patches_by_region(mask, regions), patches_by_region(varied.any(1, keepdim=True), regions)
    return RegionTargets(location, location.sum(1), counts, counts.all(1))


def _mean(values: Tensor, counted: Tensor) -> Tensor:
    """Mean of the counted values; 0 (with a gradient of 0) if there are none."""
    counted = counted.expand_as(values)
    return (values * counted).sum() / counted.sum().clamp(min=1)


class PartialRegionLoss(nn.Module):
    """Pixel level: mean squared error over the masked voxels of the decoded box, in every channel."""

    def forward(self, prediction: Prediction, image: Tensor, mask: Tensor) -> Tensor:
        """Image [B, C, H, W, D] before masking, mask [B, 1, P1, P2, P3] → scalar."""
        box = (..., *prediction.box)
        counted = expand_mask(mask, image.shape[2:])[box] & scan_voxels(image[box])
        return _mean((prediction.reconstruction.float() - image[box]) ** 2, counted)


class NumberLoss(nn.Module):
    """Region level, how many patches are masked: cross-entropy over the M + 1 possible counts."""

    def forward(self, number: Tensor, targets: RegionTargets) -> Tensor:
        """Logits [B, M + 1, R1, R2, R3] → scalar."""
        return _mean(F.cross_entropy(number.float(), targets.number, reduction="none"), targets.number_counts)


class LocationLoss(nn.Module):
    """Region level, which patches are masked: binary cross-entropy for each patch."""

    def forward(self, location: Tensor, targets: RegionTargets) -> Tensor:
        """Logits [B, M, R1, R2, R3] → scalar."""
        entropy = F.binary_cross_entropy_with_logits(location.float(), targets.location.float(), reduction="none")
        return _mean(entropy, targets.location_counts)


class ConsistencyLoss(nn.Module):
    """Region level, consistency of number and location: squared difference of the two expected counts.

    The paper compares an arg-max with a thresholded sum, which has no gradient. Here the expected count of the number
    head's softmax is compared with the sum of the location head's sigmoids, so that both heads get a gradient.
    """

    def forward(self, number: Tensor, location: Tensor, targets: RegionTargets) -> Tensor:
        """Logits [B, M + 1, R1, R2, R3] and [B, M, R1, R2, R3] → scalar, in patches²."""
        counts = torch.arange(number.shape[1], device=number.device).view(1, -1, 1, 1, 1)
        by_number = (number.float().softmax(1) * counts).sum(1)
        by_location = location.float().sigmoid().sum(1)
        return _mean((by_number - by_location) ** 2, targets.number_counts)


class NTXentLoss(nn.Module):
    """Sample level: normalised temperature-scaled cross-entropy (NT-Xent, arXiv 2002.05709, Eq. 1) of centred views."""

    def __init__(self, temperature: float = 0.5) -> None:
        super().__init__()
        if temperature <= 0:
            raise ValueError(f"temperature must be above 0, found {temperature}")
        self.temperature = temperature

    def forward(self, first: Tensor, second: Tensor) -> Tensor:
        """Two views [N, E] of the same N crops → scalar; chance level ln(2N - 1), constant 0 for N = 1."""
        n = len(first)
        similarity = view_similarity(first, second) / self.temperature
        partner = torch.arange(2 * n, device=first.device).roll(n)
        return F.cross_entropy(similarity, partner)


def view_similarity(first: Tensor, second: Tensor) -> Tensor:
    """Cosine similarity between all views after their mean was taken away, [2N, 2N]; -inf on the diagonal.

    The vectors of all crops are nearly the same at the start: as they are, every cosine is close to 1, nothing tells
    the views apart, and the loss may stay at its chance level for a whole run.
    """
    views = torch.cat([first, second]).float()
    views = F.normalize(views - views.mean(0), dim=1)
    return (views @ views.T).masked_fill(torch.eye(len(views), dtype=torch.bool, device=views.device), -torch.inf)


class HybridMIMLoss(nn.Module):
    """Weighted sum of the five terms of HybridMIM (arXiv 2303.10333, Fig. 1); the defaults are the published weights.

    Args:
        weight_pr: weight of partial region prediction.
        weight_num: weight of the number of masked patches.
        weight_loc: weight of the location of masked patches.
        weight_con: weight of the consistency of number and location.
        weight_cl: weight of dropout-based contrastive learning.
        temperature: temperature of NT-Xent.

    Raises:
        ValueError: a weight is negative, or all are 0.
    """

    def __init__(
        self,
        weight_pr: float = 1.0,
        weight_num: float = 0.1,
        weight_loc: float = 0.1,
        weight_con: float = 0.01,
        weight_cl: float = 0.1,
        temperature: float = 0.5,
    ) -> None:
        super().__init__()
        self.weights = {
            "loss_pr": weight_pr,
            "loss_num": weight_num,
            "loss_loc": weight_loc,
            "loss_con": weight_con,
            "loss_cl": weight_cl,
        }
        if min(self.weights.values()) < 0 or not any(self.weights.values()):
            raise ValueError(f"loss weights must be 0 or more, and one above 0; found {self.weights}")
        self.partial_region = PartialRegionLoss()
        self.number = NumberLoss()
        self.location = LocationLoss()
        self.consistency = ConsistencyLoss()
        self.contrastive = NTXentLoss(temperature)

    def forward(self, prediction: Prediction, image: Tensor, mask: Tensor) -> dict[str, Tensor]:
        """Return the total (`loss`) and the unweighted terms by name, as scalars.

        Args:
            prediction: predictions for the masked crops.
            image: the crops before masking, [B, C, H, W, D], intensities in (0, 1], 0 in padding.
            mask: bool [B, 1, P1, P2, P3], one entry for each patch.
        """
        targets = region_targets(image, mask, prediction.number.shape[2:])
        terms = {
            "loss_pr": self.partial_region(prediction, image, mask),
            "loss_num": self.number(prediction.number, targets),
            "loss_loc": self.location(prediction.location, targets),
            "loss_con": self.consistency(prediction.number, prediction.location, targets),
            "loss_cl": self.contrastive(*prediction.views) if prediction.views else image.new_zeros(()),
        }
        return {"loss": sum(self.weights[name] * term for name, term in terms.items()), **terms}


class MaskedL1Loss(nn.Module):
    """The loss of MAE and SimMIM on raw voxels: mean absolute error over masked voxels (arXiv 2111.09886, Eq. 2).

    MAE was published with the squared error; MIM-Med3D (arXiv 2204.11716) uses the absolute error for both.
    """

    weights = {"loss_l1": 1.0}  # noqa: RUF012

    def forward(self, prediction: Prediction, image: Tensor, mask: Tensor) -> dict[str, Tensor]:
        """`loss` and `loss_l1` (equal): image [B, C, H, W, D] before masking, mask [B, 1, P1, P2, P3] → scalars."""
        counted = expand_mask(mask, image.shape[2:]) & scan_voxels(image)
        loss = _mean((prediction.reconstruction.float() - image).abs(), counted)
        return {"loss": loss, "loss_l1": loss}


class ContrastiveLoss(nn.Module):
    """The loss of SimCLR: NT-Xent between the two views of each crop (arXiv 2002.05709, Eq. 1).

    Args:
        temperature: temperature of NT-Xent.
    """

    weights = {"loss_cl": 1.0}  # noqa: RUF012

    def __init__(self, temperature: float = 0.5) -> None:
        super().__init__()
        self.contrastive = NTXentLoss(temperature)

    def forward(self, prediction: Prediction, image: Tensor, mask: Tensor | None = None) -> dict[str, Tensor]:
        """`loss` and `loss_cl` (equal), as scalars, from the views of the prediction."""
        loss = self.contrastive(*prediction.views)
        return {"loss": loss, "loss_cl": loss}


def class_masks(label_map: Tensor, classes: Mapping[str, Sequence[int]]) -> Tensor:
    """Label map [..., 1, H, W, D] of integers → bool masks [..., K, H, W, D], one per class."""
    return torch.cat([torch.isin(label_map, label_map.new_tensor(list(v))) for v in classes.values()], dim=-4)


class BalancedDiceCELoss(nn.Module):
    """Dice loss plus a cross-entropy in which voxels of rare classes count more until they are found.

    For exclusive classes. A small organ has a small share of a plain cross-entropy, and as long as its probability is
    near 0, hardly any gradient from the Dice loss, so that a short training finds it late or never. Here a voxel counts
    (n_0 / n)^(balance · loss), if n voxels of the batch are of its class and n_0 are background; `loss` is the Dice
    loss of the class in this batch, 1 while it is not found. Later the voxel counts little more than one of background,
    because to count more to the end costs Dice where organs are found anyway (docs/study.md).

    Args:
        balance: 0: every voxel counts the same, as in MONAI's `DiceCELoss`; 1: a class that is not found counts as much
            as the background, altogether.

    Raises:
        ValueError: `balance` is no number from 0 to 1.
    """

    def __init__(self, balance: float) -> None:
        super().__init__()
        if not isinstance(balance, int | float) or not 0 <= balance <= 1:
            raise ValueError(f"class_balance must be a number from 0 to 1; found {balance!r}")
        self.balance = balance
        # one Dice over all crops of a batch, because a single crop may lack a class
        self.dice = DiceLoss(include_background=False, to_onehot_y=True, softmax=True, batch=True, reduction="none")

    def forward(self, logits: Tensor, label: Tensor) -> Tensor:
        """Logits [B, C, H, W, D] of background and classes, label map [B, 1, H, W, D] → scalar."""
        logits, label = (convert_to_tensor(t, track_meta=False) for t in (logits, label))  # flattened below
        dice = self.dice(logits, label).flatten()
        classes = label[:, 0].long()
        counts = torch.stack([(classes == index).sum() for index in range(logits.shape[1])]).clamp(min=1)
        rarity = (counts[0] / counts[1:]).to(logits.dtype)
        weight = torch.cat([rarity.new_ones(1), rarity ** (self.balance * dice.detach())])
        return dice.mean() + F.cross_entropy(logits, classes, weight=weight)


class DiceBCELoss(nn.Module):
    """Dice loss plus binary cross-entropy of each class, for overlapping classes.

    (The cross-entropy of MONAI's `DiceCELoss` assumes exclusive classes.)

    Args:
        classes: name → label values.
    """

    def __init__(self, classes: Mapping[str, Sequence[int]]) -> None:
        super().__init__()
        self.classes = dict(classes)
        self.dice = DiceLoss(sigmoid=True, batch=True)
        self.cross_entropy = nn.BCEWithLogitsLoss()

    def forward(self, logits: Tensor, label: Tensor) -> Tensor:
        """Logits [B, K, H, W, D], label map [B, 1, H, W, D] → scalar."""
        masks = class_masks(label, self.classes).to(logits.dtype)
        return self.dice(logits, masks) + self.cross_entropy(logits, masks)
