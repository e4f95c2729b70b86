"""A run that was killed and resumed ends as if nothing had happened."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time

import pytest
import torch
from whole_runs import same

from tools.common.errors import root_cause
from tools.common.tables import read_metrics
from tools.weights.checkpoints import WeightsError
from tools.weights.training_checkpoints import checkpoints, newest_checkpoint

from .bundle import ROOT, TINY, config_files, places

EPOCHS = 6
# a crop of which the decoded box, drawn by Python's own generator, is a part
OPTIONS = {**TINY, "roi_size": [48, 32, 32], "epochs": EPOCHS, "checkpoint_interval": 2}


def start(epoch, scans, folder, workers):
    """Start a training in `folder`, in a process group of its own; return once the row of `epoch` is written."""
    options = {
        **OPTIONS,
        **places(folder),
        "dataset_dir": scans,
        "num_workers": workers,
    }
    line = [sys.executable, "-m", "monai.bundle", "run", "training"]
    line += ["--config_file", str(config_files(["train", "small"]))]
    for name, value in options.items():
        line += [f"--{name}", str(value)]
    process = subprocess.Popen(
        line,
        cwd=ROOT,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        start_new_session=True,
    )
    deadline = time.monotonic() + 300
    while len(read_metrics(folder / "out/metrics.csv")) < epoch:
        assert process.poll() is None, "the training ended before it could be killed"
        assert time.monotonic() < deadline
        time.sleep(0.01)
    return process


def kill_after_epoch(epoch, scans, folder, workers):
    """Start a training in `folder` and end it without warning once the row of `epoch` is written."""
    process = start(epoch, scans, folder, workers)
    process.kill()
    process.communicate()


@pytest.mark.skipif(sys.platform == "win32", reason="no process groups")
@pytest.mark.parametrize(
    ("name", "workers"),
    [
        ("SIGTERM", 2),
        pytest.param("SIGINT", 2, marks=pytest.mark.slow),
        *(pytest.param(name, 0, marks=pytest.mark.slow) for name in ("SIGTERM", "SIGINT", "SIGUSR1", "SIGHUP")),
    ],
)
def test_a_signal_to_all_processes_ends_the_run_with_a_checkpoint(ct_scans, tmp_path, name, workers):
    process = start(1, ct_scans, tmp_path, workers)
    os.killpg(process.pid, getattr(signal, name))  # workers get it, too
    said, errors = process.communicate(timeout=120)
    assert process.returncode == 75
    assert "Error" not in errors and "Traceback" not in errors
    written = newest_checkpoint(tmp_path / "models")
    (line,) = (line for line in said.splitlines() if line.startswith(f"{name}: interrupted in epoch "))
    assert line.endswith(f"; {written} is written: the same command with --resume true continues")


@pytest.mark.skipif(sys.platform == "win32", reason="no process groups")
def test_a_signal_before_the_first_step_ends_with_the_exit_code_that_starts_again(ct_scans, tmp_path):
    process = start(0, ct_scans, tmp_path, 0)
    lock = tmp_path / "out/run.lock"
    while not lock.exists():
        assert process.poll() is None
        time.sleep(0.01)
    time.sleep(0.1)  # it imports, reads scans and builds the network, for seconds
    os.killpg(process.pid, signal.SIGUSR1)
    _, errors = process.communicate(timeout=120)
    assert process.returncode == 75, errors
    assert "SIGUSR1: interrupted while no step was under way: the same command goes on" in errors
    assert "Traceback" not in errors
    assert not lock.exists()


@pytest.mark.parametrize("workers", [pytest.param(0, marks=pytest.mark.slow), 2])
def test_a_killed_and_resumed_run_ends_as_the_uninterrupted_one(run_bundle, workflow, ct_scans, tmp_path, workers):
    whole, killed = tmp_path / "whole", tmp_path / "killed"
    options = {**OPTIONS, "num_workers": workers, "dataset_dir": str(ct_scans)}
    kill_after_epoch(3, ct_scans, killed, workers)
    assert (killed / "models/checkpoint_epoch=2.pt").is_file()
    assert not (killed / f"models/checkpoint_epoch={EPOCHS}.pt").exists()
    done = run_bundle("training", ["train", "small"], **options, **places(killed), resume="true")
    workflow("train", ["train", "small"], **options, **places(whole)).run()
    assert "resumed from" in done.stdout

    rows = read_metrics(whole / "out/metrics.csv")
    assert [int(row["epoch"]) for row in rows] == list(range(1, EPOCHS + 1))
    assert read_metrics(killed / "out/metrics.csv") == rows
    last = [
        torch.load(folder / f"models/checkpoint_epoch={EPOCHS}.pt", weights_only=True) for folder in (whole, killed)
    ]
    (step, *_), (whole_step, *_) = (content.pop("validation").values() for content in last)  # the rest is seconds
    assert step == whole_step == last[0]["trainer"]["iteration"]
    assert same(*last)
    assert same(*(torch.load(f / "models/model.pt", weights_only=True) for f in (whole, killed)))


# -------------------------------------------------------------------------------------------- in this process


@pytest.fixture
def train(workflow, ct_scans):
    def run(**options):
        flow = workflow("train", ["train", "small"], dataset_dir=str(ct_scans), **{**TINY, **options})
        flow.run()
        flow.finalize()
        return flow

    return run


def edit_checkpoint(path, edit):
    content = torch.load(path, weights_only=True)
    edit(content)
    torch.save(content, path)


@pytest.mark.parametrize(("best", "replaced"), [(-1.0, False), (1e9, True)])
def test_only_a_better_validation_replaces_the_best_weights(train, tmp_path, best, replaced):
    train(epochs=2)
    edit_checkpoint(tmp_path / "models/checkpoint_epoch=2.pt", lambda content: content["best"].update(best=best))
    before = {name: (tmp_path / "models" / name).read_bytes() for name in ("model.pt", "backbone.pt")}
    train(epochs=3, resume=True, resume_changed=True)
    assert len(read_metrics(tmp_path / "out/metrics.csv")) == 3
    for name, content in before.items():
        assert ((tmp_path / "models" / name).read_bytes() != content) == replaced


def test_a_resumed_run_keeps_its_seed(train, tmp_path):
    """Continuing with the draws of another seed would be neither of the two runs."""
    train(epochs=2, seed=5)
    flow = train(epochs=3, seed=5, resume=True, resume_changed=True)
    assert flow.parser.get_parsed_content("train#handlers#0").seed == 5
    edit_checkpoint(tmp_path / "models/checkpoint_epoch=3.pt", lambda content: content["random"].update(seed=7))
    flow = train(epochs=4, seed=5, resume=True, resume_changed=True)
    assert flow.parser.get_parsed_content("train#handlers#0").seed == 7


def test_a_finished_run_stays_as_it_is(train, tmp_path):
    train(epochs=2)
    before = (tmp_path / "out/metrics.csv").read_text()
    train(epochs=2, resume=True)
    assert (tmp_path / "out/metrics.csv").read_text() == before


def test_a_run_that_was_killed_while_it_deleted_its_last_checkpoint_but_one_deletes_it_when_resumed(train, tmp_path):
    train(epochs=2, checkpoints_kept=1)
    last = tmp_path / "models/checkpoint_epoch=2.pt"
    last.with_name("checkpoint_epoch=1.pt").write_bytes(last.read_bytes())
    train(epochs=2, checkpoints_kept=1, resume=True)
    assert checkpoints(tmp_path / "models") == [last]


def test_resume_without_a_checkpoint_is_refused(train, tmp_path):
    with pytest.raises(RuntimeError) as error:
        train(resume=True)
    cause = root_cause(error.value)
    assert isinstance(cause, WeightsError)
    assert f"no checkpoint_epoch=N.pt in ckpt_dir {tmp_path / 'models'}" in str(cause)
    assert not (tmp_path / "out/metrics.csv").exists()


@pytest.mark.parametrize(
    ("configs", "options", "words"),
    [
        (
            ["train", "swin_unetr", "small"],
            {},
            [
                *("not the weights of a SwinUNETR", "configs/swin_unetr.yaml"),
                "they look like a UNet (BasicUNet) with 1 input channel(s) and 4 features",
            ],
        ),
        (["train", "small"], {"unet_features": [8, 8, 8, 8, 16, 4]}, ["expected [8, 1, 3, 3, 3]", "[4, 1, 3, 3, 3]"]),
    ],
    ids=["backbone", "size"],
)
def test_resume_from_another_network_is_refused(train, parse, ct_scans, tmp_path, configs, options, words):
    train(epochs=1)
    metrics = (tmp_path / "out/metrics.csv").read_bytes()
    sizes = {**TINY, **options} if options else {}
    parser = parse(configs, dataset_dir=str(ct_scans), resume=True, **sizes)
    with pytest.raises(RuntimeError) as error:
        parser.get_parsed_content("start")
    message = str(root_cause(error.value))
    assert all(part in message for part in [*words, str(tmp_path / "models/checkpoint_epoch=1.pt")]), message
    assert (tmp_path / "out/metrics.csv").read_bytes() == metrics
