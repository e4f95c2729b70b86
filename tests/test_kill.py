"""`python -m tests.kill`: trainings that are killed and resumed end as those that are not."""

from __future__ import annotations

import os
import re
import subprocess
import sys

import pytest
from conftest import ROOT

pytestmark = pytest.mark.skipif(not hasattr(os, "fork"), reason="processes are forked")


def kill(*options):
    line = [sys.executable, "-m", "tests.kill", *options]
    done = subprocess.run(line, cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr[-3000:]
    kills, runs, same = map(int, re.search(r"(\d+) kills .* in (\d+) runs, of which (\d+) ended", done.stdout).groups())
    assert runs == same
    return kills


def test_killed_runs_end_as_the_whole_one():
    assert kill("--kills", "3", "--bundles", "pretrain", "--processes", "1,2", "--workers", "2") >= 3


@pytest.mark.slow
def test_a_hundred_kills():
    assert kill() >= 100
