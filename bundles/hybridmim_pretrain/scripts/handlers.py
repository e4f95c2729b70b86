"""Handlers of pre-training: the best weights, and a picture after every validation."""

from __future__ import annotations

import math
from collections.abc import Mapping
from pathlib import Path

import ignite.distributed as idist
import torch
from ignite.engine import Engine, Events

from tools.figures import reconstruction_figure
from tools.files import atomic_path
from tools.losses import expand_mask, inside

from .hybridmim import HybridMIM
from .masking import apply_mask


class BestWeights:
    """Keeps the weights of the validation with the lowest loss: `model.pt` with the heads, `backbone.pt` without.

    Both are bare state dicts. The best loss so far belongs to the training checkpoints, so that a resumed run
    does not replace a better model.

    Args:
        network_def: the network.
        ckpt_dir: folder to write to.
    """

    def __init__(self, network_def: HybridMIM, ckpt_dir: str | Path) -> None:
        self.network_def = network_def
        self.ckpt_dir = Path(ckpt_dir)
        self.loss = math.inf

    def attach(self, engine: Engine) -> None:
        """Attach to the validator."""
        engine.add_event_handler(Events.COMPLETED, self)

    def __call__(self, validator: Engine) -> None:
        """Compare, and write if better (rank 0 only)."""
        loss = validator.state.metrics["loss"]
        if not loss < self.loss:
            return
        self.loss = loss
        if idist.get_rank() > 0:
            return
        for name, module in (("model.pt", self.network_def), ("backbone.pt", self.network_def.backbone)):
            with atomic_path(self.ckpt_dir / name) as temporary:
                torch.save(module.state_dict(), temporary)

    def state_dict(self) -> dict[str, float]:
        """What a checkpoint needs."""
        return {"loss": self.loss}

    def load_state_dict(self, state: Mapping[str, float]) -> None:
        """Continue from there."""
        self.loss = state["loss"]


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
