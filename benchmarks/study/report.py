"""report.md: the tables and the command of each, figures, learning rates, machine, versions, numbers of the preset."""

from __future__ import annotations

import json
import shlex
from collections import Counter
from collections.abc import Sequence

import yaml

from benchmarks.study.figures import draw
from benchmarks.study.findings import RESULTS, Findings, options_text
from benchmarks.study.plan import Arm, Run, plan
from benchmarks.study.runs import read_record
from benchmarks.study.settings import METHODS, STUDY, Study, everything
from benchmarks.study.tables import MISSING, TITLES, markdown, table
from tools.common.files import atomic_path

REPORT = "report.md"


def write_report(study: Study) -> None:
    """Write report.md, results.csv and the figures of all that was ever asked of a study, as far as it is run."""
    study = everything(study)
    findings = Findings(study)
    findings.write_results()
    pictures = draw(findings)
    planned = plan(study, findings.validation)
    parts = [
        f"# {study.bundle}, preset {study.preset_name}",
        _introduction(findings, planned),
        *(_section(findings, which) for which in study.asked.tables),
        *_figures(pictures),
        _rates(findings),
        _machines(findings, planned),
        _numbers(study),
    ]
    with atomic_path(study.output_dir / REPORT) as temporary:
        temporary.write_text("\n\n".join(parts) + "\n", encoding="utf-8")


def _introduction(findings: Findings, planned: Sequence[Run]) -> str:
    study = findings.study
    counts = {section: len(study.cases(section)) for section in ("training", "validation", "test")}
    seeds = study.asked.seeds
    unlabelled = study.pretraining_scans() - counts["training"]
    more = f", and {unlabelled} scans that have none" if unlabelled else ""
    interval = (
        "One seed: no interval is given, and no claim should rest on it."
        if len(seeds) == 1
        else f"Values are means over {len(seeds)} seeds, ± half of the 95 % interval by Student's t over the seeds."
    )
    done = sum(findings.record(run.id) is not None for run in planned)
    return "\n\n".join(
        [
            f"What pre-training brings on `{study.dataset_dir}` ({study.segmentation}): {counts['training']} training, "
            f"{counts['validation']} validation and {counts['test']} test cases. Pre-training sees the images of the "
            f"training and validation cases, without labels{more}; nothing but the tests sees the test cases.",
            f"{interval} Every arm is fine-tuned for the same steps, at the learning rate that was best for it on the "
            "validation cases.",
            f"**{done} of {len(planned)} runs are done.** {MISSING} is what has not been run yet. Every test, class by "
            f"class: [{RESULTS}]({RESULTS}).",
        ]
    )


def _section(findings: Findings, which: int) -> str:
    return "\n\n".join(
        [
            f"## Table {which}. {TITLES[which]}",
            table(findings, which),
            f"```bash\n{command(findings.study, which)}\n```",
        ]
    )


def command(study: Study, which: int) -> str:
    """The command that makes one table, or continues it."""
    asked = study.asked
    options = {
        "dataset_dir": str(study.dataset_dir),
        "output_dir": str(study.output_dir),
        "preset": study.preset_name,
        "bundle": study.bundle,
        "methods": f"[{','.join(asked.methods)}]" if len(asked.methods) < len(METHODS) else None,
        "label_fractions": json.dumps(asked.label_fractions) if not asked.preset_fractions else None,
        "seeds": json.dumps(asked.seeds) if list(asked.seeds) != study.preset.seeds else None,
        "tables": f"[{which}]",
        "jobs": str(asked.jobs),
    }
    words = [f"--{key} {shlex.quote(value)}" for key, value in options.items() if value]
    return "python -m benchmarks.study " + " ".join(words)


def _figures(pictures: dict[str, str]) -> list[str]:
    if not pictures:
        return []
    return ["## Figures", *(f"![{text}]({path})\n\n{text}" for path, text in pictures.items())]


def _rates(findings: Findings) -> str:
    rates = findings.study.preset.finetuning.learning_rates
    at = findings.study.preset.finetuning.rate_chosen_at
    if len(rates) == 1:
        return f"## Learning rates\n\nOne rate for all: {rates[0]:g}."
    each = at["label_fraction"] == "each"
    lines: dict[tuple[str, ...], None] = {}  # an order, each once
    for arm, fraction in findings.arms():
        found = findings.candidates(arm, fraction)
        chosen = findings.rate(arm, fraction)
        dice = [MISSING if found[rate] is None else f"{found[rate]:.4f}" for rate in rates]
        where = [f"{fraction:g}"] if each else []
        lines[(*_names(arm), *where, *dice, MISSING if chosen is None else f"{chosen:g}")] = None
    head = ["network", "method", "changed", *(["labels"] if each else []), *(f"{rate:g}" for rate in rates), "chosen"]
    where = "each label fraction" if each else f"label fraction {at['label_fraction']:g}, and used for the others"
    return "\n\n".join(
        [
            "## Learning rates",
            f"Best validation Dice of each rate, chosen at {where}; mean of the fine-tunings with seed "
            f"{', '.join(map(str, at['seeds']))}.",
            markdown(head, [list(line) for line in lines]),
        ]
    )


def _names(arm: Arm) -> tuple[str, str, str]:
    options = [*arm.pretraining, *(option for option in arm.finetuning if option not in arm.pretraining)]
    return arm.network, METHODS[arm.method], options_text(options)


def _machines(findings: Findings, planned: Sequence[Run]) -> str:
    """Every machine and set of versions that runs of this study had, with the number of runs."""
    records = [record for run in planned if (record := read_record(findings.study, run.id))]
    machines = Counter(json.dumps({**record["machine"], "jobs": record["jobs"]}) for record in records)
    found = [(json.loads(text), count) for text, count in machines.most_common()]
    head = ["runs", "device", "processor", "cores", "memory", "at a time", "Python", "torch", "MONAI", "commit"]
    keys = ("device", "processor", "cores", "memory", "jobs", "python", "torch", "monai", "commit")
    lines = [[str(count), *(str(machine[key]) for key in keys)] for machine, count in found]
    return "\n\n".join(["## Machine and versions", markdown(head, lines) if lines else MISSING])


def _numbers(study: Study) -> str:
    numbers = json.loads((study.output_dir / STUDY).read_text(encoding="utf-8"))["numbers"]
    text = yaml.safe_dump(numbers, sort_keys=False, width=110, default_flow_style=None)
    return f"## Numbers of the preset\n\n```yaml\n{text}```"
