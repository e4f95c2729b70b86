"""Shared by all tests: the bundle's scripts on the path, and where the real scans are."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
PRETRAIN = ROOT / "bundles/hybridmim_pretrain"
sys.path.insert(0, str(PRETRAIN))

SHARED_DATA = ROOT.parent / "shared/data"


@pytest.fixture(scope="session")
def shared_data() -> Path:
    """Folder of real scans; a user's machine does not have it."""
    if not SHARED_DATA.is_dir():
        pytest.skip(f"needs the real scans in {SHARED_DATA}")
    return SHARED_DATA
