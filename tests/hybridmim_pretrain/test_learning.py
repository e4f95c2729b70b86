"""Pre-training learns: each level leaves chance behind within a few dozen steps."""

from __future__ import annotations

import math

import numpy as np
import pytest
from scipy.ndimage import gaussian_filter

from tools.handlers import read_metrics

from .bundle import save_nifti

CROPS = 8  # in a batch


@pytest.fixture(scope="module")
def smooth_scans(tmp_path_factory):
    """24 scans of structures larger than a patch, so that what is masked can be guessed from around it."""
    folder = tmp_path_factory.mktemp("smooth")
    for n in range(24):
        volume = gaussian_filter(np.random.default_rng(n).standard_normal((52, 52, 52)), 6)
        save_nifti(folder / f"smooth_{n:02}.nii.gz", (volume / volume.std() * 400 - 100).astype(np.int16))
    return folder


def test_reconstruction_and_contrast_leave_chance_behind(workflow, smooth_scans, tmp_path):
    flow = workflow(
        "train",
        ["train", "small"],
        dataset_dir=str(smooth_scans),
        unet_features=[8, 8, 16, 32, 128, 8],
        roi_size=[48, 48, 48],
        decode_size=[48, 48, 48],
        batch_size=CROPS,
        val_fraction=1 / 3,
        val_interval=8,
        epochs=8,
        learning_rate=0.006,
    )
    flow.run()
    rows = read_metrics(tmp_path / "out/metrics.csv")
    last = {name: float(value) for name, value in rows[-1].items()}
    assert flow.trainer.state.iteration == 16

    # all terms, in training
    assert last["loss_pr"] < 0.6 * float(rows[0]["loss_pr"])
    assert last["loss_cl"] < 0.8 * math.log(2 * CROPS - 1)  # chance

    # scans that were not trained on
    assert last["val_masked_mse"] < 0.7 * last["val_mean_mse"]
    assert last["val_retrieval_chance"] == pytest.approx(1 / (2 * 8 - 1), rel=1e-4)
    assert last["val_retrieval_accuracy"] > 5 * last["val_retrieval_chance"]


def test_region_heads_learn_to_tell_masked_patches(workflow, smooth_scans, tmp_path):
    """With patches that can be seen at the bottleneck, one to a region, the region level is easy."""
    sizes = {"roi_size": [32] * 3, "region_size": [32] * 3, "patch_size": [16] * 3, "decode_size": [32] * 3}
    flow = workflow(
        "train",
        ["train", "small"],
        dataset_dir=str(smooth_scans),
        unet_features=[8, 8, 16, 32, 64, 8],
        **sizes,
        batch_size=CROPS,
        crops_per_volume=2,
        val_fraction=1 / 3,
        val_interval=12,
        epochs=12,
        learning_rate=0.006,
        weight_cl=0,
        weight_num=1,
        weight_loc=1,
    )
    flow.run()
    last = {name: float(value) for name, value in read_metrics(tmp_path / "out/metrics.csv")[-1].items()}
    print(last)
    assert last["val_location_auroc"] > 0.7
