"""Sample data in the layout of each data set, and two ways to run a bundle: command line, and in this process."""

from __future__ import annotations

import sys
from functools import cache

import pytest
import torch
from monai.bundle import ConfigParser, create_workflow

from tools.samples.sample_data import sample_data

from .bundles import ROOT, bundle, config_files, places


@pytest.fixture(scope="session")
def samples(tmp_path_factory):
    """`samples("btcv")`: folder of five synthetic cases laid out as the data set is."""

    @cache
    def make(name):
        folder = tmp_path_factory.mktemp(name)
        sample_data(str(folder), name, cases=5)
        return folder

    return make


@pytest.fixture(scope="session")
def run_bundle(command):
    """Runs `python -m monai.bundle run ID` of a bundle, from the repository's root unless `cwd` is another folder."""

    def run(name, run_id, configs, cwd=ROOT, check=True, **overrides):
        if cwd == ROOT:
            overrides = {"bundle_root": bundle(name), **overrides}
        files = config_files(name, configs, cwd)
        return command("-m", "monai.bundle", "run", run_id, cwd=cwd, check=check, config_file=files, **overrides)

    return run


@pytest.fixture
def parse(tmp_path):
    """Reads configs in this process: `parse("btcv", ["train", "small"], epochs=1)` gives a parser."""

    def read(name, configs, **overrides):
        parser = ConfigParser()
        parser.read_config([ROOT / file for file in config_files(name, configs)])
        parser.read_meta(ROOT / bundle(name) / "configs/metadata.json")
        parser.update({"bundle_root": str(ROOT / bundle(name)), **places(tmp_path), **overrides})
        return parser

    return read


@pytest.fixture
def workflow(tmp_path, monkeypatch):
    """An initialized MONAI workflow in this process: `workflow("btcv", "train", ["train", "small"]).run()`."""

    def create(name, kind, configs, **overrides):
        folder = ROOT / bundle(name)
        return create_workflow(
            config_file=[str(ROOT / file) for file in config_files(name, configs)],
            meta_file=str(folder / "configs/metadata.json"),
            workflow_type=kind,
            logging_file=False,  # it would silence the loggers that other tests listen to
            **{"bundle_root": str(folder), **places(tmp_path), **overrides},
        )

    monkeypatch.setattr(sys, "excepthook", sys.excepthook)  # what a config's `initialize` changes in this process
    state = torch.get_rng_state()
    yield create
    torch.set_rng_state(state)
