"""Dice of a validation: over the cases that hold a class, and not a number where none does."""

from __future__ import annotations

import math

import pytest
import torch
from ignite.engine import Engine, Events

from tools.results.validation import ClassDice

NAN = math.nan


@pytest.mark.parametrize(
    ("dice", "mean", "classes"),
    [
        ([[0.5, NAN], [0.7, 0.2]], 0.4, [0.6, 0.2]),
        ([[0.0, NAN]], 0.0, [0.0, NAN]),
        ([[NAN, NAN], [NAN, NAN]], NAN, [NAN, NAN]),
    ],
)
def test_a_mean_over_nothing_is_no_number(dice, mean, classes):
    validator = Engine(lambda *_: None)
    validator.state.metric_details = {"mean_dice": torch.tensor(dice)}
    validator.state.metrics["mean_dice"] = 0.0 if math.isnan(mean) else mean  # as MONAI
    ClassDice(["a", "b"]).attach(validator)
    validator.fire_event(Events.EPOCH_COMPLETED)
    found = [validator.state.metrics[name] for name in ("mean_dice", "dice_a", "dice_b")]
    assert found == pytest.approx([mean, *classes], nan_ok=True)
