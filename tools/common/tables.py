"""Tables that are printed, and the CSV files that runs write."""

from __future__ import annotations

import csv
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import ignite.distributed as idist

from tools.common.files import atomic_path


def read_metrics(path: str | Path) -> list[dict[str, str]]:
    """Read the rows of a CSV file of a run; an empty list if there is no file."""
    if not Path(path).is_file():
        return []
    with Path(path).open(newline="", encoding="utf-8") as file:
        return list(csv.DictReader(file))


def write_rows(path: str | Path, rows: Sequence[Mapping[str, Any]], names: Sequence[str] | None = None) -> None:
    """Write a CSV; its columns are `names`, or those of the first row."""
    with atomic_path(path) as temporary, temporary.open("w", newline="", encoding="utf-8") as file:
        writer = csv.DictWriter(file, list(rows[0] if rows else []) if names is None else names)
        writer.writeheader()
        writer.writerows(rows)


def aligned(lines: Sequence[Sequence[str]], numbers: bool = False) -> str:
    """Lines of cells as a text table; with `numbers`, all columns but the first end where their heads end."""
    widths = [max(map(len, column)) for column in zip(*lines, strict=True)]
    justify = [str.ljust, *[str.rjust if numbers else str.ljust] * (len(widths) - 1)]
    cells = ([f(cell, width) for f, cell, width in zip(justify, line, widths, strict=True)] for line in lines)
    return "\n".join("  ".join(line).rstrip() for line in cells)


def report_metrics(metrics: Mapping[str, float], path: str | Path) -> None:
    """Print metrics and write them as a CSV with one row (rank 0 only)."""
    if idist.get_rank() > 0:
        return
    write_rows(path, [metrics])
    width = max(map(len, metrics))
    print(
        "\n".join(f"  {name:<{width}}  {value:.4f}" for name, value in metrics.items()),
        f"\nwritten to {path}",
    )


def print_written(*paths: str | Path) -> None:
    """Print the paths of a run's results that exist (rank 0 only)."""
    found = [str(path) for path in paths if Path(path).exists()]
    if idist.get_rank() == 0 and found:
        print("written:", *found, sep="\n  ", flush=True)


def print_table(lines: Sequence[tuple[str, str]]) -> None:
    """Print rows of a name and a text, the names aligned (rank 0 only)."""
    if idist.get_rank() == 0:
        width = max(len(name) for name, _ in lines)
        print("\n".join(f"  {name:<{width}}  {text}" for name, text in lines), flush=True)
