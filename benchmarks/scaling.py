"""What more processes cost: one and two of one thread each, at the same batch per process.

    python -m benchmarks.scaling                                      # the network for a laptop
    python -m benchmarks.scaling --overlays "" --roi_size "[64,64,64]"    # the full network on smaller crops

Prints the efficiency (time of a step of one process / of two) with and without gathered views, the bytes that a process
sends per step, and from these a table, on paper, for 8 to 512 GPUs. Two processes share the memory and caches of the
machine. What that costs is measured, too: two that train apart, side by side, and send nothing. All run in turn.
"""

from __future__ import annotations

import json
import os
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import fire
import torch
import torch.distributed as dist
from monai.bundle import ConfigParser

from tools.common.ranks import leave_processes
from tools.common.text import bytes_text

BUNDLE = Path(__file__).resolve().parents[1] / "bundles/hybridmim_pretrain"
GPUS = (8, 16, 64, 128, 512)
LINKS = {"10 Gb/s": 1.25e9, "100 Gb/s": 12.5e9, "400 Gb/s": 50e9}  # bytes per second and GPU


def child(overlays: Sequence[str], crops: int, steps: int, gathered: bool, overrides: dict[str, Any]) -> None:
    """Take steps in this process, which torchrun may have started with others; rank 0 prints what it measured."""
    torch.set_num_threads(1)
    several = "WORLD_SIZE" in os.environ
    parser = ConfigParser()
    parser.read_config(
        [str(BUNDLE / f"configs/{n}.yaml") for n in ("train", *overlays, *["multi_gpu_train"] * several)]
    )
    parser.update({"bundle_root": str(BUNDLE), "device": "$torch.device('cpu')", **overrides})
    sent = {"gradients": 0, "views": 0}
    if several:
        dist.init_process_group("gloo")
    torch.manual_seed(0)
    parser.get_parsed_content("path")
    network = parser.get_parsed_content("network").train()
    loss, optimizer = parser.get_parsed_content("loss"), parser.get_parsed_content("train#optimizer")
    draw = parser.get_parsed_content("draw")[-1]
    image = torch.rand(crops, 1, *draw.geometry.roi_size) * 0.9 + 0.05
    mask = torch.stack([draw({"image": crop})["mask"] for crop in image])
    if several:
        _count(network, sent, steps + 1)
    if not gathered:
        from scripts import hybridmim  # the bundle's scripts can be imported now

        hybridmim.gather = lambda projection: projection
    seconds = []
    for step in range(steps + 1):
        if several:
            dist.barrier()
        start = time.perf_counter()
        loss(network(image, mask), image, mask)["loss"].backward()
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        if step:  # the first is not timed
            seconds.append(time.perf_counter() - start)
    if not several or dist.get_rank() == 0:
        print(json.dumps({"seconds": statistics.median(seconds), **{k: v // (steps + 1) for k, v in sent.items()}}))
    if several:
        leave_processes()


def _count(network: torch.nn.Module, sent: dict[str, int], steps: int) -> None:
    """Add up the bytes that this process gives to the others: all gradients at every step, and the views."""
    sent["gradients"] = steps * sum(p.numel() * p.element_size() for p in network.parameters() if p.requires_grad)

    def counted(function: Callable, argument: int) -> Callable:
        def call(*args: Any) -> Any:
            sent["views"] += args[argument].numel() * args[argument].element_size()
            return function(*args)

        return call

    dist.all_gather, dist.all_reduce = counted(dist.all_gather, 1), counted(dist.all_reduce, 0)


def _measure(processes: int, arguments: dict[str, Any], apart: int = 1) -> dict[str, float]:
    """Run a child per process, or as many trainings `apart` side by side; what rank 0 of the first printed."""
    line = [sys.executable, "-W", "ignore"]
    if processes > 1:
        line += ["-m", "torch.distributed.run", "--standalone", "--nproc_per_node", str(processes)]
    line += ["-m", "benchmarks.scaling", "--only", repr(arguments)]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}
    runs = [subprocess.Popen(line, cwd=BUNDLE.parents[1], env=environment, **pipes) for _ in range(apart)]
    ended = [(run, *run.communicate()) for run in runs]
    for run, _, errors in ended:
        if run.returncode:
            sys.exit(errors)
    return json.loads(ended[0][1].splitlines()[-1])


def efficiency(gpus: int, step: float, sent: float, link: float) -> float:
    """Time of a step alone / with a ring all-reduce after it, of which nothing is hidden behind the backward pass.

    Args:
        gpus: number of GPUs n.
        step: seconds of a step t on one of them.
        sent: bytes of the gradients G.
        link: bytes per second b that a GPU sends: t / (t + 2 (n - 1) / n · G / b).
    """
    return step / (step + 2 * (gpus - 1) / gpus * sent / link)


def main(
    overlays: str = "small",
    crops: int = 2,
    steps: int = 10,
    turns: int = 3,
    gpu_step: float = 0.25,
    only: dict[str, Any] | None = None,
    **overrides: Any,
) -> None:
    """Measure, and print the tables.

    Args:
        overlays: of train.yaml, separated by commas; empty for the settings of the paper.
        crops: in a batch of each process.
        steps: that are timed in each run, after one that is not.
        turns: runs of each kind.
        gpu_step: assumed seconds of a step on one GPU, for the table on paper.
        only: arguments of `child`, to run it in this process.
        overrides: keys of train.yaml.
    """
    if only is not None:
        child(**only)
        return
    names = [name for name in (overlays.split(",") if isinstance(overlays, str) else overlays) if name]
    print(f"CPU, processes of one thread; torch {torch.__version__}; {', '.join(names) or 'full size'}, {crops} crops")
    print(
        "| views | one process, s | two apart, s | two, s | efficiency | to two apart | gradients sent | views sent |"
    )
    print("|" + " --- |" * 8)
    sent = 0.0
    for gathered in (True, False):
        arguments = {
            "overlays": names,
            "crops": crops,
            "steps": steps,
            "gathered": gathered,
            "overrides": overrides,
        }
        runs = [(_measure(1, arguments), _measure(1, arguments, apart=2), _measure(2, arguments)) for _ in range(turns)]
        times = [statistics.median(run[k]["seconds"] for run in runs) for k in range(3)]
        ratios = [statistics.median(run[k]["seconds"] / run[2]["seconds"] for run in runs) for k in range(2)]
        sent, views = runs[0][2]["gradients"], runs[0][2]["views"]
        kind = "gathered" if gathered else "of one process"
        cells = [*(f"{t:.3f}" for t in times), *(f"{r:.2f}" for r in ratios), bytes_text(sent), bytes_text(views)]
        print(f"| {' | '.join([kind, *cells])} |")
    print(f"\nOn paper: t / (t + 2 (n - 1) / n · G / b), t = {gpu_step} s (assumed), G = {bytes_text(sent)}")
    print(f"| GPUs n | {' | '.join(f'b = {name}' for name in LINKS)} |\n|{' --- |' * (len(LINKS) + 1)}")
    for gpus in GPUS:
        cells = (f"{efficiency(gpus, gpu_step, sent, link):.3f}" for link in LINKS.values())
        print(f"| {gpus} | {' | '.join(cells)} |")


if __name__ == "__main__":
    fire.Fire(main)
