"""The folders of a run belong to it: its identity in `run.json`, one run at a time, what changed since it began."""

from __future__ import annotations

import hashlib
import json
import os
import platform
import socket
import subprocess
import sys
import time
import uuid
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from functools import cached_property
from pathlib import Path
from typing import Any

import ignite
import ignite.distributed as idist
import monai
import torch
import yaml

from tools.common.config import config_text
from tools.common.files import atomic_path, write_json
from tools.common.tables import print_table
from tools.common.text import command_text, first_lines, parse_bool
from tools.data.scans import paths_of
from tools.training.checkpointing import SignalsEndTheProcess
from tools.training.locks import FolderLock
from tools.weights.training_checkpoints import newest_checkpoint

NAME = "run.json"
# what a run writes to its two folders; caches and results of checks stay
WRITTEN = ("run.json", "config.yaml", "metrics.csv", "events.out.tfevents*", "validation", "figures", "bad_batch*")
WRITTEN += ("checkpoint*", "model.*", "backbone.*", "evaluation*", "report.html")
OF_A_START = {"resume", "overwrite", "resume_changed", "bundle_root"}  # say nothing about the run
OF_THE_CHECKPOINT = {"seed", "learning_rate", "weight_decay", "pretrained_lr_multiplier"}  # are restored from it


class RunError(ValueError):
    """This start and what is in its folders do not belong together."""


