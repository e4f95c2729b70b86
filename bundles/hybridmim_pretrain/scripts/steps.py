"""The step that MAE and SimMIM share."""

from __future__ import annotations

from torch import Tensor, nn

from tools.losses import Prediction

from .backbones import whole
from .mae import MAE
from .masking import Geometry, RandPatchMaskd
from .simmim import SimMIM


class ReconstructionStep(nn.Module):
    """One step of MAE or SimMIM: the whole crop is reconstructed.

    Args:
        network_def: the network that is trained.
        geometry: sizes of crop and patch.
    """

    contrastive = False
    images_per_crop = 1
    has_unused_parameters = True  # a norm in MONAI's ViT blocks, SwinUNETR's decoder

    def __init__(self, network_def: MAE | SimMIM, geometry: Geometry) -> None:
        super().__init__()
        self.network_def = network_def
        self.geometry = geometry

    def forward(self, image: Tensor, mask: Tensor) -> Prediction:
        """Image [B, C, H, W, D] in (0, 1], mask bool [B, 1, P1, P2, P3] → the reconstruction."""
        return Prediction(reconstruction=self.network_def(image, mask), box=whole(image.shape[2:]))

    def lines(self, mask: RandPatchMaskd) -> list[tuple[str, str]]:
        """Return the rows of the start table for this step."""
        return [("masking", mask.describe())]
