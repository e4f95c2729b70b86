"""Shared by all tests: the bundle's scripts on the path, and where the real scans are."""

from __future__ import annotations

from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
SHARED_DATA = ROOT.parent / "shared/data"


# tests that start processes or train
SLOW = (
    "test_configs",
    "test_hybridmim",
    "test_learning",
    "test_bad_input",
    "test_commands",
    "test_distributed",
    "test_resume",
)


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Fast tests first, so that a broken one is seen soon."""
    items.sort(key=lambda item: SLOW.index(item.path.stem) if item.path.stem in SLOW else -1)


@pytest.fixture(scope="session")
def shared_data() -> Path:
    """Folder of real scans; a user's machine does not have it."""
    if not SHARED_DATA.is_dir():
        pytest.skip(f"needs the real scans in {SHARED_DATA}")
    return SHARED_DATA
