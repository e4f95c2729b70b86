"""`python -m benchmarks.study`: what pre-training brings, on anybody's data and machine.

python -m benchmarks.study --dataset_dir /path/to/Task04_Hippocampus --output_dir runs/study --preset laptop --jobs 2
python -m benchmarks.study report --output_dir runs/study
"""

from __future__ import annotations

import math
import signal
import sys
from collections.abc import Sequence
from pathlib import Path
from types import FrameType
from typing import Any

import fire

from benchmarks.study.findings import Findings
from benchmarks.study.plan import Run, plan
from benchmarks.study.report import REPORT, write_report
from benchmarks.study.runs import LOG, estimate, execute, folder_of, last_lines, only_study, read_record
from benchmarks.study.settings import Study, open_study, read_study


def study(
    dataset_dir: str,
    output_dir: str,
    preset: str,
    bundle: str = "hippocampus",
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
        preset: smoke, laptop or gpu; its numbers are in benchmarks/study/presets.yaml.
        bundle: hippocampus, btcv, brats, liver or spleen.
        methods: of scratch, simclr, simmim, mae, hybridmim; by default all that the preset has. Scratch is always
            among them, because the others are compared with it.
        label_fractions: of tables 1 and 2, in place of the preset's.
        seeds: in place of the preset's.
        tables: in place of the preset's.
        jobs: runs at a time, which share the processor's cores.

    Raises:
        ValueError: an option is wrong, or contradicts what the folder holds.
    """
    with only_study(Path(output_dir)) as lock:
        lists = (_listed(value) for value in (methods, label_fractions, seeds, tables))
        made = open_study(output_dir, dataset_dir, preset, bundle, *lists, jobs)
        progress = Progress(made)
        write_report(made)
        print(progress.table(), flush=True)
        try:
            failed = execute(made, progress.plan, lock, progress)
        except KeyboardInterrupt:
            sys.exit(f"interrupted; the same command continues. {made.output_dir / REPORT} has what is done")
    for run_id, why in failed.items():
        print(f"\n{run_id}: {why}; its log ends with\n{last_lines(folder_of(made, run_id) / LOG)}", file=sys.stderr)
    write_report(made)
    print(f"report: {made.output_dir / REPORT}")
    if failed:
        waiting = sum(read_record(made, run.id) is None for run in progress.plan()) - len(failed)
        sys.exit(f"{len(failed)} run(s) failed, {waiting} that depend on them were left out: {', '.join(failed)}")


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


class Progress:
    """Says what will be run, what is, and how long it takes."""

    def __init__(self, study: Study) -> None:
        self.study = study

    def plan(self) -> list[Run]:
        """The runs, as far as they are known now."""
        return plan(self.study, Findings(self.study).validation)

    def table(self) -> str:
        """Runs by kind and arm, with the seconds of one, if a run of its kind tells."""
        planned = self.plan()
        seconds = estimate(self.study, planned)
        groups: dict[tuple[str, ...], list[Run]] = {}
        for run in planned:
            groups.setdefault((run.kind, run.arm.network, run.arm.method), []).append(run)
        lines = [["run", "network", "method", "runs", "done", "steps", "seconds each"]]
        for key, runs in groups.items():
            steps = sorted({run.steps for run in runs})
            each = [seconds[run.id] for run in runs if seconds[run.id] is not None]
            lines.append(
                [
                    *(*key, str(len(runs)), str(sum(self._done(run) for run in runs))),
                    f"{steps[0]}…{steps[-1]}" if len(steps) > 1 else f"{steps[0] or '-'}",
                    f"{sum(each) / len(each):.0f}" if each else "unknown until one has ended",
                ]
            )
        widths = [max(map(len, column)) for column in zip(*lines, strict=True)]
        text = ["  ".join(map(str.ljust, line, widths)).rstrip() for line in lines]
        return "\n".join([*text, f"{len(planned)} runs, {self.study.asked.jobs} at a time; {self._left(planned)}"])

    def _done(self, run: Run) -> bool:
        return read_record(self.study, run.id) is not None

    def _left(self, planned: Sequence[Run]) -> str:
        seconds = estimate(self.study, planned)
        waiting = [run for run in planned if not self._done(run)]
        known = [seconds[run.id] for run in waiting if seconds[run.id] is not None]
        if not waiting:
            return "all are done"
        if not known:
            return f"{len(waiting)} to do, for how long is unknown until the first has ended"
        unknown = len(waiting) - len(known)
        more = f", and {unknown} of a kind that has not been run yet" if unknown else ""
        return f"{len(waiting)} to do, about {math.ceil(sum(known) / self.study.asked.jobs / 60)} min{more}"

    def started(self, run: Run, resumed: bool) -> None:
        """A run has started."""
        print(f"started  {run.id}{' (resumed)' * resumed}", flush=True)

    def finished(self, run: Run, seconds: float, why: str | None) -> None:
        """A run has ended; the report has it from now on."""
        write_report(self.study)
        end = f": {why}" if why else f"; {self._left(self.plan())}"
        print(f"{'FAILED' if why else 'done':<8} {run.id}, {seconds:.0f} s{end}", flush=True)


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
