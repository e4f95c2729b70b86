"""Validation metrics against their definitions."""

from __future__ import annotations

import math

import pytest
import torch
from ignite.engine import Engine, State

from scripts.metrics import AUROC_BINS, PretrainMetrics, auroc, retrieval_accuracy
from tools.losses import Prediction


def test_auroc_is_the_share_of_pairs_in_the_right_order():
    g = torch.Generator().manual_seed(0)
    positive = torch.randint(0, 20, (60,), generator=g).float() + 3  # with ties
    negative = torch.randint(0, 20, (80,), generator=g).float()
    pairs = [1.0 if p > n else 0.5 if p == n else 0.0 for p in positive.tolist() for n in negative.tolist()]
    histograms = [torch.histc(x, AUROC_BINS, 0, 32).double() for x in (positive, negative)]
    assert auroc(*histograms).item() == pytest.approx(sum(pairs) / len(pairs), abs=1e-6)


def test_retrieval_looks_among_all_other_views():
    views = torch.eye(3)
    assert retrieval_accuracy(views, views) == 1
    assert retrieval_accuracy(views, views.roll(1, 0)) == 0
    # the first crop's views are apart, and each is nearer to the second crop's first view
    first = torch.tensor([[1.0, 0.0, 0.0], [1.0, 1.0, 0.0], [0.0, 0.0, 1.0]])
    second = torch.tensor([[0.0, 1.0, 0.0], [1.0, 1.0, 0.1], [0.0, 0.0, 1.0]])
    assert retrieval_accuracy(first, second) == pytest.approx(4 / 6)


def output(views=True, padded=False):
    """One crop of 4×4×8 voxels, patches of 2³, two regions of 4³ side by side, each with a fine chequered pattern."""
    image = torch.full((1, 1, 4, 4, 8), 0.5)
    image[..., 4:] = 0.9
    image += 0.05 * (-1.0) ** torch.stack(torch.meshgrid(*map(torch.arange, (4, 4, 8)), indexing="ij")).sum(0)
    if padded:
        image[..., 6:] = 0
    mask = torch.zeros(1, 1, 2, 2, 4, dtype=torch.bool)
    mask[0, 0, 0, 0, 0] = mask[0, 0, 0, 1, 0] = True  # two patches of the left region
    mask[0, 0, 0, 0, 3] = True  # one of the right
    painted = image + 0.1
    number = torch.zeros(1, 9, 1, 1, 2)
    number[0, 2, 0, 0, 0] = 5  # right
    number[0, 7, 0, 0, 1] = 5  # wrong
    location = torch.full((1, 8, 1, 1, 2), -5.0)
    location[0, 0, 0, 0, 0] = 5  # the first of the two patches; the others are missed
    projection = torch.tensor([[1.0, 0.0]])
    prediction = Prediction(
        painted, (slice(0, 4), slice(0, 4), slice(0, 8)), number, location, (projection,) * 2 if views else None
    )
    return [{"image": image, "mask": mask, "pred": prediction, "loss": torch.tensor(1.5)}]


def metrics_of(*outputs):
    metrics = PretrainMetrics()
    metrics.reset()
    for out in outputs:
        metrics.update(out)
    return metrics.compute()


def test_metrics_of_a_crop_by_hand():
    found = metrics_of(output())
    assert found["loss"] == 1.5
    assert found["masked_mse"] == pytest.approx(0.01, rel=1e-4)
    assert found["psnr"] == pytest.approx(20, rel=1e-4)
    visible = (6 * 8 * 0.5 + 7 * 8 * 0.9) / (13 * 8)
    expected = (2 * (0.5 - visible) ** 2 + (0.9 - visible) ** 2) / 3 + 0.05**2  # of the pattern
    assert found["mean_mse"] == pytest.approx(expected, rel=1e-4)
    assert found["number_accuracy"] == 0.5
    assert found["number_majority"] == 0.5
    assert found["location_accuracy"] == pytest.approx(14 / 16)
    assert found["location_majority"] == pytest.approx(13 / 16)
    # three masked patches: one above all 13 visible ones, two level with them
    assert found["location_auroc"] == pytest.approx((13 + 2 * 13 / 2) / 39)


def test_padding_does_not_count():
    found = metrics_of(output(padded=True))
    # the right region is half padding: no number is asked for, and its masked patch is all padding
    assert found["number_accuracy"] == 1
    assert found["location_accuracy"] == pytest.approx(11 / 12)
    assert found["masked_mse"] == pytest.approx(0.01, rel=1e-4)


def test_retrieval_is_over_all_batches_and_chance_says_so():
    found = metrics_of(output(), output(), output())
    assert found["retrieval_chance"] == pytest.approx(1 / 5)
    assert "retrieval_accuracy" not in metrics_of(output(views=False))


def test_terms_are_weighted_by_crops():
    two = [{**output()[0], "loss": torch.tensor(3.0)}]
    assert metrics_of(output(), two, two)["loss"] == pytest.approx(2.5)


def test_every_metric_gets_its_own_name():
    engine = Engine(lambda _engine, _batch: None)
    engine.state = State(metrics={})
    metrics = PretrainMetrics()
    metrics.reset()
    metrics.update(output())
    metrics.completed(engine, "loss")
    assert engine.state.metrics["loss"] == 1.5
    assert all(isinstance(value, float) and math.isfinite(value) for value in engine.state.metrics.values())
