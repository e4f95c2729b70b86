"""Kills trainings at random and at chosen moments, resumes them, and compares how they end.

    python -m tests.kill                                    100 kills, one and two processes, 0 and 2 workers
    python -m tests.kill --kills 10 --bundles hippocampus   fewer, of one bundle
    python -m tests.kill --processes 2 --workers 0          of one kind

Runs are tiny trainings of the real configs on sample scans, with one checkpoint kept and one written every few steps.
Every run is killed up to eight times, by SIGKILL, or ended by a signal that it answers, and then resumed to its end. It
must have the weights and the metrics.csv, to the last bit, of a run that nothing interrupted, which had no workers.
Exit code 0: all runs did.
"""

from __future__ import annotations

import argparse
import importlib
import itertools
import os
import random
import signal
import socket
import sys
import tempfile
import threading
import time
import traceback
from collections import Counter
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from monai.bundle import run as run_bundle
from monai.networks.nets import BasicUNet

from tests.hybridmim_pretrain import bundle as pretrain
from tests.segmentation_bundles import bundles as segmentation
from tests.whole_runs import same
from tools.samples.sample_data import sample_data
from tools.training.checkpointing import INTERRUPTED, SIGNALS
from tools.training.requirements import training_memory
from tools.weights.training_checkpoints import checkpoints

EPOCHS, KEEPS = 3, {"interval": 1, "minutes": 0.001, "kept": 1}
# the event of Python and a part of the file's name, upon which the process is killed, perhaps a little later
MOMENTS = {
    "at random": ("os.rename", ".config.yaml"),
    "writing a checkpoint": ("open", ".checkpoint_epoch="),
    "naming a checkpoint": ("os.rename", ".checkpoint_epoch="),
    "deleting a checkpoint": ("os.remove", "/checkpoint_epoch="),
    "writing weights": ("open", ".model.pt"),
    "naming metrics.csv": ("os.rename", ".metrics.csv"),
    "in the training": ("os.rename", ".checkpoint_epoch="),
}


@dataclass(frozen=True)
class Kind:
    """What is trained, and how.

    Attributes:
        bundle: `pretrain`, or the name of a segmentation bundle.
        processes: number of processes.
        workers: number of workers of each.
    """

    bundle: str
    processes: int
    workers: int


@dataclass(frozen=True)
class End:
    """How a process is ended.

    Attributes:
        moment: one of `MOMENTS`.
        count: number of events of this kind that are let pass.
        delay: time after the event, s.
        number: signal.
        rank: process that gets it.
    """

    moment: str
    count: int
    delay: float
    number: int
    rank: int


def options(kind: Kind, scans: Path, folder: Path) -> tuple[list[str], dict[str, Any]]:
    """Config files and values of a training."""
    configs = ["train", "small", *["multi_gpu_train"] * (kind.processes > 1)]
    common = {
        **{f"checkpoint_{name}": value for name, value in KEEPS.items() if name != "kept"},
        "checkpoints_kept": KEEPS["kept"],
        **{"dataset_dir": str(scans / kind.bundle), "epochs": EPOCHS, "batch_size": 1, "num_workers": kind.workers},
        **{"val_interval": 8, "cache": "none", "resume": "auto"},
    }
    if kind.bundle == "pretrain":
        files = [str(pretrain.ROOT / name) for name in pretrain.config_files(configs)]
        return files, {**pretrain.TINY, **pretrain.places(folder), **common, "crops_per_volume": 2}
    files = [str(segmentation.ROOT / name) for name in segmentation.config_files(kind.bundle, configs)]
    sizes = segmentation.sizes(kind.bundle, "unet")
    root = str(segmentation.ROOT / segmentation.bundle(kind.bundle))
    return files, {**segmentation.TINY_TRAINING, **sizes, **segmentation.places(folder), **common, "bundle_root": root}


def make_scans(folder: Path, bundle: str) -> None:
    """Five small scans for a bundle."""
    if bundle == "pretrain":
        for i in range(6):
            shape = (40 + i, 44 - i, 40)
            pretrain.save_nifti(folder / bundle / f"ct_{i}.nii.gz", pretrain.hounsfield(i, shape))
    else:
        sample_data(str(folder / bundle), bundle, cases=6)


