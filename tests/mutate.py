"""Breaks the product on purpose, one fault at a time, and tells which faults the tests notice.

    python -m tests.mutate                      every mutation of tests/mutations.yaml
    python -m tests.mutate --only flip,rate     those whose name holds one of these words
    python -m tests.mutate --jobs 4             so many at a time
    python -m tests.mutate --baseline           first the same tests without a mutation: all must pass

Mutations are applied to copies of the tree in a temporary folder. Exit code 0: all are caught or explained; 1: one
survives that is not explained; 2: the list does not fit the code (a text that is not found, tests that do not run).
"""

from __future__ import annotations

import argparse
import importlib
import multiprocessing
import os
import re
import shlex
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from dataclasses import dataclass
from multiprocessing import connection
from multiprocessing.process import BaseProcess
from pathlib import Path

import pytest
import yaml

ROOT = Path(__file__).resolve().parents[1]
LIST = ROOT / "tests/mutations.yaml"
# imported once, because that takes longer than most tests; none is mutated
LIBRARIES = ("matplotlib.pyplot", "monai.bundle", "monai.handlers", "monai.networks.nets", "nibabel", "scipy.ndimage")
TESTS_FAILED = 1  # exit code of pytest


@dataclass(frozen=True)
class Mutation:
    """One fault.

    Attributes:
        name: what is wrong then.
        files: pattern, relative to the repository's root; the text is replaced in every file that matches.
        old: text that stands in each of them.
        new: what takes its place, wherever it stands.
        tests: arguments of pytest.
        explained: why no test needs to notice.
    """

    name: str
    files: str
    old: str
    new: str
    tests: str
    explained: str = ""

    def apply(self, root: Path) -> dict[Path, str]:
        """Change the files of a copy of the tree; return what they held.

        Raises:
            LookupError: no file matches, or one does not hold the text.
        """
        before = {path: path.read_text("utf-8") for path in sorted(root.glob(self.files))}
        if not before:
            raise LookupError(f"{self.name}: files: found none that matches {self.files}, expected at least one")
        for path, text in before.items():
            if self.old not in text:
                raise LookupError(f"{self.name}: {path.relative_to(root)}: expected the text\n{self.old}")
        for path, text in before.items():
            path.write_text(text.replace(self.old, self.new), "utf-8")
        return before


@dataclass(frozen=True)
class Outcome:
    """What the tests said.

    Attributes:
        code: exit code of pytest.
        by: name of the first test that failed.
        seconds: how long they took.
        said: the end of their output.
    """

    code: int
    by: str
    seconds: float
    said: str


def read_mutations(path: Path = LIST) -> list[Mutation]:
    """The list, each name once.

    Raises:
        ValueError: a name is there twice.
    """
    mutations = [Mutation(**entry) for entry in yaml.safe_load(path.read_text("utf-8"))]
    names = [mutation.name for mutation in mutations]
    if twice := {name for name in names if names.count(name) > 1}:
        raise ValueError(f"{path}: found {', '.join(sorted(twice))} more than once, expected each name once")
    return mutations


def copy_tree(folder: Path) -> Path:
    """A copy of all files that git does not ignore."""
    listed = ["git", "ls-files", "--cached", "--others", "--exclude-standard", "-z"]
    for name in subprocess.run(listed, cwd=ROOT, capture_output=True, text=True, check=True).stdout.split("\0"):
        if name and (ROOT / name).is_file():
            (folder / name).parent.mkdir(parents=True, exist_ok=True)
            shutil.copy2(ROOT / name, folder / name)
    return folder


def start_tests(arguments: str, root: Path, log: Path) -> BaseProcess:
    """Run pytest in a copy of the tree until a test fails, in a fork of this process, which has the libraries."""

    def run() -> None:
        with log.open("wb") as file:
            os.dup2(file.fileno(), 1)
            os.dup2(file.fileno(), 2)
        os.chdir(root)
        sys.path[:] = [str(root), *(p for p in sys.path if Path(p).resolve() != ROOT)]  # "" is the working folder
        for name in [name for name in sys.modules if name.partition(".")[0] == "tests"]:
            del sys.modules[name]  # this package belongs to the tree that is not mutated
        os.environ |= {"PYTHONPATH": str(root), "PYTHONDONTWRITEBYTECODE": "1"}  # of commands that tests start
        # no compiled files: two versions of a file within a second have the same date
        sys.dont_write_bytecode = True
        line = ["-x", "-q", "-p", "no:cacheprovider", "-p", "no:xdist", "-W", "ignore", "--basetemp", f"{root}_pytest"]
        os._exit(pytest.main([*line, *shlex.split(arguments)]))

    process = multiprocessing.get_context("fork").Process(target=run)
    process.start()
    return process


