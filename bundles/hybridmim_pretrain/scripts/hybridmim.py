"""HybridMIM (arXiv 2303.10333): mask a crop, reconstruct it, and predict what was masked.

            ┌─ decode a box ──────────→ reconstruction      pixel level
    crop → mask → encode ─┬─ mean of each region ─→ number, location    region level
            └─ again, other mask ─────→ two projections     sample level

`HybridMIM` is the network: a backbone and three heads, each a linear layer. `PretrainStep` runs one pre-training step,
as in the figure.
"""

from __future__ import annotations

import math
import random
from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from tools.common.text import size_text
from tools.losses import Prediction
from tools.weights.export import NamesOverlays

from .backbones import Backbone, Box, dropout_active, pooled, whole
from .gathering import gather
from .masking import Geometry, RandPatchMaskd, another, apply_mask, require_fill

VIEWS = ("other_masks", "dropout")


class HybridMIM(NamesOverlays):
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


class _BoundedHeads(torch.autograd.Function):
    """The same features for the decoder and for the heads, whose gradients meet here on their way to the encoder."""

    @staticmethod
    def forward(ctx: Any, features: Tensor, limit: float) -> tuple[Tensor, Tensor]:
        ctx.limit = limit
        return features.view_as(features), features.view_as(features)

    @staticmethod
    def backward(ctx: Any, decoder: Tensor, heads: Tensor) -> tuple[Tensor, None]:
        of_decoder, of_heads = (gradient.float().norm() for gradient in (decoder, heads))
        smallest = torch.finfo(torch.float32).tiny
        scale = (ctx.limit * of_decoder / of_heads.clamp(min=smallest)).clamp(max=1)
        return decoder + heads * scale.to(heads.dtype), None


class PretrainStep(nn.Module):
    """One step of HybridMIM: masks crops and predicts at all three levels.

    In training only a box of the crop is decoded, and the projections of all processes are gathered. In
    evaluation the whole crop is decoded, only the two views use dropout, and nothing is gathered, because the
    processes may have batches of different sizes.

    With `views: dropout`, as published, both views show the same masked crop and differ by dropout alone, so they have
    the mask in common, too. With `other_masks` each crop is seen under its own mask and under its neighbour's.

    Args:
        network_def: the network that is trained.
        geometry: sizes of crop, patch and decoded box (`decode_size`).
        decode_box: position of the decoded box: `random` (a new aligned position at every step), or its first
            voxel (three numbers).
        contrastive: whether to make the two views.
        mask_fill: what stands in masked voxels, of `MASK_FILLS`.
        views: how the two views differ, of `VIEWS`.
        crops_per_volume: crops of one scan that follow each other in a batch, for `mask_fill: foreign`.
        head_gradient: upper bound of the norm of the gradient that the region and the sample level together send from
            the bottleneck into the encoder, in units of that of the pixel level in the same step; None: no bound.
            The heads themselves learn from their whole gradient.

    Raises:
        ValueError: `decode_box` is neither `random` nor three numbers, is not aligned, or exceeds the crop;
            `mask_fill` or `views` is unknown; or `head_gradient` is not above 0.
    """

    images_per_crop = 1  # number of images per crop in a batch

    def __init__(
        self,
        network_def: HybridMIM,
        geometry: Geometry,
        decode_box: str | Sequence[int] = "random",
        contrastive: bool = True,
        mask_fill: str = "zero",
        views: str = "dropout",
        crops_per_volume: int = 1,
        head_gradient: float | None = None,
    ) -> None:
        super().__init__()
        self.network_def = network_def
        self.geometry = geometry
        self.decode_box = decode_box
        self.contrastive = contrastive
        self.mask_fill = require_fill(mask_fill)
        if views not in VIEWS:
            raise ValueError(f"views: found {views!r}, expected one of {', '.join(VIEWS)}")
        self.views = views
        self.crops_per_volume = crops_per_volume
        number = isinstance(head_gradient, int | float) and not isinstance(head_gradient, bool)
        if head_gradient is not None and not (number and 0 < head_gradient < math.inf):
            expected = "above 0, or null for no bound ('$None' on the command line)"
            raise ValueError(f"head_gradient must be {expected}; found {head_gradient!r}")
        self.head_gradient = head_gradient
        self.has_unused_parameters = not contrastive  # the projection
        self._check_decode_box()

    def forward(self, image: Tensor, mask: Tensor) -> Prediction:
        """Image [B, C, H, W, D] in (0, 1], mask bool [B, 1, P1, P2, P3] → predictions of all levels."""
        backbone = self.network_def.backbone
        # the other view first, as long as nothing is kept for the backward pass
        other = self.other_view(image, mask) if self.contrastive and self.views == "other_masks" else None
        visible = self.hide(image, mask)
        features = backbone.encode(visible)
        bottleneck = features[-1]
        if self.head_gradient is not None:
            features[-1], bottleneck = _BoundedHeads.apply(bottleneck, self.head_gradient)
        box = self.draw_box() if self.training else whole(image.shape[2:])
        number, location = self.network_def.perceive(bottleneck)
        return Prediction(
            reconstruction=torch.sigmoid(backbone.decode(features, box)),
            box=box,
            number=number,
            location=location,
            views=self.two_views(visible, [*features[:-1], bottleneck], other) if self.contrastive else None,
            visible=visible,
        )

    def hide(self, image: Tensor, mask: Tensor, shift: int = 1) -> Tensor:
        """What the network sees of the crops; `shift`: the scan of the batch that a foreign fill comes from."""
        return apply_mask(image, mask, self.mask_fill, shift * self.crops_per_volume)

    def encode(self, image: Tensor, mask: Tensor) -> list[Tensor]:
        """Features of all levels of the masked crops."""
        return self.network_def.backbone.encode(self.hide(image, mask))

    def other_view(self, image: Tensor, mask: Tensor) -> Tensor:
        """Bottleneck of each crop under its neighbour's mask, without gradient, with dropout."""
        backbone = self.network_def.backbone
        with torch.no_grad(), dropout_active(backbone):
            return backbone.encode(self.hide(image, another(mask), shift=-1))[-1]

    def two_views(self, visible: Tensor, features: list[Tensor], other: Tensor | None) -> tuple[Tensor, Tensor]:
        """Two projections [N, E] of each crop; the second, of `other` or of the same, leaves the encoder alone."""
        backbone, project = self.network_def.backbone, self.network_def.project
        with torch.no_grad(), dropout_active(backbone):
            second = backbone.encode_again(visible, features)[-1] if other is None else other
        if self.training:
            return gather(project(features[-1])), gather(project(second))
        with dropout_active(backbone):
            first = backbone.encode_again(visible, features)[-1]
        return project(first), project(second)

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
                f"{mask.describe()}, filled with {self.mask_fill}; regions of {size_text(g.region_size)}; "
                f"decoded box {size_text(g.decode_size)}",
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
