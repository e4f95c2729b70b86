"""A picture after every validation of pre-training."""

from __future__ import annotations

from pathlib import Path

import ignite.distributed as idist
from ignite.engine import Engine, Events

from tools.losses import expand_mask, scan_voxels
from tools.results.figures import reconstruction_figure, views_figure

from .masking import apply_mask


class ValidationFigure:
    """Draws the first validation crop in three planes, at every validation.

    Shows input, masked input, reconstruction and error; for a method without masking, the two views.

    Args:
        figure_dir: folder of the pictures, one PNG for each validation.
    """

    def __init__(self, figure_dir: str | Path) -> None:
        self.figure_dir = Path(figure_dir)

    def attach(self, engine: Engine) -> None:
        """Attach to the validator."""
        if idist.get_rank() == 0:
            engine.add_event_handler(Events.ITERATION_COMPLETED(once=1), self)

    def __call__(self, validator: Engine) -> None:
        """Draw the first crop of this batch (its first channel)."""
        (output,) = validator.state.output
        batch, epoch = validator.state.batch, validator.state.epoch
        labels = {
            "title": f"{Path(batch['file'][0]).name}, epoch {epoch}",
            "spacing": tuple(batch["spacing"][0].tolist()),
        }
        if output["mask"] is None:
            first, second = output["image"][:2, 0].cpu()
            views_figure(self.figure_dir / f"views_epoch={epoch:04d}.png", first, second, **labels)
            return
        image, mask = output["image"][:1], output["mask"][:1]
        seen = output["pred"].visible
        reconstruction_figure(
            self.figure_dir / f"reconstruction_epoch={epoch:04d}.png",
            image[0, 0].cpu(),
            (apply_mask(image, mask) if seen is None else seen)[0, 0].cpu(),
            output["pred"].reconstruction[0, 0].float().cpu(),
            counted=(expand_mask(mask, image.shape[2:]) & scan_voxels(image))[0, 0].cpu(),
            **labels,
        )
