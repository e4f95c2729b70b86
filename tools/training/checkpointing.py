"""Training checkpoints: by epochs, by time, and when a signal asks the run to end."""

from __future__ import annotations

import multiprocessing
import os
import signal
import sys
import threading
import time
from collections.abc import Callable, Mapping
from contextlib import suppress
from pathlib import Path
from types import FrameType
from typing import Any

import ignite.distributed as idist
import torch
import torch.distributed as dist
from ignite.engine import Engine, Events

from tools.common.files import remove_leftovers
from tools.common.ranks import leave_processes
from tools.training.handlers import RunEvents
from tools.weights.training_checkpoints import remove_old, save_checkpoint

INTERRUPTED = 75  # exit code: a checkpoint was written, start again (EX_TEMPFAIL of sysexits.h)
SIGNALS = [getattr(signal, name) for name in ("SIGTERM", "SIGINT", "SIGUSR1", "SIGHUP") if hasattr(signal, name)]


def ignore_signals(_worker: int) -> None:
    """`worker_init_fn` of data loaders: signals to all processes of a run are the trainer's to answer."""
    for number in SIGNALS:
        signal.signal(number, signal.SIG_IGN)


class SignalsEndTheProcess:
    """While no step is under way, a signal ends the process with `INTERRUPTED`, too: the same command begins again.

    A queue that starts a run anew upon this exit code then does so as well if the scans are still being read.

    Args:
        first: what is done before the process ends.
    """

    def __init__(self, first: Callable[[], None]) -> None:
        self.first = first
        self.before: dict[int, Any] = {}
        self.process = 0
        self.stderr = 2

    def start(self) -> None:
        """From now on; in the main thread, because Python allows it no other one."""
        if threading.current_thread() is threading.main_thread() and not self.before:
            self.process = os.getpid()
            self.stderr = os.dup(2)  # descriptor 2 itself is held back while a scan is read
            self.before = {number: signal.signal(number, self._end) for number in SIGNALS}

    def stop(self) -> None:
        """As it was before."""
        for number, handler in self.before.items():
            signal.signal(number, handler)
        if self.before:
            os.close(self.stderr)
        self.before = {}

    def _end(self, number: int, _frame: FrameType | None) -> None:
        if os.getpid() != self.process:  # a forked one, which reads scans, has this handler, too
            signal.signal(number, signal.SIG_DFL)
            os.kill(os.getpid(), number)
            return
        said = f"\n{signal.Signals(number).name}: interrupted while no step was under way: the same command goes on\n"
        os.write(self.stderr, said.encode())  # a print could have been interrupted
        self.first()
        for worker in multiprocessing.active_children():
            worker.kill()  # do not wait for the scans that they are reading
        with suppress(RuntimeError):  # it is being written to
            sys.stdout.flush()
        os._exit(INTERRUPTED)  # an exception would be caught by imports that MONAI makes


def _end_workers(*engines: Engine) -> None:
    """End the workers of data loaders: at the end of the process, Python would for ever wait for those that are left.

    It ends them with a signal, which they ignore.
    """
    for engine in engines:
        loader = getattr(engine, "data_loader", None)
        iterator = getattr(loader, "_iterator", None)  # there if the workers are kept between epochs
        if iterator is not None:
            iterator._shutdown_workers()
            for worker in iterator._workers:
                worker.kill()  # those that did not end within seconds
            loader._iterator = None


