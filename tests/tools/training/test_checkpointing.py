"""A run that is ended by a signal and resumed is the run that was not, wherever in an epoch or validation it was."""

from __future__ import annotations

import multiprocessing
import os
import random
import signal
import subprocess
import sys
import time

import pytest
import torch
from ignite.engine import Events
from monai.data import DataLoader
from monai.engines import Evaluator, Trainer
from monai.handlers import CheckpointLoader
from monai.transforms import Compose, RandomizableTransform

from tools.common.tables import read_metrics
from tools.data.datasets import SeededDataset
from tools.data.sampling import SeededSampler
from tools.training.checkpointing import INTERRUPTED, SIGNALS, SaveCheckpoints, SignalsEndTheProcess
from tools.training.handlers import MetricsCSV, SeedSteps, ValidateEpochs, ValidationSchedule
from tools.weights.training_checkpoints import newest_checkpoint

EPOCHS, STEPS = 3, 4


class AddNumber(RandomizableTransform):
    """Adds a random number to an item."""

    def __call__(self, data):
        return {**data, "drawn": self.R.random()}


class DrawingTrainer(Trainer):
    """Its loss is the mean of what is drawn: by the transforms, by the network, and by Python."""

    def _iteration(self, engine, batch):
        drawn = (float(batch["drawn"].sum()), float(torch.rand(())), random.random())
        return {"loss": torch.tensor(drawn).double().mean(), "scans": batch["scan"].tolist(), "drawn": drawn}


class ScoringValidator(Evaluator):
    """Its metric is a random number, as of masks that the network draws."""

    def _iteration(self, engine, batch):
        engine.state.metrics["score"] = float(torch.rand(()))


class Run:
    """A training of three epochs of four steps."""

    def __init__(self, folder, resume=False, minutes=None, seed=0, workers=0):
        data = SeededDataset([{"scan": n} for n in range(2 * STEPS)], Compose([AddNumber()]))
        sampler = SeededSampler(data, seed)
        loader = DataLoader(data, batch_size=2, sampler=sampler, num_workers=workers)
        self.trainer = DrawingTrainer("cpu", EPOCHS, loader, decollate=False)
        self.validator = ScoringValidator("cpu", [0, 1, 2], decollate=False)
        self.seen, self.validated = [], []
        seeding = SeedSteps(seed, sampler)
        seeding.attach(self.trainer)
        schedule = ValidationSchedule(1, 1)
        ValidateEpochs(self.validator, schedule).attach(self.trainer)
        MetricsCSV(folder / "metrics.csv", self.validator).attach(self.trainer)
        self.validator.add_event_handler(
            Events.COMPLETED, lambda engine: self.validated.append((engine.state.epoch, engine.state.iteration % 4))
        )
        self.trainer.add_event_handler(Events.ITERATION_COMPLETED, self._note)
        state = {"trainer": self.trainer, "random": seeding, "validation": schedule}
        if resume:
            CheckpointLoader(str(newest_checkpoint(folder)), state).attach(self.trainer)
        self.saving = SaveCheckpoints(folder, state, self.validator, interval=1, minutes=minutes, kept=1)
        self.saving.attach(self.trainer)

    def _note(self, engine):
        self.seen.append((engine.state.iteration, engine.state.output["scans"], engine.state.output["drawn"]))

    def interrupt(self, number, engine, event):
        """Run, and send a signal to this process at an event."""
        engine.add_event_handler(event, lambda: os.kill(os.getpid(), number))
        with pytest.raises(SystemExit) as exit_:
            self.saving.run(self.trainer)
        assert exit_.value.code == INTERRUPTED == 75
        return self

    def finish(self):
        self.saving.run(self.trainer)
        return self


@pytest.fixture(autouse=True)
def signals():
    """A run that was interrupted ends its process, and so does not restore these."""
    before = {number: signal.getsignal(number) for number in (*SIGNALS, signal.SIGCHLD)}
    yield
    for number, handler in before.items():
        signal.signal(number, handler)


@pytest.fixture
def whole(tmp_path):
    run = Run(tmp_path / "whole").finish()
    numbers = {number for *_, drawn in run.seen for number in drawn}
    assert len(numbers) == 3 * EPOCHS * STEPS  # every step draws anew
    return run, read_metrics(tmp_path / "whole/metrics.csv")


def test_a_run_ended_after_any_step_goes_on_with_the_draws_of_the_whole_one(tmp_path, whole, capsys):
    for step in range(1, EPOCHS * STEPS):
        folder = tmp_path / str(step)
        number = SIGNALS[step % len(SIGNALS)]
        first = Run(folder)
        first.interrupt(number, first.trainer, Events.ITERATION_STARTED(once=step))
        epoch, within = divmod(step, STEPS)
        name = f"checkpoint_epoch={epoch + 1}_step={step}.pt" if within else f"checkpoint_epoch={epoch}_step={step}.pt"
        assert [path.name for path in folder.glob("*.pt")] == [name]
        said = f"{signal.Signals(number).name}: interrupted in epoch {epoch + bool(within)}, after step {step}; "
        assert said + str(folder / name) in capsys.readouterr().out
        rest = Run(folder, resume=True).finish()
        assert first.seen + rest.seen == whole[0].seen
        assert read_metrics(folder / "metrics.csv") == whole[1]
        assert first.validated + rest.validated == whole[0].validated


