"""The code of docs/federated.md, as it stands there: two sites, three rounds of MONAI's federated learning."""

from __future__ import annotations

import csv
import itertools
import re
import shutil
import sys
from types import SimpleNamespace

import monai.fl.client
import nibabel as nib
import numpy as np
import pytest
import torch
import yaml
from ignite.engine import Events
from monai.fl.utils.constants import ExtraItems, ModelType, WeightType
from monai.fl.utils.exchange_object import ExchangeObject

from tools.common.tables import read_metrics
from tools.samples.sample_data import sample_data

from .bundles import ROOT, bundle

pytestmark = pytest.mark.slow  # what a client asks a bundle for is tested by `tools verify`, too

REAL = ROOT.parent / "shared/data/Task04_Hippocampus"
CASES = {"a": 12, "b": 8}  # at each site; of five folds, one validates
TRAINING = {"a": 9, "b": 6}
ROUNDS, LOCAL_EPOCHS = 3, 2
STEPS = {"a": 5, "b": 3}  # in an epoch

# in place of small.yaml, for the tests' time
TINY = {"unet_features": [8, 8, 16, 32, 64, 8], "roi_size": [32, 48, 32], "num_workers": 0}


class Watched(monai.fl.client.MonaiAlgo):
    """A client that remembers what it was given, what it gave, its Dice, and the learning rate of each step."""

    def initialize(self, extra=None):
        super().initialize(extra)
        self.received, self.sent, self.dice, self.rates = [], [], [], []
        group = self.trainer.optimizer.param_groups[-1]
        self.trainer.add_event_handler(Events.ITERATION_STARTED, lambda: self.rates.append(group["lr"]))

    def train(self, data, extra=None):
        self.received.append({name: value.clone() for name, value in data.weights.items()})
        super().train(data, extra)

    def get_weights(self, extra=None):
        self.sent.append(super().get_weights(extra))
        return self.sent[-1]

    def evaluate(self, data, extra=None):
        answer = super().evaluate(data, extra)
        self.dice.append(answer.metrics["mean_dice"])
        return answer


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A copy of the bundle, and each site's own cases: real ones where they are. A test scan cannot be read."""
    root = tmp_path_factory.mktemp("federated")
    shutil.copytree(ROOT / bundle("hippocampus") / "configs", root / bundle("hippocampus") / "configs")
    real = iter(sorted((REAL / "imagesTr").glob("*.nii.gz")))
    for seed, (site, count) in enumerate(CASES.items()):
        data = root / f"data/site_{site}"
        if REAL.is_dir():
            for part in ("imagesTr", "labelsTr"):
                (data / part).mkdir(parents=True)
            for image, part in itertools.product(list(itertools.islice(real, count)), ("imagesTr", "labelsTr")):
                shutil.copy(REAL / part / image.name, data / part)
        else:
            sample_data(str(data), "hippocampus", cases=count, seed=seed)
        (data / "imagesTs").mkdir()
        (data / "imagesTs/hippocampus_999.nii.gz").write_bytes(b"no scan")
    return root


def files(root):
    """Every file below a folder, with what tells that it was written to."""
    return {str(path.relative_to(root)): path.stat().st_mtime_ns for path in root.rglob("*") if path.is_file()}


@pytest.fixture(scope="module")
def page(folder):
    """Runs a block of the page's Python, in the folder: `page(0)`; returns the names that all have set so far."""
    blocks = re.findall(r"^```python\n(.*?)^```", (ROOT / "docs/federated.md").read_text(), re.DOTALL | re.MULTILINE)
    assert blocks[0].count('"configs/small.yaml"') == 1
    (folder / "tiny.yaml").write_text(yaml.safe_dump(TINY))
    scope = {}

    def run(number):
        with pytest.MonkeyPatch.context() as patch:
            patch.chdir(folder)
            patch.setattr(sys, "excepthook", sys.excepthook)  # what a config's `initialize` changes in this process
            patch.setattr(monai.fl.client, "MonaiAlgo", Watched)
            exec(blocks[number].replace("configs/small.yaml", str(folder / "tiny.yaml")), scope)
        return scope

    state = torch.get_rng_state()
    yield run
    torch.set_rng_state(state)


@pytest.fixture(scope="module")
def federation(page, folder):
    """What the first block has left."""
    before = files(folder)
    scope = page(0)
    written = {path for path, time in files(folder).items() if before.get(path) != time}
    clients = dict(zip(CASES, scope["clients"], strict=True))
    return SimpleNamespace(clients=clients, weights=scope["weights"], written=written)


def test_the_global_model_learns(federation):
    """On cases that nothing was trained on."""
    for client in federation.clients.values():
        start, *rounds = client.dice
        assert len(rounds) == ROUNDS
        assert rounds[-1] > start + 0.2


def test_the_sites_send_differences_that_are_averaged_by_their_cases(federation):
    a, b = federation.clients.values()
    assert {answer.weight_type for client in (a, b) for answer in client.sent} == {WeightType.WEIGHT_DIFF}
    given = [*a.received, federation.weights]
    for number in range(ROUNDS):
        for name, before in given[number].items():
            assert torch.equal(b.received[number][name], before)
            change = [client.sent[number].weights[name] for client in (a, b)]
            expected = before + (TRAINING["a"] * change[0] + TRAINING["b"] * change[1]) / sum(TRAINING.values())
            torch.testing.assert_close(given[number + 1][name], expected)
        assert any(not torch.equal(*(client.sent[number].weights[name] for client in (a, b))) for name in given[0])