class RunFolder:
    """The folders `output_dir` and `ckpt_dir` of a run. Nothing is read or written before `claim`.

    Args:
        output_dir: folder of `run.json`, `metrics.csv`, `config.yaml`.
        ckpt_dir: folder of the training checkpoints; has a copy of `run.json`, which says whose they are.
        dataset_dir: scans in it are known by their path in it, so that the data may move.
        resume: true: continue; false: begin; auto: continue if there is a checkpoint, else begin.
        overwrite: begin in folders that hold another run, whose files move to `previous/ID`.
        resume_changed: continue although the split or the schedule has changed.

    Raises:
        ValueError: a value is none of these, or both `resume` and `overwrite`.
    """

    def __init__(
        self,
        output_dir: str | Path,
        ckpt_dir: str | Path,
        dataset_dir: str | Path,
        resume: bool | str,
        overwrite: bool | str,
        resume_changed: bool | str,
    ) -> None:
        self.output_dir, self.ckpt_dir, self.dataset_dir = Path(output_dir), Path(ckpt_dir), Path(dataset_dir)
        self.resume = str(resume).lower()
        if self.resume not in ("true", "false", "auto"):
            raise ValueError(f"resume: found {resume!r}, expected true, false or auto")
        self.overwrite, self.resume_changed = parse_bool(overwrite), parse_bool(resume_changed)
        if self.overwrite and self.resume != "false":
            raise ValueError(f"overwrite: found true, together with resume: {self.resume}; expected one of them")
        self.locks = [FolderLock(folder) for folder in dict.fromkeys(map(Path.resolve, self._folders))]
        self.claimed: dict[str, Any] | None = None  # the run that is here already
        self.signals = SignalsEndTheProcess(self.release)

    @property
    def _folders(self) -> tuple[Path, Path]:
        return self.output_dir, self.ckpt_dir

    @cached_property
    def resumed(self) -> bool:
        """Whether this start continues a run."""
        return self.resume == "true" or (self.resume == "auto" and newest_checkpoint(self.ckpt_dir) is not None)

    def claim(self) -> None:
        """Make sure that no other run is at work in the folders, and that this start may use them (rank 0).

        From now on, signals end this process with the exit code after which it may be started again.

        Raises:
            FolderInUseError: another run is at work there.
            RunError: they hold another run.
        """
        if idist.get_rank() == 0:
            for lock in self.locks:
                lock.acquire()
            with self._released_if_refused():
                self.claimed = self._usable()
        self.signals.start()

    @contextmanager
    def _released_if_refused(self) -> Iterator[None]:
        try:
            yield
        except RunError:
            self.release()
            raise

    def _usable(self) -> dict[str, Any] | None:
        """The run that is here already, if this start may continue or replace it."""
        output, checkpoints = (_read_run(folder) for folder in self._folders)
        found = output or checkpoints
        if found is None or self.overwrite:
            return found
        if self.resume == "false" and "monailabel" not in sys.modules:  # which trains on from its own weights
            place = self.output_dir if output else self.ckpt_dir
            raise RunError(
                f"{place} holds {_run_text(found)}; this start is another one ({_start_text(_this_start())}): "
                f"`--resume auto` continues that run, `--overwrite true` begins anew and moves it to {place}/previous, "
                "or choose another output_dir and ckpt_dir"
            )
        if output and (checkpoints or {}).get("id") != output["id"]:
            other = _run_text(checkpoints) if checkpoints else "nothing of it"
            raise RunError(
                f"resume: output_dir {self.output_dir} holds {_run_text(output)}, but ckpt_dir {self.ckpt_dir} holds "
                f"{other}; expected the folders of one run"
            )
        return found

    def begin(
        self,
        training: Sequence[Mapping[str, Any]],
        validation: Sequence[Mapping[str, Any]],
        schedule: Mapping[str, float],
    ) -> None:
        """Tell what changed, move an older run aside, and write `run.json` and `config.yaml` (rank 0).

        Called from a config, after its checks: a start that fails them leaves no trace.

        Args:
            training: items that are trained on.
            validation: items that validate.
            schedule: what the learning rate depends on, by name.

        Raises:
            RunError: the run would train on scans that validated it, or its schedule would be another.
        """
        if idist.get_rank() > 0:
            return
        before = self.claimed
        if before and "command" not in before and not self.overwrite:
            before = None  # nothing is known of it
        if before and self.overwrite:
            for folder in dict.fromkeys(map(Path.resolve, self._folders)):
                _move_aside(folder, before["id"])
            before = None
        split = {"training": self._keys(training), "validation": self._keys(validation)}
        text = config_text()
        if before and (changes := self._changes(text)):
            print_table([("changed", line) for line in changes])
        if before and self.resumed and not self.resume_changed:
            with self._released_if_refused():
                _require_same_split(before, split)
                _require_same_schedule(before, schedule)
        run = {
            "format": 1,
            "id": before["id"] if before else uuid.uuid4().hex[:12],
            **_this_start(),
            "resumed": self.resumed,
            "versions": _versions(),
            "git": _revision(),
            "config": hashlib.sha256(text.encode()).hexdigest(),
            "schedule": dict(schedule),
            **{part: list(keys) for part, keys in split.items()},
            "earlier": [*before["earlier"], _start_of(before)] if before else [],
        }
        for folder in reversed(self._folders):
            write_json(folder / NAME, run)
        with atomic_path(self.output_dir / "config.yaml") as temporary:
            temporary.write_text(text, encoding="utf-8")

    def release(self) -> None:
        """Let other runs use the folders."""
        self.signals.stop()
        for lock in self.locks:
            lock.release()

    def _keys(self, items: Sequence[Mapping[str, Any]]) -> dict[str, str]:
        """Short hash → path of each scan."""
        keys = {}
        root = self.dataset_dir.absolute()
        for item in items:
            path = Path(paths_of(item)[0]).absolute()
            known = path.relative_to(root) if path.is_relative_to(root) else path
            keys[hashlib.sha256(os.fsencode(known)).hexdigest()[:16]] = str(path)
        return keys

    def _changes(self, config: str) -> list[str]:
        """Settings that differ from those of the last start."""
        path = self.output_dir / "config.yaml"
        try:
            old = dict(_settings(yaml.safe_load(path.read_text(encoding="utf-8"))))
        except (OSError, ValueError, AttributeError, yaml.YAMLError):
            return [f"unknown: {path} cannot be read"]
        new = dict(_settings(yaml.safe_load(config)))
        return [
            f"{key}: {new.get(key)}, before {old.get(key)}"
            + ("; that of the checkpoint is used" if key in OF_THE_CHECKPOINT and self.resumed else "")
            for key in {**new, **old}
            if new.get(key) != old.get(key)
        ]


