"""Every bundle trains, evaluates and segments, with each network, on data laid out as its data set is."""

from __future__ import annotations

import csv
import itertools
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import nibabel as nib
import numpy as np
import pytest
import torch

from tools.common.tables import read_metrics
from tools.data.classes import label_values
from tools.weights.checkpoints import newest_checkpoint

from .bundles import NAMES, ROOT, TINY, TINY_TRAINING, bundle, config_files, places, read, sizes

CASES = [*itertools.product(NAMES, ("unet", "swin_unetr")), ("hippocampus", "unetr"), ("brats", "unetr")]


def overlays(network):
    return [] if network == "unet" else [network]


def rows(path):
    with Path(path).open(newline="") as file:
        return list(csv.DictReader(file))


@pytest.mark.parametrize(("name", "network"), CASES, ids=["-".join(case) for case in CASES])
def test_train_evaluate_infer(name, network, workflow, samples, tmp_path):
    data, where = str(samples(name)), places(tmp_path)
    size = sizes(name, network)
    cached = {"cache": "none"} if network == "swin_unetr" else {}
    overlay = overlays(network)
    workflow(
        name, "train", ["train", *overlay], dataset_dir=data, **{**TINY_TRAINING, "epochs": 1, **size, **cached}
    ).run()
    metrics = read_metrics(tmp_path / "out/metrics.csv")
    classes = read(name, "train")["classes"]
    assert len(metrics) == 1 and float(metrics[0]["loss"]) > 0
    assert {"val_mean_dice", *(f"val_dice_{c}" for c in classes)} <= metrics[0].keys()
    assert (tmp_path / "out/figures/segmentation_epoch=0001.png").stat().st_size > 10_000
    assert torch.load(tmp_path / "models/model.pt", weights_only=True).keys()

    workflow(name, "train", ["train", *overlay, "evaluate"], dataset_dir=data, **{**TINY, **size}).run()
    cases = rows(tmp_path / "out/evaluation_cases.csv")
    assert len(cases) == len(classes)  # one validation case of five
    summary = rows(tmp_path / "out/evaluation.csv")
    assert [row["class"] for row in summary] == [*classes, "mean"]
    assert list((tmp_path / "out/figures/evaluation").glob("worst_*.png"))

    scans = samples(name) / "imagesTr" if (samples(name) / "imagesTr").is_dir() else samples(name)
    one = next(p for p in sorted(scans.rglob("*.nii.gz")))
    only = tmp_path / "scans" / (one.parent.name if name == "brats" else one.name)
    only.parent.mkdir()
    shutil.copytree(one.parent, only) if name == "brats" else shutil.copy(one, only)
    workflow(
        name,
        "infer",
        ["inference", *overlay],
        dataset_dir=str(tmp_path / "scans"),
        output_dir=where["output_dir"],
        ckpt_path=where["ckpt_dir"] + "/model.pt",
        **{**TINY, **size},
    ).run()
    (written,) = (tmp_path / "out").rglob("*_seg.nii.gz")
    label, image = nib.load(written), nib.load(one)
    assert label.shape == image.shape[:3] and label.get_data_dtype() == np.uint8
    np.testing.assert_allclose(label.affine, image.affine, atol=1e-4)
    assert set(np.unique(label.dataobj)) <= {0, *label_values(classes)}


# ----------------------------------------------------------------------------------------------- command line


@pytest.fixture(scope="module")
def trained(run_bundle, samples, tmp_path_factory):
    """A hippocampus run of two epochs, from the command line."""
    folder = tmp_path_factory.mktemp("trained")
    done = run_bundle(
        *("hippocampus", "training", ["train"]),
        **{**TINY_TRAINING, **sizes("hippocampus", "unet"), **places(folder)},
        dataset_dir=samples("hippocampus"),
    )
    return folder, done.stdout + done.stderr


def test_the_start_table_says_what_will_be_done(trained, samples):
    _, said = trained
    assert "4 for training, 1 for validation" in said
    assert "anterior 1, posterior 2" in said
    assert "BasicUNet" in said and "no file given" in said
    assert "validation, epoch 2: mean_dice" in said and "dice_posterior" in said


def test_tensorboard_holds_the_dice_of_every_class(trained):
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    folder, _ = trained
    events = EventAccumulator(str(folder / "out/validation")).Reload()
    assert {"mean_dice", "dice_anterior", "dice_posterior"} <= set(events.Tags()["scalars"])
    assert len(events.Scalars("dice_anterior")) == 2


def test_evaluation_prints_a_table(trained, run_bundle, samples):
    folder, _ = trained
    done = run_bundle(
        *("hippocampus", "evaluating", ["train", "evaluate"]),
        **{**TINY, **sizes("hippocampus", "unet"), **places(folder)},
        dataset_dir=samples("hippocampus"),
        folds=2,  # more than one case to evaluate
    )
    assert "anterior" in done.stdout and "±" in done.stdout and "HD95" in done.stdout


