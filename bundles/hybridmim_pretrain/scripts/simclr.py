"""SimCLR (arXiv 2002.05709) on volumes, the contrastive method in MIM-Med3D (arXiv 2204.11716).

    scan → two crops, each augmented → the same encoder → maximum over the bottleneck → two-layer head → two views

The loss matches the two views of a scan among those of all scans of the batch. The crops and their augmentation are
transforms (`draw` in simclr.yaml).
"""

from __future__ import annotations

from torch import Tensor, nn

from tools.losses import Prediction

from .backbones import Backbone, pooled
from .gathering import gather
from .masking import Geometry
from .vit import ViTBackbone


class SimCLR(nn.Module):
    """An encoder and a head of two layers, each with a batch norm, as in SimCLR's published code.

    At the start the vectors of all crops are nearly equal; the norms remove their common part. Each process normalises
    over its own crops.

    Args:
        backbone: any backbone; a decoder is not trained.
        projection_size: length of the projection of a view.
    """

    def __init__(self, backbone: Backbone | ViTBackbone, projection_size: int = 128) -> None:
        super().__init__()
        width = backbone.bottleneck_channels
        self.backbone = backbone
        self.head = nn.Sequential(
            *(nn.Linear(width, width, bias=False), nn.BatchNorm1d(width), nn.ReLU()),
            *(nn.Linear(width, projection_size, bias=False), nn.BatchNorm1d(projection_size)),
        )

    def forward(self, image: Tensor) -> Tensor:
        """Crops [B, C, H, W, D] → one vector each, [B, E]."""
        return self.head(pooled(self.backbone.encode(image)[-1]))


class SimCLRStep(nn.Module):
    """One step of SimCLR: computes the projections of both views.

    Args:
        network_def: the network that is trained.
        geometry: crop size.
    """

    contrastive = True
    images_per_crop = 2  # a batch of N crops has 2N images: the two views of the first crop, of the second, …
    has_unused_parameters = True  # the backbone's decoder

    def __init__(self, network_def: SimCLR, geometry: Geometry) -> None:
        super().__init__()
        self.network_def = network_def
        self.geometry = geometry

    def forward(self, image: Tensor, mask: Tensor | None = None) -> Prediction:
        """Images [2N, C, H, W, D] → views, each [N, E] (in training, of all processes); nothing is masked."""
        vectors = self.network_def(image)
        views = vectors[0::2], vectors[1::2]
        return Prediction(views=tuple(gather(view) for view in views) if self.training else views)

    def lines(self, mask: object) -> list[tuple[str, str]]:
        """Return the rows of the start table for this step."""
        return [("views", "two crops of each scan, each augmented; nothing is masked")]
