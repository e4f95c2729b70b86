"""Two processes on CPUs (gloo): the same training as with one, shared between them."""

from __future__ import annotations

import json
import os
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch

from tools.common.tables import read_metrics
from tools.weights.training_checkpoints import newest_checkpoint

from .bundle import BUNDLE, ROOT, TINY, config_files, hounsfield, places, save_nifti

TORCHRUN = ("-m", "torch.distributed.run", "--standalone", "--nproc_per_node", 2)
EPOCHS = 2


@pytest.fixture(scope="module")
def ranks(command, ct_scans, tmp_path_factory):
    """A folder, and what each of two processes writes there.

    Four scans for training, and three for validation, so that one process has more batches than the other.
    """
    folder = tmp_path_factory.mktemp("train")
    extra = save_nifti(folder / "scans/ct_6.nii.gz", hounsfield(6, (40, 50, 44)))
    scans = [*sorted(map(str, ct_scans.iterdir())), str(extra)]
    (folder / "list.json").write_text(json.dumps({"training": scans[:4], "validation": scans[4:]}))
    command(*TORCHRUN, Path(__file__).with_name("two_processes.py"), folder, folder / "list.json")
    return folder, [torch.load(folder / f"rank={rank}.pt", weights_only=True) for rank in (0, 1)]


def test_contrastive_loss_of_two_processes_is_that_of_the_joint_batch(ranks):
    for rank in ranks[1]:
        joint, alone, split = (rank[kind] for kind in ("joint", "alone", "split"))
        assert split["losses"]["loss_cl"] == pytest.approx(joint["losses"]["loss_cl"], rel=1e-5)
        assert abs(alone["losses"]["loss_cl"] - joint["losses"]["loss_cl"]) > 0.1  # two negatives, not six


def test_gradients_of_two_processes_are_those_of_the_joint_batch(ranks):
    for rank in ranks[1]:
        joint, alone, split = (rank[kind]["gradients"] for kind in ("joint", "alone", "split"))
        assert joint.keys() == split.keys()
        largest = max(float(gradient.abs().max()) for gradient in joint.values())
        for name, expected in joint.items():
            torch.testing.assert_close(split[name], expected, atol=1e-5 * largest, rtol=1e-3)
        weight = "network_def.projection.weight"
        assert not torch.allclose(alone[weight], joint[weight], rtol=0.1)  # the comparison can fail


def seen(ranks, kind, epoch):
    """The scans that each process worked on."""
    return [[name for k, e, names, _ in rank["seen"] if (k, e) == (kind, epoch) for name in names] for rank in ranks[1]]


@pytest.mark.parametrize("epoch", [1, 2, 3])
def test_scans_are_shared_without_overlap(ranks, epoch):
    first, second = seen(ranks, "training", epoch)
    assert len(first) == len(second) == 2
    assert {*first, *second} == {f"ct_{n}.nii.gz" for n in range(4)}
    first, second = seen(ranks, "validation", epoch)
    assert sorted(first + second) == [f"ct_{n}.nii.gz" for n in range(4, 7)]


def test_scans_are_shared_anew_in_each_epoch(ranks):
    assert len({frozenset(seen(ranks, "training", epoch)[0]) for epoch in (1, 2, 3)}) > 1


def test_losses_are_averaged_over_the_processes(ranks):
    folder, results = ranks
    rows = read_metrics(folder / "out/metrics.csv")
    assert len(rows) == 3
    for row in rows:
        losses = [
            [loss for kind, epoch, _, loss in rank["seen"] if (kind, epoch) == ("training", int(row["epoch"]))]
            for rank in results
        ]
        assert losses[0] != losses[1]
        assert float(row["loss"]) == pytest.approx(sum(map(sum, losses)) / 4, rel=1e-4)


def test_the_processes_end_with_the_same_weights(ranks):
    first, second = (rank["weights"] for rank in ranks[1])
    assert all(torch.equal(first[name], second[name]) for name in first)


# --------------------------------------------------------------------------------------------- the command itself


