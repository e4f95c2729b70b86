"""What two processes send, and the efficiency on paper."""

from __future__ import annotations

import re

import pytest

from benchmarks.scaling import efficiency, main


def test_the_efficiency_of_a_ring():
    assert efficiency(1, step=1.0, sent=1e9, link=1e9) == 1
    assert efficiency(2, step=1.0, sent=1e9, link=1e9) == 1 / 2
    assert efficiency(10**6, step=1.0, sent=1e9, link=1e9) == pytest.approx(1 / 3, rel=1e-5)


@pytest.mark.slow
def test_two_processes_send_gradients_and_gathered_views(capsys):
    main(crops=2, steps=1, turns=1, unet_features=[4, 4, 8, 8, 16, 4])
    rows = re.findall(
        r"^\| (gathered|of one process) \| .* \| (.*?) \| (.*?) \|$", capsys.readouterr().out, re.MULTILINE
    )
    assert [kind for kind, *_ in rows] == ["gathered", "of one process"]
    # two views of 2 crops × 384 numbers; in the backward pass the gradients of both processes' views
    assert [views for *_, views in rows] == ["18.4 kB", "0 B"]
    assert len({gradients for _, gradients, _ in rows}) == 1
