"""By the real commands: a training that learns its one case by heart, and an evaluation that says so."""

from __future__ import annotations

import csv
import json

import pytest

from tools.common.tables import read_metrics

from .bundles import places

OPTIONS = {
    "unet_features": [8, 8, 16, 16, 32, 8],
    "roi_size": [32, 48, 32],
    "num_workers": 0,
}
EPOCHS = 100


pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def learnt(run_bundle, samples, tmp_path_factory):
    """A UNet trained on one hippocampus, validated and evaluated on the same."""
    folder = tmp_path_factory.mktemp("learnt")
    data = samples("hippocampus")
    image = sorted((data / "imagesTr").glob("*.nii.gz"))[0]
    case = [{"image": f"imagesTr/{image.name}", "label": f"labelsTr/{image.name}"}]
    datalist = folder / "list.json"
    datalist.write_text(json.dumps({"training": case, "validation": case}))
    options = {**OPTIONS, **places(folder), "dataset_dir": data, "datalist": datalist}
    run_bundle(
        *("hippocampus", "training", ["train"]),
        **options,
        epochs=EPOCHS,
        warmup_epochs=3,
        batch_size=1,
        crops_per_volume=2,
        learning_rate=0.02,
        val_interval=EPOCHS // 4,  # steps: one in each epoch
        val_share=1,
        checkpoint_interval=EPOCHS,
    )
    run_bundle("hippocampus", "evaluating", ["train", "evaluate"], **options)
    return folder


def test_dice_rises_over_the_validations(learnt):
    rows = read_metrics(learnt / "out/metrics.csv")
    dice = [float(row["val_mean_dice"]) for row in rows if row["val_mean_dice"]]
    assert len(rows) == EPOCHS and len(dice) == 4
    assert dice[0] < dice[1] < dice[-1]
    assert dice[-1] > dice[0] + 0.2
    loss = [float(row["loss"]) for row in rows]
    assert sum(loss[-5:]) < 0.5 * sum(loss[:5])


def test_one_case_is_learnt_by_heart(learnt):
    with (learnt / "out/evaluation.csv").open(newline="") as file:
        rows = {row["class"]: row for row in csv.DictReader(file)}
    assert rows.keys() == {"anterior", "posterior", "mean"}
    for name, row in rows.items():
        assert float(row["dice_mean"]) > 0.9, (name, row)
        assert float(row["nsd_mean"]) > 0.95 and float(row["hd95_mm_mean"]) <= 2