@pytest.fixture(scope="module")
def trained(command, ct_scans, tmp_path_factory):
    folder = tmp_path_factory.mktemp("torchrun")
    done = command(
        *(*TORCHRUN, "-m", "monai.bundle", "run", "training"),
        config_file=config_files(["train", "small", "multi_gpu_train"]),
        bundle_root=BUNDLE,
        dataset_dir=ct_scans,
        output_dir=folder / "out",
        ckpt_dir=folder / "models",
        epochs=EPOCHS,
        **TINY,
    )
    return folder, done


def test_only_one_process_writes(trained):
    folder, done = trained
    assert done.stdout.count("4 for training, 2 for validation") == 1
    assert "2 in a batch of each of 2 process(es)" in done.stdout
    assert done.stdout.count("validation, epoch 1:") == 1
    assert len(read_metrics(folder / "out/metrics.csv")) == EPOCHS
    for place in (folder / "out", folder / "out/validation"):
        assert len(list(place.glob("events.out.tfevents.*"))) == 1
    written = {path.name for path in (folder / "models").iterdir()}
    checkpoints = {"checkpoint_epoch=1.pt", "checkpoint_epoch=2.pt", "run.json"}
    assert written == {"model.pt", "model.json", "backbone.pt", "backbone.json"} | checkpoints
    assert not list(folder.rglob(".*"))  # no temporary file left


def test_metrics_are_reduced_over_the_processes(trained, workflow, ct_scans, tmp_path):
    """One process that evaluates the same weights on both validation scans finds the same."""
    folder, _ = trained
    flow = workflow(
        "train",
        ["train", "small", "evaluate"],
        # one scan in a batch, as in each of two processes: batches of another size are rounded differently
        **{**TINY, "batch_size": 1},
        dataset_dir=str(ct_scans),
        ckpt_path=str(folder / "models/model.pt"),
    )
    flow.run()
    (alone,) = read_metrics(tmp_path / "out/evaluation.csv")
    best = min(read_metrics(folder / "out/metrics.csv"), key=lambda row: float(row["val_loss"]))
    for name in ("masked_mse", "mean_mse", "psnr", "number_accuracy", "number_majority", "location_auroc"):
        assert float(best[f"val_{name}"]) == pytest.approx(float(alone[name]), rel=1e-4), name
    assert float(best["val_retrieval_chance"]) == pytest.approx(1 / 3, rel=1e-4)  # four views of two crops


@pytest.mark.skipif(sys.platform == "win32", reason="SIGTERM ends a process there")
def test_a_signal_to_one_process_ends_both_with_a_checkpoint(ct_scans, tmp_path):
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = str(free.getsockname()[1])
    options = {**TINY, **places(tmp_path), "dataset_dir": ct_scans, "epochs": 1000, "val_interval": 1000}
    line = [sys.executable, "-m", "monai.bundle", "run", "training"]
    line += ["--config_file", str(config_files(["train", "small", "multi_gpu_train"]))]
    line += [part for name, value in options.items() for part in (f"--{name}", str(value))]
    group = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port, "WORLD_SIZE": "2", "OMP_NUM_THREADS": "1"}
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.STDOUT, "text": True}
    two = [
        subprocess.Popen(line, cwd=ROOT, env={**os.environ, **group, "RANK": rank, "LOCAL_RANK": rank}, **pipes)
        for rank in "01"
    ]
    try:
        deadline = time.monotonic() + 120
        while len(read_metrics(tmp_path / "out/metrics.csv")) < 2:
            assert all(process.poll() is None for process in two) and time.monotonic() < deadline
            time.sleep(0.05)
        two[1].send_signal(signal.SIGTERM)
        said = [process.communicate(timeout=60)[0] for process in two]
    finally:
        for process in two:
            process.kill()
    assert [process.returncode for process in two] == [75, 75], said
    written = newest_checkpoint(tmp_path / "models")
    assert [f"; {written} is written" in text for text in said] == [True, False]
