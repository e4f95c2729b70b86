"""MAE (arXiv 2111.06377) on volumes, as in MIM-Med3D (arXiv 2204.11716): encode what is visible, paint the rest.

    crop → tokens ─ visible ones → encoder (ViT) → put back among mask tokens → light decoder → voxels

The transformer is MONAI's `MaskedAutoEncoderViT`, which draws its masks itself; here they come with the data, so that
validation repeats its masks and pictures show them. Its encoder is the one of MONAI's `UNETR`.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from monai.networks.nets import MaskedAutoEncoderViT
from monai.networks.utils import pixelshuffle
from torch import Tensor, nn

from .masking import empty_patches
from .vit import LAYERS, TOKEN


class MAE(MaskedAutoEncoderViT):
    """A masked autoencoder.

    Args:
        roi_size: of a crop, voxels; a multiple of 16.
        in_channels: of the image.
        hidden_size: width of the encoder.
        mlp_size: width of its feed-forward layers.
        heads: of its attention.
        mask_ratio: share of the tokens that every mask of a training hides.
        decoder_size: width of the decoder.
        decoder_layers: its depth.
        decoder_heads: of its attention.
    """

    def __init__(
        self,
        roi_size: Sequence[int],
        in_channels: int = 1,
        hidden_size: int = 768,
        mlp_size: int = 3072,
        heads: int = 12,
        mask_ratio: float = 0.75,
        decoder_size: int = 384,
        decoder_layers: int = 1,
        decoder_heads: int = 12,
    ) -> None:
        super().__init__(
            in_channels=in_channels,
            img_size=roi_size,
            patch_size=TOKEN,
            hidden_size=hidden_size,
            mlp_dim=mlp_size,
            num_layers=LAYERS,
            num_heads=heads,
            masking_ratio=mask_ratio,
            decoder_hidden_size=decoder_size,
            decoder_mlp_dim=4 * decoder_size,
            decoder_num_layers=decoder_layers,
            decoder_num_heads=decoder_heads,
        )
        self.grid = [side // TOKEN for side in self.img_size]

    def forward(self, image: Tensor, mask: Tensor | None = None) -> Tensor:
        """Reconstruct a crop: [B, C, H, W, D] → the same shape.

        Args:
            image: the crop; masked voxels are ignored.
            mask: bool [B, 1, H/16, W/16, D/16], `mask_ratio` of it true. Without it the image is masked already:
                tokens of nothing but 0 are hidden.

        Raises:
            ValueError: the mask has another shape.
        """
        if mask is None:
            hidden = empty_patches(image, (TOKEN,) * 3).flatten(1)
            each = zip(image.split(1), hidden.split(1), strict=True)  # they differ in the number of visible tokens
            return torch.cat([self._paint(x, h, int((~h).sum())) for x, h in each])
        if list(mask.shape[2:]) != self.grid:
            raise ValueError(f"mask: found {list(mask.shape[2:])} patches, expected the {self.grid} tokens of the crop")
        hidden = mask.flatten(1)
        tokens = hidden.shape[1]
        return self._paint(image, hidden, tokens - round(self.masking_ratio * tokens))

    def _paint(self, image: Tensor, hidden: Tensor, visible: int) -> Tensor:
        """Hidden [B, tokens], of which `visible` are false in every row."""
        kept = hidden.byte().argsort(dim=1, stable=True)[:, :visible, None]  # false, the visible ones, come first
        tokens = self.patch_embedding(image)
        tokens = tokens.gather(1, kept.expand(-1, -1, tokens.shape[2]))
        encoded = self.decoder_embed(self.blocks(torch.cat([self.cls_token.expand(len(tokens), -1, -1), tokens], 1)))

        every = self.mask_tokens.to(encoded.dtype).repeat(len(tokens), hidden.shape[1], 1)
        every = every.scatter(1, kept.expand(-1, -1, every.shape[2]), encoded[:, 1:]) + self.decoder_pos_embedding
        decoded = self.decoder_pred(self.decoder_blocks(torch.cat([encoded[:, :1], every], 1)))
        return pixelshuffle(decoded[:, 1:].transpose(1, 2).unflatten(2, self.grid), 3, TOKEN)


class MAEEncoder(nn.Module):
    """The encoder of a MAE under the names of MONAI's `ViT`, as `UNETR` has it; it shares the MAE's parameters."""

    stride = TOKEN

    def __init__(self, mae: MAE) -> None:
        super().__init__()
        *blocks, norm = mae.blocks
        self.patch_embedding = mae.patch_embedding
        self.blocks = nn.ModuleList(blocks)
        self.norm = norm
