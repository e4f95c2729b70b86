"""What the planner would say of the five bundles' own data sets, beside what their configs say.

    python -m benchmarks.planning hippocampus --dataset_dir /path/to/Task04_Hippocampus

Prints the rows of the table in docs/planning.md: a key, its value in the bundle, and the planner's.
"""

from __future__ import annotations

from typing import Any

import fire
import yaml

from tools.commands.bundles import DEFAULTS, FACTS
from tools.commands.new_bundle import DEFAULT, network_memory
from tools.common.command_line import keep_text
from tools.data.cases import find_cases
from tools.data.datalists import read_datalist
from tools.data.fingerprint import fingerprint
from tools.training.planning import AXES, plan_segmentation

KEYS = ("spacing", "roi_size", "batch_size", "crops_per_volume", "epochs", "val_overlap", "cache", "surface_tolerance")


def compare(facts: dict[str, Any], planned: dict[str, Any]) -> list[tuple[str, str, str]]:
    """A row for each decision: key, the bundle's value, the planner's."""
    rows = [(key, facts[key], planned[key]) for key in KEYS]
    rows.append(("intensity", *(f"{one['intensity']} {one.get('window', '')}" for one in (facts, planned))))
    for n, axis in enumerate(AXES):
        flips = (0 if axis in one["no_flips"] else one["flip_probability"] for one in (facts, planned))
        rows.append((f"flip_probability[{n}], {axis}", *flips))
    return [(key, *(str(value).strip() for value in values)) for key, *values in rows]


def main(name: str, dataset_dir: str, datalist: str | None = None, memory_gb: float = 8, workers: int = 4) -> None:
    """Print the table of a bundle.

    Args:
        name: of the bundle's facts, as hippocampus.
        dataset_dir: folder of its data set.
        datalist: list of cases, instead of the published layout.
        memory_gb: that the planner may use.
        workers: number of processes that read.
    """
    facts = {**DEFAULTS, **yaml.safe_load((FACTS / f"{name}.yaml").read_text(encoding="utf-8"))}
    if datalist is None:
        cases = find_cases(dataset_dir, facts["layout"], facts["modalities"])
    else:
        cases = read_datalist(datalist, dataset_dir, "training", labels=True)
    hounsfield, classes = facts["intensity"] == "hu_window", facts["classes"]
    outputs = len(classes) + (facts["activation"] == "softmax")
    memory = network_memory(DEFAULT, len(facts["channels"]), outputs, 16, memory_gb)
    planned, _ = plan_segmentation(fingerprint(cases, hounsfield, workers), classes, hounsfield, memory)
    print(f"{len(cases)} cases, {memory_gb} GB\n\n| key | {name} | planner |\n| --- | --- | --- |")
    for row in compare(facts, planned):
        print(f"| {' | '.join(row)} |")


if __name__ == "__main__":
    fire.Fire(keep_text(main))
