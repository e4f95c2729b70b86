"""Handlers for the training of all bundles, in addition to MONAI's: progress, metrics.csv, seeds, best weights."""

from __future__ import annotations

import math
import random
import time
from collections.abc import Mapping, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any

import ignite.distributed as idist
import numpy as np
import torch
from ignite.engine import Engine, EventEnum, Events
from monai.engines import Evaluator
from monai.engines.utils import IterationEvents
from monai.utils import convert_to_tensor
from torch import Tensor, nn
from tqdm import tqdm

from tools.common.cards import save_weights
from tools.common.files import atomic_path, remove_leftovers
from tools.common.processes import return_freed_memory
from tools.common.ranks import mark_step
from tools.common.tables import read_metrics, write_rows
from tools.data.sampling import SeededSampler
from tools.weights.training_checkpoints import newest_checkpoint

WAIT = 0.5  # seconds between two looks at a value that is still on the device


class RunEvents(EventEnum):
    """Events of a trainer beside those of Ignite and MONAI."""

    SAVING = "saving"  # in all processes, before a checkpoint is written


def loss_terms(output: Mapping[str, Any] | list[dict[str, Any]]) -> dict[str, Tensor]:
    """Return the entries `loss` and `loss_…` of an engine's output, decollated or not."""
    output = output if isinstance(output, Mapping) else output[0]
    # MONAI decollates a loss into plain numbers, and its names are no plain text
    return {str(name): torch.as_tensor(value).detach() for name, value in output.items() if name.startswith("loss")}


class ProgressBar:
    """Progress bar of the whole training with the loss terms and the time left, and one line per validation.

    On rank 0 only.

    Args:
        validator: engine whose metrics are printed after each of its runs.
        metrics: names of the metrics to print.
    """

    def __init__(self, validator: Engine, metrics: Sequence[str]) -> None:
        self.validator = validator
        self.metrics = metrics

    def attach(self, engine: Engine) -> None:
        """Attach to the trainer."""
        if idist.get_rank() > 0:
            return
        engine.add_event_handler(Events.EPOCH_STARTED, self._open)
        engine.add_event_handler(Events.ITERATION_COMPLETED, self._advance)
        engine.add_event_handler(Events.COMPLETED, self._close)
        engine.add_event_handler(Events.EXCEPTION_RAISED, self._close_and_raise)
        self.validator.add_event_handler(Events.COMPLETED, self._print_validation)
        self.bar: tqdm | None = None
        self.read = -math.inf

    def _open(self, engine: Engine) -> None:
        state = engine.state
        if self.bar is None:
            total = state.max_epochs * state.epoch_length
            self.bar = tqdm(total=total, initial=state.iteration, unit="step", dynamic_ncols=True, mininterval=WAIT)
        self.bar.set_description(f"epoch {state.epoch}/{state.max_epochs}", refresh=False)

    def _advance(self, engine: Engine) -> None:
        state, now = engine.state, time.monotonic()
        last = state.iteration == state.max_epochs * state.epoch_length
        if now - self.read >= WAIT or last:  # reading a value waits for the GPU
            self.read = now
            terms = loss_terms(state.output).items()
            self.bar.set_postfix({name: f"{float(value):.4f}" for name, value in terms}, refresh=False)
        self.bar.update()

    def _close(self) -> None:
        if self.bar is not None:  # resuming a finished run starts no epoch
            self.bar.close()
            self.bar = None  # in federated learning, another round follows

    def _close_and_raise(self, engine: Engine, error: BaseException) -> None:
        self._close()  # now, so that the error is printed below it
        raise error

    def _print_validation(self, validator: Engine) -> None:
        values = {name: validator.state.metrics[name] for name in self.metrics if name in validator.state.metrics}
        line = "  ".join(f"{name} {value:.4f}" for name, value in values.items())
        tqdm.write(f"validation, epoch {validator.state.epoch}: {line}")


