"""The published recipe's pre-training step, in our words, to measure ours beside it (arXiv 2303.10333's code).

32 bit, PyTorch's own layers; dropout of every element in UNet's first stage; the second view encodes the crop again
from the image; the decoded box is the corner that the published code takes; targets are built by loops that read every
region's mask with `.item()`. (What these targets mean is not repeated: a region's patches are those inside it.)
"""

from __future__ import annotations

import torch
from monai.losses import ContrastiveLoss
from torch import Tensor, nn

from scripts.backbones import Backbone
from scripts.hybridmim import HybridMIM
from scripts.masking import Geometry, apply_mask


class PublishedStep(nn.Module):
    """Forward pass and losses of the published recipe.

    Args:
        backbone: `UNetBackbone(dropout_stages=[0])` or `SwinUNETRBackbone`.
        geometry: sizes of crop, region, patch and decoded box.
    """

    def __init__(self, backbone: Backbone, geometry: Geometry) -> None:
        super().__init__()
        self.network_def = HybridMIM(backbone, geometry)
        self.geometry = geometry
        self.contrast: ContrastiveLoss | None = None

    def forward(self, image: Tensor, mask: Tensor) -> Tensor:
        """Image [B, C, H, W, D] in (0, 1], mask bool [B, 1, P1, P2, P3] → the weighted sum of the five terms."""
        network, g = self.network_def, self.geometry
        visible = apply_mask(image, mask)
        features = network.backbone.encode(visible)
        box = tuple(slice(r - d, r) for r, d in zip(g.roi_size, g.decode_size, strict=True))
        reconstruction = torch.sigmoid(network.backbone.decode(features, box))
        number, location = network.perceive(features[-1])
        first = network.project(features[-1])
        with torch.no_grad():
            second = network.backbone.encode(visible)[-1]
        second = network.project(second)
        hidden = visible[(..., *box)] == 0
        error = ((reconstruction - image[(..., *box)]) ** 2)[hidden].mean()
        numbers, locations = self._targets(mask, number.shape[2:])
        by_number = nn.functional.cross_entropy(number, numbers)
        by_location = nn.functional.binary_cross_entropy_with_logits(location, locations)
        agreement = ((location > 0).sum(1) - number.argmax(1)).float().square().mean()
        contrast = ContrastiveLoss(temperature=0.5)(first, second)
        return error + 0.1 * by_number + 0.1 * by_location + 0.01 * agreement + 0.1 * contrast

    def _targets(self, mask: Tensor, regions: torch.Size) -> tuple[Tensor, Tensor]:
        m = self.geometry.patches_per_region
        numbers = torch.zeros(len(mask), *regions, dtype=torch.long, device=mask.device)
        locations = torch.zeros(len(mask), m[0] * m[1] * m[2], *regions, device=mask.device)
        for b in range(len(mask)):
            for i in range(regions[0]):
                for j in range(regions[1]):
                    for k in range(regions[2]):
                        of_region = mask[b, 0, i * m[0] :, j * m[1] :, k * m[2] :][: m[0], : m[1], : m[2]].flatten()
                        numbers[b, i, j, k] = of_region.sum().item()
                        for n in range(len(of_region)):
                            locations[b, n, i, j, k] = float(of_region[n].item())
        return numbers, locations
