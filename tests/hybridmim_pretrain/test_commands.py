"""The command line that a user types, in processes of their own: train, evaluate, infer, export, track."""

from __future__ import annotations

import json
import shutil
import sqlite3

import nibabel as nib
import numpy as np
import onnxruntime
import pytest
import torch
from monai.bundle import ckpt_export, create_workflow
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from scripts.backbones import SwinUNETRBackbone, UNetBackbone
from scripts.hybridmim import HybridMIM
from scripts.masking import Geometry
from tools.common.tables import read_metrics

from .bundle import BUNDLE, ROOT, TINY, TINY_INFERENCE, config_files, hounsfield, places, save_nifti

TERMS = ["loss", "loss_pr", "loss_num", "loss_loc", "loss_con", "loss_cl"]
METRICS = ["masked_mse", "mean_mse", "psnr", "number_accuracy", "number_majority", "location_accuracy"]
METRICS += ["location_majority", "location_auroc", "retrieval_accuracy", "retrieval_chance"]
FEATURES = [f"{factor}_variance_{stride}" for stride in (1, 2, 4, 8, 16) for factor in ("scan", "mask")]
METRICS += [*FEATURES, "scan_retrieval", "mask_retrieval", "scan_mask_chance"]
EPOCHS = 3


@pytest.fixture(scope="module")
def trained(run_bundle, ct_scans, tmp_path_factory):
    """A run from the repository root: its folder, and what it printed."""
    folder = tmp_path_factory.mktemp("trained")
    done = run_bundle(
        "training",
        ["train", "small"],
        dataset_dir=ct_scans,
        output_dir=folder / "out",
        ckpt_dir=folder / "models",
        epochs=EPOCHS,
        **TINY,
    )
    return folder, done


@pytest.fixture(scope="module")
def network(trained):
    """The network of that run, with its best weights."""
    size = {key: TINY[key] for key in ("roi_size", "region_size", "patch_size", "decode_size")}
    network = HybridMIM(UNetBackbone(1, TINY["unet_features"]), Geometry(**size, stride=16))
    network.load_state_dict(torch.load(trained[0] / "models/model.pt", weights_only=True), strict=True)
    return network.eval()


# ------------------------------------------------------------------------------------------------------ training


def test_training_says_what_it_does(trained):
    printed = trained[1].stdout
    assert "4 for training, 2 for validation" in printed
    assert "32×32×32, 2 in a batch of each of 1 process(es)" in printed
    assert "new, at random" in printed
    written = (f"models/{name}.pt" for name in ("model", "backbone"))
    assert "\n  ".join(["written:", *(str(trained[0] / name) for name in written)]) in printed
    for epoch in range(1, EPOCHS + 1):
        assert f"validation, epoch {epoch}: loss " in printed
    assert f"epoch {EPOCHS}/{EPOCHS}: 100%" in trained[1].stderr  # the progress bar
    assert "loss_cl=" in trained[1].stderr


def test_training_writes_one_row_of_metrics_per_epoch(trained):
    rows = read_metrics(trained[0] / "out/metrics.csv")
    names = [*TERMS, *METRICS]
    assert list(rows[0]) == ["epoch", *TERMS, *(f"val_{name}" for name in names)]
    assert [row["epoch"] for row in rows] == [str(epoch) for epoch in range(1, EPOCHS + 1)]
    assert np.isfinite([[float(value) for value in row.values()] for row in rows]).all()


def test_training_writes_pictures_and_tensorboard_events(trained):
    out = trained[0] / "out"
    pictures = sorted(path.name for path in (out / "figures").iterdir())
    kinds = ("features", "reconstruction")
    assert pictures == [f"{kind}_epoch={epoch:04d}.png" for kind in kinds for epoch in range(1, EPOCHS + 1)]
    assert all(path.read_bytes()[:4] == b"\x89PNG" for path in (out / "figures").iterdir())

    # two curves of one name, which TensorBoard shows beside each other because their folders differ
    training, validation = scalars(out), scalars(out / "validation")
    assert set(TERMS) <= set(training)
    assert [event.step for event in training["loss_cl"]] == list(range(1, EPOCHS * 2 + 1))
    assert {*TERMS, *METRICS} <= set(validation)
    rows = read_metrics(out / "metrics.csv")
    assert [event.step for event in validation["loss"]] == list(range(1, EPOCHS + 1))
    found = [event.value for event in validation["loss"]]
    assert found == pytest.approx([float(row["val_loss"]) for row in rows], rel=1e-4)