class SaveCheckpoints:
    """Saves the training state every so many epochs, every so many minutes, after the last epoch, and on a signal.

    After a signal the step ends, or the validation is broken off, which a resumed run repeats; then the run ends with
    the exit code `INTERRUPTED`. All processes agree after every step, so that a signal to one of them is enough.

    Args:
        folder: folder to write to.
        state: name → object with a `state_dict`; it holds the trainer.
        validator: engine of the validation.
        interval: number of epochs between checkpoints.
        minutes: time between checkpoints, also in the middle of an epoch; 0 or None: only at the end of epochs.
        kept: number of checkpoints to keep.

    Raises:
        ValueError: one of the numbers is out of range.
    """

    def __init__(
        self,
        folder: str | Path,
        state: Mapping[str, Any],
        validator: Engine,
        interval: int,
        minutes: float | None,
        kept: int,
    ) -> None:
        for key, found, least in (
            ("checkpoint_interval", interval, 1),
            ("checkpoint_minutes", minutes or 0, 0),
            ("checkpoints_kept", kept, 1),
        ):
            if not isinstance(found, int | float) or found < least:
                raise ValueError(f"{key}: found {found!r}, expected a number, {least} or more")
        self.folder = Path(folder)
        self.state = state
        self.validator = validator
        self.interval = interval
        self.minutes = minutes or float("inf")
        self.kept = kept
        self.signal = 0  # number of the one that this process got
        self.group: dist.ProcessGroup | None = None
        self.written: Path | None = None
        self.last = time.monotonic()

    def attach(self, engine: Engine) -> None:
        """Attach to the trainer, after all other handlers; remove what a killed run was writing."""
        if idist.get_rank() == 0:
            remove_leftovers(self.folder)
        if idist.get_world_size() > 1 and dist.get_backend() != "gloo":
            self.group = dist.new_group(backend="gloo")  # on the CPU: the GPU need not be waited for
        engine.register_events(*RunEvents)
        engine.state.epoch_ended = True
        engine.state_dict_user_keys.append("epoch_ended")
        engine.add_event_handler(Events.STARTED, self._remove_old)
        engine.add_event_handler(Events.STARTED, self._end_epoch)
        engine.add_event_handler(Events.ITERATION_COMPLETED, self._after_step)
        engine.add_event_handler(Events.EPOCH_COMPLETED, self._after_epoch)
        self.validator.add_event_handler(Events.ITERATION_COMPLETED, self._cut_validation)
        self.validator.add_event_handler(Events.EPOCH_COMPLETED, self._drop_validation)

    def run(self, trainer: Engine) -> None:
        """Run the trainer, and note signals meanwhile.

        Raises:
            SystemExit: with `INTERRUPTED`, after a signal.
        """
        main = threading.current_thread() is threading.main_thread()  # Python allows it no other one
        before = {number: signal.signal(number, self._note) for number in SIGNALS if main}
        try:
            trainer.run()
        finally:
            if interrupted := self.signal and trainer.should_terminate:
                before = {}  # further signals are not needed
            for number, handler in before.items():
                signal.signal(number, handler)
            if not interrupted:
                _end_workers(trainer, self.validator)
        if interrupted:
            self._leave(trainer)

    def _note(self, number: int, _frame: FrameType | None) -> None:
        self.signal = number

    def _agreed(self) -> int:
        """What to do, the same in all processes: 0 nothing, 1 save, or 1 + the number of a signal."""
        late = idist.get_rank() == 0 and time.monotonic() - self.last >= 60 * self.minutes
        asked = torch.tensor(1 + self.signal if self.signal else int(late))
        if idist.get_world_size() > 1:
            dist.all_reduce(asked, dist.ReduceOp.MAX, group=self.group)
            self.signal = max(int(asked) - 1, 0)
        return int(asked)

    def _after_step(self, engine: Engine) -> None:
        if engine.state.iteration % engine.state.epoch_length == 0:
            return  # the end of the epoch follows
        if asked := self._agreed():
            self._save(engine, engine.state.iteration)
        if asked > 1:
            engine.terminate()

    def _after_epoch(self, engine: Engine) -> None:
        epoch, asked, cut = engine.state.epoch, self._agreed(), self.validator.should_terminate
        last = epoch == engine.state.max_epochs
        if asked or last or epoch % self.interval == 0:
            self._save(engine, engine.state.iteration if cut else None)
        if asked > 1 and (cut or not last):
            engine.terminate()

    def _cut_validation(self, validator: Engine) -> None:
        if self.signal:
            validator.terminate_epoch()  # so that the processes meet at the computation of the metrics

    def _drop_validation(self, validator: Engine) -> None:
        if self._agreed() > 1:
            validator.terminate(skip_completed=True)  # no best weights of a part of the scans

    def _remove_old(self, engine: Engine) -> None:
        """Finish what a run that was killed while it deleted checkpoints did not come to."""
        if idist.get_rank() == 0:
            state = engine.state
            remove_old(self.folder, state.epoch, None if state.epoch_ended else state.iteration, self.kept)

    def _end_epoch(self, engine: Engine) -> None:
        """Repeat the end of an epoch whose validation was broken off."""
        state = engine.state
        if state.iteration % state.epoch_length == 0 and not state.epoch_ended:
            engine.fire_event(Events.EPOCH_STARTED)
            engine.fire_event(Events.EPOCH_COMPLETED)

    def _save(self, engine: Engine, step: int | None) -> None:
        engine.state.epoch_ended = step is None
        engine.fire_event(RunEvents.SAVING)
        self.last = time.monotonic()
        if idist.get_rank() == 0:
            content = {name: part.state_dict() for name, part in self.state.items()}
            self.written = save_checkpoint(self.folder, content, engine.state.epoch, step, self.kept)

    def _leave(self, trainer: Engine) -> None:
        if idist.get_rank() == 0:
            print(
                f"{signal.Signals(self.signal).name}: interrupted in epoch {trainer.state.epoch}, after step "
                f"{trainer.state.iteration}; {self.written} is written: the same command with --resume true continues",
                flush=True,
            )
        if idist.get_world_size() > 1:
            leave_processes()
        if hasattr(signal, "SIGCHLD"):
            signal.signal(signal.SIGCHLD, signal.SIG_DFL)  # torch's handler would report the next line as an error
        for worker in multiprocessing.active_children():
            worker.kill()  # do not wait for the scans that they are reading
        raise SystemExit(INTERRUPTED)