def test_a_validation_that_is_broken_off_is_repeated(tmp_path, whole):
    """In the middle, after its last batch, and of the last epoch; nothing takes its part for the whole."""
    for epoch, batch in ((1, 1), (2, 3), (EPOCHS, 2)):
        folder = tmp_path / f"{epoch}_{batch}"
        first = Run(folder)
        # every validation counts its batches anew
        event = Events.ITERATION_STARTED(
            event_filter=lambda engine, count, at=(epoch, batch): (engine.state.epoch, count) == at
        )
        first.interrupt(signal.SIGTERM, first.validator, event)
        assert [path.name for path in folder.glob("*.pt")] == [f"checkpoint_epoch={epoch}_step={epoch * STEPS}.pt"]
        assert len(read_metrics(folder / "metrics.csv")) == len(first.validated) == epoch - 1
        rest = Run(folder, resume=True).finish()
        assert first.seen + rest.seen == whole[0].seen
        assert read_metrics(folder / "metrics.csv") == whole[1]
        assert first.validated + rest.validated == whole[0].validated


def test_checkpoints_by_time_are_written_in_the_middle_of_epochs(tmp_path):
    names = []
    run = Run(tmp_path, minutes=1e-9)
    run.trainer.add_event_handler(
        Events.ITERATION_COMPLETED | Events.EPOCH_COMPLETED,
        lambda: names.extend(path.name for path in tmp_path.glob("*.pt")),
    )
    run.finish()
    steps = [f"checkpoint_epoch={(n + STEPS - 1) // STEPS}_step={n}.pt" for n in range(1, EPOCHS * STEPS) if n % STEPS]
    ends = [f"checkpoint_epoch={epoch}.pt" for epoch in range(1, EPOCHS + 1)]
    assert {*names} == {*steps, *ends} and [path.name for path in tmp_path.glob("*.pt")] == [ends[-1]]


@pytest.mark.parametrize("minutes", [None, 0, 1000])
def test_without_them_only_at_the_ends(tmp_path, minutes):
    run, names = Run(tmp_path, minutes=minutes), set()
    run.trainer.add_event_handler(
        Events.ITERATION_COMPLETED, lambda: names.update(path.name for path in tmp_path.glob("*.pt"))
    )
    run.finish()
    assert names == {"checkpoint_epoch=1.pt", "checkpoint_epoch=2.pt"}


@pytest.mark.parametrize(
    ("key", "value"),
    [("checkpoint_interval", 0), ("checkpoint_minutes", -1), ("checkpoints_kept", 0), ("checkpoints_kept", None)],
)
def test_numbers_out_of_range_are_refused(tmp_path, key, value):
    values = {
        "interval": 1,
        "minutes": 15,
        "kept": 1,
        key.removeprefix("checkpoint_").removeprefix("checkpoints_"): value,
    }
    with pytest.raises(ValueError, match=f"{key}: found {value}, expected a number, "):
        SaveCheckpoints(tmp_path, {}, None, **values)


def test_two_workers_draw_what_none_draws(tmp_path, whole):
    assert Run(tmp_path, workers=2).finish().seen == whole[0].seen


def test_the_seed_matters(tmp_path, whole):
    first, second = ({n for *_, drawn in run.seen for n in drawn} for run in (whole[0], Run(tmp_path, seed=1).finish()))
    assert not first & second


def test_a_run_that_is_not_interrupted_leaves_the_signals_as_they_were(tmp_path):
    before = [signal.getsignal(number) for number in SIGNALS]
    Run(tmp_path).finish()
    assert [signal.getsignal(number) for number in SIGNALS] == before


KEPT_WORKERS = """
import sys
from monai.data import DataLoader
from monai.engines import Evaluator, Trainer
from tools.training.checkpointing import SaveCheckpoints, ignore_signals

class Training(Trainer):
    def _iteration(self, engine, batch):
        if sys.argv[2] == "error":
            raise ValueError("of a step")
        return {}

loader = DataLoader([1, 2], num_workers=1, persistent_workers=True, worker_init_fn=ignore_signals)
trainer, validator = Training("cpu", 1, loader, decollate=False), Evaluator("cpu", [0], decollate=False)
saving = SaveCheckpoints(sys.argv[1], {"trainer": trainer}, validator, interval=1, minutes=None, kept=1)
saving.attach(trainer)
try:
    saving.run(trainer)
finally:
    sys.kept = loader, trainer  # referred to until the very end
"""


@pytest.mark.parametrize("ends", ["well", "error"])
def test_the_process_ends_though_workers_ignore_signals(tmp_path, ends):
    line = [sys.executable, "-c", KEPT_WORKERS, str(tmp_path), ends]
    done = subprocess.run(line, capture_output=True, text=True, timeout=100)
    assert done.returncode == (0 if ends == "well" else 1), done.stderr
    assert ("of a step" in done.stderr) == (ends == "error")


def test_a_forked_process_is_ended_by_a_signal_without_a_word(capfd):
    """Readers of scans have the handler of the run, and are ended by signals when the reading is over."""
    ended = []
    signals = SignalsEndTheProcess(lambda: ended.append(os.getpid()))
    signals.start()
    try:
        child = multiprocessing.get_context("fork").Process(target=time.sleep, args=(60,))
        child.start()
        time.sleep(0.5)
        child.terminate()
        child.join(30)
    finally:
        signals.stop()
    assert child.exitcode == -signal.SIGTERM
    assert "interrupted" not in capfd.readouterr().err and ended == []


WHILE_READING = """
import os, signal
from tools.data import reading
from tools.training.checkpointing import SignalsEndTheProcess

SignalsEndTheProcess(lambda: None).start()
with reading._held_back():
    os.write(2, b"of the library that reads")
    os.kill(os.getpid(), signal.SIGTERM)
"""


def test_a_signal_while_a_scan_is_read_is_told():
    """What the reading library writes to descriptor 2 is held back, and was the last word of the run with it."""
    done = subprocess.run([sys.executable, "-c", WHILE_READING], capture_output=True, text=True, timeout=100)
    assert done.returncode == INTERRUPTED
    assert done.stderr.strip() == "SIGTERM: interrupted while no step was under way: the same command goes on"
