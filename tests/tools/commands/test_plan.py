"""`plan` writes an overlay with which pre-training can start on these scans."""

from __future__ import annotations

from pathlib import Path

import pytest
import yaml
from monai.bundle import ConfigParser

from tools.commands.plan import plan
from tools.data.scans import ScanError
from tools.samples.sample_data import sample_data

BUNDLE = Path(__file__).resolve().parents[3] / "bundles/hybridmim_pretrain"


@pytest.fixture(scope="module")
def scans(tmp_path_factory):
    folder = tmp_path_factory.mktemp("scans")
    for kind in ("spleen", "hippocampus", "brain_mri"):
        sample_data(str(folder / kind), kind, cases=2)
    return folder


@pytest.mark.parametrize(
    ("kind", "small", "scaling", "channels"),
    [("spleen", True, "window", 1), ("spleen", False, "window", 1), ("brain_mri", True, "percentiles", 4)],
)
def test_the_overlay_fits_the_configs(scans, tmp_path, capsys, kind, small, scaling, channels):
    output = tmp_path / "plan.yaml"
    plan(str(scans / kind / "imagesTr"), str(output), small=small, memory_gb=8, workers=0)
    names = ["train", *(["small"] if small else [])]
    files = [BUNDLE / f"configs/{name}.yaml" for name in names]
    overlay = yaml.safe_load(output.read_text())
    known = [*files, BUNDLE / "configs/mri.yaml"]
    assert overlay.keys() <= {key for file in known for key in yaml.safe_load(file.read_text())}
    parser = ConfigParser()
    parser.read_config([*files, output])
    parser.update({"bundle_root": str(BUNDLE), "unet_features": [4, 4, 8, 8, 16, 4]})
    geometry = parser.get_parsed_content("geometry")  # refuses sizes that do not go together
    assert list(geometry.roi_size) == overlay["roi_size"]
    plain = parser.get_parsed_content("prepared").plain()
    assert (plain["spacing"], plain["intensity"]["scaling"]) == (overlay["spacing"], scaling)
    assert parser["in_channels"] == channels
    printed = capsys.readouterr().out
    assert all(
        key.split("_")[0] in printed for key in ("spacing", "roi_size", "intensity", "batch_size", "num_workers")
    )
    assert f"{BUNDLE}/configs/train.yaml" in printed or "bundles/hybridmim_pretrain/configs/train.yaml" in printed


def test_bad_input_is_named_and_leaves_nothing(scans, tmp_path):
    output = tmp_path / "plan.yaml"
    with pytest.raises(ScanError, match=r"found CT \(--modality\), but .*expected Hounsfield units"):
        plan(str(scans / "hippocampus/imagesTr"), str(output), modality="CT", workers=0)
    with pytest.raises(
        ValueError, match=r"memory_gb: found 0.01 GB, expected at least .* for a batch of 2 crop.s. of 64×64×64"
    ):
        plan(str(scans / "spleen/imagesTr"), str(output), memory_gb=0.01, workers=0)
    (tmp_path / "one").mkdir()
    (tmp_path / "one/a.nii").write_text("no scan")
    with pytest.raises(ScanError, match=r"(?s)found 0 usable scans .*expected at least 2.*a\.nii"):
        plan(str(tmp_path / "one"), str(output), workers=0)
    assert not output.exists()


@pytest.mark.slow
def test_pre_training_runs_with_the_overlay(scans, tmp_path, command):
    plan(str(scans / "hippocampus/imagesTr"), str(tmp_path / "plan.yaml"), small=True, memory_gb=8, workers=0)
    files = [str(BUNDLE / f"configs/{name}.yaml") for name in ("train", "small")]
    command(
        *("-m", "monai.bundle", "run", "training", "--config_file", [*files, str(tmp_path / "plan.yaml")]),
        *("--bundle_root", BUNDLE, "--dataset_dir", scans / "hippocampus/imagesTr", "--epochs", 1, "--num_workers", 0),
        *("--unet_features", "[4,4,8,8,16,4]", "--output_dir", tmp_path / "eval", "--ckpt_dir", tmp_path / "models"),
    )
    assert (tmp_path / "models/backbone.json").is_file()
