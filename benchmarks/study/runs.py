"""Runs each part of a plan as a process of its own, and remembers what has ended well.

A run has a folder `runs/ID` with `command.sh`, `log.txt`, `metrics.csv`, `models`, and, once it has ended well,
`done.json`: its settings, seconds, memory and machine. A folder without `done.json` is a run that was interrupted or
failed; the next start resumes it from its newest checkpoint, or runs it afresh.
"""

from __future__ import annotations

import fcntl
import json
import os
import re
import shlex
import shutil
import signal
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from typing import Any

import torch
from tensorboard.backend.event_processing.event_accumulator import SCALARS, EventAccumulator

from benchmarks.study.machine import cores, describe
from benchmarks.study.plan import Run
from benchmarks.study.settings import PRETRAIN, ROOT, Study, differences
from tools.common.files import write_json
from tools.weights.training_checkpoints import newest_checkpoint

DONE, COMMAND, LOG = "done.json", "command.sh", "log.txt"
WRITTEN = {"pretrain": "models/backbone.pt", "finetune": "models/model.pt", "test": "evaluation_cases.csv"}
STARTED, RESUMED, ENDED = "started", "resumed", "done"  # what is told of a run
GPU_MEMORY = "peak GPU memory in bytes:"  # said by a run on a GPU as its last words
Record = dict[str, Any]  # content of a done.json


def folder_of(study: Study, run_id: str) -> Path:
    """Where a run writes."""
    return study.output_dir / "runs" / run_id


def read_record(study: Study, run_id: str) -> Record | None:
    """What a finished run left; None if it has not ended well."""
    path = folder_of(study, run_id) / DONE
    return json.loads(path.read_text(encoding="utf-8")) if path.is_file() else None


def settings(run: Run) -> dict[str, Any]:
    """What makes a run what it is, as `done.json` holds it."""
    return json.loads(json.dumps({"configs": run.configs, "options": run.options}))


def is_done(study: Study, run: Run) -> bool:
    """Whether a run has ended well.

    Raises:
        ValueError: it has, but with other settings.
    """
    record = read_record(study, run.id)
    if record is None:
        return False
    changed = differences(record["settings"], settings(run))
    if changed:
        raise ValueError(f"{folder_of(study, run.id) / DONE}: {'; '.join(changed)}; give another output_dir")
    return True


# ------------------------------------------------------------------------------------------------------- commands


def command(study: Study, run: Run) -> list[str]:
    """The command of a run from its beginning."""
    folder = folder_of(study, run.id)
    weights = folder_of(study, run.needs[0]) / "models" if run.needs else None
    places = {
        "config_file": f"[{','.join(repr(file) for file in run.configs)}]",
        "bundle_root": PRETRAIN if run.kind == "pretrain" else study.segmentation,
        "dataset_dir": study.dataset_dir,
        "datalist": study.scans if run.kind == "pretrain" else study.datalist,
        "output_dir": folder,
        "ckpt_dir": weights if run.kind == "test" else folder / "models",
    }
    if run.kind == "finetune" and weights:
        places["pretrained"] = weights / "backbone.pt"
    if run.options.get("cache") == "disk":
        places["cache_dir"] = study.output_dir / "cache"  # runs share it: its entries are found by their content
    if torch.cuda.is_available():
        places["finalize"] = f"$print('{GPU_MEMORY}', torch.cuda.max_memory_allocated())"
    words = [f"--{key}={_text(value)}" for key, value in {**places, **run.options}.items()]
    return [sys.executable, "-m", "monai.bundle", "run", "evaluating" if run.kind == "test" else "training", *words]


def _text(value: Any) -> str:
    if value is None:
        return "$None"  # MONAI passes over `None`
    if isinstance(value, list | tuple):
        return json.dumps(value, separators=(",", ":"))
    return str(value)


# ------------------------------------------------------------------------------------------------------ processes


@dataclass
class Child:
    """A run in its process."""

    run: Run
    process: subprocess.Popen
    began: float
    resumed: bool
    machine: dict[str, str]  # and versions, as they were when it began
    memory: int = 0  # bytes: the peak so far

    def has_ended(self) -> bool:
        """Whether it has; `process.returncode` says how."""
        self.memory = max(self.memory, _peak_memory(self.process.pid))
        return self.process.poll() is not None

    def stop(self) -> None:
        """End it and what it started."""
        for number, patience in ((signal.SIGTERM, 10), (signal.SIGKILL, None)):
            with suppress(ProcessLookupError):
                os.killpg(self.process.pid, number)
            with suppress(subprocess.TimeoutExpired):
                self.process.wait(patience)
                return


@contextmanager
def only_study(output_dir: Path) -> Iterator[int]:
    """Keep other studies out of the folder; yields the lock's file descriptor, which every run inherits.

    So a run that outlived its study keeps the folder, too.

    Raises:
        ValueError: another study, or a run of it, is at work there.
    """
    output_dir.mkdir(parents=True, exist_ok=True)
    with (output_dir / ".lock").open("w") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise ValueError(
                f"output_dir: found a study, or a run that it left, at work in {output_dir}; expected none"
            ) from None
        yield file.fileno()


