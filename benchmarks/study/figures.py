"""The figures of a report: learning curves, Dice against labels, and Dice against what pre-training costs.

Drawn as `tools.results.figures` does, without pyplot. An arm has the same colour, marker and line in all of them.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import numpy as np
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.ticker import FixedLocator, MaxNLocator, NullLocator

from benchmarks.study.findings import Findings
from benchmarks.study.plan import Row, rows
from benchmarks.study.settings import METHODS
from benchmarks.study.statistics import Estimate, estimate
from tools.common.files import atomic_path

# Okabe and Ito's colours, which differ for colour-blind readers; markers and lines differ in grey
STYLES = {
    "scratch": ("#4d4d4d", "o", "-"),
    "simclr": ("#E69F00", "s", "--"),
    "simmim": ("#56B4E9", "^", "-."),
    "mae": ("#009E73", "D", ":"),
    "hybridmim": ("#D55E00", "v", "-"),
}
DPI = 200
PANEL = (2.5, 2.2)  # inches


def draw(findings: Findings) -> dict[str, str]:
    """Draw what there is something to draw of.

    Returns:
        Path of each picture, from the output folder, and what it shows.
    """
    asked = {1, 2} & set(findings.study.asked.tables)
    made = [row for row in rows(findings.study, 1) if row.fractions] if asked else []
    seeds = len(findings.study.asked.seeds)
    bands = f"means over {seeds} seeds and 95 % intervals, which end at the frame" if seeds > 1 else "one seed"
    lines = f"{bands}; thin lines: each seed" if seeds > 1 else bands
    pictures = {
        "figures/curves.png": (_curves, f"Validation Dice against training steps; {lines}."),
        "figures/labels.png": (_labels, f"Test Dice against the number of labelled training cases; {bands}."),
        "figures/cost.png": (_cost, f"Test Dice with the fewest labels against the cost of pre-training; {bands}."),
    }
    drawn = {}
    for path, (figure, text) in pictures.items():
        if made and figure(findings, made, findings.study.output_dir / path):
            drawn[path] = text
    return drawn


def _by_network(made: Sequence[Row]) -> dict[str, list[Row]]:
    return {
        network: [row for row in made if row.arm.network == network]
        for network in dict.fromkeys(r.arm.network for r in made)
    }


def _curves(findings: Findings, made: Sequence[Row], path: Path) -> bool:
    fractions = sorted({fraction for row in made for fraction in row.fractions})
    networks = _by_network(made)
    figure, grid = _grid(len(networks), len(fractions))
    shown: set[str] = set()
    for across, (network, of_network) in zip(grid, networks.items(), strict=True):
        values: list[float] = []
        for axes, fraction in zip(across, fractions, strict=True):
            if not any(fraction in row.fractions for row in of_network):
                axes.set_axis_off()
            for row in of_network:
                curves = findings.curves(row.arm, fraction) if fraction in row.fractions else {}
                points = _band(curves)
                if not points:
                    continue
                colour, marker, line = STYLES[row.arm.method]
                steps, means = [step for step, _ in points], [found.mean for _, found in points]
                few = max(1, len(steps) // 8)
                axes.plot(steps, means, line, color=colour, marker=marker, markevery=few, **_THIN)
                wide = [found.half_width or 0 for _, found in points]
                if any(wide):
                    low, high = np.subtract(means, wide), np.add(means, wide)
                    axes.fill_between(steps, low, high, color=colour, alpha=0.08, linewidth=0)
                    for curve in curves.values():
                        axes.plot(*zip(*curve, strict=True), line, color=colour, alpha=0.6, linewidth=0.5)
                values += means
                shown.add(row.arm.method)
            axes.xaxis.set_major_locator(MaxNLocator(nbins=4, integer=True))
            axes.set_xlim(left=0)
        _limits(across, values)
        across[0].set_ylabel(f"{network}\nvalidation Dice", fontsize=9)
    for axes, fraction in zip(grid[0], fractions, strict=True):
        axes.set_title(_fraction(findings, fraction), fontsize=9)
    for column in zip(*grid, strict=True):
        lowest = [axes for axes in column if axes.axison][-1]
        lowest.set_xlabel("training steps", fontsize=9)
    return _save(figure, path, shown)


def _band(curves: dict[int, list[tuple[int, float]]]) -> list[tuple[int, Estimate]]:
    """Mean and interval over seeds at each step that all of them have."""
    by_seed = [dict(curve) for curve in curves.values()]
    steps = sorted(set.intersection(*(set(curve) for curve in by_seed))) if by_seed else []
    return [(step, estimate([curve[step] for curve in by_seed])) for step in steps]


def _labels(findings: Findings, made: Sequence[Row], path: Path) -> bool:
    networks = _by_network(made)
    figure, [across] = _grid(1, len(networks))
    shown: set[str] = set()
    values: list[float] = []
    for axes, (network, of_network) in zip(across, networks.items(), strict=True):
        for number, row in enumerate(of_network):
            found = {f: dice for f in row.fractions if (dice := findings.dice(row.arm, f))}
            if not found:
                continue
            # side by side, so that intervals do not hide one another
            places = [f * 1.05 ** (number - (len(of_network) - 1) / 2) for f in found]
            _points(axes, places, list(found.values()), row.arm.method, line=True)
            values += [dice.mean for dice in found.values()]
            shown.add(row.arm.method)
        fractions = sorted({fraction for row in of_network for fraction in row.fractions})
        axes.set_xscale("log")
        axes.xaxis.set_major_locator(FixedLocator(fractions))
        axes.xaxis.set_minor_locator(NullLocator())
        axes.set_xticklabels([f"{100 * fraction:g} %\n({findings.study.labelled(fraction)})" for fraction in fractions])
        axes.set_xlim(fractions[0] / 1.25, fractions[-1] * 1.25)
        axes.set_title(network, fontsize=9)
        axes.set_xlabel("share of the labels (cases)", fontsize=9)
    _limits(across, values)
    across[0].set_ylabel("test Dice", fontsize=9)
    return _save(figure, path, shown)


def _cost(findings: Findings, made: Sequence[Row], path: Path) -> bool:
    networks = _by_network(made)
    figure, [across] = _grid(1, len(networks))
    costs = [cost.mean for row in made if (cost := findings.pretraining_seconds(row.arm))]
    unit, size = ("hours", 3600) if max(costs, default=0) > 3 * 3600 else ("minutes", 60)
    shown: set[str] = set()
    values: list[float] = []
    for axes, (network, of_network) in zip(across, networks.items(), strict=True):
        fraction = min(fraction for row in of_network for fraction in row.fractions)
        for row in of_network:
            dice = findings.dice(row.arm, fraction) if fraction in row.fractions else None
            cost = findings.pretraining_seconds(row.arm)
            if dice is None or cost is None:
                continue
            if row.arm.method == "scratch":
                axes.axhline(dice.mean, color=STYLES["scratch"][0], linewidth=0.8, linestyle=":")
            _points(axes, [cost.mean / size], [dice], row.arm.method, line=False)
            values.append(dice.mean)
            shown.add(row.arm.method)
        axes.set_title(f"{network}, {100 * fraction:g} % of the labels", fontsize=9)
        axes.set_xlabel(f"pre-training ({unit})", fontsize=9)
        axes.margins(x=0.12)
    _limits(across, values)
    across[0].set_ylabel("test Dice", fontsize=9)
    return _save(figure, path, shown)


_THIN = {"linewidth": 1.3, "markersize": 3.5}


def _points(axes: Axes, places: Sequence[float], found: Sequence[Estimate], method: str, line: bool) -> None:
    colour, marker, style = STYLES[method]
    means, widths = [dice.mean for dice in found], [dice.half_width or 0 for dice in found]
    axes.errorbar(
        places,
        means,
        yerr=widths if any(widths) else None,
        color=colour,
        marker=marker,
        linestyle=style if line else "none",
        capsize=2.5,
        elinewidth=0.9,
        **({**_THIN, "markersize": 5}),
    )


def _grid(down: int, across: int) -> tuple[Figure, list[list[Axes]]]:
    size = (0.6 + PANEL[0] * max(across, 2), 0.75 + PANEL[1] * down)
    figure = Figure(figsize=size, dpi=DPI, layout="constrained")
    figure.get_layout_engine().set(w_pad=0.06, h_pad=0.06)
    FigureCanvasAgg(figure)
    grid = figure.subplots(down, across, squeeze=False, sharey="row")
    for axes in grid.flat:
        axes.grid(alpha=0.25, linewidth=0.6)
        axes.tick_params(labelsize=8)
        axes.spines[["top", "right"]].set_visible(False)
    return figure, [list(row) for row in grid]


def _limits(across: Sequence[Axes], values: Sequence[float]) -> None:
    """Show the means: with two seeds, intervals are many times wider than what there is to see."""
    if values:
        margin = max(0.3 * (max(values) - min(values)), 0.01)
        for axes in across:
            axes.set_ylim(max(0, min(values) - margin), min(1, max(values) + margin))


def _fraction(findings: Findings, fraction: float) -> str:
    return f"{100 * fraction:g} % of the labels ({findings.study.labelled(fraction)} cases)"


def _save(figure: Figure, path: Path, shown: set[str]) -> bool:
    """Add the legend and write the file; False, and no file, if nothing was drawn."""
    if not shown:
        path.unlink(missing_ok=True)
        return False
    lines = [
        Line2D([], [], color=colour, marker=marker, linestyle=line, label=METHODS[method], linewidth=1.3, markersize=5)
        for method, (colour, marker, line) in STYLES.items()
        if method in shown
    ]
    figure.legend(handles=lines, loc="outside lower center", ncols=len(lines), frameon=False, fontsize=9)
    with atomic_path(path) as temporary:
        figure.savefig(temporary, format="png")
    return True