def run_all(tasks: Sequence[tuple[Mutation | None, str]], jobs: int) -> list[Outcome]:
    """Outcome of each (mutation, tests); None changes nothing."""
    for name in LIBRARIES:
        importlib.import_module(name)
    outcomes: dict[int, Outcome] = {}
    with tempfile.TemporaryDirectory(prefix="mutate_") as folder:
        free = [copy_tree(Path(folder) / f"copy{number}") for number in range(jobs)]
        waiting, running = list(enumerate(tasks)), {}
        while waiting or running:
            while waiting and free:
                number, (mutation, tests) = waiting.pop(0)
                root = free.pop()
                before = mutation.apply(root) if mutation else {}
                log = Path(folder) / f"{number}.txt"
                process = start_tests(tests, root, log)
                running[process.sentinel] = (process, number, root, before, log, time.monotonic())
            for sentinel in connection.wait(list(running)):
                process, number, root, before, log, start = running.pop(sentinel)
                process.join()
                for path, text in before.items():
                    path.write_text(text, "utf-8")
                free.append(root)
                said = log.read_text("utf-8", "replace")
                failed = re.search(r"^(?:FAILED|ERROR) \S+::(\w+)", said, re.MULTILINE)
                seconds = time.monotonic() - start
                outcomes[number] = Outcome(process.exitcode, failed[1] if failed else "", seconds, said[-3000:])
                _say(*tasks[number], outcomes[number])
    return [outcomes[number] for number in range(len(tasks))]


def _say(mutation: Mutation | None, tests: str, outcome: Outcome) -> None:
    good = "passes" if mutation is None else "SURVIVES"
    verdict = {0: good, TESTS_FAILED: "caught"}.get(outcome.code, f"exit code {outcome.code}")
    name = mutation.name if mutation else f"without a mutation: {tests}"
    print(f"{verdict:<9} {outcome.seconds:5.0f} s  {name}", file=sys.stderr, flush=True)


def table(mutations: Sequence[Mutation], outcomes: Sequence[Outcome]) -> str:
    """Markdown: a row for each mutation."""
    lines = ["| mutation | caught by |", "| --- | --- |"]
    for mutation, outcome in zip(mutations, outcomes, strict=True):
        survivor = f"**survives**: {mutation.explained or 'not explained'}"
        lines.append(f"| {mutation.name} | {f'`{outcome.by}`' if outcome.code else survivor} |")
    return "\n".join(lines)


def main() -> int:
    """Run the mutations and print the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", default="", help="words, separated by commas, of the names of mutations")
    parser.add_argument("--jobs", type=int, default=max((os.cpu_count() or 1) // 2, 1))
    parser.add_argument("--baseline", action="store_true", help="first run the tests without a mutation")
    chosen = parser.parse_args()
    words = [word for word in chosen.only.split(",") if word]
    mutations = [m for m in read_mutations() if not words or any(word in m.name for word in words)]
    try:
        if not mutations:
            raise LookupError(f"--only: found no mutation with {chosen.only!r} in its name, expected at least one")
        with tempfile.TemporaryDirectory(prefix="mutate_") as folder:  # a list that does not fit costs no hour
            root = copy_tree(Path(folder))
            for mutation in mutations:
                for path, text in mutation.apply(root).items():
                    path.write_text(text, "utf-8")
    except LookupError as error:
        print(error, file=sys.stderr)
        return 2
    start = time.monotonic()
    if chosen.baseline:
        selections = list(dict.fromkeys(m.tests for m in mutations))
        for tests, outcome in zip(selections, run_all([(None, t) for t in selections], chosen.jobs), strict=True):
            if outcome.code:
                print(f"{tests}: expected to pass without a mutation:\n{outcome.said}", file=sys.stderr)
                return 2
    outcomes = run_all([(m, m.tests) for m in mutations], chosen.jobs)
    pairs = list(zip(mutations, outcomes, strict=True))
    print(table(mutations, outcomes))
    survivors = [m for m, outcome in pairs if outcome.code == 0]
    caught = sum(outcome.code == TESTS_FAILED for outcome in outcomes)
    print(f"\n{caught} of {len(pairs)} caught ({caught / len(pairs):.0%}) in {time.monotonic() - start:.0f} s")
    broken = [(m, outcome) for m, outcome in pairs if outcome.code not in (0, TESTS_FAILED)]
    for mutation, outcome in broken:
        print(f"{mutation.name}: the tests did not run:\n{outcome.said}", file=sys.stderr)
    if broken:
        return 2
    return int(any(not m.explained for m in survivors))


if __name__ == "__main__":
    os.environ["OMP_NUM_THREADS"] = "1"
    sys.exit(main())
