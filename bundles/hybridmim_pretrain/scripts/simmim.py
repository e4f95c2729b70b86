"""SimMIM (arXiv 2111.09886) on volumes, as in MIM-Med3D (arXiv 2204.11716): raw voxels from a one-layer head.

    crop → tokens ─ hidden ones become one learnt mask token → encoder (ViT or Swin) → one linear layer → voxels

The encoder sees all tokens at their positions. Only the encoder is trained, not the decoder of SwinUNETR.
"""

from __future__ import annotations

from typing import Any

import torch
from monai.networks.layers import trunc_normal_
from monai.networks.utils import pixelshuffle
from torch import Tensor, nn

from tools.losses import expand_mask

from .backbones import SwinUNETRBackbone
from .masking import Geometry, empty_patches
from .vit import ViTBackbone


class SimMIM(nn.Module):
    """An encoder whose masked tokens are replaced by a mask token, and a linear head.

    Args:
        backbone: `ViTBackbone` or `SwinUNETRBackbone`.
        geometry: size of the masked patches, a multiple of the token size.

    Raises:
        ValueError: the backbone has no tokens, or the patch size is not a multiple of the token size.
    """

    def __init__(self, backbone: ViTBackbone | SwinUNETRBackbone, geometry: Geometry) -> None:
        super().__init__()
        if not hasattr(backbone, "token_embedding"):
            raise ValueError(f"SimMIM hides tokens: found a {type(backbone).__name__}, expected a ViT or SwinUNETR")
        embedding = backbone.token_embedding
        if any(p % token for p, token in zip(geometry.patch_size, embedding.stride, strict=True)):
            raise ValueError(
                f"token_size {list(geometry.patch_size)} must be a multiple of the network's tokens, "
                f"{list(embedding.stride)} voxels"
            )
        self.backbone = backbone
        self.patch_size = geometry.patch_size
        self.mask_token = nn.Parameter(torch.zeros(1, embedding.out_channels, 1, 1, 1))
        trunc_normal_(self.mask_token, mean=0.0, std=0.02, a=-2.0, b=2.0)
        # a 1×1×1 convolution is one linear layer for every element of the bottleneck
        self.head = nn.Conv3d(backbone.bottleneck_channels, embedding.in_channels * backbone.stride**3, kernel_size=1)

    def forward(self, image: Tensor, mask: Tensor | None = None) -> Tensor:
        """Reconstruct a crop: [B, C, H, W, D] → the same shape.

        Args:
            image: the crop; masked voxels are not used.
            mask: bool [B, 1, P1, P2, P3]. None: the image is already masked; patches with only 0 count as masked.
        """
        hidden = empty_patches(image, self.patch_size) if mask is None else mask

        def hide(module: nn.Module, inputs: Any, tokens: Tensor) -> Tensor:
            return torch.where(expand_mask(hidden, tokens.shape[2:]), self.mask_token.to(tokens.dtype), tokens)

        handle = self.backbone.token_embedding.register_forward_hook(hide)
        try:
            bottleneck = self.backbone.encode(image)[-1]
        finally:
            handle.remove()
        return pixelshuffle(self.head(bottleneck), 3, self.backbone.stride)
