"""`python -m tools bundles`: generates the segmentation bundles from one template.

`bundle_template/` looks like a bundle: `<<word>>` is replaced by a fact of the bundle, and lines after `#% if … %#` are
only in some bundles. `bundle_facts/NAME.yaml` has the facts of a bundle.
"""

from __future__ import annotations

import json
import math
import re
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
    """Render the template with the facts of one bundle: path in the bundle → text of the file.

    Raises:
        ValueError: a fact is missing or wrong.
    """
    template, known = _template(), yaml.safe_load(facts.read_text(encoding="utf-8")) or {}
    written = {}
    try:
        known = {"name": facts.stem, **known, **_derived(known)}
        for name in template.list_templates():
            if not name.startswith(PARTS):
                text = template.get_template(name).render(known)
                if not text.strip():  # not for this bundle
                    continue
                written[name] = COLUMN.sub(lambda line: f"{line[1]:<{int(line[2]) - 1}} ", text)
        json.loads(written["configs/metadata.json"])
    except json.JSONDecodeError as error:
        line = written["configs/metadata.json"].splitlines()[error.lineno - 1].strip()
        raise ValueError(
            f'{facts}: metadata.json would be no JSON ({error.msg}), expected no " or \\ in: {line}'
        ) from error
    except KeyError as error:
        raise ValueError(f"{facts}: {error} is missing") from error
    except (UndefinedError, ValueError) as error:
        raise ValueError(f"{facts}: {error}") from error
    return written


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
    return {
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
        return f"[{', '.join(map(str, value))}]"
    return "null" if value is None else value
