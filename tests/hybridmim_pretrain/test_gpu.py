"""Pre-training on a GPU, in mixed precision: it trains, resumes and exports."""

from __future__ import annotations

import pytest
import torch

from scripts.backbones import UNetBackbone
from scripts.hybridmim import HybridMIM
from scripts.masking import Geometry
from tools.common.tables import read_metrics

from .bundle import BUNDLE, TINY, TINY_INFERENCE, config_files

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
SWIN = {"roi_size": [64] * 3, "region_size": [32] * 3, "patch_size": [16] * 3, "decode_size": [64] * 3}


@pytest.mark.parametrize("overlays", [(), ("swin_unetr",), ("simclr",), ("published",)], ids="+".join)
def test_it_trains_and_resumes(run_bundle, ct_scans, tmp_path, overlays):
    options = {**TINY, "warmup_epochs": 0, "dataset_dir": ct_scans, "swin_feature_size": 12}
    options |= SWIN if "swin_unetr" in overlays else {}
    options |= {"output_dir": tmp_path / "out", "ckpt_dir": tmp_path / "models"}
    run_bundle("training", ["train", *overlays], epochs=2, **options)
    run_bundle("training", ["train", *overlays], epochs=3, resume="true", resume_changed="true", **options)
    rows = read_metrics(tmp_path / "out/metrics.csv")
    assert [row["epoch"] for row in rows] == ["1", "2", "3"]
    weights = torch.load(tmp_path / "models/backbone.pt", weights_only=True)
    assert all(tensor.isfinite().all() for tensor in weights.values())


def test_an_exported_network_computes_the_same_on_the_gpu(command, tmp_path):
    geometry = Geometry(*(TINY[key] for key in ("roi_size", "region_size", "patch_size", "decode_size")), stride=16)
    network = HybridMIM(UNetBackbone(1, TINY["unet_features"]), geometry).eval()
    torch.save(network.state_dict(), tmp_path / "model.pt")
    options = {"bundle_root": BUNDLE, "config_file": config_files(["inference"]), **TINY_INFERENCE}
    paths = {"ckpt_file": tmp_path / "model.pt", "filepath": tmp_path / "model.ts"}
    command("-m", "monai.bundle", "ckpt_export", net_id="network_def", **paths, **options)
    image = torch.rand(1, 1, 32, 32, 32)
    with torch.no_grad():
        found = torch.jit.load(tmp_path / "model.ts", map_location="cuda")(image.cuda()).cpu()
        torch.testing.assert_close(found, network(image), atol=5e-3, rtol=0)  # TF32 in convolutions
