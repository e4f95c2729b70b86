"""A training keeps nothing of the steps that it has taken."""

from __future__ import annotations

import pytest
from whole_runs import Objects

from .bundle import TINY


@pytest.mark.slow
def test_epochs_leave_no_objects(workflow, ct_scans):
    options = {**TINY, "dataset_dir": str(ct_scans), "epochs": 16, "val_interval": 8, "checkpoint_interval": 2}
    flow = workflow("train", ["train", "small"], **options)
    objects = Objects(flow.parser.get_parsed_content("train#trainer"))
    flow.run()
    assert len(objects.counts) == 16
    assert objects.growth(10) < 20, objects.counts
