"""What cannot work is refused before the first step, with the file or key, what was found and what was expected."""

from __future__ import annotations

import gzip
import math
import re
import subprocess

import numpy as np
import pytest
import torch
from ignite.engine import Events

from tools.common.errors import root_cause
from tools.common.tables import read_metrics
from tools.data.scans import ScanError
from tools.weights.checkpoints import WeightsError

from .bundle import TINY, TINY_INFERENCE, hounsfield, save_nifti


@pytest.fixture
def scans(ct_scans, tmp_path):
    """A folder of its own with the good scans, to which a test adds a bad one."""
    folder = tmp_path / "scans"
    folder.mkdir()
    for path in ct_scans.iterdir():
        (folder / path.name).symlink_to(path)
    return folder


@pytest.fixture
def refused(parse, tmp_path):
    """The error of a start, before which nothing was written that looks like a training."""

    def start(configs=("train", "small"), evaluate="start", **options):
        parser = parse(configs, **options)
        with pytest.raises(Exception) as error:
            parser.get_parsed_content(evaluate)
        assert not (tmp_path / "out/metrics.csv").exists()
        assert not (tmp_path / "out/config.yaml").exists()
        assert not list(tmp_path.glob("models/*"))
        return root_cause(error.value)

    return start


# --------------------------------------------------------------------------------------------------------- scans


def test_a_path_that_does_not_exist(refused, tmp_path):
    error = refused(dataset_dir=str(tmp_path / "missing"), **TINY)
    assert isinstance(error, ScanError)
    assert str(error) == f"dataset_dir: {tmp_path / 'missing'} does not exist, expected a folder of scans"


def test_a_datalist_that_names_missing_scans(refused, tmp_path, ct_scans):
    datalist = tmp_path / "list.json"
    datalist.write_text('{"training": ["ct_0.nii.gz", "gone.nii.gz"]}')
    error = refused(dataset_dir=str(ct_scans), datalist=str(datalist), **TINY)
    assert f"{datalist}: 'training': 1 image files do not exist: {ct_scans / 'gone.nii.gz'}" in str(error)


def truncated(path):
    content = gzip.compress(gzip.decompress(save_nifti(path, hounsfield(0, (50, 50, 50))).read_bytes())[:100_000])
    path.write_bytes(content)


def with_nan(path):
    volume = hounsfield(0, (50, 50, 50)).astype(np.float32)
    volume[3, 4, 5] = np.nan
    save_nifti(path, volume)


BAD = {
    "truncated": (truncated, r"is truncated: found \d+ bytes of voxels, expected 250000"),
    "empty": (lambda path: path.write_bytes(b""), r"is empty: found 0 bytes, expected an image"),
    "NaN": (with_nan, r"has 1 NaN or infinite values among 125000 voxels, expected finite values"),
}


def test_all_bad_scans_are_named_at_once(refused, scans):
    for kind, (make, _) in BAD.items():
        make(scans / f"{kind}.nii.gz")
    error = refused(dataset_dir=str(scans), **TINY)
    assert isinstance(error, ScanError)
    assert f"{len(BAD)} of {len(BAD) + 6} scans cannot be used" in str(error)
    for kind, (_, expected) in BAD.items():
        assert re.search(rf"{re.escape(str(scans))}/{kind}.nii.gz: {expected}", str(error)), str(error)
    assert "--skip_unreadable true" in str(error)


def test_skip_unreadable_trains_without_the_bad_ones(workflow, scans, tmp_path, capsys):
    for kind, (make, _) in BAD.items():
        make(scans / f"{kind}.nii.gz")
    flow = workflow(
        "train", ["train", "small"], dataset_dir=str(scans), skip_unreadable="true", **{**TINY, "epochs": 1}
    )
    flow.run()
    printed = capsys.readouterr().out
    assert "4 for training, 2 for validation" in printed
    assert re.search(rf"left out +{len(BAD)}\n", printed)
    assert f"{scans / 'empty.nii.gz'}: is empty" in printed
    assert len(read_metrics(tmp_path / "out/metrics.csv")) == 1


