"""Every bundle trains, evaluates and segments, with each network, on data laid out as its data set is."""

from __future__ import annotations

import csv
import itertools
import re
import shutil
from pathlib import Path

import nibabel as nib
import numpy as np
import pytest
import torch

from tools.common.errors import root_cause
from tools.common.tables import read_metrics
from tools.data.classes import label_values
from tools.weights.checkpoints import WeightsError

from .bundles import NAMES, ROOT, TINY, TINY_TRAINING, bundle, config_files, places, read, sizes

# of each kind of data (one channel and softmax, four and sigmoid) and of each network; all bundles are of one template
FAST = {("btcv", "unet"), ("brats", "unet"), ("hippocampus", "unetr")}
CASES = [*itertools.product(NAMES, ("unet", "swin_unetr")), ("hippocampus", "unetr"), ("brats", "unetr")]
CASES = [pytest.param(*case, marks=[] if case in FAST else pytest.mark.slow, id="-".join(case)) for case in CASES]


def overlays(network):
    return [] if network == "unet" else [network]


def rows(path):
    with Path(path).open(newline="") as file:
        return list(csv.DictReader(file))


@pytest.mark.parametrize(("name", "network"), CASES)
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


TRAINING = {**TINY_TRAINING, **sizes("hippocampus", "unet"), "epochs": 4}
INFERENCE = {**TINY, **sizes("hippocampus", "unet")}


@pytest.fixture(scope="module")
def trained(run_bundle, samples, tmp_path_factory):
    """A hippocampus run of four epochs, from the command line: its folder, and what it printed."""
    folder = tmp_path_factory.mktemp("trained")
    done = run_bundle(
        *("hippocampus", "training", ["train"]), **TRAINING, **places(folder), dataset_dir=samples("hippocampus")
    )
    return folder, done.stdout + done.stderr


def test_the_start_table_says_what_will_be_done(trained):
    folder, said = trained
    assert "4 for training, 1 for validation" in said
    assert "all training cases; anterior 1, posterior 2" in said
    assert f"written:\n  {places(folder)['ckpt_dir']}/model.pt\n" in said
    assert "BasicUNet" in said and "no file given" in said
    assert "validation, epoch 4: mean_dice" in said and "dice_posterior" in said


def test_tensorboard_holds_the_dice_of_every_class(trained):
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    folder, _ = trained
    events = EventAccumulator(str(folder / "out/validation")).Reload()
    assert {"mean_dice", "dice_anterior", "dice_posterior"} <= set(events.Tags()["scalars"])
    assert len(events.Scalars("dice_anterior")) == 4


def test_evaluation_prints_a_table(trained, run_bundle, samples):
    folder, _ = trained
    done = run_bundle(
        *("hippocampus", "evaluating", ["train", "evaluate"]),
        **{**INFERENCE, **places(folder)},
        dataset_dir=samples("hippocampus"),
        folds=2,  # more than one case to evaluate
    )
    assert "anterior" in done.stdout and "±" in done.stdout and "HD95" in done.stdout


def test_inference_inside_the_bundle_gives_the_same(trained, run_bundle, workflow, samples, tmp_path):
    folder, _ = trained
    options = {**INFERENCE, "dataset_dir": str(samples("hippocampus") / "imagesTr")}
    options["ckpt_path"] = str(folder / "models/model.pt")
    inside, outside = tmp_path / "inside", tmp_path / "outside"
    run_bundle(
        *("hippocampus", "inferring", ["inference"]), cwd=ROOT / bundle("hippocampus"), **options, output_dir=inside
    )
    workflow("hippocampus", "infer", ["inference"], **{**options, "output_dir": str(outside)}).run()
    maps = sorted(p.relative_to(inside) for p in inside.rglob("*_seg.nii.gz"))
    assert len(maps) == 5
    for path in maps:
        np.testing.assert_array_equal(nib.load(inside / path).dataobj, nib.load(outside / path).dataobj)


@pytest.mark.parametrize("bad", [{"class_balance": 2}, {"pretrained_lr_multiplier": "much"}, {"learning_rate": -1}])
def test_what_the_loss_or_the_optimizer_refuses_leaves_the_folders_free(bad, workflow, samples, tmp_path):
    options = {"dataset_dir": str(samples("spleen")), **TINY_TRAINING, "epochs": 1}
    with pytest.raises(RuntimeError) as error:
        workflow("spleen", "train", ["train"], **options, **bad).run()
    assert re.match("{}(:| must).* '?{}'?".format(*next(iter(bad.items()))), str(root_cause(error.value)))
    assert not list(tmp_path.rglob("run.json")) + list(tmp_path.rglob("config.yaml"))


def test_another_network_is_refused_before_any_work(trained, workflow, samples, tmp_path):
    folder, _ = trained
    options = {"dataset_dir": str(samples("hippocampus") / "imagesTr"), "ckpt_path": str(folder / "models/model.pt")}
    with pytest.raises(RuntimeError) as error:
        workflow("hippocampus", "infer", ["inference"], **options).run()
    cause = root_cause(error.value)
    assert isinstance(cause, WeightsError)
    assert "model.json: network: found UNet (in_channels 1, unet_features [4, 4, 8, 8, 16, 4]), expected UNet" in str(
        cause
    )
    assert '--unet_features "[4, 4, 8, 8, 16, 4]"' in str(cause)
    assert not list(tmp_path.rglob("*_seg.nii.gz"))


@pytest.mark.slow
@pytest.mark.parametrize("network", ["unet", "unetr"])  # UNETR leaves parameters without a gradient: DDP must be told
def test_two_processes(network, command, samples, tmp_path):
    options = {
        **{**TINY_TRAINING, **sizes("hippocampus", network), **places(tmp_path), "bundle_root": bundle("hippocampus")},
        "batch_size": 1,
        "folds": 2,  # so that each process has cases to validate
        "dataset_dir": samples("hippocampus"),
        "config_file": config_files("hippocampus", ["train", *overlays(network), "multi_gpu_train"]),
    }
    torchrun = ("-m", "torch.distributed.run", "--standalone", "--nproc_per_node", 2)
    done = command(*torchrun, "-m", "monai.bundle", "run", "training", **options)
    assert done.stdout.count("for validation") == 1  # one of them speaks
    metrics = read_metrics(tmp_path / "out/metrics.csv")
    assert len(metrics) == 2 and all(float(row["val_mean_dice"]) >= 0 for row in metrics)


@pytest.mark.slow  # MONAI's own, as in pre-training
def test_mlflow(samples, workflow, tmp_path):
    mlflow = pytest.importorskip("mlflow")
    workflow(
        *("hippocampus", "train", ["train"]),
        **{**TRAINING, "epochs": 1},
        dataset_dir=str(samples("hippocampus")),
        tracking="mlflow",
        tracking_uri=f"sqlite:///{tmp_path}/mlruns.db",
    ).run()
    client = mlflow.MlflowClient(f"sqlite:///{tmp_path}/mlruns.db")
    (experiment,) = [e for e in client.search_experiments() if e.name != "Default"]
    runs = client.search_runs([experiment.experiment_id])
    assert any({"mean_dice", "dice_anterior"} <= run.data.metrics.keys() for run in runs)
