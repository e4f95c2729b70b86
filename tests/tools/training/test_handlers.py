"""Handlers of training, on small engines."""

from __future__ import annotations

import gc
import json
import math
import weakref

import pytest
import torch
from ignite.engine import Engine, Events
from monai.data import DataLoader
from monai.engines import Evaluator, Trainer
from monai.engines.utils import IterationEvents

from tools.common.cards import digest
from tools.common.files import atomic_path
from tools.common.tables import read_metrics, report_metrics
from tools.training import handlers
from tools.training.checkpointing import SaveCheckpoints
from tools.training.handlers import (
    BestWeights,
    GuardLoss,
    MetricsCSV,
    ProgressBar,
    ValidateEpochs,
    ValidationSchedule,
)


class FakeTrainer(Trainer):
    """Its loss is the number of the iteration."""

    def _iteration(self, engine, batch):
        return [{"loss": torch.tensor(float(engine.state.iteration)), "loss_pr": torch.tensor(0.5), "pred": 1}]


class FakeValidator(Evaluator):
    """Its metric is the epoch."""

    def _iteration(self, engine, batch):
        engine.state.metrics["loss"] = float(engine.state.epoch)


def engines(epochs=3):
    trainer = FakeTrainer("cpu", epochs, [0, 1], decollate=False)
    return trainer, FakeValidator("cpu", [0], decollate=False)


def test_metrics_csv_has_one_row_per_epoch(tmp_path):
    trainer, validator = engines()
    ValidateEpochs(validator, ValidationSchedule(4, 1)).attach(trainer)
    MetricsCSV(tmp_path / "metrics.csv", validator).attach(trainer)
    trainer.run()
    assert read_metrics(tmp_path / "metrics.csv") == [
        {"epoch": "1", "loss": "1.5", "loss_pr": "0.5", "val_loss": ""},
        {"epoch": "2", "loss": "3.5", "loss_pr": "0.5", "val_loss": "2"},
        {"epoch": "3", "loss": "5.5", "loss_pr": "0.5", "val_loss": "3"},
    ]


def test_what_a_validation_leaves_behind_is_freed():
    """Objects that refer to themselves, as figures do, would wait for Python's collector."""

    class Figure:
        def __init__(self):
            self.own = self

    trainer, validator = engines(epochs=2)
    drawn = []
    validator.add_event_handler(Events.COMPLETED, lambda: drawn.append(weakref.ref(Figure())))
    ValidateEpochs(validator, ValidationSchedule(2, 1)).attach(trainer)
    gc.disable()
    try:
        trainer.run()
    finally:
        gc.enable()
    assert len(drawn) == 2
    assert [figure() for figure in drawn] == [None, None]


def test_the_progress_bar_comes_back_in_another_round(capsys):
    """As in federated learning, which runs one trainer several times."""
    trainer, validator = engines(epochs=1)
    ProgressBar(validator, ["loss"]).attach(trainer)
    for _ in range(2):
        trainer.run()
        assert "epoch 1/1: 100%" in capsys.readouterr().err
        trainer.state.epoch = trainer.state.iteration = 0


def validated_epochs(trainer, validator, schedule):
    """Run, with as many as are asked for."""
    ValidateEpochs(validator, schedule).attach(trainer)
    seen = []
    validator.add_event_handler(Events.COMPLETED, lambda: seen.append(validator.state.epoch))
    trainer.run()
    return seen


@pytest.mark.parametrize(
    ("interval", "expected"), [(1, [1, 2, 3, 4, 5]), (2, [1, 2, 3, 4, 5]), (3, [2, 4, 5]), (4, [2, 4, 5]), (20, [5])]
)
def test_validations_are_so_many_steps_apart_and_the_last_epoch_has_one(interval, expected):
    assert validated_epochs(*engines(epochs=5), ValidationSchedule(interval, 1)) == expected


@pytest.fixture
def clock(monkeypatch):
    """Time in which a training step takes 1 s, and a validation 2 s."""
    now = [0.0]
    monkeypatch.setattr("tools.training.handlers.time.monotonic", lambda: now[0])

    def run(trainer, validator, schedule):
        trainer.add_event_handler(Events.ITERATION_COMPLETED, lambda: now.__setitem__(0, now[0] + 1))
        validator.add_event_handler(Events.ITERATION_COMPLETED, lambda: now.__setitem__(0, now[0] + 2))
        return validated_epochs(trainer, validator, schedule)

    return run


