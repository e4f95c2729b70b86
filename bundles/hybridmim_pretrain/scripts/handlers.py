"""A picture after every validation of pre-training."""

from __future__ import annotations

from pathlib import Path

import ignite.distributed as idist
from ignite.engine import Engine, Events

from tools.figures import reconstruction_figure
from tools.losses import expand_mask, inside

from .masking import apply_mask


class ReconstructionFigure:
    """Draws the first validation crop after every validation: input, masked, reconstruction, error in three planes.

    Args:
        figure_dir: folder of the pictures, one PNG for each validation.
        mask_fill: value of the masked voxels.
    """

    def __init__(self, figure_dir: str | Path, mask_fill: float = 0.0) -> None:
        self.figure_dir = Path(figure_dir)
        self.mask_fill = mask_fill

    def attach(self, engine: Engine) -> None:
        """Attach to the validator."""
        if idist.get_rank() == 0:
            engine.add_event_handler(Events.ITERATION_COMPLETED(once=1), self)

    def __call__(self, validator: Engine) -> None:
        """Draw the first crop of this batch (its first channel)."""
        (output,) = validator.state.output
        image, mask = output["image"][:1], output["mask"][:1]
        batch = validator.state.batch
        reconstruction_figure(
            self.figure_dir / f"reconstruction_epoch={validator.state.epoch:04d}.png",
            image[0, 0].cpu(),
            apply_mask(image, mask, self.mask_fill)[0, 0].cpu(),
            output["pred"].reconstruction[0, 0].float().cpu(),
            counted=(expand_mask(mask, image.shape[2:]) & inside(image))[0, 0].cpu(),
            title=f"{Path(batch['file'][0]).name}, epoch {validator.state.epoch}",
            spacing=tuple(batch["spacing"][0].tolist()),
        )
