"""`report.html`: what the folder of a run holds, on one page without any other file."""

from __future__ import annotations

import base64
import csv
import json
import logging
import os
import platform
import sys
import tempfile
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import redirect_stdout
from pathlib import Path
from typing import Any, NamedTuple

import ignite
import ignite.distributed as idist
import jinja2
import monai
import psutil
import torch
import yaml

from tools.common.files import atomic_path
from tools.common.tables import read_metrics
from tools.common.text import bytes_text, command_text
from tools.results.figures import COMPARISONS, curves_figure

logger = logging.getLogger(__name__)

NAME = "report.html"
PLAN = "docs/plan.json"  # in a bundle
PICTURES = {  # file, of which the last in the order of names is shown: title, text
    "figures/reconstruction_epoch=*.png": ("Reconstruction", "Validation: what the network paints where it is masked."),
    "figures/features_epoch=*.png": ("Features", "What the encoder sees: the same colour is the same feature."),
    "figures/views_epoch=*.png": ("Views", "Two views of one scan, which the contrastive term brings together."),
    "figures/segmentation_epoch=*.png": ("Segmentation", "The last validation of the training."),
    "figures/evaluation/best_*.png": ("Best case", "Of the evaluation, by the mean Dice of its classes."),
    "figures/evaluation/worst_*.png": ("Worst case", "Of the evaluation, by the mean Dice of its classes."),
    "comparison.png": ("Comparison of runs", "The same case by each run."),
}
TABLES = {
    "evaluation.csv": "Evaluation",
    "comparison.csv": "Dice of each run",
    "evaluation_cases.csv": "Every case",
}
MANY = 30  # rows, above which a table is folded
TEMPLATE = """<!doctype html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1">
<title>{{ title }}</title>
<link rel="icon" href="data:,">
<style>
body { font: 16px/1.5 system-ui, sans-serif; max-width: 70rem; margin: 2rem auto; padding: 0 1rem; color: #222; }
h1, h2 { line-height: 1.2; }
h2 { margin-top: 2.5rem; border-bottom: 1px solid #ddd; }
img { max-width: 100%; height: auto; }
table { border-collapse: collapse; }
th, td { padding: .2rem .8rem .2rem 0; border-bottom: 1px solid #eee; text-align: left; vertical-align: top; }
td.number { text-align: right; font-variant-numeric: tabular-nums; }
code { overflow-wrap: anywhere; }
.scroll { overflow-x: auto; }
</style>
</head>
<body>
<h1>{{ title }}</h1>
<table id="facts">
{%- for name, value in facts %}
<tr><th>{{ name }}</th><td><code>{{ value }}</code></td></tr>
{%- endfor %}
</table>
{%- for part in parts %}
<h2>{{ part.title }}</h2>
{%- if part.text %}
<p>{{ part.text }}</p>
{%- endif %}
{%- if part.image %}
<img alt="{{ part.title }}" src="data:image/png;base64,{{ part.image }}">
{%- endif %}
{%- if part.rows %}
{%- if part.rows | length > many %}
<details><summary>{{ part.rows | length }} rows</summary>
{%- endif %}
<div class="scroll"><table>
<tr>{% for name in part.rows[0] %}<th>{{ name | replace("_", " ") }}</th>{% endfor %}</tr>
{%- for row in part.rows %}
<tr>
{%- for cell in row.values() %}<td{% if cell | is_number %} class="number"{% endif %}>{{ cell }}</td>{% endfor -%}
</tr>
{%- endfor %}
</table></div>
{%- if part.rows | length > many %}
</details>
{%- endif %}
{%- endif %}
{%- endfor %}
</body>
</html>
"""


class Part(NamedTuple):
    """A section: a PNG in base64, rows of a table, or both."""

    title: str
    text: str = ""
    image: str = ""
    rows: Sequence[Mapping[str, str]] = ()


def report(folder: str) -> None:
    """Write `report.html`, one page of what the folder of a run holds: curves, pictures, tables, how it was made.

    Args:
        folder: `output_dir` of a run.

    Raises:
        ValueError: there is no such folder, it holds nothing to show, or one of its files is damaged.
    """
    root = Path(folder)
    if not root.is_dir():
        raise ValueError(f"report: no such folder: {folder}")
    parts = list(_parts(root))
    if not parts:
        known = ", ".join(("metrics.csv", *TABLES, *PICTURES))
        raise ValueError(f"report: {folder} holds none of {known}; expected the folder of a run")
    environment = jinja2.Environment(autoescape=True, undefined=jinja2.StrictUndefined)
    environment.filters["is_number"] = _is_number
    title = f"{root.resolve().name}: {_bundle(root)}" if _bundle(root) else root.resolve().name
    page = environment.from_string(TEMPLATE).render(title=title, facts=_facts(root), parts=parts, many=MANY)
    with atomic_path(root / NAME) as temporary:
        temporary.write_text(page, encoding="utf-8")
    print(f"report: {root / NAME}", flush=True)


def report_run(folder: str | Path) -> None:
    """Write the report at the end of a run (rank 0 only); called from a config.

    What the run is for has been written: without the page, it has not failed.
    """
    if idist.get_rank() > 0:
        return
    try:
        report(str(folder))
    except Exception as error:
        logger.warning("%s is not written, everything else is: %s", Path(folder, NAME), error)


