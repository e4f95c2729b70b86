"""Terms that stay at chance are named once, after a tenth of the run."""

from __future__ import annotations

import pytest
from ignite.engine import Engine

from scripts.chance import WarnOfChance

CHANCE = {
    **{"masked_mse": 0.05, "mean_mse": 0.05, "number_accuracy": 0.2, "number_majority": 0.2},
    **{"location_auroc": 0.5, "retrieval_accuracy": 0.1, "retrieval_chance": 0.1},
}
WEIGHTS = {"loss_pr": 1.0, "loss_num": 0.01, "loss_loc": 0.01, "loss_con": 0.001, "loss_cl": 0.01}


def lines(handler, metrics, epochs):
    validator = Engine(lambda engine, batch: None)
    handler.attach(validator)
    for epoch in epochs:
        validator.state.metrics = metrics
        validator.state.epoch = epoch
        handler(validator)


@pytest.mark.parametrize(
    ("learnt", "named"),
    [
        ({}, ["loss_pr", "loss_num", "loss_loc", "loss_cl"]),
        ({"masked_mse": 0.02, "number_accuracy": 0.5, "location_auroc": 0.8, "retrieval_accuracy": 0.9}, []),
        ({"masked_mse": 0.02, "number_accuracy": 0.5, "retrieval_accuracy": 0.9}, ["loss_loc"]),
        ({"masked_mse": 0.07, "number_accuracy": 0.5, "location_auroc": 0.8}, ["loss_pr", "loss_cl"]),
    ],
)
def test_terms_at_chance_are_named_with_what_helps(capsys, learnt, named):
    lines(WarnOfChance(WEIGHTS, 100), {**CHANCE, **learnt}, [5, 10, 20])
    said = capsys.readouterr().out
    assert said.count("\n") == bool(named)
    assert [term for term in WEIGHTS if f"{term} (" in said] == named
    if "loss_loc" in named:
        assert "WARNING: at chance after 10 of 100 epochs: " in said
        assert "loss_loc (location_auroc 0.5, by chance 0.5): try a longer warm-up (--warmup_epochs)" in said


def test_terms_that_are_not_trained_are_not_named(capsys):
    lines(WarnOfChance({"loss_pr": 1.0, "loss_cl": 0}, 10), CHANCE, [1])
    said = capsys.readouterr().out
    assert "loss_pr (masked_mse 0.05, by chance 0.05)" in said and "loss_cl" not in said