@pytest.mark.parametrize(
    ("share", "expected"),
    [(1, [*range(1, 11)]), (0.4, [1, 3, 5, 6, 8, 9, 10]), (0.25, [1, 6, 9, 10]), (0, [1, 10])],
)
def test_validations_take_no_more_than_their_share_of_the_time(clock, share, expected):
    """After 2 n steps of training and v validations: 2 (v + 1) seconds of 2 n + 2 (v + 1)."""
    assert clock(*engines(epochs=10), ValidationSchedule(1, share)) == expected


def test_a_resumed_schedule_goes_on_where_it_was(clock):
    whole = ValidationSchedule(3, 0.3)
    expected, state = clock(*engines(epochs=12), whole), whole.state_dict()
    first = ValidationSchedule(3, 0.3)
    trainer, validator = engines(epochs=12)
    trainer.add_event_handler(Events.EPOCH_COMPLETED(once=5), lambda engine: engine.terminate())
    start = clock(trainer, validator, first)
    rest = ValidationSchedule(3, 0.3)
    again, validator = engines(epochs=12)
    again.load_state_dict(trainer.state_dict())
    again.add_event_handler(Events.STARTED, lambda: rest.load_state_dict(first.state_dict()))
    assert start + clock(again, validator, rest) == expected
    assert rest.state_dict() == pytest.approx(state)


def test_every_round_of_a_federation_validates_as_the_first():
    trainer, validator = engines(epochs=4)
    schedule = ValidationSchedule(4, 1)
    assert validated_epochs(trainer, validator, schedule) == [2, 4]
    trainer.state.epoch = trainer.state.iteration = 0
    seen = []
    validator.add_event_handler(Events.COMPLETED, lambda: seen.append(validator.state.epoch))
    trainer.run()
    assert seen == [2, 4]


def test_validations_leave_the_random_numbers_of_the_training_alone():
    """A data loader draws a seed whenever it is iterated."""

    def draws(interval):
        torch.manual_seed(3)
        trainer, _ = engines(epochs=4)
        validator = FakeValidator("cpu", DataLoader([0, 1], batch_size=1), decollate=False)
        ValidateEpochs(validator, ValidationSchedule(interval, 1)).attach(trainer)
        drawn = []
        trainer.add_event_handler(Events.ITERATION_COMPLETED, lambda: drawn.append(float(torch.rand(()))))
        trainer.run()
        return drawn

    assert len(draws(1)) == 8 and draws(1) == draws(100)


@pytest.mark.parametrize(("interval", "share", "named"), [(0, 0.1, "val_interval"), (1, 1.5, "val_share")])
def test_a_schedule_out_of_range_is_refused(interval, share, named):
    with pytest.raises(ValueError, match=f"{named}: found"):
        ValidationSchedule(interval, share)


def test_a_word_for_bad_losses_that_is_unknown_is_named(tmp_path):
    with pytest.raises(ValueError, match="on_bad_loss: found 'ignore', expected stop or skip"):
        GuardLoss(torch.nn.Linear(1, 1), tmp_path, tmp_path, "ignore")


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_a_loss_that_is_not_finite_stops_the_run(tmp_path, value):
    for epoch in (2, 10):
        torch.save({"epoch": epoch}, tmp_path / f"checkpoint_epoch={epoch}.pt")
    trainer = FakeTrainer("cpu", 1, [0], decollate=False)

    def step(engine, _batch):
        engine.state.batch = {"file": ["/scans/a.nii.gz"]}
        engine.state.output = [{"loss": torch.tensor(value), "loss_pr": torch.tensor(0.25)}]
        engine.fire_event(IterationEvents.LOSS_COMPLETED)

    trainer._process_function = step
    GuardLoss(torch.nn.Linear(1, 1), tmp_path, tmp_path / "out").attach(trainer)
    with pytest.raises(FloatingPointError) as error:
        trainer.run()
    for part in (f"loss {value}", "step 1 (epoch 1)", "loss_pr 0.25", "/scans/a.nii.gz", "checkpoint_epoch=10.pt"):
        assert part in str(error.value)