def test_skip_unreadable_false_as_text_skips_nothing(refused, scans):
    truncated(scans / "bad.nii.gz")
    assert "1 of 7 scans" in str(refused(dataset_dir=str(scans), skip_unreadable="false", **TINY))


# ------------------------------------------------------------------------------------------------------ settings

SETTINGS = [
    ({"roi_size": [40, 32, 32]}, "roi_size [40, 32, 32] must be a multiple of region_size [16, 16, 16]"),
    ({"region_size": [8, 8, 8]}, "region_size [8, 8, 8] must be a multiple of the bottleneck stride"),
    ({"patch_size": [5, 8, 8]}, "region_size [16, 16, 16] must be a multiple of patch_size [5, 8, 8]"),
    ({"patch_size": [8, 8, 0]}, "patch_size must be three whole numbers of voxels above 0, found [8, 8, 0]"),
    ({"decode_size": [48, 32, 32]}, "decode_size [48, 32, 32] must fit into roi_size [32, 32, 32]"),
    ({"decode_size": [24, 32, 32]}, "decode_size [24, 32, 32] must be a multiple of the bottleneck stride"),
    ({"decode_size": [16, 32, 32]}, "decode_size [16, 32, 32] must span at least two voxels"),
    ({"decode_box": [8, 0, 0]}, "decode_box [8, 0, 0]: expected `random`, or three multiples of 16"),
    ({"roi_size": [32, 32]}, "roi_size must be three whole numbers of voxels above 0, found [32, 32]"),
    ({"mask_ratio": 1}, "mask_ratio must be above 0 and below 1, found 1"),
    ({"mask_ratio": 0}, "mask_ratio must be above 0 and below 1, found 0"),
    ({"mask_scheme": "blocks"}, "mask_scheme must be one of two_level, uniform; found 'blocks'"),
    ({"mask_fill": 0.0}, "mask_fill: found 0.0, expected one of foreign, zero, mean, noise"),
    ({"views": "crops"}, "views: found 'crops', expected one of other_masks, dropout"),
    ({"cache": "ssd"}, "cache must be one of none, memory, disk; found 'ssd'"),
    ({"val_fraction": 1.0}, "val_fraction: found 1.0, expected a number between 0 and 1"),
    ({"dropout_stages": [5]}, "dropout_stages must be among 0 … 4, found [5]"),
    ({"weight_num": -1}, "loss weights must be 0 or more"),
    ({"head_gradient": "null"}, "head_gradient must be above 0, or null for no bound ('$None' on the command line)"),
    ({"temperature": 0}, "temperature must be above 0, found 0"),
    ({"resume": "maybe"}, "resume: found 'maybe', expected true, false or auto"),
]


@pytest.mark.parametrize(("setting", "expected"), SETTINGS, ids=[next(iter(s)) for s, _ in SETTINGS])
def test_a_setting_that_does_not_fit_is_named(refused, ct_scans, setting, expected):
    assert expected in str(refused(dataset_dir=str(ct_scans), **{**TINY, **setting}))


def test_a_batch_of_one_cannot_contrast(refused, parse, ct_scans):
    options = {**TINY, "batch_size": 1, "dataset_dir": str(ct_scans)}
    message = str(refused(**options))
    assert "batch_size × crops_per_volume × processes is 1 crop" in message
    assert "expected at least 2" in message
    assert "--weight_cl 0" in message
    parse(["train", "small"], **options, crops_per_volume=2).get_parsed_content("start")


def test_a_batch_of_one_trains_without_the_contrastive_term(workflow, ct_scans, tmp_path):
    options = {**TINY, "batch_size": 1, "weight_cl": 0, "epochs": 1}
    workflow("train", ["train", "small"], dataset_dir=str(ct_scans), **options).run()
    (row,) = read_metrics(tmp_path / "out/metrics.csv")
    assert float(row["loss_cl"]) == 0
    assert float(row["loss_pr"]) > 0
    assert "val_retrieval_accuracy" not in row


