"""`python -m tools bundles`: generates the segmentation bundles from one template.

`bundle_template/` looks like a bundle: `<<word>>` is replaced by a fact of the bundle, and lines after `#% if … %#` are
only in some bundles. `bundle_facts/NAME.yaml` has the facts of a bundle.
"""

from __future__ import annotations

import json
import math
import re
from collections.abc import Mapping
from functools import cache
from pathlib import Path
from typing import Any

import yaml
from jinja2 import DictLoader, Environment, StrictUndefined, UndefinedError

from tools.common.files import atomic_path
from tools.shipping.verify import BUNDLES

TEMPLATE = Path(__file__).with_name("bundle_template")
FACTS = Path(__file__).with_name("bundle_facts")
PARTS = "parts/"  # folder of the template with text that several files include
AXES = ("left-right", "posterior-anterior", "inferior-superior")  # of a volume in RAS orientation
CHOICES = {  # allowed values of facts that the template's conditions use
    "intensity": ("hu_window", "percentiles", "z_score"),
    "activation": ("softmax", "sigmoid"),
    "empty": ("skip", "brats"),
}
DEFAULTS: dict[str, Any] = {"authors": "HybridMIM Bundles contributors", "val_overlap": 0.25}
PREPARED: dict[str, dict[str, Any]] = {  # facts that have a default for each way of scaling intensities
    "scaled_to": {"hu_window": [0.0, 1.0], "percentiles": [0.001, 1.0], "z_score": []},
    "foreground_above": {"hu_window": 0.0, "percentiles": 0.01, "z_score": None},
}
COMMENT = re.compile(r"(.*\S) +(?=# )")
COLUMN = re.compile(r"^(.*)\0(\d+)\0", re.MULTILINE)  # text, and the column of the comment after it


def bundles(output: str | Path = BUNDLES) -> None:
    """Write the segmentation bundles.

    Args:
        output: folder to write the bundles to.

    Raises:
        ValueError: a fact is missing or wrong.
        FileNotFoundError: there are no facts, as in a released bundle.
    """
    files = sorted(FACTS.glob("*.yaml"))
    if not files:
        raise FileNotFoundError(f"{FACTS}: found no facts of bundles; they are in the repository")
    for file in files:
        folder = Path(output) / f"hybridmim_{file.stem}_seg"
        for name, text in bundle_files(file).items():
            with atomic_path(folder / name) as path:
                path.write_text(text, encoding="utf-8", newline="\n")
        print(folder)


def bundle_files(facts: Path) -> dict[str, str]:
    """Do as `render`, with the facts in a file; errors name it."""
    try:
        return render({"name": facts.stem, **(yaml.safe_load(facts.read_text(encoding="utf-8")) or {})})
    except ValueError as error:
        raise ValueError(f"{facts}: {error}") from error


def render(facts: Mapping[str, Any]) -> dict[str, str]:
    """Render the template with the facts of one bundle: path in the bundle → text of the file.

    Raises:
        ValueError: a fact is missing or wrong.
    """
    template, written = _template(), {}
    try:
        known = {**DEFAULTS, **facts}
        known |= _derived(known)
        for name in template.list_templates():
            if not name.startswith(PARTS):
                text = template.get_template(name).render(_in_json(known) if name.endswith(".json") else known)
                if not text.strip():  # not for this bundle
                    continue
                written[name] = COLUMN.sub(lambda line: f"{line[1]:<{int(line[2]) - 1}} ", text)
    except KeyError as error:
        raise ValueError(f"{error} is missing") from error
    except UndefinedError as error:
        raise ValueError(str(error)) from error
    return written


def _in_json(value: Any) -> Any:
    """Facts whose texts can stand between the quotation marks of JSON."""
    if isinstance(value, Mapping):
        return {key: _in_json(one) for key, one in value.items()}
    if isinstance(value, list):
        return [_in_json(one) for one in value]
    return json.dumps(value, ensure_ascii=False)[1:-1] if isinstance(value, str) else value


