"""MONAI's networks, with `forward` split into `encode` (all levels) and `decode` (a sub-box of every level).

The modules, and so the keys of the `state_dict`, are those of the MONAI class: pre-trained weights load strictly into
a plain `monai.networks.nets.BasicUNet` or `SwinUNETR`, without renaming. The networks have as many output as input
channels, because pre-training reconstructs the input.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager

import torch
from monai.networks.nets import BasicUNet
from torch import Tensor, nn

from tools.weights.export import SwinUNETR

Box = tuple[slice, slice, slice]


def whole(size: Sequence[int]) -> Box:
    """Return the box that covers the whole crop of `size` voxels."""
    return tuple(slice(0, s) for s in size)


def crop_level(feature: Tensor, box: Box, stride: int) -> Tensor:
    """Crop a feature map [B, F, H/stride, W/stride, D/stride] to a box of voxels.

    Raises:
        ValueError: the box is not aligned to the elements of the feature map.
    """
    if any(side.start % stride or side.stop % stride for side in box):
        raise ValueError(f"box {[(s.start, s.stop) for s in box]} must be aligned to {stride} voxels")
    return feature[(..., *(slice(side.start // stride, side.stop // stride) for side in box))]


@contextmanager
def dropout_active(module: nn.Module) -> Iterator[None]:
    """Keep dropout active while the module is in evaluation mode."""
    layers = [m for m in module.modules() if isinstance(m, nn.Dropout)]
    before = [layer.training for layer in layers]
    for layer in layers:
        layer.train()
    try:
        yield
    finally:
        for layer, training in zip(layers, before, strict=True):
            layer.train(training)


class UNetBackbone(BasicUNet):
    """MONAI's `BasicUNet` with dropout in chosen encoder stages and none in the decoder.

    Args:
        in_channels: channels of the input and of the output.
        features: channels of the five encoder stages, and of the last decoder stage.
        dropout: dropout probability in the encoder's convolutions.
        dropout_stages: encoder stages (0 to 4) with dropout. By default all but the first, so that the first stage,
            which works at full resolution, is computed only once for both views of the contrastive term.
            `[0]` is the published placement.
    """

    stride = 16
    level_strides = (1, 2, 4, 8, 16)

    def __init__(
        self,
        in_channels: int = 1,
        features: Sequence[int] = (64, 64, 128, 256, 512, 64),
        dropout: float = 0.1,
        dropout_stages: Sequence[int] = (1, 2, 3, 4),
    ) -> None:
        super().__init__(3, in_channels, in_channels, features, dropout=dropout)
        self.bottleneck_channels = features[4]
        stages = [self.conv_0, self.down_1, self.down_2, self.down_3, self.down_4]
        if not set(dropout_stages) <= set(range(len(stages))):
            raise ValueError(f"dropout_stages must be among 0 … {len(stages) - 1}, found {list(dropout_stages)}")
        with_dropout = {m for i in dropout_stages for m in stages[i].modules()}
        for module in self.modules():
            if isinstance(module, nn.Dropout) and module not in with_dropout:
                module.p = 0.0
        self.shares_first_stage = 0 not in dropout_stages

    def encode(self, image: Tensor) -> list[Tensor]:
        """[B, C, H, W, D] → five levels [B, F, H/s, W/s, D/s] for s in 1, 2, 4, 8, 16; the last is the bottleneck."""
        return self._down(self.conv_0(image))

    def encode_again(self, image: Tensor, features: list[Tensor]) -> list[Tensor]:
        """Encode the same image again with new dropout; a first stage without dropout is reused."""
        return self._down(features[0]) if self.shares_first_stage else self.encode(image)

    def _down(self, x0: Tensor) -> list[Tensor]:
        x1 = self.down_1(x0)
        x2 = self.down_2(x1)
        x3 = self.down_3(x2)
        return [x0, x1, x2, x3, self.down_4(x3)]

    def decode(self, features: list[Tensor], box: Box) -> Tensor:
        """Output logits [B, C, h, w, d] of a box that is aligned to the bottleneck (16 voxels)."""
        levels = zip(features, self.level_strides, strict=True)
        x0, x1, x2, x3, x4 = (crop_level(x, box, s) for x, s in levels)
        u4 = self.upcat_4(x4, x3)
        u3 = self.upcat_3(u4, x2)
        u2 = self.upcat_2(u3, x1)
        return self.final_conv(self.upcat_1(u2, x0))


class SwinUNETRBackbone(SwinUNETR):
    """MONAI's `SwinUNETR`; the convolution blocks on the skip paths (`encoder1–4, 10`) belong to `decode`.

    Args:
        in_channels: channels of the input and of the output.
        feature_size: channels of the first stage, a multiple of 12.
        dropout: dropout probability after the patch embedding and in the transformer blocks.
        use_v2: SwinUNETR v2, with a convolution before each stage of the encoder.
        window_size: tokens per side of a window of attention.
    """

    stride = 32
    level_strides = (1, 2, 4, 8, 16, 32)

    def __init__(
        self,
        in_channels: int = 1,
        feature_size: int = 48,
        dropout: float = 0.1,
        use_v2: bool = False,
        window_size: int = 7,
    ) -> None:
        super().__init__(
            in_channels,
            in_channels,
            window_size=window_size,
            feature_size=feature_size,
            drop_rate=dropout,
            use_v2=use_v2,
        )
        self.bottleneck_channels = 16 * feature_size

    @property
    def token_embedding(self) -> nn.Conv3d:
        """The patch embedding, a convolution [B, C, H, W, D] → [B, F, H/2, W/2, D/2]."""
        return self.swinViT.patch_embed.proj

    def encode(self, image: Tensor) -> list[Tensor]:
        """[B, C, H, W, D] → the image and five levels [B, F, H/s, W/s, D/s] for s in 2, 4, 8, 16, 32."""
        self._check_input_size(image.shape[2:])
        return [image, *self.swinViT(image, self.normalize)]

    def encode_again(self, image: Tensor, features: list[Tensor]) -> list[Tensor]:
        """Encode the same image again with new dropout (which starts in the first block, so nothing is reused)."""
        return self.encode(image)

    def decode(self, features: list[Tensor], box: Box) -> Tensor:
        """Output logits [B, C, h, w, d] of a box that is aligned to the bottleneck (32 voxels)."""
        levels = zip(features, self.level_strides, strict=True)
        image, h0, h1, h2, h3, h4 = (crop_level(x, box, s) for x, s in levels)
        d3 = self.decoder5(self.encoder10(h4), h3)
        d2 = self.decoder4(d3, self.encoder4(h2))
        d1 = self.decoder3(d2, self.encoder3(h1))
        d0 = self.decoder2(d1, self.encoder2(h0))
        return self.out(self.decoder1(d0, self.encoder1(image)))


Backbone = UNetBackbone | SwinUNETRBackbone


def pooled(bottleneck: Tensor) -> Tensor:
    """Pool the bottleneck to one vector per crop by the maximum: [B, F, h, w, d] → [B, F].

    The mean does not distinguish crops: a normalisation before it makes it nearly the same for every crop.
    """
    return torch.amax(bottleneck, dim=(2, 3, 4))
