"""A fine-tuning keeps nothing of the steps that it has taken."""

from __future__ import annotations

import pytest
from whole_runs import Objects

from .bundles import TINY_TRAINING, sizes


@pytest.mark.slow
def test_epochs_leave_no_objects(workflow, samples):
    options = {**TINY_TRAINING, **sizes("hippocampus", "unet"), "dataset_dir": str(samples("hippocampus"))}
    flow = workflow("hippocampus", "train", ["train"], **options | {"epochs": 16, "val_interval": 4})
    objects = Objects(flow.parser.get_parsed_content("train#trainer"))
    flow.run()
    assert len(objects.counts) == 16
    assert objects.growth(10) < 20, objects.counts
