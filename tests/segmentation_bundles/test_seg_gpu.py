"""The segmentation bundles on a GPU, in mixed precision: they train, resume, segment and export."""

from __future__ import annotations

import nibabel as nib
import numpy as np
import pytest
import torch

from tools.common.tables import read_metrics

from .bundles import NAMES, TINY, TINY_TRAINING, bundle, config_files, places, sizes

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")


@pytest.mark.parametrize("network", ["unet", "swin_unetr"])
@pytest.mark.parametrize("name", NAMES)
def test_it_trains(run_bundle, samples, tmp_path, name, network):
    """Two steps or more."""
    overlays = [] if network == "unet" else [network]
    options = {**TINY_TRAINING, **sizes(name, network), **places(tmp_path), "epochs": 1}
    run_bundle(name, "training", ["train", *overlays], dataset_dir=samples(name), **options)
    (row,) = read_metrics(tmp_path / "out/metrics.csv")
    assert np.isfinite(float(row["loss"])) and 0 <= float(row["val_mean_dice"]) <= 1


@pytest.mark.parametrize("network", ["unet", "swin_unetr"])
def test_it_resumes_segments_and_exports(run_bundle, command, samples, tmp_path, network):
    name, overlays = "hippocampus", [] if network == "unet" else [network]
    shape = {**sizes(name, network), **places(tmp_path)}
    for epochs, resume in ((1, "false"), (2, "true")):
        options = {**TINY_TRAINING, **shape, "epochs": epochs, "resume": resume, "resume_changed": resume}
        run_bundle(name, "training", ["train", *overlays], dataset_dir=samples(name), **options)
    assert [row["epoch"] for row in read_metrics(tmp_path / "out/metrics.csv")] == ["1", "2"]

    weights = tmp_path / "models/model.pt"
    scans = samples(name) / "imagesTr"
    window = {**TINY, "roi_size": shape["roi_size"]}
    options = {**window, "output_dir": tmp_path / "labels", "ckpt_path": weights}
    run_bundle(name, "inferring", ["inference", *overlays], dataset_dir=scans, **options)
    scan = nib.load(next(scans.iterdir()))
    (label, *_) = (path for path in (tmp_path / "labels").rglob("*.nii.gz") if path.name.startswith(stem(scan)))
    assert nib.load(label).shape == scan.shape[:3]

    paths = {"ckpt_file": weights, "filepath": tmp_path / "model.ts"}
    options = {"bundle_root": bundle(name), "config_file": config_files(name, ["inference", *overlays]), **window}
    if network == "swin_unetr":
        options |= {"use_trace": "True", "input_shape": [1, 1, *shape["roi_size"]]}
    command("-m", "monai.bundle", "ckpt_export", net_id="network_def", **paths, **options)
    image = torch.rand(1, 1, *shape["roi_size"], device="cuda")
    assert torch.jit.load(tmp_path / "model.ts", map_location="cuda")(image).isfinite().all()


def stem(scan: nib.Nifti1Image) -> str:
    """Name of a scan without its endings."""
    return str(scan.get_filename()).rpartition("/")[2].split(".")[0]