def _rows(path: Path) -> list[dict[str, str]]:
    """Rows of a CSV file; none if there is no file.

    Raises:
        ValueError: it is no table.
    """
    try:
        rows = read_metrics(path)
    except (ValueError, csv.Error) as error:
        raise ValueError(f"{path}: found no CSV ({error}), expected a table of the run") from error
    if any(None in row or None in row.values() for row in rows):
        raise ValueError(f"{path}: found a row of another length than its head, expected a table of the run")
    return rows


def _content(path: Path) -> dict[str, Any]:
    """Content of a JSON file; empty if there is no file.

    Raises:
        ValueError: it is damaged.
    """
    if not path.is_file():
        return {}
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise ValueError(f"{path}: found no JSON ({error}), expected what the run wrote") from error
    if not isinstance(content, dict) or not isinstance(content.get("versions", {}), dict):
        raise ValueError(f"{path}: found other entries, expected what the run wrote, with `versions`")
    return content


def _parts(root: Path) -> Iterator[Part]:
    metrics = root / "metrics.csv"
    if measured := _rows(metrics):
        with tempfile.TemporaryDirectory() as temporary:
            curves = Path(temporary, "curves.png")
            with redirect_stdout(None):
                curves_figure(metrics, curves)
            yield Part(
                "Curves",
                "Dashed, where there is such a line: what chance or the simplest guess reaches.",
                _image(curves),
            )
    if rows := list(_beside_chance(measured)):
        yield Part("Beside chance", "The last validation of the training.", rows=rows)
    for name, title in TABLES.items():
        if rows := _rows(root / name):
            yield Part(title, f"From {name}.", rows=[_short(row) for row in rows])
    if plan := _plan(root):
        yield Part("Plan", f"What was decided for these data, and why. From {plan}.", rows=_content(plan)["decisions"])
    for pattern, (title, text) in PICTURES.items():
        for picture in sorted(root.glob(pattern))[-1:]:
            yield Part(title, f"{text} {picture.relative_to(root).as_posix()}", _image(picture))


def _plan(root: Path) -> Path | None:
    """`plan.json` of the bundle that was trained, if `new_bundle` planned it, or of one that lies in the folder.

    Raises:
        ValueError: config.yaml is damaged.
    """
    config = root / "config.yaml"
    try:
        content = yaml.safe_load(config.read_text(encoding="utf-8")) if config.is_file() else {}
    except (ValueError, yaml.YAMLError) as error:
        raise ValueError(f"{config}: found no YAML ({error}), expected what the run wrote") from error
    bundle = content.get("bundle_root") if isinstance(content, dict) else None
    plans = [*([Path(str(bundle), PLAN)] if bundle else []), *sorted(root.glob(f"*/{PLAN}"))]
    return next((plan for plan in plans if plan.is_file()), None)


def _image(path: Path) -> str:
    return base64.b64encode(path.read_bytes()).decode()


def _beside_chance(rows: Sequence[Mapping[str, str]]) -> Iterator[dict[str, str]]:
    """What was measured at the last validation, and what chance reaches."""
    for title, unit, metric, baseline, name in COMPARISONS:
        for row in [row for row in rows if row.get(metric) and baseline][-1:]:
            chance = str(baseline) if isinstance(baseline, float) else row.get(baseline, "")
            cells = {"measured": row[metric], "chance": chance}
            yield {"": title, "unit": unit, **_short(cells), "chance is": name, "epoch": row["epoch"]}


def _short(row: Mapping[str, str]) -> dict[str, str]:
    """Three decimals for numbers that have more."""
    return {key: f"{float(cell):.3f}" if _is_number(cell) and "." in cell else cell for key, cell in row.items()}


def _is_number(cell: str) -> bool:
    try:
        float(cell)
    except ValueError:
        return False
    return True


def _bundle(root: Path) -> str:
    """Name of the bundle, from the card of the weights."""
    cards = (_content(root / "models" / name) for name in ("model.json", "backbone.json"))
    return next((card.get("versions", {}).get("bundle", "") for card in cards if card), "")


def _facts(root: Path) -> list[tuple[str, str]]:
    """How the folder came about: the training, by its run.json, and the process that writes the page."""
    facts: list[tuple[str, str]] = []
    if run := _content(root / "run.json"):
        versions = ", ".join(f"{name} {value}" for name, value in run.get("versions", {}).items())
        first, *later = [*(run.get("earlier") or []), run]
        known: dict[str, Any] = {
            "trained": f"{first.get('time', '')} on {first.get('host', '')}",
            "training command": first.get("command"),
            "continued": later and f"{len(later)} ×, last {run.get('time', '')} on {run.get('host', '')}",
            "versions of the training": versions,
            "git": run.get("git"),
        }
        facts += [(name, str(value)) for name, value in known.items() if value]
    device = torch.cuda.get_device_name() if torch.cuda.is_available() else platform.processor() or "CPU"
    return [
        *facts,
        ("page written", time.strftime("%Y-%m-%d %H:%M")),
        ("command", command_text(["python", *sys.orig_argv[1:]])),
        ("in the folder", os.fspath(Path.cwd())),
        (
            "machine",
            f"{platform.node()}, {platform.system()} {platform.machine()}, {device}, {os.cpu_count()} cores, "
            f"{bytes_text(psutil.virtual_memory().total)}",
        ),
        (
            "versions",
            f"Python {platform.python_version()}, torch {torch.__version__}, MONAI {monai.__version__}, "
            f"Ignite {ignite.__version__}",
        ),
    ]
