"""Memory of a process."""

from __future__ import annotations

import sys

import psutil
import pytest

from tools.common.processes import return_freed_memory


@pytest.mark.skipif(sys.platform != "linux", reason="needs glibc")
def test_memory_that_was_freed_between_what_is_held_is_given_back():
    process = psutil.Process()
    blocks = [bytearray(b"x") * 50_000 for _ in range(4000)]  # too small for pages of their own
    held = blocks[::100]
    del blocks
    before = process.memory_info().rss
    return_freed_memory()
    assert before - process.memory_info().rss > 100e6
    assert len(held) == 40


@pytest.mark.skipif(sys.platform != "linux", reason="needs glibc")
def test_what_only_refers_to_itself_is_freed():
    process = psutil.Process()
    figure = {"pixels": bytearray(b"x") * 200_000_000}
    figure["self"] = figure
    before = process.memory_info().rss
    del figure
    return_freed_memory()
    assert before - process.memory_info().rss > 100e6