class ValidationSchedule:
    """When to validate: every so many steps, at the end of an epoch, within a share of the run's time.

    The last epoch is always validated. Times and steps so far are part of the training checkpoint.

    Args:
        interval: least number of steps between validations.
        share: 0 to 1; largest share of the run's time so far for validations, this one included, which is expected to
            take as long as the last one. 1 is no bound.

    Raises:
        ValueError: `interval` or `share` is out of range.
    """

    def __init__(self, interval: int, share: float) -> None:
        if interval < 1:
            raise ValueError(f"val_interval: found {interval}, expected steps, 1 or more")
        if not 0 <= share <= 1:
            raise ValueError(f"val_share: found {share}, expected a share of the time, 0 to 1")
        self.interval = interval
        self.share = share
        self.step = 0  # of the last validation
        self.last = self.spent = self.before = 0.0  # s: the last one, all validations, the run before it was resumed
        self.began = time.monotonic()

    def restart(self, trainer: Engine) -> None:
        """Attach to the start of the trainer: in federated learning, every round counts its steps anew."""
        self.step = min(self.step, trainer.state.iteration)

    def seconds(self) -> float:
        """Duration of the run so far, s."""
        return self.before + time.monotonic() - self.began

    def due(self, trainer: Engine, epoch: int) -> bool:
        """Whether to validate after this epoch; the same in all processes, by the clock of rank 0."""
        rested = trainer.state.iteration - self.step >= self.interval
        short = self.spent + self.last <= self.share * (self.seconds() + self.last)
        return bool(idist.broadcast(float(epoch == trainer.state.max_epochs or (rested and short))))

    def validated(self, trainer: Engine, seconds: float) -> None:
        """Note a validation."""
        self.step, self.last, self.spent = trainer.state.iteration, seconds, self.spent + seconds

    def state_dict(self) -> dict[str, float]:
        """Return the state for a checkpoint."""
        return {"step": self.step, "last": self.last, "spent": self.spent, "seconds": self.seconds()}

    def load_state_dict(self, state: Mapping[str, float]) -> None:
        """Go on where the checkpoint was written."""
        self.step, self.last, self.spent = int(state["step"]), state["last"], state["spent"]
        self.before, self.began = state["seconds"], time.monotonic()


class ValidateEpochs:
    """Validates after the epochs that a schedule selects.

    All validations draw the same random numbers, and those of the training are not changed.

    Args:
        validator: engine to run.
        schedule: when to validate.
    """

    def __init__(self, validator: Evaluator, schedule: ValidationSchedule) -> None:
        self.validator = validator
        self.schedule = schedule

    def attach(self, engine: Engine) -> None:
        """Attach to the trainer."""
        engine.add_event_handler(Events.STARTED, self.schedule.restart)
        engine.add_event_handler(Events.EPOCH_COMPLETED(event_filter=self.schedule.due), self)

    def __call__(self, engine: Engine) -> None:
        """Validate now."""
        began = time.monotonic()
        self.validator.state.steps = engine.state.iteration  # for the card of the weights
        with torch.random.fork_rng():  # a data loader draws a seed whenever it is iterated
            torch.manual_seed(idist.get_rank())
            self.validator.run(engine.state.epoch)
        return_freed_memory()
        if not self.validator.should_terminate:  # a validation that was interrupted is repeated
            self.schedule.validated(engine, time.monotonic() - began)


