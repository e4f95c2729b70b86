"""What the configs of pre-training mean: how scans are scaled, what is masked, how the rate runs, what is kept."""

from __future__ import annotations

import nibabel as nib
import numpy as np
import pytest
import torch
import yaml
from ignite.engine import Events
from monai.bundle import create_workflow
from monai.engines.utils import IterationEvents
from monai.networks.nets import BasicUNet
from monai.transforms import Compose
from phantom import BODY, SPACING, make_phantom, save_in, without_figures
from scipy import ndimage
from whole_runs import expected_rate, same

from scripts.backbones import UNetBackbone, whole
from scripts.masking import Geometry, RandPatchMaskd
from tools.common.tables import read_metrics

from .bundle import ROOT, TINY, config_files, places

HU = {-1: -1000, 0: -200, 1: 0, 2: 400, 3: 1500}  # of the phantom's levels; the last is brighter than the window


@pytest.fixture(scope="module")
def ct(tmp_path_factory):
    """A CT phantom in an odd orientation."""
    phantom = make_phantom([1, 2, 3], lambda level, channel: HU[level], 1)
    path = save_in("PIR", phantom.image[0].astype(np.int16), tmp_path_factory.mktemp("ct") / "ct.nii.gz")
    return phantom, {"image": str(path)}


def loaded(parser, item, which="load"):
    """An item through the deterministic steps."""
    return Compose(parser.get_parsed_content(which))(dict(item))


# ------------------------------------------------------------------------------------------------ from file to crop


