"""HybridMIM (arXiv 2303.10333): mask a crop, reconstruct it, and predict what was masked.

            ┌─ decode a box ──────────→ reconstruction      pixel level
    crop → mask → encode ─┬─ mean of each region ─→ number, location    region level
            └─ again, other dropout ──→ two projections     sample level

`HybridMIM` is the network: a backbone and three heads, each a linear layer. `PretrainStep` runs one pre-training step,
as in the figure.
"""

from __future__ import annotations

import random
from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from tools.common.text import size_text
from tools.losses import Prediction

from .backbones import Backbone, Box, dropout_active, pooled, whole
from .gathering import gather
from .masking import Geometry, RandPatchMaskd, apply_mask


class HybridMIM(nn.Module):
    """A backbone with the heads of the region level and of the sample level.

    Args:
        backbone: `UNetBackbone` or `SwinUNETRBackbone`.
        geometry: region and patch sizes, which determine M, the number of patches per region.
        projection_size: length of the projection of a crop for the contrastive term.

    Raises:
        ValueError: the backbone has no decoder, or its stride differs from that of the geometry.
    """

    def __init__(self, backbone: Backbone, geometry: Geometry, projection_size: int = 384) -> None:
        super().__init__()
        if not hasattr(backbone, "decode"):
            raise ValueError(
                f"HybridMIM trains a decoder: found a {type(backbone).__name__}, which has none; expected a UNet or "
                "SwinUNETR (ViT: simmim.yaml, mae.yaml, simclr.yaml)"
            )
        if geometry.stride != backbone.stride:
            raise ValueError(f"stride: found {geometry.stride}, the {type(backbone).__name__} has {backbone.stride}")
        m1, m2, m3 = geometry.patches_per_region
        patches = m1 * m2 * m3
        self.backbone = backbone
        # a 1×1×1 convolution is one linear layer for every region
        self.number_head = nn.Conv3d(backbone.bottleneck_channels, patches + 1, kernel_size=1)
        self.location_head = nn.Conv3d(backbone.bottleneck_channels, patches, kernel_size=1)
        self.projection = nn.Linear(backbone.bottleneck_channels, projection_size)
        self.region_extent = [size // geometry.stride for size in geometry.region_size]

    def forward(self, image: Tensor) -> Tensor:
        """Reconstruct a masked volume: [B, C, H, W, D] → intensities in (0, 1), same shape."""
        return torch.sigmoid(self.backbone(image))

    def perceive(self, bottleneck: Tensor) -> tuple[Tensor, Tensor]:
        """Logits of number [B, M + 1, R1, R2, R3] and location [B, M, R1, R2, R3] from the mean of each region."""
        regions = F.avg_pool3d(bottleneck, self.region_extent)
        return self.number_head(regions), self.location_head(regions)

    def project(self, bottleneck: Tensor) -> Tensor:
        """Projections of the crops, [B, E]."""
        return self.projection(pooled(bottleneck))


class PretrainStep(nn.Module):
    """One step of HybridMIM: masks crops and predicts at all three levels.

    In training only a box of the crop is decoded, and the projections of all processes are gathered. In
    evaluation the whole crop is decoded, only the two views use dropout, and nothing is gathered, because the
    processes may have batches of different sizes.

    Args:
        network_def: the network that is trained.
        geometry: sizes of crop, patch and decoded box (`decode_size`).
        decode_box: position of the decoded box: `random` (a new aligned position at every step), or its first
            voxel (three numbers).
        contrastive: whether to make the two views.
        mask_fill: value of the masked voxels.

    Raises:
        ValueError: `decode_box` is neither `random` nor three numbers, is not aligned, or exceeds the crop.
    """

    images_per_crop = 1  # number of images per crop in a batch

    def __init__(
        self,
        network_def: HybridMIM,
        geometry: Geometry,
        decode_box: str | Sequence[int] = "random",
        contrastive: bool = True,
        mask_fill: float = 0.0,
    ) -> None:
        super().__init__()
        self.network_def = network_def
        self.geometry = geometry
        self.decode_box = decode_box
        self.contrastive = contrastive
        self.mask_fill = mask_fill
        self.has_unused_parameters = not contrastive  # the projection
        self._check_decode_box()

    def forward(self, image: Tensor, mask: Tensor) -> Prediction:
        """Image [B, C, H, W, D] in (0, 1], mask bool [B, 1, P1, P2, P3] → predictions of all levels."""
        backbone = self.network_def.backbone
        visible = apply_mask(image, mask, self.mask_fill)
        features = backbone.encode(visible)
        box = self.draw_box() if self.training else whole(image.shape[2:])
        number, location = self.network_def.perceive(features[-1])
        return Prediction(
            reconstruction=torch.sigmoid(backbone.decode(features, box)),
            box=box,
            number=number,
            location=location,
            views=self.two_views(visible, features) if self.contrastive else None,
        )

    def two_views(self, visible: Tensor, features: list[Tensor]) -> tuple[Tensor, Tensor]:
        """Two projections [N, E] that differ only by dropout; the second has no gradient through the encoder."""
        backbone, project = self.network_def.backbone, self.network_def.project
        if not self.training:
            with dropout_active(backbone):
                views = [backbone.encode_again(visible, features)[-1] for _ in range(2)]
            return project(views[0]), project(views[1])
        with torch.no_grad():
            second = backbone.encode_again(visible, features)[-1]
        return gather(project(features[-1])), gather(project(second))

    def draw_box(self) -> Box:
        """Return the box to decode, aligned to the bottleneck."""
        g = self.geometry
        if self.decode_box == "random":
            positions = [(r - d) // g.stride + 1 for r, d in zip(g.roi_size, g.decode_size, strict=True)]
            start = [random.randrange(n) * g.stride for n in positions]
        else:
            start = self.decode_box
        return tuple(slice(s, s + d) for s, d in zip(start, g.decode_size, strict=True))

    def lines(self, mask: RandPatchMaskd) -> list[tuple[str, str]]:
        """Return the rows of the start table for this step."""
        g = self.geometry
        return [
            (
                "masking",
                f"{mask.describe()}; regions of {size_text(g.region_size)}; decoded box {size_text(g.decode_size)}",
            )
        ]

    def _check_decode_box(self) -> None:
        g = self.geometry
        if self.decode_box == "random":
            return
        expected = f"expected `random`, or three multiples of {g.stride} that leave room for decode_size "
        if isinstance(self.decode_box, str) or len(self.decode_box) != 3:
            raise ValueError(f"decode_box {self.decode_box!r}: {expected}{list(g.decode_size)}")
        ends = [s + d for s, d in zip(self.decode_box, g.decode_size, strict=True)]
        if any(s % g.stride or s < 0 for s in self.decode_box) or any(
            e > r for e, r in zip(ends, g.roi_size, strict=True)
        ):
            raise ValueError(
                f"decode_box {list(self.decode_box)}: {expected}{list(g.decode_size)} in roi_size {list(g.roi_size)}"
            )