def end_at(end: End) -> None:
    """Let this process be ended."""
    process, left = os.getpid(), [end.count]
    event, part = MOMENTS[end.moment]

    def look(name: str, arguments: tuple) -> None:
        if name == event and part in str(arguments[0]) and os.getpid() == process:
            left[0] -= 1
            if left[0] == -1 and end.delay:
                threading.Timer(end.delay, os.kill, (process, end.number)).start()
            elif left[0] == -1:
                os.kill(process, end.number)

    sys.addaudithook(look)


def load_libraries() -> None:
    """What every training loads, once; counting its memory loads most."""
    for name in ("blosc2", "matplotlib.pyplot", "tensorboard", "tools.results.figures", "tools.training.finetuning"):
        importlib.import_module(name)
    training_memory(BasicUNet(3, features=pretrain.TINY["unet_features"]), torch.rand(1, 1, 32, 32, 32))


def fork(task: Callable[[], None], log: Path) -> int:
    """Run a task in a forked process, which need not import the libraries again; return its number."""
    child = os.fork()
    if child:
        return child
    code = 1
    try:
        os.setsid()  # with its workers, so that they can be ended together
        file = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_APPEND)
        os.dup2(file, 1)
        os.dup2(file, 2)
        task()
        code = 0
    except SystemExit as error:
        code = error.code
    except BaseException:
        traceback.print_exc()
    finally:
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(code)


def train(kind: Kind, scans: Path, folder: Path, end: End | None) -> tuple[list[int], float]:
    """Train, perhaps to a premature end.

    Returns:
        The exit codes of the processes, negative for a signal, and the seconds from the start of the training.
    """
    folder.mkdir(exist_ok=True)
    files, values = options(kind, scans, folder)
    with socket.create_server(("localhost", 0)) as server:
        port = server.getsockname()[1]

    def task(rank: int) -> None:
        torch.set_num_threads(1)
        if kind.processes > 1:
            os.environ |= {"RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": str(kind.processes)}
            os.environ |= {"MASTER_ADDR": "localhost", "MASTER_PORT": str(port)}
        sys.argv = ["monai.bundle"]
        if end and end.rank == rank:
            end_at(end)
        run_bundle("training", config_file=files, logging_file=False, **values)

    children = [fork(lambda rank=rank: task(rank), folder / f"log_{rank}.txt") for rank in range(kind.processes)]
    codes: dict[int, int] = {}
    ended = None
    while len(codes) < len(children):
        child, status = os.waitpid(-1, 0) if not codes else (os.waitpid(next(c for c in children if c not in codes), 0))
        codes[child] = os.waitstatus_to_exitcode(status)
        if codes[child] not in (0, INTERRUPTED) and ended is None:  # as torchrun ends the others
            ended = child
            for other in set(children) - set(codes):
                os.kill(other, signal.SIGKILL)
    for child in children:
        with suppress(ProcessLookupError):
            os.killpg(child, signal.SIGKILL)  # workers of a killed process
    config = folder / "out/config.yaml"
    return [codes[child] for child in children], time.time() - config.stat().st_mtime if config.is_file() else 0.0


def result(folder: Path) -> dict[str, Any]:
    """What a run leaves, without the times of its validations."""
    content = {path.name: torch.load(path, weights_only=True) for path in sorted((folder / "models").glob("*.pt"))}
    for path in checkpoints(folder / "models"):
        content[path.name]["validation"] = content[path.name]["validation"]["step"]
    return {**content, "metrics.csv": (folder / "out/metrics.csv").read_text(), "left": sorted(left(folder))}


def left(folder: Path) -> list[str]:
    """Names of all files that a killed writer left."""
    return [path.name for path in folder.rglob(".*") if path.is_file()]


