"""Pre-training learns within a few steps; its engine takes the right ones, and remembers its state."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
import yaml
from monai.bundle import ConfigParser
from monai.data import MetaTensor
from scipy.ndimage import gaussian_filter

from scripts.trainer import PretrainTrainer
from tools.common.config import config_text
from tools.common.tables import read_metrics
from tools.samples.sample_data import sample_data
from tools.training.handlers import GradientClipping

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


@pytest.mark.slow
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
        val_interval=1000,
        epochs=12,
        learning_rate=0.006,
        views="dropout",  # under other masks the views take longer to learn
        weight_cl=0.1,
    )
    flow.run()
    rows = read_metrics(tmp_path / "out/metrics.csv")
    last = {name: float(value) for name, value in rows[-1].items()}
    assert flow.trainer.state.iteration == 24

    # in training
    assert last["loss_pr"] < 0.6 * float(rows[0]["loss_pr"])
    assert last["loss_cl"] < 0.9 * math.log(2 * CROPS - 1)  # chance

    # scans that were not trained on
    assert last["val_masked_mse"] < 0.7 * last["val_mean_mse"]
    assert last["val_retrieval_chance"] == pytest.approx(1 / (2 * 8 - 1), rel=1e-4)
    assert last["val_retrieval_accuracy"] > 5 * last["val_retrieval_chance"]


@pytest.mark.slow
def test_the_contrastive_term_learns_on_sample_scans(workflow, tmp_path):
    """With the settings of the quickstart and the published ones, for 8 epochs."""
    sample_data(str(tmp_path / "ct"), "ct_abdomen", cases=16)
    workflow(
        "train",
        ["train", "small", "published"],
        dataset_dir=str(tmp_path / "ct/imagesTr"),
        batch_size=2,
        crops_per_volume=3,
        val_fraction=0.2,
        val_interval=1000,
        epochs=8,
    ).run()
    last = {name: float(value) for name, value in read_metrics(tmp_path / "out/metrics.csv")[-1].items()}
    assert last["val_retrieval_chance"] == pytest.approx(1 / (2 * 9 - 1), rel=1e-4)
    assert last["val_retrieval_accuracy"] > 5 * last["val_retrieval_chance"]


# ------------------------------------------------------------------------------------------------------ the engine


class Toy(torch.nn.Module):
    """A network of one weight, whose prediction is its own product with the image."""

    def __init__(self):
        super().__init__()
        self.weight = torch.nn.Parameter(torch.ones(1))

    def forward(self, image, mask):
        return self.weight * image.mean()


def toy_loss(prediction, image, mask):
    term = (prediction - 3) ** 2
    return {"loss": term.sum(), "loss_pr": term.detach().sum()}


def toy_trainer(scale=None, max_norm=None):
    """A trainer of two steps; `scale` stands for a GPU's gradient scaler, which CPUs have as well."""
    network = Toy()
    batch = {"image": MetaTensor(torch.ones(1, 1, 2, 2, 2)), "mask": torch.zeros(1, 1, 1, 1, 1, dtype=torch.bool)}
    trainer = PretrainTrainer(
        device="cpu",
        max_epochs=1,
        train_data_loader=[batch, batch],
        network=network,
        optimizer=torch.optim.SGD(network.parameters(), lr=0.1),
        loss_function=toy_loss,
        amp=True,
        train_handlers=[] if max_norm is None else [GradientClipping(network, max_norm)],
    )
    assert not trainer.grad_scaler.is_enabled()  # only float16 needs it, which CPUs do not train in
    if scale is not None:
        trainer.grad_scaler = torch.amp.GradScaler("cpu", init_scale=scale)
    return trainer


def test_a_step_of_the_engine_is_a_step_of_the_optimizer():
    trainer = toy_trainer()
    trainer.run()
    assert trainer.network.weight.item() == pytest.approx(3 - 2 * 0.8**2)  # the distance to 3 shrinks by a fifth
    (output,) = trainer.state.output
    assert output["loss"].item() == pytest.approx((2 * 0.8) ** 2)


@pytest.mark.parametrize("max_norm", [None, 0.5])
def test_gradients_are_clipped_without_their_scale(max_norm):
    """A gradient scaler changes nothing: gradients are clipped after their scale is taken off."""
    plain, scaled = toy_trainer(max_norm=max_norm), toy_trainer(scale=1024.0, max_norm=max_norm)
    plain.run()
    scaled.run()
    assert scaled.network.weight.item() == pytest.approx(plain.network.weight.item())
    if max_norm:
        assert plain.network.weight.item() == pytest.approx(1 + 2 * 0.1 * max_norm, rel=1e-4)


def test_the_state_of_the_engine_holds_that_of_the_gradient_scaler():
    first, second = toy_trainer(scale=1024.0), toy_trainer(scale=2.0)
    first.run()
    second.load_state_dict(first.state_dict())
    assert second.grad_scaler.get_scale() == 1024
    assert (second.state.epoch, second.state.iteration) == (1, 2)


# -------------------------------------------------------------------------------------------- the config it writes


def test_the_written_config_resolves_plain_values_and_keeps_the_rest(tmp_path):
    parser = ConfigParser(
        {
            "imports": ["$from tools.common.config import config_text"],
            "folder": str(tmp_path),
            "path": "$@folder + '/sub'",
            "sizes": "$[2 * n for n in (1, 2)]",
            "network": {"_target_": "torch.nn.Linear", "in_features": "@sizes#0", "out_features": 1},
            "device": "$torch.device('cpu')",
            "unused": "$1 / 0",
            "run": ["$(@path, @sizes, @device)", "$config_text()"],
        }
    )
    written = yaml.safe_load(parser.get_parsed_content("run")[1])
    assert written["path"] == f"{tmp_path}/sub"
    assert written["sizes"] == [2, 4]
    assert written["device"] == "$torch.device('cpu')"  # no plain value
    assert written["unused"] == "$1 / 0"  # never evaluated
    assert written["network"]["_target_"] == "torch.nn.Linear"
    assert "_meta_" not in written


def test_a_config_is_written_from_a_config_only():
    with pytest.raises(RuntimeError, match="expected a call from a bundle's config"):
        config_text()
