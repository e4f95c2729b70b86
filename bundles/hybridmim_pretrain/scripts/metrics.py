"""Validation metrics of pre-training, each with a baseline: the value of a network that has learnt nothing.

| metric               | baseline            | baseline predictor                                              |
| `masked_mse`, `psnr` | `mean_mse`          | the mean of the crop's visible voxels                           |
| `number_accuracy`    | `number_majority`   | the most frequent number of masked patches                      |
| `location_accuracy`  | `location_majority` | "masked", or "visible", for every patch                         |
| `location_auroc`     | 0.5                 | random ranking of the patches                                   |
| `retrieval_accuracy` | `retrieval_chance`  | a random other view of the validation set                       |
"""

from __future__ import annotations

from typing import Any

import ignite.distributed as idist
import torch
import torch.nn.functional as F
from ignite.engine import Engine
from ignite.metrics import Metric
from monai.utils import evenly_divisible_all_gather
from torch import Tensor

from tools.losses import Prediction, expand_mask, region_targets, scan_voxels, view_similarity

AUROC_BINS = 2048


class PretrainMetrics(Metric):
    """Computes all metrics of a validation, over all processes, and adds them to `engine.state.metrics` by name.

    HybridMIM has all metrics; MAE and SimMIM have those of the reconstruction, SimCLR those of the retrieval.

    Masked voxels, regions and patches are counted as in the loss, without padding.
    """

    required_output_keys = None

    def reset(self) -> None:
        """Start a validation."""
        self._sums: dict[str, Tensor] = {}
        self._views: list[Tensor] = []

    def update(self, output: list[dict[str, Any]]) -> None:
        """Add one batch: the output of `PretrainEvaluator`."""
        (batch,) = output
        image, mask, prediction = batch["image"], batch["mask"], batch["pred"]
        self._add("crops", torch.tensor(len(image)))
        for name, value in batch.items():
            if name.startswith("loss"):
                self._add(name, value * len(image))
        if prediction.reconstruction is not None:
            self._reconstruction(prediction, image, mask)
        if prediction.number is not None:
            self._regions(prediction, image, mask)
        if prediction.views:
            self._views.append(torch.stack(prediction.views, dim=1).float())

    def _reconstruction(self, prediction: Prediction, image: Tensor, mask: Tensor) -> None:
        scan, hidden = scan_voxels(image), expand_mask(mask, image.shape[2:])
        counted, visible = scan & hidden, scan & ~hidden
        space = (2, 3, 4)
        mean = (image * visible).sum(space) / visible.sum(space).clamp(min=1)
        error = (prediction.reconstruction.float() - image) ** 2
        self._add("squared_error", (error * counted).sum())
        self._add("squared_error_of_mean", ((image - mean[..., None, None, None]) ** 2 * counted).sum())
        self._add("masked_voxels", counted.sum() * image.shape[1])

    def _regions(self, prediction: Prediction, image: Tensor, mask: Tensor) -> None:
        targets = region_targets(image, mask, prediction.number.shape[2:])
        number = targets.number[targets.number_counts]
        answer = prediction.number.argmax(1)[targets.number_counts]
        self._add("numbers", torch.bincount(number, minlength=prediction.number.shape[1]))
        self._add("numbers_right", (answer == number).sum())
        masked = targets.location[targets.location_counts]
        score = prediction.location.float().sigmoid()[targets.location_counts]
        self._add("locations_right", ((score > 0.5) == masked).sum())
        self._add("scores_masked", torch.histc(score[masked], AUROC_BINS, 0, 1))
        self._add("scores_visible", torch.histc(score[~masked], AUROC_BINS, 0, 1))

    def _add(self, name: str, value: Tensor) -> None:
        value = value.detach().double().cpu()
        self._sums[name] = self._sums.get(name, 0) + value

    def compute(self) -> dict[str, float]:
        """Return all metrics as floats."""
        s = {name: idist.all_reduce(value.to(idist.device())).cpu() for name, value in self._sums.items()}
        metrics = {name: s[name] / s["crops"] for name in s if name.startswith("loss")}
        if "squared_error" in s:
            mse = s["squared_error"] / s["masked_voxels"]
            metrics |= {
                "masked_mse": mse,
                "mean_mse": s["squared_error_of_mean"] / s["masked_voxels"],
                "psnr": -10 * mse.log10(),  # dB, for intensities of 0 to 1
            }
        if "numbers" in s:
            patches = s["scores_masked"].sum() + s["scores_visible"].sum()
            metrics |= {
                "number_accuracy": s["numbers_right"] / s["numbers"].sum(),
                "number_majority": s["numbers"].max() / s["numbers"].sum(),
                "location_accuracy": s["locations_right"] / patches,
                "location_majority": torch.maximum(s["scores_masked"].sum(), s["scores_visible"].sum()) / patches,
                "location_auroc": auroc(s["scores_masked"], s["scores_visible"]),
            }
        if self._views:
            views = evenly_divisible_all_gather(torch.cat(self._views))
            metrics["retrieval_accuracy"] = retrieval_accuracy(views[:, 0], views[:, 1])
            metrics["retrieval_chance"] = torch.tensor(1 / (2 * len(views) - 1))
        return {name: float(value) for name, value in metrics.items()}

    def completed(self, engine: Engine, name: str) -> None:
        """Add all metrics to the engine's state."""
        engine.state.metrics.update(self.compute())


def auroc(positive: Tensor, negative: Tensor) -> Tensor:
    """Area under the ROC curve from two histograms of scores [bins]: P(positive above negative), ties count half."""
    below = F.pad(negative.cumsum(0), (1, -1))
    return (positive * (below + negative / 2)).sum() / (positive.sum() * negative.sum())


def retrieval_accuracy(first: Tensor, second: Tensor) -> Tensor:
    """Fraction of views whose nearest other view (cosine) is of the same crop; views [N, E] of N crops."""
    n = len(first)
    nearest = view_similarity(first, second).argmax(1)
    return (nearest == torch.arange(2 * n, device=nearest.device).roll(n)).double().mean()
