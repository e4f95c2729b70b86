"""Tables that are printed, and the CSV files that runs write."""

from __future__ import annotations

import csv
from collections.abc import Mapping, Sequence
from pathlib import Path

import ignite.distributed as idist

from tools.common.files import atomic_path


def read_metrics(path: str | Path) -> list[dict[str, str]]:
    """Rows of a `metrics.csv`; none if there is no file."""
    if not Path(path).is_file():
        return []
    with Path(path).open(newline="") as file:
        return list(csv.DictReader(file))


def report_metrics(metrics: Mapping[str, float], path: str | Path) -> None:
    """Print metrics and write them as a CSV with one row (rank 0 only)."""
    if idist.get_rank() > 0:
        return
    with atomic_path(path) as temporary, temporary.open("w", newline="") as file:
        writer = csv.DictWriter(file, list(metrics))
        writer.writeheader()
        writer.writerow(metrics)
    width = max(map(len, metrics))
    print(
        "\n".join(f"  {name:<{width}}  {value:.4f}" for name, value in metrics.items()),
        f"\nwritten to {path}",
    )


def print_written(*paths: str | Path) -> None:
    """Print where a run has left its results: those of the paths that exist (rank 0 only)."""
    found = [str(path) for path in paths if Path(path).exists()]
    if idist.get_rank() == 0 and found:
        print("written:", *found, sep="\n  ", flush=True)


def print_table(lines: Sequence[tuple[str, str]]) -> None:
    """Print rows of a name and a text, the names aligned (rank 0 only)."""
    if idist.get_rank() == 0:
        width = max(len(name) for name, _ in lines)
        print("\n".join(f"  {name:<{width}}  {text}" for name, text in lines), flush=True)
