"""Tiny scans, and two ways to run the bundle: its command line, and its parser in this process."""

from __future__ import annotations

import sys

import numpy as np
import pytest
import torch
from monai.bundle import ConfigParser, create_workflow

from .bundle import BUNDLE, ROOT, blobs, config_files, hounsfield, places, save_nifti


@pytest.fixture(scope="session")
def ct_scans(tmp_path_factory):
    """Folder of six CT-like scans of about 50×60×50 voxels."""
    folder = tmp_path_factory.mktemp("ct")
    for i in range(6):
        save_nifti(folder / f"ct_{i}.nii.gz", hounsfield(i, (50 + i, 60 - i, 48 + 2 * i)))
    return folder


@pytest.fixture(scope="session")
def mr_scans(tmp_path_factory):
    """Folder of six MR-like scans with two channels, whose intensities differ from scan to scan."""
    folder = tmp_path_factory.mktemp("mr")
    for i in range(6):
        array = (blobs(10 + i, (50, 60 - i, 48), channels=2) * 30 + 100) * 5**i
        save_nifti(folder / f"mr_{i}.nii.gz", array.astype(np.float32))
    return folder


@pytest.fixture(scope="session")
def run_bundle(command):
    """Runs `python -m monai.bundle run ID`, from the repository root unless `cwd` is another folder."""

    def run(run_id, configs, cwd=ROOT, check=True, **overrides):
        if cwd == ROOT:
            overrides = {"bundle_root": BUNDLE, **overrides}
        return command(
            "-m",
            "monai.bundle",
            "run",
            run_id,
            cwd=cwd,
            check=check,
            config_file=config_files(configs, cwd),
            **overrides,
        )

    return run


@pytest.fixture
def parse(tmp_path):
    """Reads configs in this process: `parse(["train", "small"], epochs=1)` gives a parser."""

    def read(configs, **overrides):
        parser = ConfigParser()
        parser.read_config([ROOT / name for name in config_files(configs)])
        parser.read_meta(ROOT / BUNDLE / "configs/metadata.json")
        parser.update({**places(tmp_path), **overrides})
        return parser

    return read


@pytest.fixture
def workflow(tmp_path, monkeypatch):
    """An initialized MONAI workflow in this process: `workflow("train", ["train", "small"], epochs=1).run()`."""

    def create(kind, configs, **overrides):
        return create_workflow(
            config_file=[str(ROOT / name) for name in config_files(configs)],
            workflow_type=kind,
            logging_file=False,  # it would silence the loggers that other tests listen to
            **{**places(tmp_path), **overrides},
        )

    # what a config's `initialize` changes in this process
    monkeypatch.setattr(sys, "excepthook", sys.excepthook)
    state = torch.get_rng_state()
    yield create
    torch.set_rng_state(state)
