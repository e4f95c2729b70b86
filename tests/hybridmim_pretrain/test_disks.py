"""Disks that fail in the middle of a training: what is said, and that the run goes on once they are mended."""

from __future__ import annotations

import shutil
import subprocess
from contextlib import suppress

import pytest
import torch
from ignite.engine import Events
from whole_runs import same

from tools.common.tables import read_metrics
from tools.weights.training_checkpoints import newest_checkpoint

from .bundle import TINY, places
from .test_resume import EPOCHS, OPTIONS, start


def mount(*arguments):
    if shutil.which("mount") is None:
        pytest.skip("needs mount")
    done = subprocess.run(["mount", *map(str, arguments)], capture_output=True, text=True)
    if done.returncode:
        pytest.skip(f"needs the right to mount a file system: {done.stderr.strip()}")


@pytest.fixture
def disk(tmp_path):
    """A file system of 20 MB."""
    place = tmp_path / "disk"
    place.mkdir()
    mount("-t", "tmpfs", "-o", "size=20m", "tmpfs", place)
    yield place
    subprocess.run(["umount", "-R", "-l", place], check=True)


class Full:
    """No byte is left."""

    said = ("No space left on device", "0 B are free")

    def __init__(self, folder):
        self.ballast = folder / "ballast"
        with suppress(OSError), self.ballast.open("wb", buffering=0) as file:
            while True:
                file.write(bytes(4096))

    def mend(self):
        self.ballast.unlink()


class ReadOnly:
    """The folder of the checkpoints cannot be written to."""

    said = ("Read-only file system", "free")

    def __init__(self, folder):
        self.place = folder / "models"
        mount("--bind", self.place, self.place)
        mount("-o", "remount,ro,bind", self.place)

    def mend(self):
        subprocess.run(["umount", "-l", self.place], check=True)


@pytest.mark.slow
@pytest.mark.parametrize("fault", [Full, ReadOnly])
def test_a_disk_that_fails_costs_no_more_than_the_steps_since_the_last_checkpoint(
    run_bundle, workflow, ct_scans, disk, tmp_path, fault
):
    process = start(3, ct_scans, disk, 0)
    failing = fault(disk)
    _, errors = process.communicate(timeout=120)
    assert process.returncode == 1, errors
    last = errors.rstrip().splitlines()[-1]
    assert all(words in last for words in fault.said), errors
    assert str(disk) in last
    assert newest_checkpoint(disk / "models").name == "checkpoint_epoch=2.pt"  # by its checksums, it is whole

    failing.mend()
    options = {**OPTIONS, "num_workers": 0, "dataset_dir": str(ct_scans)}
    run_bundle("training", ["train", "small"], **options, **places(disk), resume="true")
    whole = tmp_path / "whole"
    workflow("train", ["train", "small"], **options, **places(whole)).run()
    assert read_metrics(disk / "out/metrics.csv") == read_metrics(whole / "out/metrics.csv")
    weights = [torch.load(folder / "models/model.pt", weights_only=True) for folder in (whole, disk)]
    assert same(*weights)
    assert newest_checkpoint(disk / "models").name == f"checkpoint_epoch={EPOCHS}.pt"


@pytest.mark.slow
def test_a_cache_that_is_deleted_while_it_is_used_is_built_again(workflow, ct_scans, tmp_path):
    options = {**TINY, "dataset_dir": str(ct_scans), "epochs": 3, "cache": "disk"}
    whole, deleted = tmp_path / "whole", tmp_path / "deleted"
    workflow("train", ["train", "small"], **options, **places(whole)).run()
    flow = workflow("train", ["train", "small"], **options, **places(deleted))
    trainer = flow.parser.get_parsed_content("train#trainer")
    trainer.add_event_handler(Events.EPOCH_COMPLETED(once=1), lambda: shutil.rmtree(deleted / "out/cache"))
    flow.run()
    assert any((deleted / "out/cache").rglob("*"))
    assert read_metrics(deleted / "out/metrics.csv") == read_metrics(whole / "out/metrics.csv")