@pytest.fixture
def full_disk(tmp_path):
    """A file system of 256 kB."""
    folder = tmp_path / "disk"
    folder.mkdir()
    mount = ["mount", "-t", "tmpfs", "-o", "size=256k", "tmpfs", str(folder)]
    try:
        subprocess.run(mount, check=True, capture_output=True)
    except (OSError, subprocess.CalledProcessError) as error:
        pytest.skip(f"cannot mount a small disk: {error}")
    yield folder
    subprocess.run(["umount", str(folder)], check=True)


def test_a_disk_without_room_for_the_cache(refused, parse, ct_scans, full_disk):
    options = {**TINY, "dataset_dir": str(ct_scans), "cache": "disk"}
    error = refused(**options, cache_dir=str(full_disk / "cache"))
    assert isinstance(error, OSError)
    assert re.search(
        rf"cache_dir {full_disk / 'cache'}: the disk has 2\d\d kB, 6 scans need about 9\d\d kB", str(error)
    )
    assert "--cache none" in str(error)
    parse(["train", "small"], **options).get_parsed_content("start")  # on a larger disk


# --------------------------------------------------------------------------------------------------- checkpoints


@pytest.fixture
def unet_weights(parse, tmp_path):
    """A checkpoint of the tiny UNet, outside of the run's own folder."""
    path = tmp_path / "unet.pt"
    torch.save(parse(["inference", "small"], **TINY_INFERENCE).get_parsed_content("network_def").state_dict(), path)
    return path


def swin(configs):
    return [configs, "swin_unetr", "small", *(["evaluate"] if configs == "train" else [])]


@pytest.mark.parametrize(("base", "step"), [("train", "evaluating#0"), ("inference", "inferring#1")])
def test_weights_of_another_backbone(refused, unet_weights, ct_scans, base, step):
    error = refused(swin(base), step, ckpt_path=str(unet_weights), dataset_dir=str(ct_scans))
    assert isinstance(error, WeightsError)
    assert str(error).startswith(
        f"{unet_weights}: these are not the weights of a SwinUNETR with 1 input channel(s) and 12 features, "
        "they look like a UNet (BasicUNet) with 1 input channel(s) and 4 features"
    )


@pytest.mark.parametrize(("base", "step"), [("train", "evaluating#0"), ("inference", "inferring#1")])
def test_weights_that_are_not_there(refused, tmp_path, ct_scans, base, step):
    configs = [base, "small", *(["evaluate"] if base == "train" else [])]
    missing = tmp_path / "nowhere/model.pt"
    error = refused(configs, step, ckpt_path=str(missing), dataset_dir=str(ct_scans))
    assert str(error) == f"{missing}: no such checkpoint"


def test_inference_with_a_method_that_makes_no_image(refused, ct_scans):
    error = refused(["inference", "simclr", "small"], "inferring#0", dataset_dir=str(ct_scans))
    assert str(error).startswith("config_file: found simclr.yaml, whose network makes no image, expected the overlays")


# ---------------------------------------------------------------------------------- a loss that is not finite


