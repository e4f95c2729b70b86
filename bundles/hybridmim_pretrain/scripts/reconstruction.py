"""What inference makes of a reconstructed scan: the comparison with the original, and a picture."""

from __future__ import annotations

from collections.abc import Hashable, Mapping
from pathlib import Path

from monai.transforms import Transform
from monai.transforms.utils import generate_spatial_bounding_box
from torch import Tensor, nn

from tools.data.scans import stem_of
from tools.losses import expand_mask, scan_voxels
from tools.results.figures import reconstruction_figure

from .simclr import SimCLR


def require_reconstruction(network: nn.Module) -> None:
    """Refuse, before scans are read, a network that has nothing to show.

    Raises:
        ValueError: it makes no image.
    """
    if isinstance(network, SimCLR):
        raise ValueError(
            "config_file: found simclr.yaml, whose network makes no image, expected the overlays of a method that "
            "does (HybridMIM needs none; mae.yaml, simmim.yaml). SimCLR is measured by `run evaluating` with train.yaml"
        )


class CompareReconstructiond(Transform):
    """Pastes the reconstruction into the scan and measures it, where it was masked.

    Takes `scan` and `pred` [C, H, W, D] and `mask` [1, P1, P2, P3]. Sets `pred` (painted where masked, the scan
    elsewhere), `error` (absolute, 0 where nothing was masked) and `counted` (bool [1, H, W, D], masked voxels of
    the scan).
    """

    def __call__(self, data: Mapping[Hashable, Tensor]) -> dict[Hashable, Tensor]:
        """Compare."""
        scan, mask = data["scan"], data["mask"][None].to(data["scan"].device)
        counted = (expand_mask(mask, scan.shape[1:]) & scan_voxels(scan.as_tensor()[None]))[0]
        pred = data["pred"].to(scan.dtype)
        pasted = pred.where(counted, scan)
        return {**data, "pred": pasted, "error": (pasted - scan).abs(), "counted": counted}


class SaveReconstructionFigured(Transform):
    """Writes `NAME_reconstruction.png` of the middle planes, before the scan goes back to its own geometry.

    Args:
        figure_dir: folder of the pictures.
        scan_root: folder of the scans; the folders below it are kept.
    """

    def __init__(self, figure_dir: str | Path, scan_root: str | Path) -> None:
        self.figure_dir = Path(figure_dir)
        self.scan_root = Path(scan_root).absolute()

    def __call__(self, data: Mapping[Hashable, Tensor]) -> dict[Hashable, Tensor]:
        """Draw the first channel, without the padding."""
        path = Path(data["file"]).absolute()
        folder = path.parent.relative_to(self.scan_root)
        start, end = generate_spatial_bounding_box(data["scan"].as_tensor())
        box = (0, *(slice(s, e) for s, e in zip(start, end, strict=True)))
        image, masked, pred, counted = (
            data[key].float().as_tensor()[box].cpu() if hasattr(data[key], "as_tensor") else data[key][box].cpu()
            for key in ("scan", "image", "pred", "counted")
        )
        error = (pred - image)[counted].square().mean()
        reconstruction_figure(
            self.figure_dir / folder / f"{stem_of(path)}_reconstruction.png",
            image,
            masked,
            pred,
            counted=counted,
            title=f"{path.name}: masked error {error:.4f} (MSE)",
            spacing=tuple(data["spacing"].tolist()),
        )
        return dict(data)
