"""What the features of an encoder depend on: the scan, or the mask that was drawn for it.

Some scans of a validation batch are each encoded under some of its masks. If the features follow the masks, the encoder
has learnt to find masked patches, not anatomy, however good its own metrics are.

| metric                     | meaning                                                                              |
| `scan_variance_S`          | share of the variance of the features at 1/S of the resolution that the scan explains |
| `mask_variance_S`          | the same of the mask                                                                 |
| `scan_retrieval`           | how often the nearest of the scans under another mask is the same scan               |
| `mask_retrieval`           | how often the nearest of the masks on another scan is the same mask                  |
| `scan_mask_chance`         | both for features that know neither                                                  |
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import ignite.distributed as idist
import torch
import torch.nn.functional as F
from ignite.engine import Engine, Events
from torch import Tensor, nn
from tqdm import tqdm

from tools.common.mixed_precision import autocast
from tools.results.figures import features_figure

from .backbones import pooled

SCANS = 4  # of a batch, each under as many masks
MASK_CODE = 0.8  # share of the variance above which an encoder is called a code of the mask; before training: 0.63
CODED = 4  # stride from which on levels are judged; above, features see little more than their own voxels
PICTURED = (2, 4, 8)  # strides of the levels in the picture


def strides(image: Tensor, features: Sequence[Tensor]) -> list[int]:
    """Stride of each level of features [B, F, h, w, d] of image [B, C, H, W, D]."""
    return [image.shape[2] // level.shape[2] for level in features]


def variance_shares(total: Tensor, by_scan: Tensor, by_mask: Tensor, scans: int, masks: int) -> tuple[Tensor, Tensor]:
    """Shares of the variance that the scan and the mask explain (two-way analysis of variance).

    Args:
        total: sum over scans and masks of the squared features, summed over all elements.
        by_scan: [scans, elements] sums of the features over the masks.
        by_mask: sum over masks of the squared sums over the scans, summed over all elements.
        scans: number of scans.
        masks: number of masks.
    """
    grand = by_scan.sum(0).square().sum() / (scans * masks)
    whole = (total - grand).clamp(min=1e-12)
    return (by_scan.square().sum() / masks - grand) / whole, (by_mask / scans - grand) / whole


@torch.no_grad()
def study_features(step: nn.Module, image: Tensor, mask: Tensor) -> dict[str, float]:
    """Metrics of the encoder of a `PretrainStep` for crops [N, C, H, W, D] of N scans, and N masks [N, 1, P1, P2, P3].

    Every crop is encoded under every mask. One mask at a time, and sums alone are kept.
    """
    n = len(image)
    sums: dict[int, list[Tensor]] = {}
    vectors = []
    for number in range(n):
        features = [level.float() for level in step.encode(image, mask[number : number + 1].expand_as(mask))]
        vectors.append(pooled(features[-1]))
        for stride, level in zip(strides(image, features), features, strict=True):
            level = level.flatten(1).double()
            add = [level.square().sum(), level, level.sum(0).square().sum()]
            sums[stride] = [a + b for a, b in zip(sums[stride], add, strict=True)] if stride in sums else add
    metrics = {}
    for stride, (total, by_scan, by_mask) in sums.items():
        shares = variance_shares(total, by_scan, by_mask, n, n)
        metrics[f"scan_variance_{stride}"], metrics[f"mask_variance_{stride}"] = map(float, shares)
    z = F.normalize(torch.stack(vectors, 1), dim=2)  # [scans, masks, F]
    metrics["scan_retrieval"] = nearest_is_same(z)
    metrics["mask_retrieval"] = nearest_is_same(z.transpose(0, 1))
    metrics["scan_mask_chance"] = 1 / n
    return metrics


def nearest_is_same(vectors: Tensor) -> float:
    """How often, of the rows of another column, the nearest is the own row; unit vectors [rows, columns, F]."""
    similarity = torch.einsum("smf,tnf->mnst", vectors, vectors)
    right = similarity.argmax(-1) == torch.arange(len(vectors), device=vectors.device)
    others = ~torch.eye(vectors.shape[1], dtype=torch.bool, device=vectors.device)
    return float(right[others].double().mean())


class FeatureStudy:
    """Adds the metrics of `study_features` to every validation, and draws the features of one scan.

    Says so, once, if the encoder has become a code of the mask.

    Args:
        step: the training step; one without `encode` (MAE, SimMIM) is passed over, one without masks (SimCLR) drawn.
        crops_per_volume: crops of one scan that follow each other in a batch.
        figure_dir: folder of the pictures, `features_epoch=N.png`.
        amp: precision, as in `amp_dtype`.
    """

    def __init__(self, step: nn.Module, crops_per_volume: int, figure_dir: str | Path, amp: str | bool) -> None:
        self.step = step
        self.amp = amp
        self.crops_per_volume = crops_per_volume
        self.figure_dir = Path(figure_dir)
        self.said = False
        self.found: dict[str, float] = {}

    def attach(self, engine: Engine) -> None:
        """Attach to the validator."""
        if hasattr(self.step, "encode"):
            engine.add_event_handler(Events.ITERATION_COMPLETED(once=1), self)
            engine.add_event_handler(Events.EPOCH_COMPLETED, self._add)  # after the other metrics, before their card

    def __call__(self, validator: Engine) -> None:
        """Study the first batch of this validation."""
        (output,) = validator.state.output
        image, mask = output["image"], output["mask"]
        each = slice(None, SCANS * self.crops_per_volume, self.crops_per_volume)  # one crop of each scan
        some = mask is not None and len(image[each]) > 1
        with autocast(self.amp, image.device):
            self.found = study_features(self.step, image[each], mask[each]) if some else {}
            if idist.get_rank() == 0:
                self._draw(validator, image[:1])

    def _add(self, validator: Engine) -> None:
        """The mean over the processes whose batch has two scans."""
        found = self.found
        names = [*found]
        for other in idist.all_gather(",".join(names)) if idist.get_world_size() > 1 else ():
            names = names or [name for name in other.split(",") if name]
        if not names:
            return
        sums = torch.tensor([*(found.get(name, 0.0) for name in names), float(bool(found))], dtype=torch.float64)
        sums = idist.all_reduce(sums.to(idist.device(), torch.float32)).cpu()
        metrics = {name: float(total / sums[-1]) for name, total in zip(names, sums[:-1], strict=True)}
        validator.state.metrics.update(metrics)
        levels = [name.rpartition("_")[2] for name in names if name.startswith("mask_variance")]
        stride = max(
            (s for s in levels if int(s) >= CODED), key=lambda s: metrics[f"mask_variance_{s}"], default=levels[-1]
        )
        share, scan = metrics[f"mask_variance_{stride}"], metrics[f"scan_variance_{stride}"]
        if share > MASK_CODE and not self.said and idist.get_rank() == 0:
            self.said = True
            tqdm.write(
                f"WARNING: the encoder has become a code of the mask: of the variance of its features at 1/{stride}, "
                f"{share:.0%} follows the masks and {scan:.0%} the scans. Pre-training is for features of anatomy: "
                "take views: other_masks, and a lower head_gradient (the default is 1)"
            )

    def _draw(self, validator: Engine, image: Tensor) -> None:
        network = self.step.network_def.backbone
        with torch.no_grad():
            features = network.encode(image)
        levels = dict(zip(strides(image, features), features, strict=True))
        shown = {s: level for s, level in levels.items() if s in PICTURED or len(levels) == 1}
        batch, epoch = validator.state.batch, validator.state.epoch
        features_figure(
            self.figure_dir / f"features_epoch={epoch:04d}.png",
            image[0, 0].cpu(),
            {
                f"features at 1/{stride}": colours(level[0].float(), image.shape[2:]).cpu()
                for stride, level in shown.items()
            },
            title=f"{Path(batch['file'][0]).name}, epoch {epoch}",
            spacing=tuple(batch["spacing"][0].tolist()),
        )


def colours(features: Tensor, size: Sequence[int]) -> Tensor:
    """The first three principal components of features [F, h, w, d] as colours [3, H, W, D], 0 to 1."""
    points = features.flatten(1).T
    points = points - points.mean(0)
    _, _, axes = torch.linalg.svd(points.T @ points)
    components = (points @ axes[:3].T).T
    low, high = components.quantile(0.02, dim=1, keepdim=True), components.quantile(0.98, dim=1, keepdim=True)
    scaled = ((components - low) / (high - low).clamp(min=1e-6)).clamp(0, 1)
    return F.interpolate(scaled.view(1, -1, *features.shape[1:]), tuple(size), mode="nearest")[0]
