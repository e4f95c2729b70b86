"""MONAI's `ViT` as a backbone: the encoder of its `UNETR`, which has tokens of 16³ voxels and 12 layers."""

from __future__ import annotations

from collections.abc import Sequence

from monai.networks.nets import ViT
from torch import Tensor, nn

TOKEN, LAYERS = 16, 12  # fixed by MONAI's UNETR


class ViTBackbone(ViT):
    """An encoder without a decoder. Its `state_dict` loads strictly into a plain `monai.networks.nets.ViT`.

    Args:
        roi_size: crop size, voxels; a multiple of 16. The position embeddings fit only this size.
        in_channels: channels of the image.
        hidden_size: channels of a token, a multiple of 6 and of `heads`.
        mlp_size: width of the feed-forward layers.
        heads: number of attention heads.
    """

    stride = TOKEN

    def __init__(
        self,
        roi_size: Sequence[int],
        in_channels: int = 1,
        hidden_size: int = 768,
        mlp_size: int = 3072,
        heads: int = 12,
    ) -> None:
        super().__init__(in_channels, roi_size, TOKEN, hidden_size, mlp_size, LAYERS, heads, pos_embed_type="sincos")
        self.grid = [side // TOKEN for side in roi_size]
        self.bottleneck_channels = hidden_size

    @property
    def token_embedding(self) -> nn.Conv3d:
        """The patch embedding, a convolution [B, C, H, W, D] → [B, F, H/16, W/16, D/16]."""
        return self.patch_embedding.patch_embeddings

    def encode(self, image: Tensor) -> list[Tensor]:
        """[B, C, H, W, D] → one level, the bottleneck [B, F, H/16, W/16, D/16]."""
        tokens, _ = self(image)
        return [tokens.transpose(1, 2).unflatten(2, self.grid)]