def _settings(config: Mapping[str, Any], inside: str = "") -> Iterator[tuple[str, Any]]:
    """Names and values of a config, nested ones as `train#optimizer#lr`."""
    for key, value in config.items():
        if isinstance(value, Mapping):
            yield from _settings(value, f"{inside}{key}#")
        elif inside or key not in OF_A_START:
            yield f"{inside}{key}", value


def _require_same_split(before: Mapping[str, Any], split: Mapping[str, Mapping[str, str]]) -> None:
    for now, once, what in (
        ("training", "validation", "would be trained on, but validated this run before"),
        ("validation", "training", "would validate, but this run was trained on them"),
    ):
        if both := [path for key, path in split[now].items() if key in before[once]]:
            raise RunError(
                f"resume: {len(both)} scan(s) {what}:\n{first_lines(both)}\nexpected the split of the first start "
                "(dataset_dir, datalist, seed and the keys of the split), or `--resume_changed true`"
            )


def _require_same_schedule(before: Mapping[str, Any], schedule: Mapping[str, float]) -> None:
    changed = [
        f"{key} {value}, expected {before['schedule'].get(key)}"
        for key, value in schedule.items()
        if before["schedule"].get(key) != value
    ]
    if changed:
        raise RunError(
            f"resume: found {'; '.join(changed)} as the run began: its learning rate would jump (steps_per_epoch "
            "follows from the number of scans, batch_size and processes); `--resume_changed true` continues so"
        )


# ------------------------------------------------------------------------------------------------------- identity


def _this_start() -> dict[str, Any]:
    return {
        "time": time.strftime("%Y-%m-%d %H:%M:%S %z"),
        "host": socket.gethostname(),
        "process": os.getpid(),
        "command": command_text(sys.orig_argv),
    }


def _start_of(run: Mapping[str, Any]) -> dict[str, Any]:
    return {key: run[key] for key in _this_start()}


def _versions() -> dict[str, str]:
    modules = {module.__name__: module.__version__ for module in (torch, monai, ignite)}
    return {"python": platform.python_version(), **modules}


def _revision() -> str | None:
    """Git revision of this code, with `-dirty` if files have changed; None if it is in no repository."""
    line = ["git", "describe", "--always", "--dirty", "--abbrev=40", "--exclude=*"]
    try:
        done = subprocess.run(line, cwd=Path(__file__).parent, capture_output=True, text=True, timeout=30, check=True)
    except (OSError, subprocess.SubprocessError):
        return None
    return done.stdout.strip()


def _read_run(folder: Path) -> dict[str, Any] | None:
    """The run in a folder: from its `run.json`, or one of which only checkpoints are known; None if there is none.

    Raises:
        RunError: `run.json` is damaged.
    """
    path = folder / NAME
    if not path.exists():
        return {"id": "unnamed"} if any(folder.glob("checkpoint*")) else None
    try:
        run = json.loads(path.read_text(encoding="utf-8"))
        _start_of(run), run["schedule"].items(), run["training"], run["validation"], run["earlier"], run["id"] + ""
    except (OSError, ValueError, TypeError, KeyError, AttributeError) as error:
        raise RunError(
            f"{path}: found {error!r}, expected the identity of a run; remove it if you know whose folder it is"
        ) from error
    return run


def _run_text(run: Mapping[str, Any]) -> str:
    return f"the run {run['id']} ({_start_text(run)})" if "command" in run else f"checkpoints of a run without {NAME}"


def _start_text(start: Mapping[str, Any]) -> str:
    return f"{start['time']}, host {start['host']}, process {start['process']}: {start['command']}"


def _move_aside(folder: Path, run: str) -> None:
    """Move what a run wrote to `previous/ID`, where nothing is replaced."""
    target = folder / "previous" / run
    while target.exists():
        target = target.with_name(f"{target.name}_2")
    target.mkdir(parents=True)
    for path in [path for pattern in WRITTEN for path in folder.glob(pattern)]:
        path.replace(target / path.name)
