"""The tables of a report, in Markdown. What has not been run yet is `—`."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence

from benchmarks.study.findings import MEAN, Findings, Reached, seconds
from benchmarks.study.plan import Arm, Row, left_out, length, mask_name, rows
from benchmarks.study.runs import Record
from benchmarks.study.settings import METHODS
from benchmarks.study.statistics import Estimate, estimate
from tools.common.text import bytes_text

MISSING = "—"
TITLES = {
    1: "Test Dice",
    2: "Convergence",
    3: "Parts of HybridMIM",
    4: "Mask ratio and patch size",
    5: "Cost of pre-training",
    6: "Resolution",
}


def markdown(head: Sequence[str], lines: Sequence[Sequence[str]]) -> str:
    """A table."""
    text = [head, ["---"] * len(head), *lines]
    return "\n".join(f"| {' | '.join(line)} |" for line in text)


def number(found: Estimate | None, seeds: int, digits: int = 3, sign: bool = False) -> str:
    """A mean with its interval, and of how many seeds it is if some are missing."""
    if found is None:
        return MISSING
    text = f"{found.mean:{'+' if sign else ''}.{digits}f}"
    if found.half_width is not None:
        text += f" ± {found.half_width:.{digits}f}"
    return text if found.seeds == seeds else f"{text} ({found.seeds} of {seeds} seeds)"


def _mean_dice(findings: Findings, arm: Arm, fraction: float, name: str = MEAN) -> str:
    return number(findings.dice(arm, fraction, name), len(findings.study.asked.seeds))


def _gain(findings: Findings, arm: Arm, other: Arm, fraction: float) -> str:
    """Difference in test Dice to another arm, if it is another."""
    found = findings.difference(arm, other, fraction) if arm != other else None
    return number(found, len(findings.study.asked.seeds), sign=True)


def table(findings: Findings, which: int) -> str:
    """One of the six tables, with what its columns mean."""
    return _TABLES[which](findings)


def _each(made: Sequence[Row]) -> Iterator[tuple[Row, float]]:
    return ((row, fraction) for row in made for fraction in row.fractions)


def _by_labels(made: Sequence[Row]) -> list[tuple[Row, float]]:
    """Network by network, from few labels to many."""
    networks = list(dict.fromkeys(row.arm.network for row in made))
    return sorted(_each(made), key=lambda pair: (networks.index(pair[0].arm.network), pair[1]))


# -------------------------------------------------------------------------------------------------------- table 1


def _dice(findings: Findings) -> str:
    made = [row for row in rows(findings.study, 1) if row.fractions]
    others = [row for row in made if row.arm.method != "scratch"]
    classes, names = [], (*findings.classes(), MEAN)
    for row, fraction in _by_labels(made):
        rate = findings.rate(row.arm, fraction)
        first = [row.arm.network, f"{fraction:g}", row.name, MISSING if rate is None else f"{rate:g}"]
        classes.append([*first, *(_mean_dice(findings, row.arm, fraction, name) for name in names)])
    return "\n\n".join(
        [
            "Mean over classes, by share of the training cases:",
            _by_fraction(findings, made, lambda arm, f: _mean_dice(findings, arm, f)),
            "Difference to training from scratch: same test cases, same labels, same seed, paired; mean over cases and "
            "seeds:",
            _by_fraction(findings, others, lambda arm, f: _gain(findings, arm, arm.baseline, f)),
            "By class, at the learning rate that was chosen:",
            markdown(["network", "labels", "method", "rate", *names], classes),
        ]
    )


def _by_fraction(findings: Findings, made: Sequence[Row], value: Callable[[Arm, float], str]) -> str:
    fractions = sorted({fraction for row in made for fraction in row.fractions})
    lines = [
        [row.arm.network, row.name, *(value(row.arm, f) if f in row.fractions else "" for f in fractions)]
        for row in made
    ]
    head = ["network", "method", *(f"{f:g} ({findings.study.labelled(f)} cases)" for f in fractions)]
    return markdown(head, lines)


# -------------------------------------------------------------------------------------------------------- table 2


def _convergence(findings: Findings) -> str:
    lines = []
    for row, fraction in _by_labels(rows(findings.study, 2)):
        arm = row.arm
        times = findings.reached(arm, fraction)
        steps, _ = length(findings.study, fraction)
        lines.append(
            [
                *(arm.network, f"{fraction:g}", row.name, *_when(times, len(findings.study.asked.seeds))),
                str(steps),
                *(_faster(findings, arm, Arm(arm.network, other), fraction) for other in ("scratch", "simclr")),
            ]
        )
    head = ["network", "labels", "method", "reached with", "steps", "epochs", "seconds"]
    return "\n\n".join(
        [
            "The first validation at which the Dice is what training from scratch ends with, for the same network, "
            "labels and seed, and the number of seeds with which it came to that. Seconds are those of the training "
            "steps. *Faster*: the other one's steps over this one's, if both got there with every seed.",
            markdown([*head, "of", "faster than scratch", "faster than SimCLR"], lines),
        ]
    )


def _when(times: dict[int, Reached | None], seeds: int) -> list[str]:
    """Cells: with how many seeds it was reached; mean steps with their interval, epochs and seconds."""
    reached = [time for time in times.values() if time]
    if not times:
        return [MISSING] * 4
    if not reached:
        return ["never", *[MISSING] * 3]
    steps = number(estimate([time.steps for time in reached]), len(reached), digits=0)
    others = ([time.epochs for time in reached], [time.seconds for time in reached])
    run = f" ({len(times)} of {seeds} seeds)" if len(times) < seeds else ""
    means = [estimate(values) for values in others]
    return [
        f"{len(reached)} of {len(times)}{run}",
        steps,
        *(MISSING if mean is None else f"{mean.mean:.0f}" for mean in means),
    ]


def _faster(findings: Findings, arm: Arm, other: Arm, fraction: float) -> str:
    times = [list(findings.reached(a, fraction).values()) for a in (arm, other)]
    if not all(times) or not all(time for values in times for time in values):
        return MISSING
    ours, theirs = (sum(time.steps for time in values) / len(values) for values in times)
    return f"{theirs / ours:.2f}×"


# -------------------------------------------------------------------------------------------------------- table 3


def _ablation(findings: Findings) -> str:
    network = findings.study.preset.ablation["network"]
    full = Arm(network, "hybridmim")
    lines = [
        [
            *(row.name, f"{fraction:g}", _mean_dice(findings, row.arm, fraction)),
            *(_gain(findings, row.arm, other, fraction) for other in (row.arm.baseline, full)),
        ]
        for row, fraction in _each(rows(findings.study, 3))
    ]
    text = [
        f"{METHODS['hybridmim']} with {network}, one part changed at a time; mean test Dice over classes. Differences "
        "are paired, as in table 1.",
        markdown(["variant", "labels", "test Dice", "to scratch", "to the method as configured"], lines),
    ]
    missing = left_out(findings.study)
    if missing:
        text.append(
            f"Left out, because crops of this size have no such box that fits the network: {', '.join(missing)}."
        )
    return "\n\n".join(text)


# -------------------------------------------------------------------------------------------------------- table 4


def _masks(findings: Findings) -> str:
    numbers = findings.study.preset.masks
    by_name = {row.name: row.arm for row in rows(findings.study, 4)}
    parts = [f"{METHODS['hybridmim']} with {numbers['network']}; mean test Dice over classes."]
    for fraction in numbers["fractions"]:
        lines = []
        for patch in numbers["patch_size"]:
            arms = [by_name[mask_name(ratio, patch)] for ratio in numbers["mask_ratio"] if by_name]
            lines.append([f"{patch}", *(_mean_dice(findings, arm, fraction) for arm in arms)])
        head = ["patch (voxels)", *(f"{ratio:g} masked" for ratio in numbers["mask_ratio"])]
        parts += [f"Labels {fraction:g} ({findings.study.labelled(fraction)} cases):", markdown(head, lines)]
    return "\n\n".join(parts)


# -------------------------------------------------------------------------------------------------------- table 5


def _cost(findings: Findings) -> str:
    fractions = findings.study.preset.cost["fractions"]
    lines = []
    for row in rows(findings.study, 5):
        records = list(findings.pretrainings(row.arm).values())
        name = row.name if not row.arm.pretraining else f"{METHODS[row.arm.method]}, {row.name}"
        lines.append(
            [
                *(row.arm.network, name, str(findings.study.preset.pretraining.epochs)),
                *_pace(records, findings.study.preset.pretraining.epochs),
                *(_mean_dice(findings, row.arm, fraction) for fraction in fractions),
            ]
        )
    head = ["network", "method", "epochs", "s per step", "s per epoch", "min in all", "peak memory"]
    return "\n\n".join(
        [
            "Means over seeds. Times are those of the training steps: reading, validation and the start of the process "
            "are not among them. Memory is the GPU's, or without one that of the whole process.",
            markdown([*head, *(f"test Dice, labels {fraction:g}" for fraction in fractions)], lines),
        ]
    )


def _pace(records: Sequence[Record], epochs: int) -> list[str]:
    """Cells: seconds per step, per epoch, minutes in all, memory."""
    if not records:
        return [MISSING] * 4
    steps = estimate([record["seconds_per_step"] or math.nan for record in records])
    whole = estimate([seconds(record) for record in records])
    memory = max(record["peak_gpu_memory"] or record["peak_memory"] for record in records)
    if steps is None or whole is None:  # a single step has no time between two
        return [*[MISSING] * 3, bytes_text(memory)]
    return [f"{steps.mean:.3f}", f"{whole.mean / epochs:.1f}", f"{whole.mean / 60:.1f}", bytes_text(memory)]


# -------------------------------------------------------------------------------------------------------- table 6


def _resolution(findings: Findings) -> str:
    lines = [
        [
            *(row.name, f"{fraction:g}", _mean_dice(findings, row.arm, fraction)),
            _gain(findings, row.arm, row.arm.baseline, fraction),
        ]
        for row, fraction in _each(rows(findings.study, 6))
    ]
    return "\n\n".join(
        [
            f"{findings.study.preset.resolution['network']}, pre-trained and fine-tuned on scans resampled to this "
            "spacing, tested in the geometry of the files; mean test Dice over classes. The difference is to scratch "
            "at the same spacing, paired.",
            markdown(["method and spacing", "labels", "test Dice", "to scratch"], lines),
        ]
    )


_TABLES: dict[int, Callable[[Findings], str]] = {
    1: _dice,
    2: _convergence,
    3: _ablation,
    4: _masks,
    5: _cost,
    6: _resolution,
}
