"""The planner beside the five bundles."""

from __future__ import annotations

import re

from benchmarks.planning import main
from tools.samples.sample_data import sample_data


def test_every_decision_has_a_row_with_both_values(tmp_path, capsys):
    sample_data(str(tmp_path), "spleen", cases=2)
    capsys.readouterr()
    main("spleen", str(tmp_path), workers=0)
    rows = dict(re.findall(r"^\| (.*?) \| (.*?) \| .+ \|$", capsys.readouterr().out, re.MULTILINE))
    assert rows["spacing"] == "[1.5, 1.5, 1.5]"
    assert rows["epochs"] == "600"
    assert rows["intensity"] == "hu_window [-57, 164]"
    assert rows["flip_probability[0], left-right"] == "0.1"
