"""MONAI's trainer and evaluator for steps that predict from (image, mask) and have a loss of several terms."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from monai.engines import SupervisedEvaluator, SupervisedTrainer
from monai.engines.utils import IterationEvents
from monai.utils import convert_to_tensor
from torch import Tensor

from tools.common.mixed_precision import needs_scaler


def predict(engine: SupervisedTrainer | SupervisedEvaluator, batch: Mapping[str, Any]) -> dict[str, Any]:
    """Run the network on one batch; return image, mask, prediction and loss terms, on the engine's device."""
    image, mask = (
        convert_to_tensor(batch[key], track_meta=False).to(engine.state.device, non_blocking=engine.non_blocking)
        if key in batch  # SimCLR has no mask
        else None
        for key in ("image", "mask")
    )
    prediction = engine.inferer(image, engine.network, mask)
    losses: dict[str, Tensor] = engine.loss_function(prediction, image, mask)
    return {"image": image, "mask": mask, "pred": prediction, **losses}


class PretrainTrainer(SupervisedTrainer):
    """`SupervisedTrainer` whose loss function takes (prediction, image, mask) and returns `loss` and its terms.

    `state.output` is a list with one dictionary for the whole batch: `image`, `mask`, `pred`, `loss` and the
    terms. The inferer chooses the precision; `amp` is its choice, because gradients in float16 must be scaled.
    """

    def __init__(self, device: str | torch.device, *args: Any, amp: str | bool, **kwargs: Any) -> None:
        device = torch.device(device)
        super().__init__(device, *args, decollate=False, optim_set_to_none=True, **kwargs)
        # MONAI creates a new scaler in every `run`, which could not be restored before training
        self.grad_scaler = torch.amp.GradScaler(device.type, enabled=needs_scaler(amp, device))

    def _iteration(self, engine: PretrainTrainer, batchdata: Mapping[str, Any]) -> list[dict[str, Any]]:
        engine.network.train()
        engine.optimizer.zero_grad(set_to_none=engine.optim_set_to_none)
        output = predict(engine, batchdata)
        engine.state.output = [output]
        engine.fire_event(IterationEvents.LOSS_COMPLETED)
        engine.grad_scaler.scale(output["loss"]).backward()
        engine.grad_scaler.unscale_(engine.optimizer)
        engine.fire_event(IterationEvents.BACKWARD_COMPLETED)
        engine.grad_scaler.step(engine.optimizer)
        engine.grad_scaler.update()
        engine.fire_event(IterationEvents.MODEL_COMPLETED)
        return engine.state.output

    def state_dict(self) -> dict[str, Any]:
        """Return Ignite's state of the engine and the state of the gradient scaler."""
        return {**super().state_dict(), "scaler": self.grad_scaler.state_dict()}

    def load_state_dict(self, state_dict: Mapping[str, Any]) -> None:
        """Restore both."""
        state_dict = dict(state_dict)
        self.grad_scaler.load_state_dict(state_dict.pop("scaler"))
        super().load_state_dict(state_dict)


class PretrainEvaluator(SupervisedEvaluator):
    """`SupervisedEvaluator` that also computes the training loss; same output as `PretrainTrainer`."""

    def __init__(self, device: str | torch.device, *args: Any, loss_function: Any, **kwargs: Any) -> None:
        super().__init__(torch.device(device), *args, decollate=False, **kwargs)
        self.loss_function = loss_function

    def _iteration(self, engine: PretrainEvaluator, batchdata: Mapping[str, Any]) -> list[dict[str, Any]]:
        with engine.mode(engine.network):
            engine.state.output = [predict(engine, batchdata)]
        engine.fire_event(IterationEvents.MODEL_COMPLETED)
        return engine.state.output
