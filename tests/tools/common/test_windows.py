"""Sliding windows."""

from __future__ import annotations

import pytest
import torch

from tools.common.windows import SlidingWindow


def test_flips_are_averaged():
    calls = []

    def network(window):  # an output that depends on where in the window a voxel is
        calls.append(1)
        return window * torch.linspace(1, 2, 32).view(1, 1, 32, 1, 1)

    image = torch.rand(1, 1, 32, 32, 32)
    out = SlidingWindow(
        "off", "cpu", flip_axes=[0, 2], roi_size=(32, 32, 32), sw_batch_size=1, overlap=0.5, mode="gaussian"
    )(image, network)
    assert len(calls) == 4
    torch.testing.assert_close(out, image * 1.5)  # the mean of the ramp and its mirror image


@pytest.mark.parametrize(
    ("key", "value"), [("flip_axes", [3]), ("flip_axes", [0, 0]), ("flip_axes", 1), ("overlap", 1.0), ("overlap", -0.1)]
)
def test_what_no_window_can_do_is_refused_at_once(key, value):
    with pytest.raises(ValueError, match=f"{key}: found"):
        SlidingWindow("off", "cpu", roi_size=(32, 32, 32), **{key: value})