def test_the_learning_rate_falls_over_all_rounds(federation):
    """`MonaiAlgo` makes the schedule as long as one round, after which a cosine rises."""
    for site, client in federation.clients.items():
        steps = STEPS[site]
        assert len(client.rates) == ROUNDS * LOCAL_EPOCHS * steps
        warm, rest = client.rates[:steps], client.rates[steps:]
        assert warm == sorted(warm)
        assert rest == sorted(rest, reverse=True) and rest[0] == 0.01
        assert 0 < rest[-1] < 0.05 * rest[0]


def test_evaluate_gives_the_dice_of_the_written_table(federation, folder):
    for site, client in federation.clients.items():
        metrics = client.evaluator.state.metrics
        classes = ("anterior", "posterior")
        assert metrics.keys() == {"mean_dice", *(f"{m}_{c}" for m in ("dice", "hd95", "nsd") for c in classes)}
        with (folder / f"runs/federated/{site}/eval/evaluation.csv").open(newline="") as file:
            table = {row["class"]: row for row in csv.DictReader(file)}
        assert metrics["mean_dice"] == client.dice[-1] == pytest.approx(float(table["mean"]["dice_mean"]), rel=1e-4)
        assert int(table["mean"]["cases"]) == CASES[site] - TRAINING[site]


def test_every_site_writes_into_its_own_folder(federation, folder):
    assert {path.split("/models/")[0].split("/eval/")[0] for path in federation.written} == {
        "runs/federated/a",
        "runs/federated/b",
    }
    for site in CASES:
        rows = read_metrics(folder / f"runs/federated/{site}/eval/metrics.csv")
        assert len(rows) == ROUNDS * LOCAL_EPOCHS
        ends = rows[LOCAL_EPOCHS - 1 :: LOCAL_EPOCHS]  # of the rounds
        assert all(row["val_mean_dice"] for row in ends)


def test_the_best_model_is_the_sites_own(federation, folder):
    for site, client in federation.clients.items():
        answer = client.get_weights({ExtraItems.MODEL_TYPE: ModelType.BEST_MODEL})
        assert answer.weight_type == WeightType.WEIGHTS
        written = torch.load(folder / f"runs/federated/{site}/models/model.pt", weights_only=True)
        assert answer.weights.keys() == written.keys() == federation.weights.keys()
        assert all(torch.equal(answer.weights[name], value) for name, value in written.items())


def test_an_aborted_round_does_not_spoil_the_next(federation):
    """After the tests above, because a site trains on."""
    client, weights = federation.clients["b"], federation.weights
    state = client.trainer.state
    epoch, step = state.epoch, state.iteration
    client.trainer.add_event_handler(Events.ITERATION_COMPLETED(once=step + 2), lambda: client.abort())
    client.train(ExchangeObject(weights))
    assert (state.epoch, state.iteration) == (epoch + 1, step + 2)
    client.train(ExchangeObject(weights))  # the rest of that epoch, too
    assert (state.epoch, state.iteration) == (epoch + 1 + LOCAL_EPOCHS, step + (1 + LOCAL_EPOCHS) * STEPS["b"])
    assert all(torch.isfinite(change).all() for change in client.get_weights().weights.values())
    client.finalize()


def test_statistics_of_the_sites_are_those_of_their_files(page, federation, folder):
    before = files(folder)
    statistics = page(1)["statistics"]
    written = {path for path, time in files(folder).items() if before.get(path) != time}
    assert {path.rpartition("/")[0] for path in written} == {"runs/federated/a", "runs/federated/b"}
    for site, count in CASES.items():
        found = statistics[site]
        counts = {part: (found[part]["data_count"], found[part]["fail_count"]) for part in found}
        rest = count - TRAINING[site]
        assert counts == {"train": (TRAINING[site], 0), "eval": (rest, 0), "total_data": (count, 0)}

        data = folder / f"data/site_{site}"
        names = sorted(path.name for path in (data / "imagesTr").iterdir())
        images, labels = ([np.asarray(nib.load(data / p / n).dataobj) for n in names] for p in ("imagesTr", "labelsTr"))
        stats = found["total_data"]["data_stats"]
        assert stats["image_stats"]["intensity"]["max"] == pytest.approx(max(image.max() for image in images), rel=1e-5)
        assert stats["label_stats"]["labels"] == [0, 1, 2]
        for value, label in enumerate(stats["label_stats"]["label"]):
            share = np.mean([(array == value).mean() for array in labels])
            assert label["foreground_percentage"]["mean"] == pytest.approx(share, rel=1e-4)
        (histogram,) = found["eval"]["data_stats"]["image_histogram"]["histogram"]
        validation = federation.clients[site].train_workflow.val_dataset_data
        images = [np.asarray(nib.load(case["image"]).dataobj) for case in validation]
        assert histogram["counts"] == sum(np.histogram(image, 20, (0, 1000))[0] for image in images).tolist()