def start(study: Study, run: Run, lock: int) -> Child:
    """Start a run, from its newest checkpoint if there is one."""
    folder = folder_of(study, run.id)
    line = command(study, run)
    text = f"cd {shlex.quote(str(ROOT))}\n{shlex.join(line)}\n"
    checkpoint = newest_checkpoint(folder / "models")
    same = (folder / COMMAND).is_file() and (folder / COMMAND).read_text(encoding="utf-8") == text
    resumed = checkpoint is not None and same
    if not resumed and folder.exists():
        shutil.rmtree(folder)
    folder.mkdir(parents=True, exist_ok=True)
    (folder / COMMAND).write_text(text, encoding="utf-8")
    threads = max(1, cores() // study.asked.jobs)
    machine = describe()
    with (folder / LOG).open("ab") as log:
        process = subprocess.Popen(
            [*line, "--resume=true"] if resumed else line,
            cwd=ROOT,
            env={**os.environ, "OMP_NUM_THREADS": str(threads), "PYTHONUNBUFFERED": "1"},  # the log is read meanwhile
            stdin=subprocess.DEVNULL,
            stdout=log,
            stderr=subprocess.STDOUT,
            start_new_session=True,  # Ctrl-C is for the study, which ends its runs
            pass_fds=(lock,),
        )
    return Child(run, process, time.monotonic(), resumed, machine)


def _peak_memory(pid: int) -> int:
    """Bytes that a process has held at most; 0 if it has ended, or where there is no /proc.

    Not `ru_maxrss`: it begins with what the study itself held when it started the process, which is as much.
    """
    try:
        status = Path(f"/proc/{pid}/status").read_text()
    except OSError:
        return 0
    found = re.search(r"VmHWM:\s+(\d+) kB", status)  # a process that has ended has none
    return int(found[1]) * 1024 if found else 0


def conclude(study: Study, child: Child) -> str | None:
    """Mark a run as done, and remove its checkpoints; or say why it has failed."""
    run, folder = child.run, folder_of(study, child.run.id)
    if child.process.returncode:
        return f"exit status {child.process.returncode}"
    if not (folder / WRITTEN[run.kind]).is_file():
        return f"it did not write {WRITTEN[run.kind]}"
    record = {
        "settings": settings(run),
        "steps": run.steps,
        "seconds": round(time.monotonic() - child.began, 1),
        "seconds_per_step": _seconds_per_step(run, folder) if run.steps else None,
        "peak_memory": child.memory,
        "peak_gpu_memory": _gpu_memory(folder / LOG),
        "resumed": child.resumed,
        "jobs": study.asked.jobs,
        "machine": child.machine,
    }
    write_json(folder / DONE, record)
    for path in (folder / "models").glob("checkpoint_epoch=*.pt"):
        path.unlink()
    return None


def _seconds_per_step(run: Run, folder: Path) -> float | None:
    """Median time from one training step to the next, by TensorBoard's events; not over a validation."""
    events = EventAccumulator(str(folder), size_guidance={SCALARS: 0}).Reload()
    steps = events.Scalars("loss") if "loss" in events.Tags()["scalars"] else []
    neighbours = ((a, b) for a, b in pairwise(steps) if b.step == a.step + 1 and a.step % run.options["val_interval"])
    times = [b.wall_time - a.wall_time for a, b in neighbours]
    return statistics.median(times) if times else None


def _gpu_memory(log: Path) -> int | None:
    found = re.findall(rf"{GPU_MEMORY} (\d+)", log.read_text(encoding="utf-8", errors="replace"))
    return int(found[-1]) if found else None


def last_lines(path: Path, count: int = 12) -> str:
    """The end of a log, without progress bars."""
    text = path.read_bytes().decode("utf-8", "replace") if path.is_file() else ""  # as it is: \r redraws a line
    lines = [part for line in text.split("\n") if (part := line.rstrip().split("\r")[-1])]
    return "\n".join(lines[-count:])


# ------------------------------------------------------------------------------------------------------ execution


def execute(study: Study, make_plan: Callable[[], Sequence[Run]], lock: int) -> Iterator[tuple[Run, str]]:
    """Run what is not done, `jobs` at a time, and leave out what depends on a failed run.

    However this ends, no process is left. `joblib` and `doit` want the whole plan beforehand, and tell no peak memory.

    Args:
        study: gives the folder and `jobs`.
        make_plan: the runs as they are known now; asked again after every run.
        lock: of `only_study`.

    Yields:
        Each run with `STARTED` or `RESUMED`, and then with `ENDED` or why it failed.

    Raises:
        ValueError: a run was done with other settings.
    """
    failed: set[str] = set()
    running: dict[str, Child] = {}
    try:
        while True:
            planned = make_plan()
            done = {run.id for run in planned if is_done(study, run)}
            for run in planned:
                startable = run.known and run.id not in {*done, *failed, *running} and done.issuperset(run.needs)
                if startable and len(running) < study.asked.jobs:
                    running[run.id] = start(study, run, lock)
                    yield run, RESUMED if running[run.id].resumed else STARTED
            if not running:
                return
            child = _wait(running)
            del running[child.run.id]
            why = conclude(study, child)
            if why:
                failed.add(child.run.id)
            yield child.run, why or ENDED
    finally:
        for child in running.values():
            child.stop()


def _wait(running: Mapping[str, Child]) -> Child:
    """The first child that ends."""
    while True:
        for child in running.values():
            if child.has_ended():
                return child
        time.sleep(0.2)