def test_a_bad_loss_stops_the_run_and_keeps_the_last_checkpoint(workflow, ct_scans, tmp_path):
    options = {**TINY, "dataset_dir": str(ct_scans), "cache": "none"}
    workflow("train", ["train", "small"], **options, epochs=1).run()
    models = tmp_path / "models"
    before = {path.name: path.read_bytes() for path in models.iterdir() if not path.name.startswith("run.")}

    divide = "$@load + [monai.transforms.Lambdad('image', lambda x: x / 0)] + @draw"
    infinite = {"train#preprocessing": {"_target_": "Compose", "transforms": divide}}
    flow = workflow("train", ["train", "small"], **options, epochs=2, resume=True, resume_changed=True, **infinite)
    with pytest.raises(RuntimeError) as error:
        flow.run()
    error = root_cause(error.value)
    assert isinstance(error, FloatingPointError)
    message = str(error)
    assert "the loss is not finite at step 3 (epoch 2): loss " in message
    assert "loss_pr " in message
    named = re.findall(rf"{ct_scans}/(ct_\d.nii.gz)", message)
    assert len(named) == TINY["batch_size"]
    assert message.endswith(f"the last good checkpoint is {models / 'checkpoint_epoch=1.pt'}")
    assert {name: (models / name).read_bytes() for name in before} == before
    assert {path.name for path in models.iterdir()} == {*before, "run.json", "run.lock"}  # this process lives
    assert len(read_metrics(tmp_path / "out/metrics.csv")) == 1


def spoiled(flow, steps):
    """Weights before and after each step, if the scans of some steps are infinite."""
    trainer, seen = flow.parser.get_parsed_content("train#trainer"), []
    parameter = next(flow.parser.get_parsed_content("network_def").parameters())
    spoil = Events.ITERATION_STARTED(event_filter=lambda engine, step: step in steps)
    trainer.add_event_handler(spoil, lambda engine: engine.state.batch["image"].fill_(math.inf))
    trainer.add_event_handler(Events.ITERATION_STARTED, lambda: seen.append([parameter.detach().clone()]))
    trainer.add_event_handler(Events.ITERATION_COMPLETED, lambda: seen[-1].append(parameter.detach().clone()))
    return seen


def test_a_step_with_a_bad_loss_can_be_skipped(workflow, ct_scans, tmp_path, capsys):
    options = {**TINY, "dataset_dir": str(ct_scans), "epochs": 2, "on_bad_loss": "skip"}
    flow = workflow("train", ["train", "small"], **options)
    seen = spoiled(flow, {2})
    flow.run()
    assert [torch.equal(*pair) for pair in seen] == [False, True, False, False]
    moments = flow.parser.get_parsed_content("train#optimizer").state.values()
    assert {int(state["step"]) for state in moments} == {3}
    assert "WARNING: step skipped, the 1. of this start: the loss is not finite at step 2" in capsys.readouterr().out
    assert all(math.isfinite(float(row["loss"])) for row in read_metrics(tmp_path / "out/metrics.csv"))
    batch = torch.load(tmp_path / "out/bad_batch_step=2_rank=0.pt", weights_only=True)
    assert batch["image"].isinf().all() and len(batch["file"]) == TINY["batch_size"]


def test_too_many_bad_losses_in_a_row_stop_the_run(workflow, ct_scans):
    options = {**TINY, "dataset_dir": str(ct_scans), "epochs": 3, "on_bad_loss": "skip", "bad_loss_limit": 1}
    flow = workflow("train", ["train", "small"], **options)
    seen = spoiled(flow, {1, 3, 4})
    with pytest.raises(RuntimeError) as error:
        flow.run()
    assert str(root_cause(error.value)).startswith(
        "2 steps in a row (bad_loss_limit: 1): the loss is not finite at step 4"
    )
    assert len(seen) == 4


# ---------------------------------------------------------------------------------------- by the command itself


def test_the_command_ends_with_the_cause_that_has_a_cause(run_bundle, ct_scans, tmp_path):
    """The error of torch.load below it says nothing of the file."""
    (tmp_path / "model.pt").write_bytes(b"not a checkpoint")
    done = run_bundle(
        "inferring",
        ["inference", "small"],
        check=False,
        dataset_dir=ct_scans,
        output_dir=tmp_path / "out",
        ckpt_path=tmp_path / "model.pt",
    )
    error = done.stderr.rpartition("\n\n")[2]
    assert error.startswith(f"WeightsError: {tmp_path / 'model.pt'}: not a checkpoint that torch.load")