class MetricsCSV:
    """Writes `metrics.csv`: one row per epoch with the mean of each training term, and the validation's metrics.

    In epochs without a validation its cells are empty. A resumed run replaces the rows of epochs that it repeats. The
    sums of the epoch so far, of each process, are part of the trainer's state in a checkpoint.

    Args:
        path: file to write.
        validator: engine whose metrics are written with the prefix `val_`.
    """

    def __init__(self, path: str | Path, validator: Engine) -> None:
        self.path = Path(path)
        self.validator = validator
        self._validation: dict[str, float] = {}
        self._sums: dict[str, Tensor] = {}  # term → sum of its finite values, and their number

    def attach(self, engine: Engine) -> None:
        """Attach to the trainer, after the handler that validates."""
        if idist.get_rank() == 0:
            remove_leftovers(self.path.parent)
            remove_leftovers(self.path.parent / "figures")
        engine.register_events(*RunEvents)
        engine.state.sums = []
        engine.state_dict_user_keys.append("sums")
        engine.add_event_handler(Events.EPOCH_STARTED, self._begin)
        engine.add_event_handler(Events.ITERATION_COMPLETED, self._add)
        engine.add_event_handler(RunEvents.SAVING, self._gather)
        engine.add_event_handler(Events.EPOCH_COMPLETED, self._write)
        self.validator.add_event_handler(Events.COMPLETED, self._keep_validation)

    def _begin(self, engine: Engine) -> None:
        self._validation = {}
        sums = next(iter(engine.state.sums[idist.get_rank() :]), {})
        self._sums = {name: torch.tensor(pair, dtype=torch.float64) for name, pair in sums.items()}

    def _add(self, engine: Engine) -> None:
        for name, value in loss_terms(engine.state.output).items():
            finite = value.isfinite()  # others belong to steps that are skipped
            pair = torch.stack([value.double().where(finite, 0), finite.double()])
            self._sums[name] = pair + self._sums[name].to(pair.device) if name in self._sums else pair

    def _gather(self, engine: Engine) -> None:
        pairs = [[pair.tolist() for pair in self._sums.values()]]
        rows = idist.all_gather(torch.tensor(pairs, dtype=torch.float64, device=idist.device()))
        engine.state.sums = [dict(zip(self._sums, row, strict=True)) for row in rows.tolist()]

    def _keep_validation(self, validator: Engine) -> None:
        self._validation = {f"val_{name}": value for name, value in validator.state.metrics.items()}

    def _write(self, engine: Engine) -> None:
        if self.validator.should_terminate:
            return  # the end of this epoch is repeated
        sums = {name: [idist.all_reduce(x) for x in pair.tolist()] for name, pair in self._sums.items()}
        means = {name: total / number if number else math.nan for name, (total, number) in sums.items()}
        self._sums, engine.state.sums = {}, []
        if idist.get_rank() > 0:
            return
        row = {"epoch": engine.state.epoch, **means, **self._validation}
        rows = [old for old in read_metrics(self.path) if int(old["epoch"]) < engine.state.epoch]
        rows.append({name: f"{value:.6g}" for name, value in row.items()})
        names = list(dict.fromkeys(name for r in rows for name in r))
        # training terms first, independent of the epoch of the first validation
        names.sort(key=lambda name: name.startswith("val_"))
        write_rows(self.path, rows, names)


class SeedSteps:
    """Seeds the random generators of the network before each step from (seed, step, rank).

    So a checkpoint needs only the seed and the number of steps to restore the generators of all processes: a run that
    is resumed, in the middle of an epoch too, draws the same random numbers as an uninterrupted one, with any number of
    workers. (The sampler of the data loader seeds the random transforms.)

    Args:
        seed: random seed of the run.
        sampler: sampler of the training data, which gets the seed of a checkpoint too.
    """

    def __init__(self, seed: int, sampler: SeededSampler) -> None:
        self.seed = seed
        self.sampler = sampler

    def attach(self, engine: Engine) -> None:
        """Attach to the trainer."""
        engine.add_event_handler(Events.EPOCH_STARTED, self._skip)
        engine.add_event_handler(Events.ITERATION_STARTED, self._seed)

    def _skip(self, engine: Engine) -> None:
        done = engine.state.iteration - (engine.state.epoch - 1) * engine.state.epoch_length  # steps of this epoch
        self.sampler.start = done * engine.data_loader.batch_size

    def _seed(self, engine: Engine) -> None:
        sequence = np.random.SeedSequence([self.seed, engine.state.iteration, idist.get_rank()])
        state = int(sequence.generate_state(1)[0])
        random.seed(state)
        torch.default_generator.manual_seed(state)  # 100 times as fast as torch.manual_seed
        if engine.state.device.type != "cpu":
            torch.get_device_module(engine.state.device).manual_seed(state)

    def state_dict(self) -> dict[str, int]:
        """Return the state for a checkpoint."""
        return {"seed": self.seed}

    def load_state_dict(self, state: Mapping[str, int]) -> None:
        """Restore the seed of the checkpoint, instead of that of the config."""
        self.seed = self.sampler.seed = state["seed"]