def test_from_inside_the_bundle(trained, run_bundle, samples, tmp_path):
    folder, _ = trained
    options = {**TINY, **sizes("hippocampus", "unet"), "dataset_dir": samples("hippocampus") / "imagesTr"}
    inside, outside = tmp_path / "inside", tmp_path / "outside"
    for cwd, out in ((ROOT / bundle("hippocampus"), inside), (ROOT, outside)):
        run_bundle(
            *("hippocampus", "inferring", ["inference"]),
            cwd=cwd,
            **options,
            output_dir=out,
            ckpt_path=folder / "models/model.pt",
        )
    maps = sorted(p.relative_to(inside) for p in inside.rglob("*_seg.nii.gz"))
    assert len(maps) == 5
    for path in maps:
        np.testing.assert_array_equal(nib.load(inside / path).dataobj, nib.load(outside / path).dataobj)


def test_another_network_is_refused_before_any_work(trained, run_bundle, samples, tmp_path):
    folder, _ = trained
    done = run_bundle(
        *("hippocampus", "inferring", ["inference"]),
        check=False,
        dataset_dir=samples("hippocampus") / "imagesTr",
        output_dir=tmp_path,
        ckpt_path=folder / "models/model.pt",
    )
    assert done.returncode != 0
    last = done.stderr.strip().splitlines()[-1]
    assert "WeightsError" in last and "these are not the weights of a UNet" in last
    assert not list(tmp_path.rglob("*_seg.nii.gz"))


def test_a_killed_run_resumes_and_ends_as_if_it_had_not_been(trained, samples, run_bundle, tmp_path):
    options = {
        **{**TINY_TRAINING, "epochs": 4, **sizes("hippocampus", "unet"), "bundle_root": bundle("hippocampus")},
        "dataset_dir": samples("hippocampus"),
        "config_file": config_files("hippocampus", ["train"]),
    }
    whole, broken = tmp_path / "whole", tmp_path / "broken"
    line = [sys.executable, "-m", "monai.bundle", "run", "training"]
    for name, value in {**options, **places(broken)}.items():
        line += [f"--{name}", str(value)]
    process = subprocess.Popen(
        line, cwd=ROOT, env={**os.environ, "OMP_NUM_THREADS": "1"}, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL
    )
    deadline = time.monotonic() + 200
    while newest_checkpoint(broken / "models") is None and time.monotonic() < deadline:
        time.sleep(0.05)
    process.send_signal(signal.SIGKILL)
    process.wait()
    options.pop("config_file"), options.pop("bundle_root")
    done = run_bundle("hippocampus", "training", ["train"], **options, **places(broken), resume=True)
    assert "resumed from" in done.stdout
    run_bundle("hippocampus", "training", ["train"], **options, **places(whole))
    expected, found = (torch.load(f / "models/model.pt", weights_only=True) for f in (whole, broken))
    for key, tensor in expected.items():
        assert torch.equal(found[key], tensor), key
    assert [r["loss"] for r in read_metrics(broken / "out/metrics.csv")] == [
        r["loss"] for r in read_metrics(whole / "out/metrics.csv")
    ]


@pytest.mark.parametrize("network", ["unet", "unetr"])
def test_two_processes(network, command, samples, tmp_path):
    options = {
        **{**TINY_TRAINING, **sizes("hippocampus", network), **places(tmp_path), "bundle_root": bundle("hippocampus")},
        "batch_size": 1,
        "folds": 2,  # so that each process has cases to validate
        "dataset_dir": samples("hippocampus"),
        "config_file": config_files("hippocampus", ["train", *overlays(network), "multi_gpu_train"]),
    }
    done = command(
        *(
            "-m",
            "torch.distributed.run",
            "--standalone",
            "--nproc_per_node",
            2,
            "-m",
            "monai.bundle",
            "run",
            "training",
        ),
        **options,
    )
    assert done.stdout.count("for validation") == 1  # one of them speaks
    metrics = read_metrics(tmp_path / "out/metrics.csv")
    assert len(metrics) == 2 and all(float(row["val_mean_dice"]) >= 0 for row in metrics)


def test_mlflow(samples, run_bundle, tmp_path):
    mlflow = pytest.importorskip("mlflow")
    run_bundle(
        *("hippocampus", "training", ["train"]),
        **{**TINY_TRAINING, "epochs": 1, **sizes("hippocampus", "unet"), **places(tmp_path)},
        dataset_dir=samples("hippocampus"),
        tracking="mlflow",
        tracking_uri=f"sqlite:///{tmp_path}/mlruns.db",
    )
    client = mlflow.MlflowClient(f"sqlite:///{tmp_path}/mlruns.db")
    (experiment,) = [e for e in client.search_experiments() if e.name != "Default"]
    runs = client.search_runs([experiment.experiment_id])
    assert any({"mean_dice", "dice_anterior"} <= run.data.metrics.keys() for run in runs)