def test_ct_is_scaled_turned_and_cropped_to_what_is_no_air(parse, ct):
    """-1000 HU is 0.001, 1000 HU is 1; padding, and nothing else, is 0."""
    phantom, item = ct
    roi = [48, 48, 32]
    found = loaded(parse(["train"], roi_size=roi), item)
    expected = 0.001 + 0.999 * (phantom.image.clip(-1000, 1000) + 1000) / 2000
    expected = expected[(slice(None), *BODY)]
    pad = [max(r - s, 0) for r, s in zip(roi, expected.shape[1:], strict=True)]
    expected = np.pad(expected, [(0, 0), *((p // 2, p - p // 2) for p in pad)])
    np.testing.assert_allclose(np.asarray(found["image"]), expected, atol=1e-6)
    assert sum(pad) > 0
    np.testing.assert_allclose(found["spacing"], SPACING, rtol=1e-5)


def test_a_ct_is_resampled_along_the_right_axes(parse, ct):
    phantom, item = ct
    spacing = [1.5, 1.2, 2.0]
    parser = parse(["train"], roi_size=[8, 8, 8], spacing=spacing, foreground_above=-1.0)
    found = np.asarray(loaded(parser, item)["image"])[0]
    steps = [np.arange(n) * new / old for n, new, old in zip(found.shape, spacing, SPACING, strict=True)]
    raw = ndimage.map_coordinates(phantom.image[0].astype(float), np.meshgrid(*steps, indexing="ij"), order=1)
    np.testing.assert_allclose(found, 0.001 + 0.999 * (raw.clip(-1000, 1000) + 1000) / 2000, atol=1e-3)


def test_mr_is_scaled_by_its_own_percentiles_channel_by_channel(parse, tmp_path):
    rng = np.random.default_rng(0)
    array = rng.gamma(2, 1, (20, 24, 18, 2)) * [30, 4000]
    nib.save(nib.Nifti1Image(array.astype(np.float32), np.eye(4)), tmp_path / "mr.nii.gz")
    parser = parse(["train", "mri"], in_channels=2, roi_size=[8, 8, 8], foreground_above=-1.0)
    found = np.asarray(loaded(parser, {"image": str(tmp_path / "mr.nii.gz")})["image"])
    for channel, raw in zip(found, np.moveaxis(array, -1, 0), strict=True):
        low, high = np.percentile(raw, [0.5, 99.5])
        np.testing.assert_allclose(channel, 0.001 + 0.999 * ((raw - low) / (high - low)).clip(0, 1), atol=1e-3)


def test_inference_shows_the_scan_as_training_does(parse, ct):
    """But for what is masked."""
    _, item = ct
    options = {"roi_size": [32, 32, 32], "region_size": [16, 16, 16], "patch_size": [8, 8, 8]}
    training = loaded(parse(["train"], **{**options, "foreground_above": -1.0}), item)["image"]
    options |= {"decode_size": [32, 32, 32], "mask_fill": "foreign"}
    prepared = parse(["inference"], **options).get_parsed_content("preprocessing")(dict(item))
    scan = np.asarray(prepared["scan"])
    pad = [(new - old) // 2 for new, old in zip(scan.shape[1:], training.shape[1:], strict=True)]
    box = (slice(None), *(slice(p, p + n) for p, n in zip(pad, training.shape[1:], strict=True)))
    np.testing.assert_array_equal(scan[box], np.asarray(training))
    assert (scan > 0).sum() == training.numel()
    hidden = np.asarray(prepared["mask"])[0].repeat(8, 0).repeat(8, 1).repeat(8, 2)
    mirrored = scan[0, ::-1, ::-1, ::-1]
    np.testing.assert_array_equal(np.asarray(prepared["image"])[0], np.where(hidden, mirrored, scan[0]))


def test_what_is_padding_changes_no_loss(parse):
    """A prediction may say there what it likes; the terms are those of a config."""
    parser = parse(["train"], **{**TINY, "weight_cl": 0.0})
    loss, step = (parser.get_parsed_content(key) for key in ("loss", "step"))
    image = torch.rand(1, 1, 32, 32, 32) * 0.9 + 0.05
    image[:, :, :12] = 0
    mask = torch.rand(1, 1, 4, 4, 4) < 0.5
    step.eval()
    with torch.no_grad():
        prediction = step(image, mask)
        painted = prediction.reconstruction.clone()
        painted[:, :, :12] = 7
        changed = prediction._replace(reconstruction=painted)
        assert loss(prediction, image, mask)["loss"] == loss(changed, image, mask)["loss"]
        painted[:, :, 12:] += 1
        assert loss(prediction, image, mask)["loss"] < loss(changed, image, mask)["loss"]


def test_the_published_weights_of_the_terms(parse):
    """arXiv 2303.10333: 1, 0.1, 0.1, 0.01, 0.1."""
    weights = parse(["train", "published"], **TINY).get_parsed_content("loss").weights
    assert weights == {"loss_pr": 1.0, "loss_num": 0.1, "loss_loc": 0.1, "loss_con": 0.01, "loss_cl": 0.1}


@pytest.mark.parametrize(
    ("overlays", "options", "bound"), [([], {}, 1.0), (["published"], {}, None), ([], {"weight_pr": 0.0}, None)]
)
def test_the_bound_on_what_the_heads_ask_of_the_encoder(parse, overlays, options, bound):
    """None as published, and where there is no gradient of the pixel level to compare with."""
    step = parse(["train", *overlays], **TINY, **options).get_parsed_content("step")
    assert step.head_gradient == bound


# ------------------------------------------------------------------------------------------- one short training

EPOCHS, WARMUP, RATE, CLIP = 4, 1, 0.002, 0.05
OPTIONS = {
    **TINY,
    "epochs": EPOCHS,
    "warmup_epochs": WARMUP,
    "learning_rate": RATE,
    "clip_norm": CLIP,
    "crops_per_volume": 2,
    "checkpoints_kept": 10,
    **without_figures(yaml.safe_load((ROOT / config_files(["train"])[0]).read_text())),
}


def training(folder, scans, **overrides):
    return create_workflow(
        config_file=[str(ROOT / name) for name in config_files(["train"])],
        workflow_type="train",
        logging_file=False,
        dataset_dir=str(scans),
        **{**OPTIONS, **places(folder), **overrides},
    )


def norm(network):
    return torch.stack([p.grad.norm() for p in network.parameters() if p.grad is not None]).norm().item()


def watched(flow):
    """Runs a training; gives what happened at every step, and what was validated at every validation."""
    trainer, validator = (flow.parser.get_parsed_content(key) for key in ("train#trainer", "validate#evaluator"))
    steps, validations = [], []

    def note(engine):
        batch = engine.state.batch
        steps.append(
            {
                "epoch": engine.state.epoch,
                "rate": engine.optimizer.param_groups[0]["lr"],
                "files": list(batch["file"]),
                "image": torch.as_tensor(batch["image"]).clone(),
                "mask": torch.as_tensor(batch["mask"]).clone(),
            }
        )

    def note_validation(engine):
        batch = engine.state.batch
        copy = [torch.as_tensor(batch[key]).clone() for key in ("image", "mask")]
        validations.append((list(batch["file"]), *copy))

    trainer.add_event_handler(Events.ITERATION_STARTED, note)
    # after the config's own handler, which clips
    trainer.add_event_handler(
        IterationEvents.BACKWARD_COMPLETED, lambda engine: steps[-1].update(norm=norm(engine.network))
    )
    validator.add_event_handler(Events.ITERATION_COMPLETED, note_validation)
    flow.run()
    return steps, validations


@pytest.fixture(scope="module")
def run(ct_scans, quiet, tmp_path_factory):
    """A training whose network forgets what it painted before its last epoch."""
    folder = tmp_path_factory.mktemp("run")
    flow = training(folder, ct_scans)

    @flow.parser.get_parsed_content("train#trainer").on(Events.EPOCH_STARTED(once=EPOCHS))
    def forget(engine):
        with torch.no_grad():
            for parameter in flow.parser.get_parsed_content("backbone").final_conv.parameters():
                parameter.fill_(9.0)

    return folder, flow, *watched(flow)


def test_the_learning_rate_rises_then_falls_to_nothing(run):
    _, flow, steps, _ = run
    per_epoch = len(steps) // EPOCHS
    assert per_epoch == 2 and len(steps) == per_epoch * EPOCHS
    expected = [RATE * expected_rate(n, WARMUP * per_epoch, EPOCHS * per_epoch) for n in range(len(steps))]
    assert [step["rate"] for step in steps] == pytest.approx(expected)
    assert steps[0]["rate"] == pytest.approx(RATE / 100) and steps[per_epoch]["rate"] == RATE
    assert steps[5 * per_epoch // 2]["rate"] == pytest.approx(RATE / 2)
    assert flow.parser.get_parsed_content("train#optimizer").param_groups[0]["lr"] == 0  # after the last step


def test_gradients_are_no_longer_than_the_config_says(run):
    *_, steps, _ = run
    norms = [step["norm"] for step in steps]
    assert max(norms) <= CLIP * 1.001
    assert max(norms) > CLIP * 0.99  # they would have been longer


def test_exactly_the_configured_share_of_patches_is_masked(run, parse):
    *_, steps, _ = run
    ratio = parse(["train"]).get_parsed_content("mask_ratio")
    assert ratio == 0.4  # the paper's
    for step in steps:
        patches = step["mask"].flatten(1)
        assert patches.shape == (4, 64) and step["image"].shape == (4, 1, 32, 32, 32)
        assert patches.sum(1).tolist() == [round(ratio * 64)] * 4
    assert len({m.numpy().tobytes() for step in steps for m in step["mask"]}) == 4 * len(steps)  # all differ


def test_nothing_is_trained_on_what_validates(run, ct_scans):
    *_, steps, validations = run
    trained = {file for step in steps for file in step["files"]}
    validated = {file for files, *_ in validations for file in files}
    assert not trained & validated
    assert len(trained) == 4 and len(validated) == 2
    assert len(trained | validated) == len(list(ct_scans.iterdir()))


def test_every_validation_sees_the_same_crops_and_masks(run):
    *_, validations = run
    (files, image, mask), *others = validations
    assert len(validations) == EPOCHS
    for other in others:
        assert other[0] == files and torch.equal(other[1], image) and torch.equal(other[2], mask)
    assert not torch.equal(image[0], image[1])


def test_the_kept_weights_are_those_of_the_best_validation(run):
    folder, *_ = run
    loss = [float(row["val_loss"]) for row in read_metrics(folder / "out/metrics.csv")]
    best = int(np.argmin(loss)) + 1
    assert len(loss) == EPOCHS and best != EPOCHS and loss[-1] > loss[best - 1]
    model, backbone = (torch.load(folder / "models" / name, weights_only=True) for name in ("model.pt", "backbone.pt"))
    for epoch in range(1, EPOCHS + 1):
        weights = torch.load(folder / f"models/checkpoint_epoch={epoch}.pt", weights_only=True)["model"]
        assert weights.keys() == model.keys()
        assert all(torch.equal(model[key], weights[key]) for key in weights) == (epoch == best), epoch
    assert {"number_head.weight", "location_head.weight", "projection.weight"} <= model.keys()  # to train on from
    assert {f"backbone.{key}": key for key in backbone}.keys() == {k for k in model if k.startswith("backbone.")}
    assert all(torch.equal(tensor, model[f"backbone.{key}"]) for key, tensor in backbone.items())
    BasicUNet(3, 1, 1, TINY["unet_features"]).load_state_dict(backbone)


def test_a_seed_repeats_crops_and_masks_and_another_does_not(run, ct_scans, quiet, tmp_path):
    _, _, steps, validations = run
    again, validated = watched(training(tmp_path / "same", ct_scans, epochs=1))
    other, _ = watched(training(tmp_path / "other", ct_scans, epochs=1, seed=1))
    assert len(again) == 2
    for a, b in zip(steps, again, strict=False):
        assert a["files"] == b["files"]
        assert torch.equal(a["image"], b["image"]) and torch.equal(a["mask"], b["mask"])
    assert torch.equal(validated[0][1], validations[0][1])
    for a, b in zip(again, other, strict=True):
        assert not torch.equal(a["image"], b["image"]) and not torch.equal(a["mask"], b["mask"])
    assert not torch.equal(steps[0]["mask"], steps[2]["mask"])  # epochs differ


def test_a_run_that_was_stopped_goes_on_as_if_it_had_not_been(run, ct_scans, quiet, tmp_path):
    folder, _, steps, _ = run
    flow = training(tmp_path, ct_scans)
    trainer = flow.parser.get_parsed_content("train#trainer")
    trainer.add_event_handler(Events.EPOCH_COMPLETED(once=2), lambda engine: engine.terminate())
    watched(flow)
    resumed, _ = watched(training(tmp_path, ct_scans, resume=True))
    assert [step["epoch"] for step in resumed] == [3, 3, 4, 4]
    for mine, other in zip(resumed, steps[4:], strict=True):
        assert mine["rate"] == pytest.approx(other["rate"]) and mine["files"] == other["files"]
        assert torch.equal(mine["image"], other["image"]) and torch.equal(mine["mask"], other["mask"])
    before, after = (read_metrics(f / "out/metrics.csv") for f in (folder, tmp_path))
    assert before[:3] == after[:3]  # the fourth began with a network that had forgotten
    a, b = (torch.load(f / "models/checkpoint_epoch=3.pt", weights_only=True) for f in (folder, tmp_path))
    assert all(same(a[part], b[part]) for part in ("model", "optimizer", "best"))


# --------------------------------------------------------------------------------------------------- the methods


def test_every_region_has_its_own_number_of_masked_patches_along_unequal_axes():
    """Level one of the masking draws a number for a region of space, whatever the shape of the crop."""
    geometry = Geometry((32, 64, 96), (32, 32, 32), (16, 16, 16), (32, 32, 32), 16)
    transform = RandPatchMaskd(geometry, mask_ratio=0.5)
    transform.set_random_state(0)
    counts = []
    for _ in range(200):
        mask = transform({"image": torch.ones(1, 32, 64, 96)})["mask"][0]
        counts += [int(mask[:, 2 * j : 2 * j + 2, 2 * k : 2 * k + 2].sum()) for j in range(2) for k in range(3)]
    share = np.bincount(counts, minlength=9) / len(counts)
    assert share.min() > 0.06  # nine counts, about alike; patches drawn each by itself leave 0.004 for none and for all


def test_the_decoded_box_lies_where_it_says():
    """Its features are those of its own place in every level."""
    torch.manual_seed(0)
    backbone = UNetBackbone(1, TINY["unet_features"]).eval()
    box = (slice(16, 48), slice(0, 32), slice(32, 64))
    with torch.no_grad():
        features = backbone.encode(torch.rand(1, 1, 64, 48, 64))
        levels = [
            f[:, :, 16 // s : 48 // s, : 32 // s, 32 // s : 64 // s]
            for f, s in zip(features, (1, 2, 4, 8, 16), strict=True)
        ]
        expected = backbone.decode(levels, whole((32, 32, 32)))
        torch.testing.assert_close(backbone.decode(features, box), expected)


def test_dropout_acts_in_the_encoder_and_nowhere_else(parse):
    backbone = parse(["train"], **TINY).get_parsed_content("backbone")
    acting = {name for name, m in backbone.named_modules() if isinstance(m, torch.nn.Dropout) and m.p > 0}
    assert {name.partition(".")[0] for name in acting} == {"down_1", "down_2", "down_3", "down_4"}
    assert all(m.p == 0.1 for name, m in backbone.named_modules() if name in acting)


@pytest.mark.parametrize("overlays", [["mae"], ["simmim"]])
def test_mae_and_simmim_mask_three_quarters_of_whole_tokens(parse, overlays):
    parser = parse(["train", *overlays], roi_size=[64, 64, 64], vit_hidden_size=24, vit_heads=2, mae_decoder_size=12)
    mask = parser.get_parsed_content("draw")[-1]
    mask.set_random_state(0)
    drawn = mask({"image": torch.ones(1, 64, 64, 64)})["mask"]
    assert drawn.shape == (1, 4, 4, 4)  # tokens of 16 voxels
    assert drawn.sum() == {"mae": 48, "simmim": 48}[overlays[0]]