class BestWeights:
    """Saves the weights with the best validation, as bare state dicts, each with its card.

    The best value so far is part of the training checkpoints, so that a resumed run does not replace a better model.

    Args:
        weights: file name → module whose weights are saved.
        ckpt_dir: folder to write to.
        card: what the card says, as `training_card` returns it; epoch, steps and metrics are added.
        metric: name of the validation metric to compare.
        lower_is_better: whether a lower metric is better, as for a loss.
    """

    def __init__(
        self,
        weights: Mapping[str, nn.Module],
        ckpt_dir: str | Path,
        card: Mapping[str, Any],
        metric: str,
        lower_is_better: bool = False,
    ) -> None:
        self.weights = weights
        self.ckpt_dir = Path(ckpt_dir)
        self.card = card
        self.metric = metric
        self.lower_is_better = lower_is_better
        self.best = math.inf if lower_is_better else -math.inf

    def attach(self, engine: Engine) -> None:
        """Attach to the validator."""
        engine.add_event_handler(Events.COMPLETED, self)

    def __call__(self, validator: Engine) -> None:
        """Compare, and write if better (rank 0 only)."""
        value = validator.state.metrics[self.metric]
        better = value < self.best if self.lower_is_better else value > self.best
        if better:
            self.best = value
        elif math.isfinite(self.best) or not math.isnan(value):
            return  # NaN is not better, but as long as no validation can be compared, the newest weights are kept
        if idist.get_rank() > 0:
            return
        state = validator.state
        metrics = {name: float(f"{v:.6g}") if math.isfinite(v) else None for name, v in state.metrics.items()}
        # only `ValidateEpochs` knows the steps
        reached = {"epoch": state.epoch, "steps": getattr(state, "steps", None), "metrics": metrics}
        for name, module in self.weights.items():
            save_weights(self.ckpt_dir / name, module.state_dict(), {**self.card, **reached})

    def state_dict(self) -> dict[str, float]:
        """Return the state for a checkpoint."""
        return {"best": self.best}

    def load_state_dict(self, state: Mapping[str, float]) -> None:
        """Restore the best value."""
        self.best = state["best"]


class MarkSteps:
    """Tells the other processes at which step of training or validation this one is, so that one that hangs is named.

    Args:
        validator: engine of the validation.
    """

    def __init__(self, validator: Engine) -> None:
        self.validator = validator

    def attach(self, engine: Engine) -> None:
        """Attach to the trainer."""
        for one, kind in ((engine, "step"), (self.validator, "validation, batch")):
            one.add_event_handler(Events.ITERATION_STARTED, self._mark, kind)

    def _mark(self, engine: Engine, kind: str) -> None:
        mark_step(f"{kind} {engine.state.iteration} (epoch {engine.state.epoch})")


class GradientClipping:
    """Clips the global norm of the gradients before every optimizer step.

    Args:
        network: network whose gradients are clipped.
        max_norm: maximum norm of all gradients together.
    """

    def __init__(self, network: nn.Module, max_norm: float) -> None:
        self.network = network
        self.max_norm = max_norm

    def attach(self, engine: Engine) -> None:
        """Attach to the trainer."""
        engine.add_event_handler(IterationEvents.BACKWARD_COMPLETED, self)

    def __call__(self) -> None:
        """Clip now."""
        nn.utils.clip_grad_norm_(self.network.parameters(), self.max_norm)


