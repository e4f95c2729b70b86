"""MAE (arXiv 2111.06377) on volumes, as in MIM-Med3D (arXiv 2204.11716): encode visible tokens, reconstruct the rest.

    crop → tokens ─ visible ones → encoder (ViT) → put back among mask tokens → light decoder → voxels

The transformer is MONAI's `MaskedAutoEncoderViT`. That class draws its own masks; here masks come with the data, so
that validation masks are fixed and pictures show them. Its encoder is that of MONAI's `UNETR`.
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
        roi_size: crop size, voxels; a multiple of 16.
        in_channels: channels of the image.
        hidden_size: channels of a token in the encoder.
        mlp_size: width of the encoder's feed-forward layers.
        heads: attention heads of the encoder.
        mask_ratio: fraction of the tokens that is masked in training.
        decoder_size: channels of a token in the decoder.
        decoder_layers: depth of the decoder.
        decoder_heads: attention heads of the decoder.
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
            image: the crop; masked voxels are not used.
            mask: bool [B, 1, H/16, W/16, D/16], a fraction `mask_ratio` of it true. None: the image is already
                masked, and tokens that contain only 0 count as masked.

        Raises:
            ValueError: the mask has the wrong shape.
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
        """Reconstruct from the tokens that are not hidden (bool [B, tokens]); every row has `visible` of them."""
        kept = hidden.byte().argsort(dim=1, stable=True)[:, :visible, None]  # false, the visible ones, come first
        tokens = self.patch_embedding(image)
        tokens = tokens.gather(1, kept.expand(-1, -1, tokens.shape[2]))
        encoded = self.decoder_embed(self.blocks(torch.cat([self.cls_token.expand(len(tokens), -1, -1), tokens], 1)))

        every = self.mask_tokens.to(encoded.dtype).repeat(len(tokens), hidden.shape[1], 1)
        every = every.scatter(1, kept.expand(-1, -1, every.shape[2]), encoded[:, 1:]) + self.decoder_pos_embedding
        decoded = self.decoder_pred(self.decoder_blocks(torch.cat([encoded[:, :1], every], 1)))
        return pixelshuffle(decoded[:, 1:].transpose(1, 2).unflatten(2, self.grid), 3, TOKEN)


class MAEEncoder(nn.Module):
    """The encoder of an MAE with the parameter names of MONAI's `ViT`, as in `UNETR`; shares the MAE's parameters."""

    stride = TOKEN

    def __init__(self, mae: MAE) -> None:
        super().__init__()
        *blocks, norm = mae.blocks
        self.patch_embedding = mae.patch_embedding
        self.blocks = nn.ModuleList(blocks)
        self.norm = norm
