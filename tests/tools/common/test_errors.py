"""What a user sees of an error: one line that says its cause, and a traceback only where it helps."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

from tools.common.errors import SHOW_TRACEBACK, is_named
from tools.data.scans import require_folder

ROOT = Path(__file__).resolve().parents[3]
WRAPPED = """
from tools.common.errors import explain_errors
from tools.data.scans import require_folder
explain_errors()
try:
    {}
except Exception as error:  # as config parsers do
    raise RuntimeError("failed to instantiate component") from error
"""


def stderr_of(statement: str, **environment: str) -> str:
    done = subprocess.run(
        [sys.executable, "-c", WRAPPED.format(statement)],
        cwd=ROOT,
        env=os.environ | environment,
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 1
    return done.stderr.strip()


def test_an_error_of_this_project_is_one_line():
    assert stderr_of("require_folder('/nowhere')") == (
        "ScanError: dataset_dir: /nowhere does not exist, expected a folder of scans"
    )


@pytest.mark.parametrize(
    ("statement", "environment"),
    [("require_folder('/nowhere')", {SHOW_TRACEBACK: "1"}), ("int('x')", {}), ("require_folder(None)", {})],
    ids=["asked for", "of a library", "a wrong call"],
)
def test_a_traceback_comes_before_the_line(statement, environment):
    first, *_, last = stderr_of(statement, **environment).splitlines()
    assert first.startswith("Traceback")
    assert last.startswith(("ScanError: ", "ValueError: ", "TypeError: "))


def test_only_what_this_project_raised_is_named():
    with pytest.raises(ValueError, match="expected a folder") as ours:
        require_folder("/nowhere")
    with pytest.raises(ValueError, match="invalid literal") as theirs:
        int("x")
    assert is_named(ours.value)
    assert not is_named(theirs.value)