def scalars(folder):
    """The curves in the one event file of a folder."""
    (path,) = folder.glob("events.out.tfevents.*")
    events = EventAccumulator(str(path)).Reload()
    return {tag: events.Scalars(tag) for tag in events.Tags()["scalars"]}


def test_training_writes_checkpoints_that_hold_no_code(trained):
    models = trained[0] / "models"
    written = {path.name for path in models.iterdir()}
    kept = {f"checkpoint_epoch={epoch}.pt" for epoch in (EPOCHS - 1, EPOCHS)}
    assert written == {"model.pt", "model.json", "backbone.pt", "backbone.json", "run.json"} | kept
    weights = (name for name in written if name.endswith(".pt"))
    content = {name: torch.load(models / name, weights_only=True) for name in weights}
    last = content[f"checkpoint_epoch={EPOCHS}.pt"]
    assert set(last) == {"model", "optimizer", "lr_scheduler", "trainer", "random", "best", "validation"}
    assert set(last["model"]) == set(content["model.pt"])
    losses = [float(row["val_loss"]) for row in read_metrics(trained[0] / "out/metrics.csv")]
    assert last["best"]["best"] == pytest.approx(min(losses), rel=1e-4)


def test_the_written_config_runs_again_and_gives_the_same(trained, workflow, tmp_path):
    create_workflow(
        config_file=str(trained[0] / "out/config.yaml"),
        workflow_type="train",
        logging_file=False,
        **places(tmp_path),
    ).run()
    assert read_metrics(tmp_path / "out/metrics.csv") == read_metrics(trained[0] / "out/metrics.csv")


def test_mlflow_gets_the_losses(workflow, ct_scans, tmp_path):
    pytest.importorskip("mlflow")
    flow = workflow("train", ["train", "small"], dataset_dir=str(ct_scans), tracking="mlflow", **{**TINY, "epochs": 1})
    flow.run()
    flow.finalize()
    (store,) = (tmp_path / "out").glob("*.db")
    with sqlite3.connect(store) as database:
        runs = dict(database.execute("select run_uuid, status from runs"))
        metrics = list(database.execute("select run_uuid, key, value from metrics"))
    assert len(runs) == 1
    assert {run for run, _, _ in metrics} == set(runs)
    keys = {key for _, key, _ in metrics}
    assert any("loss" in key for key in keys)
    assert any("masked_mse" in key for key in keys)


# ---------------------------------------------------------------------------------------- evaluation and inference


def test_evaluation_inside_the_bundle_repeats_the_best_validation(trained, run_bundle, ct_scans, tmp_path):
    """Without the options that say where things are."""
    inside = tmp_path / "copy"
    shutil.copytree(ROOT / BUNDLE, inside, ignore=shutil.ignore_patterns("models", "eval", "__pycache__"))
    shutil.copytree(trained[0] / "models", inside / "models")
    done = run_bundle("evaluating", ["train", "small", "evaluate"], cwd=inside, dataset_dir=ct_scans, **TINY)
    best = min(read_metrics(trained[0] / "out/metrics.csv"), key=lambda row: float(row["val_loss"]))
    (found,) = read_metrics(inside / "eval/evaluation.csv")
    for name in ("loss_pr", "masked_mse", "mean_mse", "number_accuracy", "location_auroc"):
        assert float(found[name]) == pytest.approx(float(best[f"val_{name}"]), rel=1e-4), name
        assert f"{name} " in done.stdout
    pictures = {path.name for path in (inside / "eval/figures/evaluation").iterdir()}
    assert pictures == {f"{kind}_epoch=0001.png" for kind in ("features", "reconstruction")}
    assert not (inside / "eval/metrics.csv").exists()


