"""`python -m benchmarks.study`: what pre-training brings, on anybody's data and machine.

python -m benchmarks.study --dataset_dir /path/to/Task04_Hippocampus --output_dir runs/study --preset laptop --jobs 2
python -m benchmarks.study report --output_dir runs/study
"""

from __future__ import annotations

import signal
import sys
from collections.abc import Sequence
from contextlib import closing
from pathlib import Path
from types import FrameType
from typing import Any

import fire
from tqdm import tqdm

from benchmarks.study.findings import Findings
from benchmarks.study.plan import Run, plan
from benchmarks.study.report import REPORT, write_report
from benchmarks.study.runs import (
    ENDED,
    LOG,
    RESUMED,
    STARTED,
    execute,
    folder_of,
    last_lines,
    only_study,
    read_record,
)
from benchmarks.study.settings import Study, open_study, read_study
from tools.common.tables import aligned


def study(
    dataset_dir: str,
    output_dir: str,
    preset: str,
    bundle: str | None = None,
    methods: str | Sequence[str] | None = None,
    label_fractions: float | Sequence[float] | None = None,
    seeds: int | Sequence[int] | None = None,
    tables: int | Sequence[int] | None = None,
    jobs: int = 1,
) -> None:
    """Run a study, or continue it, and write its report.

    What has been run is not run again; started again with other tables, methods, fractions or seeds, a study grows.

    Args:
        dataset_dir: a labelled data set in the layout of the bundle.
        output_dir: folder of the study.
        preset: of benchmarks/study/presets.yaml: smoke, laptop, headneck, headneck_coarse, headneck_short,
            headneck_long, headneck_swin, headneck_gpu or gpu.
        bundle: hippocampus, btcv, brats, liver or spleen; by default the preset's.
        methods: of scratch, simclr, simmim, mae, hybridmim; by default all that the preset has. Scratch is always
            among them, because the others are compared with it.
        label_fractions: of tables 1 and 2, in place of the preset's.
        seeds: in place of the preset's.
        tables: in place of the preset's.
        jobs: runs at a time, which share the processor's cores.

    Raises:
        ValueError: an option is wrong, or contradicts what the folder holds.
    """
    failed: dict[str, str] = {}
    with only_study(Path(output_dir)) as lock:
        lists = (_listed(value) for value in (methods, label_fractions, seeds, tables))
        made = open_study(output_dir, dataset_dir, preset, bundle, *lists, jobs)
        write_report(made)
        planned = plan(made, Findings(made).validation)
        print(summary(made, planned), flush=True)
        steps = {run.id: max(run.steps, 1) for run in planned}
        done = sum(steps[run.id] for run in planned if read_record(made, run.id))
        try:
            with (
                closing(execute(made, lambda: plan(made, Findings(made).validation), lock)) as events,
                tqdm(total=sum(steps.values()), initial=done, unit="step") as bar,
            ):
                for run, news in events:
                    bar.write(f"{news:<8} {run.id}")
                    if news not in (STARTED, RESUMED):
                        write_report(made)  # it has the run from now on
                        bar.update(max(run.steps, 1))
                    if news not in (STARTED, RESUMED, ENDED):
                        failed[run.id] = news
        except KeyboardInterrupt:
            sys.exit(f"interrupted; the same command continues. {made.output_dir / REPORT} has what is done")
    for run_id, why in failed.items():
        print(f"\n{run_id}: {why}; its log ends with\n{last_lines(folder_of(made, run_id) / LOG)}", file=sys.stderr)
    print(f"report: {made.output_dir / REPORT}")
    if failed:
        planned = plan(made, Findings(made).validation)
        waiting = sum(read_record(made, run.id) is None for run in planned) - len(failed)
        sys.exit(f"{len(failed)} run(s) failed, {waiting} that depend on them were left out: {', '.join(failed)}")
    print(f"all {len(planned)} runs are done")


def report(output_dir: str) -> None:
    """Write the report of a study anew from what has been run.

    Args:
        output_dir: folder of the study.

    Raises:
        ValueError: the folder holds none.
    """
    write_report(read_study(output_dir))
    print(f"report: {Path(output_dir) / REPORT}")


def _listed(value: Any) -> list[Any] | None:
    """What Fire makes of `[1,2]`, `1,2` or `1`."""
    return value if value is None else list(value) if isinstance(value, list | tuple) else [value]


def summary(study: Study, planned: Sequence[Run]) -> str:
    """Runs by kind, network and method, as far as they are known now."""
    groups: dict[tuple[str, ...], list[Run]] = {}
    for run in planned:
        groups.setdefault((run.kind, run.arm.network, run.arm.method), []).append(run)
    lines = [["run", "network", "method", "runs", "done", "steps"]]
    for key, runs in groups.items():
        done = sum(read_record(study, run.id) is not None for run in runs)
        steps = sorted({run.steps for run in runs})
        lines.append([*key, str(len(runs)), str(done), "…".join(map(str, dict.fromkeys((steps[0], steps[-1]))))])
    return f"{aligned(lines)}\n{len(planned)} runs, {study.asked.jobs} at a time"


def _interrupt(number: int, frame: FrameType | None) -> None:
    raise KeyboardInterrupt


if __name__ == "__main__":
    signal.signal(signal.SIGTERM, _interrupt)  # what `timeout` and schedulers send ends the runs, too
    words = sys.argv[1:]
    named = words[:1] == ["report"]
    try:
        fire.Fire(report if named else study, command=words[named:], name="benchmarks.study")
    except (ValueError, OSError) as error:  # wrong input: its message says all
        sys.exit(f"{type(error).__name__}: {error}")