def main() -> int:
    """Kill, resume and compare; return the exit code."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--kills", type=int, default=100, help="least number of kills (default: 100)")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--bundles", default="pretrain,hippocampus", help="separated by commas")
    parser.add_argument("--processes", default="1,2", help="numbers of processes")
    parser.add_argument("--workers", default="0,2", help="numbers of workers")
    chosen = parser.parse_args()
    numbers = random.Random(chosen.seed)
    kinds = [
        Kind(bundle, int(processes), int(workers))
        for bundle, processes, workers in itertools.product(
            chosen.bundles.split(","), chosen.processes.split(","), chosen.workers.split(",")
        )
    ]
    done, runs, bad, expected, seconds = Counter(), 0, [], {}, {}
    with tempfile.TemporaryDirectory(prefix="kill_") as temporary:
        root = Path(temporary)
        load_libraries()
        for bundle in chosen.bundles.split(","):
            make_scans(root / "scans", bundle)
        for kind in itertools.cycle(kinds):
            if sum(number for what, number in done.items() if "KILL" in what) >= chosen.kills:
                break
            whole = Kind(kind.bundle, kind.processes, 0)
            if whole not in expected:
                folder = root / f"whole_{len(expected)}"
                codes, seconds[whole] = train(whole, root / "scans", folder, None)
                if any(codes):
                    print((folder / "log_0.txt").read_text(), file=sys.stderr)
                    return 1
                expected[whole] = result(folder)
            folder, ends, wrong = root / f"run_{runs}", [], None
            for _ in range(numbers.randint(3, 8)):
                end = draw(numbers, kind, seconds[whole])
                codes, after = train(kind, root / "scans", folder, end)
                interrupted = end.number != signal.SIGKILL
                trained = (folder / f"models/checkpoint_epoch={EPOCHS}.pt").is_file()
                if not any(codes) or (interrupted and trained):  # signals are answered until the report is written
                    break  # it ended before
                wanted = INTERRUPTED if interrupted else -signal.SIGKILL
                ends.append(f"{signal.Signals(end.number).name} {end.moment}, after {after:.1f} s")
                done[ends[-1].partition(",")[0]] += 1
                if codes[end.rank] != wanted or (interrupted and set(codes) != {INTERRUPTED}):
                    wrong = f"exit codes {codes}, expected {wanted}"
                    break
            if wrong is None:
                codes, _ = train(kind, root / "scans", folder, None)
                wrong = f"exit codes {codes}" if any(codes) else difference(result(folder), expected[whole])
            runs += 1
            print(f"{kind}: {'; '.join(ends) or 'ended before'}: {wrong or 'the same'}", flush=True)
            if wrong:
                bad.append(folder)
                print("".join(path.read_text()[-3000:] for path in sorted(folder.glob("log_*.txt"))), file=sys.stderr)
    print("\n".join(f"{number:>5}  {what}" for what, number in sorted(done.items())))
    print(
        f"{sum(done.values())} kills and signals in {runs} runs, "
        f"of which {runs - len(bad)} ended as the uninterrupted one"
    )
    return int(bool(bad))


def draw(numbers: random.Random, kind: Kind, seconds: float) -> End:
    """An end at a random time or a chosen moment; signals that are answered once the training has begun."""
    signals = numbers.random() < 0.2
    chosen = [moment for moment in MOMENTS if moment not in ("at random", "in the training")]
    moment = "in the training" if signals else numbers.choice([*["at random"] * len(chosen), *chosen])
    count, delay, rank = numbers.randrange(1 if "weights" in moment else 2), 0.0, 0
    if moment in ("at random", "in the training"):  # in half of it; a resumed run gets further
        count, delay, rank = 0, numbers.uniform(0.0, seconds / 2), numbers.randrange(kind.processes)
    elif moment.startswith("writing"):
        delay = numbers.choice([0.0, numbers.uniform(0.0, 0.004)])
    return End(moment, count, delay, numbers.choice(SIGNALS) if signals else signal.SIGKILL, rank)


def difference(found: dict[str, Any], expected: dict[str, Any]) -> str | None:
    """Names of what is not the same."""
    names = sorted(found.keys() | expected.keys())
    return ", ".join(n for n in names if n not in found or n not in expected or not same(found[n], expected[n])) or None


if __name__ == "__main__":
    os.environ |= {"OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""}
    sys.exit(main())
