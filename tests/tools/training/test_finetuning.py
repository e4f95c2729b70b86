"""The trainer of fine-tuning."""

from __future__ import annotations

import pytest
import torch
from torch.utils.data import DataLoader

from tools.training.finetuning import Finetuner


@pytest.fixture(autouse=True)
def _scaler_of_the_cpu(monkeypatch):
    """MONAI asks for CUDA's, which does nothing without a GPU."""
    monkeypatch.setattr(
        torch.cuda.amp, "GradScaler", lambda: torch.amp.GradScaler("cpu", init_scale=4.0, growth_interval=3)
    )


def trainer(epochs: int, amp: bool = True) -> Finetuner:
    torch.manual_seed(0)
    network = torch.nn.Linear(2, 1)
    cases = [{"image": torch.ones(2), "label": torch.ones(1)}] * 4
    return Finetuner(
        device=torch.device("cpu"),
        max_epochs=epochs,
        train_data_loader=DataLoader(cases, batch_size=2),
        network=network,
        optimizer=torch.optim.SGD(network.parameters(), 0.01),
        loss_function=torch.nn.functional.mse_loss,
        decollate=False,
        amp=amp,
    )


@pytest.mark.filterwarnings("ignore")
def test_a_resumed_run_scales_gradients_as_the_one_that_nothing_interrupted():
    whole, first, second = trainer(4), trainer(2), trainer(4)
    whole.run()
    first.run()
    state = first.state_dict()
    assert state["scaler"]["_growth_tracker"] == 1  # 4 steps, of which the third doubled the scale
    second.load_state_dict(state)
    second.state.max_epochs = 4  # as MONAI's CheckpointLoader does
    second.run()
    assert second.state.iteration == whole.state.iteration == 8
    assert second.scaler.state_dict() == whole.scaler.state_dict()
    assert whole.scaler.get_scale() == 16.0


def test_without_a_scaler_a_state_of_an_earlier_version_is_taken():
    first, second = trainer(2, amp=False), trainer(3, amp=False)
    first.run()
    state = first.state_dict()
    assert state.pop("scaler") == {}
    second.load_state_dict(state)
    second.state.max_epochs = 3  # as before
    second.run()
    assert second.state.iteration == 6
