"""`backbone.json` says what `backbone.pt` is, and pre-training starts from weights that exist."""

from __future__ import annotations

import json

import pytest
import torch
import yaml
from ignite.engine import Events
from monai.bundle import create_workflow
from phantom import without_figures

from tools.common.cards import digest, read_card, require_own
from tools.common.errors import root_cause
from tools.common.tables import read_metrics

from .bundle import ROOT, TINY, config_files, places

SMALL_VIT = {"vit_hidden_size": 24, "vit_mlp_size": 24, "vit_heads": 2}
OPTIONS = {
    **{**TINY, **SMALL_VIT, "epochs": 3, "warmup_epochs": 1, "spacing": [2.0, 2.0, 2.0]},
    **without_figures(yaml.safe_load((ROOT / config_files(["train"])[0]).read_text())),
}


def training(folder, scans, configs=("train",), **overrides):
    return create_workflow(
        config_file=[str(ROOT / name) for name in config_files(configs)],
        workflow_type="train",
        logging_file=False,
        dataset_dir=str(scans),
        **{**OPTIONS, **places(folder), **overrides},
    )


@pytest.fixture(scope="module")
def run(ct_scans, quiet, tmp_path_factory):
    """Folder of a short run."""
    folder = tmp_path_factory.mktemp("run")
    training(folder, ct_scans).run()
    return folder


def test_the_cards_of_the_best_weights(run):
    rows = read_metrics(run / "out/metrics.csv")
    best = min(rows, key=lambda row: float(row["val_loss"]))
    for name in ("backbone.pt", "model.pt"):
        card = read_card(run / "models" / name)
        require_own(run / "models" / name, card, torch.load(run / "models" / name, weights_only=True))
        assert card["network"] == {"name": "UNet", "in_channels": 1, "unet_features": TINY["unet_features"]}
        assert card["preparation"] == {
            "orientation": "RAS",
            "spacing": [2.0, 2.0, 2.0],
            "intensity": {"scaling": "window", "range": [-1000, 1000], "to": [0.001, 1.0]},
            "foreground_above": 0.25,
        }
        assert card["roi_size"] == TINY["roi_size"] and card["init_from"] is None
        assert (card["scans"], card["epoch"]) == (4, int(best["epoch"]))
        assert card["steps"] == 2 * card["epoch"]  # 4 scans, 2 in a batch
        assert {f"val_{key}": value for key, value in card["metrics"].items()} == {
            key: float(value) for key, value in best.items() if key.startswith("val_")
        }
        assert card["versions"]["torch"] == torch.__version__


METHODS = [
    (
        (),
        {
            "name": "HybridMIM",
            "mask_ratio": 0.4,
            "mask_scheme": "two_level",
            "mask_fill": "zero",
            "weight_loc": 0.01,
            "head_gradient": 1.0,
        },
    ),
    (
        ("swin_unetr", "mri", "published"),
        {"name": "HybridMIM", "mask_fill": "zero", "head_gradient": None, "views": "dropout"},
    ),
    (("mae",), {"name": "MAE", "mask_ratio": 0.75, "mae_decoder_layers": 1}),
    (("simmim",), {"name": "SimMIM", "mask_ratio": 0.75, "token_size": [16, 16, 16]}),
    (("simclr", "vit"), {"name": "SimCLR", "temperature": 0.5, "projection_size": 128}),
]
NETWORKS = {(): "UNet", ("swin_unetr", "mri", "published"): "SwinUNETR"}


@pytest.mark.parametrize(("overlays", "method"), METHODS, ids=["+".join(o) or "train" for o, _ in METHODS])
def test_every_method_and_network_is_named_with_its_keys(overlays, method, parse, ct_scans):
    size = {"roi_size": [64] * 3, "region_size": [32] * 3, "decode_size": [64] * 3} if "swin_unetr" in overlays else {}
    options = {**TINY, **SMALL_VIT, "swin_feature_size": 12, "mae_decoder_size": 12, "mae_decoder_heads": 2, **size}
    parser = parse(["train", *overlays], dataset_dir=str(ct_scans), **options)
    card = json.loads(json.dumps(parser.get_parsed_content("card")))
    assert card["method"] | method == card["method"]
    assert ("mask_ratio" in card["method"]) == ("simclr" not in overlays)
    assert card["network"]["name"] == NETWORKS.get(overlays, "ViT")
    scaling = card["preparation"]["intensity"]["scaling"]
    assert scaling == ("percentiles" if "mri" in overlays else "window")


# ------------------------------------------------------------------------------------------------------- init_from


@pytest.mark.parametrize("file", ["model.pt", "backbone.pt"])
def test_a_run_starts_from_weights_with_a_fresh_schedule(run, ct_scans, quiet, tmp_path, capsys, file):
    flow = training(tmp_path, ct_scans, init_from=str(run / "models" / file), epochs=1, window=[-500, 500])
    began = []

    @flow.parser.get_parsed_content("train#trainer").on(Events.ITERATION_STARTED)
    def look(engine):
        state = {k: v.clone() for k, v in flow.parser.get_parsed_content("network_def").state_dict().items()}
        began.append(
            (engine.state.iteration, engine.optimizer.param_groups[0]["lr"], len(engine.optimizer.state), state)
        )

    flow.run()
    weights, (step, rate, moments, state) = torch.load(run / "models/model.pt", weights_only=True), began[0]
    same = {name for name, tensor in state.items() if torch.equal(tensor, weights[name])}
    heads = {name for name in weights if not name.startswith("backbone.")}
    assert same >= weights.keys() - heads
    assert (heads <= same) == (file == "model.pt")
    assert (step, moments) == (1, 0) and rate == pytest.approx(OPTIONS.get("learning_rate", 1e-4) / 100)
    said = capsys.readouterr().out
    assert f"weights      started from {run / 'models' / file} is UNet" in said
    assert f"6 tensors {'loaded' if file == 'model.pt' else 'new, at random'}" in said
    assert "WARNING      intensity: window [-500, 500] → [0.001, 1.0] here, window [-1000, 1000]" in said
    card = read_card(tmp_path / "models/backbone.pt")
    source = torch.load(run / "models" / file, weights_only=True)
    assert card["init_from"] == {"file": file, "sha256": digest(source)}


def test_starting_and_resuming_together_is_refused(run, parse, ct_scans):
    options = {**TINY, "dataset_dir": str(ct_scans), "init_from": str(run / "models/model.pt"), "resume": "true"}
    with pytest.raises(RuntimeError) as error:
        parse(["train"], **options).get_parsed_content("start")
    assert "init_from: found" in str(root_cause(error.value)) and "together with resume: true" in str(
        root_cause(error.value)
    )


def test_the_weights_of_another_network_are_refused_with_both_named(run, run_bundle, ct_scans, tmp_path):
    """On the command line, as a user meets it."""
    done = run_bundle(
        "training",
        ["train"],
        check=False,
        **{**TINY, **places(tmp_path), "unet_features": [8, 8, 8, 8, 16, 8]},
        dataset_dir=ct_scans,
        init_from=run / "models/backbone.pt",
    )
    assert done.returncode == 1
    error = done.stderr[done.stderr.rindex("WeightsError: ") :]
    assert f"{run / 'models/backbone.pt'} is UNet (in_channels 1, unet_features [4, 4, 8, 8, 16, 4])" in error
    assert '--unet_features "[4, 4, 8, 8, 16, 4]"' in error
    assert "Traceback" not in done.stderr and not (tmp_path / "models").exists()