@cache
def _template() -> Environment:
    files = {path.relative_to(TEMPLATE).as_posix(): path for path in sorted(TEMPLATE.rglob("*")) if path.is_file()}
    environment = Environment(
        loader=DictLoader({name: _with_columns(path) for name, path in files.items()}),
        block_start_string="#%",  # a comment in YAML, so that the template's configs are valid YAML
        block_end_string="%#",
        variable_start_string="<<",
        variable_end_string=">>",
        trim_blocks=True,
        lstrip_blocks=True,
        keep_trailing_newline=True,
        undefined=StrictUndefined,
        finalize=_as_yaml,
    )
    environment.filters["minus"] = lambda number: str(number).replace("-", "−")
    return environment


def _derived(facts: dict[str, Any]) -> dict[str, Any]:
    """Compute the facts that follow from others, so that they cannot disagree."""
    for key, choices in CHOICES.items():
        if facts[key] not in choices:
            raise ValueError(f"{key} is {facts[key]!r}, expected one of {list(choices)}")
    classes, notes, spacing = facts["classes"], facts["class_notes"], facts["spacing"]
    softmax = facts["activation"] == "softmax"
    labels = facts.get("label_names") or {values[0]: name.replace("_", " ") for name, values in classes.items()}
    if softmax:
        described = [(f"{values[0]} {labels[values[0]]}", notes.get(name)) for name, values in classes.items()]
    else:
        described = [
            (name, f"{notes[name]}, label{'s' if len(values) > 1 else ''} {', '.join(map(str, values))}")
            for name, values in classes.items()
        ]
    terms = yaml.safe_load((TEMPLATE / PARTS / "coded_terms.yaml").read_text(encoding="utf-8"))
    if unknown := facts["no_flips"].keys() - set(AXES):
        raise ValueError(f"no_flips names {sorted(unknown)}, expected of {list(AXES)}")
    scaled, above = (facts.get(key, known[facts["intensity"]]) for key, known in PREPARED.items())
    return {
        "scaled_to": scaled,
        "scaled_text": "…".join(f"{end:g}" for end in scaled),
        "foreground_above": above,
        "foreground_hu": _unscaled(above, scaled, facts["window"]) if facts["intensity"] == "hu_window" else None,
        "labels": labels,
        "label_text": ", ".join(f"{value} {name}" for value, name in labels.items()),
        "class_text": ", ".join(f"{name} ({note})" if note else name for name, note in described),
        "coded_terms": {name: json.dumps(terms.get(name, terms["other"])).replace('"', "") for name in classes},
        "out_channels": len(classes) + softmax,
        "flips": [0 if axis in facts["no_flips"] else facts["flip_probability"] for axis in AXES],
        "spacing_text": _spacing_text(spacing) if spacing else facts["own_spacing"],
        # SwinUNETR needs multiples of 32 voxels, at least 64
        "swin_roi_size": [max(64, math.ceil(side / 32) * 32) for side in facts["roi_size"]],
    }


def _unscaled(value: float, scaled: list[float], window: list[float]) -> str:
    """The intensity that is scaled to a value."""
    return f"{window[0] + (value - scaled[0]) / (scaled[1] - scaled[0]) * (window[1] - window[0]):g}"


def _spacing_text(spacing: list[float]) -> str:
    """`1.5 mm` if it is the same along all axes, else `1.5×1.5×2.0 mm`."""
    sides = spacing[:1] if len(set(spacing)) == 1 else spacing
    return f"{'×'.join(map(str, sides))} mm"


def _with_columns(file: Path) -> str:
    """Read a file of the template; in YAML, mark the column of each comment after a placeholder.

    This is its own column, or that of the comment above, if a long placeholder moves it to the right.
    """
    lines, column = file.read_text(encoding="utf-8").splitlines(keepends=True), 120
    for number, line in enumerate(lines) if file.suffix == ".yaml" else ():
        if comment := COMMENT.match(line):
            own = len(comment[0])
            if "<<" in comment[1]:
                lines[number] = f"{comment[1]}\0{min(own, column)}\0{line[own:]}"
            else:
                column = own
    return "".join(lines)


def _as_yaml(value: Any) -> Any:
    if isinstance(value, list):
        return f"[{', '.join(_item_as_yaml(item) for item in value)}]"
    return "null" if value is None else value


def _item_as_yaml(item: Any) -> str:
    """An item of a list; a text that YAML would read as something else is quoted, such as 0001."""
    return json.dumps(item) if isinstance(item, str) and yaml.safe_load(item) != item else str(item)
