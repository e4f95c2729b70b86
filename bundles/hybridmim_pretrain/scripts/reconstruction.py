"""Inference: compares a reconstructed scan with the original, and draws a picture."""

from __future__ import annotations

from collections.abc import Hashable, Mapping
from pathlib import Path

from monai.transforms import Transform
from monai.transforms.utils import generate_spatial_bounding_box
from torch import Tensor, nn

from tools.data.outputs import output_name
from tools.losses import expand_mask, scan_voxels
from tools.results.figures import reconstruction_figure

from .simclr import SimCLR


def require_reconstruction(network: nn.Module) -> None:
    """Refuse a network that does not reconstruct, before scans are read.

    Raises:
        ValueError: the network outputs no image.
    """
    if isinstance(network, SimCLR):
        raise ValueError(
            "config_file: found simclr.yaml, whose network makes no image, expected the overlays of a method that "
            "does (HybridMIM needs none; mae.yaml, simmim.yaml). To evaluate SimCLR, use `run evaluating`"
        )


class CompareReconstructiond(Transform):
    """Inserts the reconstructed masked voxels into the scan and computes their error.

    Reads `scan` and `pred` [C, H, W, D] and `mask` [1, P1, P2, P3]. Sets `pred` (the reconstruction in masked voxels,
    the scan elsewhere), `error` (absolute, 0 in visible voxels) and `counted` (bool [1, H, W, D], masked voxels of the
    scan).
    """

    def __call__(self, data: Mapping[Hashable, Tensor]) -> dict[Hashable, Tensor]:
        """Compare."""
        scan, mask = data["scan"], data["mask"][None].to(data["scan"].device)
        counted = (expand_mask(mask, scan.shape[1:]) & scan_voxels(scan.as_tensor()[None]))[0]
        pred = data["pred"].to(scan.dtype)
        pasted = pred.where(counted, scan)
        return {**data, "pred": pasted, "error": (pasted - scan).abs(), "counted": counted}


class SaveReconstructionFigured(Transform):
    """Writes `NAME_reconstruction.png` of the middle planes, before the scan is resampled to the geometry of its file.

    Args:
        figure_dir: folder of the pictures.
    """

    def __init__(self, figure_dir: str | Path) -> None:
        self.figure_dir = Path(figure_dir)

    def __call__(self, data: Mapping[Hashable, Tensor]) -> dict[Hashable, Tensor]:
        """Draw the first channel, without the padding."""
        start, end = generate_spatial_bounding_box(data["scan"].as_tensor())
        box = (0, *(slice(s, e) for s, e in zip(start, end, strict=True)))
        image, masked, pred, counted = (
            data[key].float().as_tensor()[box].cpu() if hasattr(data[key], "as_tensor") else data[key][box].cpu()
            for key in ("scan", "image", "pred", "counted")
        )
        error = (pred - image)[counted].square().mean()
        reconstruction_figure(
            self.figure_dir / f"{output_name(data, data['file'])}_reconstruction.png",
            image,
            masked,
            pred,
            counted=counted,
            title=f"{Path(data['file']).name}: masked error {error:.4f} (MSE)",
            spacing=tuple(data["spacing"].tolist()),
        )
        return dict(data)