ORIENTATIONS = {"ras": "RAS", "lps": "LPS", "psr": "PSR", "ila": "ILA"}


@pytest.fixture(scope="module")
def turned_scans(tmp_path_factory):
    """The same volume in files of different orientation, and an oblique one with another spacing."""
    folder = tmp_path_factory.mktemp("turned")
    volume = hounsfield(20, (52, 40, 37))
    for name, orientation in ORIENTATIONS.items():
        save_nifti(folder / f"{name}.nii.gz", volume, (0.8, 0.8, 3), orientation)
    affine = np.diag((1.5, 0.7, 2, 1.0))
    turn = np.deg2rad(10)
    affine[:2, :2] = np.array([[np.cos(turn), -np.sin(turn)], [np.sin(turn), np.cos(turn)]]) @ affine[:2, :2]
    nib.save(nib.Nifti1Image(volume, affine), folder / "oblique.nii.gz")
    return folder


@pytest.fixture(scope="module")
def inferred(trained, run_bundle, turned_scans, tmp_path_factory):
    folder = tmp_path_factory.mktemp("inferred")
    run_bundle(
        "inferring",
        ["inference", "small"],
        dataset_dir=turned_scans,
        output_dir=folder,
        ckpt_path=trained[0] / "models/model.pt",
        mask_fill="zero",  # shows in the files what was masked
        **TINY_INFERENCE,
    )
    return folder


@pytest.mark.parametrize("name", [*ORIENTATIONS, "oblique"])
def test_inference_returns_to_the_geometry_of_the_file(inferred, turned_scans, name):
    scan = nib.load(turned_scans / f"{name}.nii.gz")
    images = {
        part: nib.load(inferred / name / f"{name}_{part}.nii.gz") for part in ("masked", "reconstruction", "error")
    }
    for image in images.values():
        assert image.shape == scan.shape
        np.testing.assert_allclose(image.affine, scan.affine, atol=1e-4)

    expected = np.clip((scan.get_fdata() + 1000) / 2000, 0, 1) * 0.999 + 0.001
    masked, reconstruction, error = (image.get_fdata() for image in images.values())
    hidden = masked == 0  # scaled scans are above 0
    assert 0.2 < hidden.mean() < 0.6  # of the scan; of the padded volume it is 0.4
    np.testing.assert_allclose(masked[~hidden], expected[~hidden], atol=1e-4)
    np.testing.assert_allclose(reconstruction[~hidden], expected[~hidden], atol=1e-4)
    np.testing.assert_allclose(error, np.abs(reconstruction - expected), atol=1e-4)
    assert error[hidden].mean() > 1e-3  # the network did paint there
    assert (inferred / f"figures/{name}_reconstruction.png").read_bytes()[:4] == b"\x89PNG"


def test_inference_resamples_and_returns(trained, workflow, turned_scans, tmp_path):
    flow = workflow(
        "infer",
        ["inference", "small"],
        dataset_dir=str(turned_scans),
        ckpt_path=str(trained[0] / "models/model.pt"),
        spacing=[1.0, 1.0, 2.0],
        **TINY_INFERENCE,
    )
    flow.run()
    for path in turned_scans.iterdir():
        name = path.name.split(".")[0]
        scan = nib.load(path)
        image = nib.load(tmp_path / f"out/{name}/{name}_reconstruction.nii.gz")
        assert image.shape == scan.shape
        np.testing.assert_allclose(image.affine, scan.affine, atol=1e-4)
        expected = np.clip((scan.get_fdata() + 1000) / 2000, 0, 1)
        seen = nib.load(tmp_path / f"out/{name}/{name}_masked.nii.gz").get_fdata() > 0.05
        difference = np.abs(image.get_fdata() - expected)[seen]
        assert np.median(difference) < 0.05  # at the right place, but for the interpolation


