"""Shared by the tests of releases and of their installation."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest

from tools.shipping.verify import BUNDLES


@pytest.fixture(scope="module")
def sources(tmp_path_factory):
    """A copy of all bundles, without what runs may have left in them."""
    folder = tmp_path_factory.mktemp("sources") / "bundles"
    return Path(shutil.copytree(BUNDLES, folder, ignore=shutil.ignore_patterns("models", "eval", "__pycache__")))
