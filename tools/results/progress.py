"""A progress bar for evaluation and inference."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import ignite.distributed as idist
from ignite.engine import Engine, Events
from tqdm import tqdm


class CaseProgress:
    """Progress bar with the current case, the numbers of finished and remaining cases, and the time left (rank 0)."""

    def attach(self, engine: Engine) -> None:
        """Attach to an evaluator."""
        if idist.get_rank() > 0:
            return
        engine.add_event_handler(Events.STARTED, self._open)
        engine.add_event_handler(Events.GET_BATCH_COMPLETED, self._name)
        engine.add_event_handler(Events.ITERATION_COMPLETED, self._advance)
        engine.add_event_handler(Events.COMPLETED, self._close)
        engine.add_event_handler(Events.EXCEPTION_RAISED, self._close_and_raise)
        self.bar: tqdm | None = None

    def _open(self, engine: Engine) -> None:
        self.bar = tqdm(total=len(engine.data_loader.sampler), unit="case", dynamic_ncols=True)

    def _name(self, engine: Engine) -> None:
        self.bar.set_description(case_name(engine.state.batch))

    def _advance(self, engine: Engine) -> None:
        self.bar.update(min(engine.data_loader.batch_size, self.bar.total - self.bar.n))

    def _close(self) -> None:
        self.bar.close()

    def _close_and_raise(self, engine: Engine, error: BaseException) -> None:
        self._close()  # now, so that the error is printed below it
        raise error


def case_name(batch: Mapping[str, Any] | Sequence[Mapping[str, Any]]) -> str:
    """Name of the first image file of a data loader's batch."""
    item = batch if isinstance(batch, Mapping) else batch[0]
    path = item["file"] if "file" in item else item["image"].meta["filename_or_obj"]
    return Path(path if isinstance(path, str) else path[0]).name
