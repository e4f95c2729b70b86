"""Tells early in a run which terms of the loss are not learning."""

from __future__ import annotations

from collections.abc import Iterator, Mapping

import ignite.distributed as idist
from ignite.engine import Engine, Events
from tqdm import tqdm

# term → metric, its value by chance (a metric or a number), its best value, what usually helps
TERMS = {
    **dict.fromkeys(
        ("loss_pr", "loss_l1"),
        ("masked_mse", "mean_mse", 0.0, "a higher --learning_rate, or a lower one if the loss jumps"),
    ),
    "loss_num": ("number_accuracy", "number_majority", 1.0, "a longer warm-up (--warmup_epochs), more --weight_num"),
    "loss_loc": ("location_auroc", 0.5, 1.0, "a longer warm-up (--warmup_epochs), more --weight_loc"),
    "loss_cl": (
        *("retrieval_accuracy", "retrieval_chance", 1.0),
        "more crops to compare (--batch_size, --crops_per_volume), a lower --temperature",
    ),
}
LEARNT = 0.05  # of the way from chance to the best value


class WarnOfChance:
    """At the first validation after a tenth of the run, one line names the terms whose metric is still at chance.

    Args:
        weights: term → its weight in the loss; those with 0 are not trained.
        epochs: length of the run.
    """

    def __init__(self, weights: Mapping[str, float], epochs: int) -> None:
        self.weights = weights
        self.epochs = epochs
        self._done = False

    def attach(self, engine: Engine) -> None:
        """Attach to the validator, on rank 0."""
        if idist.get_rank() == 0:
            engine.add_event_handler(Events.COMPLETED, self)

    def __call__(self, validator: Engine) -> None:
        """Look, once."""
        epoch = validator.state.epoch
        if self._done or epoch < self.epochs / 10:
            return
        self._done = True
        if found := list(self._at_chance(validator.state.metrics)):
            tqdm.write(f"WARNING: at chance after {epoch} of {self.epochs} epochs: {'; '.join(found)}")

    def _at_chance(self, metrics: Mapping[str, float]) -> Iterator[str]:
        for term, (name, chance, best, advice) in TERMS.items():
            if self.weights.get(term) and name in metrics:
                level = metrics[chance] if isinstance(chance, str) else chance
                if (metrics[name] - level) * (best - level) < LEARNT * (best - level) ** 2:
                    yield f"{term} ({name} {metrics[name]:.4g}, by chance {level:.4g}): try {advice}"