def test_scans_of_the_same_name_do_not_overwrite_each_other(trained, workflow, ct_scans, tmp_path):
    for n, patient in enumerate("ab"):
        (tmp_path / f"scans/{patient}").mkdir(parents=True)
        shutil.copy(ct_scans / f"ct_{n}.nii.gz", tmp_path / f"scans/{patient}/t1.nii.gz")
    absolute = [{"image": str(tmp_path / f"scans/{patient}/t1.nii.gz")} for patient in "ab"]
    (tmp_path / "list.json").write_text(json.dumps({"test": absolute}))
    workflow(
        "infer",
        ["inference", "small"],
        dataset_dir=str(tmp_path / "elsewhere"),
        datalist=str(tmp_path / "list.json"),
        ckpt_path=str(trained[0] / "models/model.pt"),
        **TINY_INFERENCE,
    ).run()
    for patient in "ab":
        assert (tmp_path / f"out/{patient}/t1/t1_masked.nii.gz").is_file()
        assert (tmp_path / f"out/figures/{patient}/t1_reconstruction.png").is_file()


# ------------------------------------------------------------------------------------------------------- export


def test_unet_exports_to_torchscript(trained, network, command, tmp_path):
    command(
        *("-m", "monai.bundle", "ckpt_export", "network_def"),
        filepath=tmp_path / "model.ts",
        ckpt_file=trained[0] / "models/model.pt",
        meta_file=f"{BUNDLE}/configs/metadata.json",
        config_file=config_files(["inference", "small"]),
        bundle_root=BUNDLE,
        **TINY_INFERENCE,
    )
    exported = torch.jit.load(tmp_path / "model.ts")
    for size in ((1, 1, 32, 32, 32), (2, 1, 32, 48, 64)):  # scripted: any batch and size
        image = torch.rand(size)
        with torch.no_grad():
            torch.testing.assert_close(exported(image), network(image), atol=1e-4, rtol=0)


def test_swin_unetr_exports_to_torchscript_by_tracing(tmp_path):
    torch.manual_seed(0)
    geometry = Geometry((64,) * 3, (32,) * 3, (16,) * 3, (64,) * 3, 32)
    network = HybridMIM(SwinUNETRBackbone(feature_size=12), geometry).eval()
    torch.save(network.state_dict(), tmp_path / "model.pt")
    ckpt_export(
        "network_def",
        filepath=str(tmp_path / "model.ts"),
        ckpt_file=str(tmp_path / "model.pt"),
        meta_file=str(ROOT / BUNDLE / "configs/metadata.json"),
        config_file=[str(ROOT / file) for file in config_files(["inference", "swin_unetr", "small"])],
        bundle_root=str(ROOT / BUNDLE),
        use_trace=True,
        input_shape=[1, 1, 64, 64, 64],
        converter_kwargs={"check_trace": False},  # done below
    )
    exported = torch.jit.load(tmp_path / "model.ts")
    image = torch.rand(1, 1, 64, 64, 64)
    with torch.no_grad():
        torch.testing.assert_close(exported(image), network(image), atol=1e-4, rtol=0)


@pytest.mark.slow  # PyTorch's exporter takes its time; the segmentation bundles export by the older one
def test_unet_exports_to_onnx(trained, network, command, tmp_path):
    command(
        *("-m", "monai.bundle", "onnx_export", "onnx_def"),
        filepath=tmp_path / "model.onnx",
        ckpt_file=trained[0] / "models/model.pt",
        meta_file=f"{BUNDLE}/configs/metadata.json",
        config_file=config_files(["inference", "small"]),
        bundle_root=BUNDLE,
        use_trace=True,  # MONAI 1.5 scripts otherwise, which torch's exporter refuses
        input_shape=[1, 1, 32, 32, 32],
        **TINY_INFERENCE,
    )
    session = onnxruntime.InferenceSession(tmp_path / "model.onnx", providers=["CPUExecutionProvider"])
    image = torch.rand(1, 1, 32, 32, 32)
    (found,) = session.run(None, {session.get_inputs()[0].name: image.numpy()})
    with torch.no_grad():
        np.testing.assert_allclose(found, network(image).numpy(), atol=1e-4)
