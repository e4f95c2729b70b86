"""The table of a long run."""

from __future__ import annotations

import pytest

from benchmarks.memory import COLUMNS, measure


@pytest.mark.slow
def test_rows_follow_the_steps_and_see_the_worker(tmp_path):
    rows = measure(tmp_path, steps=200, num_workers=1)
    assert all(len(row) == len(COLUMNS) for row in rows)
    steps, trainer, workers, files, written, _, seconds = zip(*rows, strict=True)
    assert steps[:3] == (10, 20, 30) and len(steps) >= 19
    assert min(trainer) > 100 and min(workers[1:-1]) > 50 and min(files) > 2  # MB, of a process that has torch
    assert list(written) == sorted(written) and written[-1] > written[0]
    assert list(seconds) == sorted(seconds)