def test_losses_of_a_gpu_are_read_later_and_blamed_on_their_own_step(tmp_path, monkeypatch):
    """The device decides; here a tensor of the CPU says that it is elsewhere."""
    read = []

    class Elsewhere(torch.Tensor):
        is_cpu = False

        def isfinite(self):
            read.append(1)
            return super().isfinite()

    trainer = FakeTrainer("cpu", 2, [0, 1, 2], decollate=False)
    monkeypatch.setattr(handlers.time, "monotonic", lambda: 1000.0)  # time stands still after the first look

    def step(engine, _batch):
        number = engine.state.iteration
        engine.state.batch = {"file": [f"/scans/{number}.nii.gz"]}
        value = torch.tensor(float("nan") if number == 2 else 1.0).as_subclass(Elsewhere)
        engine.state.output = [{"loss": value}]
        engine.fire_event(IterationEvents.LOSS_COMPLETED)
        assert len(read) == 1, "a step waited for the device"

    trainer._process_function = step
    GuardLoss(torch.nn.Linear(1, 1), tmp_path, tmp_path / "out").attach(trainer)
    SaveCheckpoints(tmp_path, {"trainer": trainer}, engines()[1], interval=1, minutes=None, kept=2).attach(trainer)
    with pytest.raises(FloatingPointError, match=r"step 2 \(epoch 1\).*/scans/2\.nii\.gz.*no checkpoint"):
        trainer.run()
    assert trainer.state.iteration == 3  # the epoch ends, but nothing is saved after it
    assert not list(tmp_path.glob("*.pt"))
    assert torch.load(tmp_path / "out/bad_batch_step=2_rank=0.pt")["file"] == ["/scans/2.nii.gz"]


@pytest.mark.parametrize(("interval", "expected"), [(2, {2, 4, 5}), (5, {5}), (9, {5})])
def test_the_last_epoch_is_always_saved_and_once(tmp_path, interval, expected):
    trainer, validator = engines(epochs=5)
    SaveCheckpoints(tmp_path, {"trainer": trainer}, validator, interval=interval, minutes=None, kept=5).attach(trainer)
    trainer.run()
    assert {path.name for path in tmp_path.iterdir()} == {f"checkpoint_epoch={epoch}.pt" for epoch in expected}


def test_report_writes_what_it_prints(tmp_path, capsys):
    report_metrics({"loss": 0.25, "psnr": 20.0}, tmp_path / "out/evaluation.csv")
    assert read_metrics(tmp_path / "out/evaluation.csv") == [{"loss": "0.25", "psnr": "20.0"}]
    assert "psnr  20.0000" in capsys.readouterr().out


def test_a_failed_write_leaves_the_old_file(tmp_path):
    path = tmp_path / "file.txt"
    path.write_text("old")
    with pytest.raises(RuntimeError), atomic_path(path) as temporary:
        temporary.write_text("half of the new")
        raise RuntimeError
    assert path.read_text() == "old"
    assert list(tmp_path.iterdir()) == [path]


@pytest.mark.parametrize(
    ("lower_is_better", "values", "kept"),
    [
        (False, [0.5, 0.7, 0.6, float("nan")], [0, 1, 1, 1]),
        (True, [3.0, 2.0, float("nan"), 2.5], [0, 1, 1, 1]),
        (False, [float("nan"), float("nan"), 0.2, float("nan")], [0, 1, 2, 2]),  # the newest, as long as none is best
    ],
)
def test_the_best_weights_are_kept(tmp_path, lower_is_better, values, kept):
    network, validator = torch.nn.Linear(1, 1), Engine(lambda *_: None)
    handler = BestWeights({"model.pt": network}, tmp_path, {"scans": 3}, "score", lower_is_better)
    handler.attach(validator)
    for epoch, value in enumerate(values):
        torch.nn.init.constant_(network.weight, epoch)
        validator.state.epoch, validator.state.steps = epoch, 10 * epoch
        validator.state.metrics |= {"score": value, "absent": float("nan")}
        validator.fire_event(Events.COMPLETED)
        assert torch.load(tmp_path / "model.pt", weights_only=True)["weight"] == kept[epoch]
        best, card = kept[epoch], json.loads((tmp_path / "model.json").read_text())
        assert card.pop("sha256") == digest({"weight": torch.tensor([[float(best)]]), "bias": network.bias})
        score = None if math.isnan(values[best]) else values[best]
        reached = {"epoch": best, "steps": 10 * best, "metrics": {"score": score, "absent": None}}
        assert card == {"format": 1, "scans": 3, **reached}
    again = BestWeights({}, tmp_path, {}, "score", lower_is_better)
    again.load_state_dict(handler.state_dict())
    assert again.best == handler.best
