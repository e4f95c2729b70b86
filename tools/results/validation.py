"""Additions to MONAI's validation in fine-tuning: Dice of each class, and a picture."""

from __future__ import annotations

import math
from collections.abc import Sequence
from pathlib import Path

import ignite.distributed as idist
from ignite.engine import Engine, Events

from tools.results.figures import segmentation_figure


class ClassDice:
    """Adds `dice_<class>` to the validator's metrics: the mean over the cases that contain the class.

    If no case contains any class, `mean_dice` becomes NaN: MONAI's mean over nothing is 0.

    Args:
        names: class names, in the order of the channels of `mean_dice`.
    """

    def __init__(self, names: Sequence[str]) -> None:
        self.names = list(names)

    def attach(self, engine: Engine) -> None:
        """Attach to the validator, whose key metric is MONAI's `MeanDice` with the name `mean_dice`.

        Attach it before handlers that log metrics, which run at the same event.
        """
        engine.add_event_handler(Events.EPOCH_COMPLETED, self)

    def __call__(self, validator: Engine) -> None:
        """Add the metrics; NaN for a class that no case contains."""
        dice = validator.state.metric_details["mean_dice"]  # [cases, K]
        means = dice.double().nanmean(0).tolist()
        validator.state.metrics.update({f"dice_{name}": mean for name, mean in zip(self.names, means, strict=True)})
        if dice.isnan().all():
            validator.state.metrics["mean_dice"] = math.nan


class SegmentationFigure:
    """Draws the first validation case after every validation: image, label, prediction in three planes.

    Args:
        figure_dir: folder of the pictures, one PNG per validation.
        names: class names.
    """

    def __init__(self, figure_dir: str | Path, names: Sequence[str]) -> None:
        self.figure_dir = Path(figure_dir)
        self.names = list(names)

    def attach(self, engine: Engine) -> None:
        """Attach to the validator, whose output is a list of `image`, `label` and `pred` (masks of the classes)."""
        if idist.get_rank() == 0:
            engine.add_event_handler(Events.ITERATION_COMPLETED(once=1), self)

    def __call__(self, validator: Engine) -> None:
        """Draw the first case of this batch (its first channel)."""
        output, item = validator.state.output[0], validator.state.batch[0]
        segmentation_figure(
            self.figure_dir / f"segmentation_epoch={validator.state.epoch:04d}.png",
            output["image"][0].cpu(),
            {"label": output["label"], "prediction": output["pred"]},
            names=self.names,
            title=f"{Path(item['file']).name}, epoch {validator.state.epoch}",
            spacing=tuple(item["spacing"].tolist()),
        )