class GuardLoss:
    """Looks for losses that are not finite: stops the run, or skips the step. The batch is saved for inspection.

    `stop`: on CPUs before the weights are updated; on GPUs within half a second. A GPU computes later than Python runs,
    and reading a loss waits for it. So the losses of a GPU are checked together, twice a second, at the end of each
    epoch, and before anything is saved.

    `skip`: no process updates its weights in a step in which the loss of one is not finite. Every step waits for the
    GPU.

    Args:
        network: network whose gradients are dropped in a step that is skipped.
        ckpt_dir: folder of the training checkpoints, for the error message.
        output_dir: folder of the saved batches, `bad_batch_step=N_rank=R.pt`.
        on_bad_loss: `stop` or `skip`.
        limit: number of steps in a row that are skipped; one more stops the run.

    Raises:
        FloatingPointError: the loss is not finite; the message names the step, the loss terms, the files of the batch
            and the last good checkpoint.
        ValueError: `on_bad_loss` is unknown.
    """

    def __init__(
        self,
        network: nn.Module,
        ckpt_dir: str | Path,
        output_dir: str | Path,
        on_bad_loss: str = "stop",
        limit: int = 10,
    ) -> None:
        if on_bad_loss not in ("stop", "skip"):
            raise ValueError(f"on_bad_loss: found {on_bad_loss!r}, expected stop or skip")
        self.network = network
        self.ckpt_dir, self.output_dir = Path(ckpt_dir), Path(output_dir)
        self.skips = on_bad_loss == "skip"
        self.limit = limit
        self.skipped = self.in_a_row = 0
        self._bad = False  # this step, on any rank
        self._unchecked: list[tuple[int, int, Mapping[str, Any], dict[str, Tensor]]] = []
        self._checked = -math.inf

    def attach(self, engine: Engine) -> None:
        """Attach to the trainer, before handlers that validate or save, or look at gradients."""
        engine.register_events(*RunEvents)
        engine.add_event_handler(IterationEvents.LOSS_COMPLETED, self)
        if self.skips:
            engine.add_event_handler(IterationEvents.BACKWARD_COMPLETED, self._drop_gradients)
        else:
            engine.add_event_handler(Events.EPOCH_COMPLETED, self._check)
            engine.add_event_handler(RunEvents.SAVING, self._check)

    def __call__(self, engine: Engine) -> None:
        """Note the loss of this step, and check those that were noted if it is time."""
        terms, state = loss_terms(engine.state.output), engine.state
        noted = (state.iteration, state.epoch, state.batch, terms)
        if self.skips:
            self._judge(noted)
            return
        self._unchecked.append(noted)
        if terms["loss"].is_cpu or time.monotonic() - self._checked >= WAIT:
            self._check()

    def _check(self) -> None:
        noted, self._unchecked = self._unchecked, []
        self._checked = time.monotonic()
        if not noted:
            return
        finite = torch.stack([terms["loss"].isfinite() for *_, terms in noted]).tolist()
        if not all(finite):
            raise FloatingPointError(self._text(*noted[finite.index(False)]))

    def _judge(self, noted: tuple[int, int, Mapping[str, Any], dict[str, Tensor]]) -> None:
        own = not bool(noted[-1]["loss"].isfinite())
        self._bad = idist.all_reduce(float(own)) > 0
        self.in_a_row = self.in_a_row + 1 if self._bad else 0
        self.skipped += self._bad
        if own:
            text = self._text(*noted)
            tqdm.write(f"WARNING: step skipped, the {self.skipped}. of this start: {text}")
        if self.in_a_row > self.limit:
            text = text if own else "the loss of another process is not finite"
            raise FloatingPointError(f"{self.in_a_row} steps in a row (bad_loss_limit: {self.limit}): {text}")

    def _drop_gradients(self, engine: Engine) -> None:
        if self._bad:
            for parameter in self.network.parameters():
                if engine.scaler is None:
                    parameter.grad = None
                elif parameter.grad is not None:  # MONAI's scaler of gradients wants some, and skips these
                    parameter.grad.fill_(math.nan)

    def _text(self, step: int, epoch: int, batch: Mapping[str, Any], terms: Mapping[str, Tensor]) -> str:
        found = ", ".join(f"{name} {float(value):.4g}" for name, value in terms.items())
        files = sorted(set(batch["file"]))
        path = self.output_dir / f"bad_batch_step={step}_rank={idist.get_rank()}.pt"
        tensors = {name: convert_to_tensor(value) for name, value in batch.items() if isinstance(value, Tensor)}
        with suppress(OSError, RuntimeError), atomic_path(path) as temporary:  # a full disk must not hide the loss
            torch.save({**tensors, "file": list(batch["file"]), "step": step}, temporary)
        saved = f", saved as {path}" if path.exists() else ""
        last = newest_checkpoint(self.ckpt_dir)
        return f"the loss is not finite at step {step} (epoch {epoch}): {found}; batch{saved}: {', '.join(files)}; " + (
            f"the last good checkpoint is {last}" if last else "no checkpoint had been written yet"
        )
