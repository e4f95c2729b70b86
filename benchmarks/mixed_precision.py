"""Whether a training learns the same in bfloat16 as in 32 bit: its losses, beside the spread of seeds.

    python -m benchmarks.mixed_precision --dataset_dir /path/to/scans --output_dir runs/amp --epochs 6
    python -m benchmarks.mixed_precision --bundle hybridmim_spleen_seg --dataset_dir … --output_dir … --epochs 40

All other options are keys of the bundle's train.yaml. Every seed is trained in both precisions by the bundle's own
command; runs that have ended in `output_dir` are not made again.

A processor without bfloat16 takes the same way, but for its convolutions and matrix products: they are computed in 32
bit from inputs in bfloat16, and the result is rounded to bfloat16, which is what a processor that has it does. So this
says how a training learns on such a processor, and nothing about how fast.
"""

from __future__ import annotations

import csv
import os
import runpy
import statistics
import subprocess
import sys
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import nullcontext
from itertools import combinations, product
from pathlib import Path
from typing import Any

import fire
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves, tree_map_only

from tools.common import mixed_precision

ROOT = Path(__file__).resolve().parents[1]
PRECISIONS = ("off", "bf16")
PRODUCTS = {f"aten::{name}" for name in ("convolution", "convolution_backward", "mm", "bmm", "addmm", "baddbmm")}


class Rounded(TorchDispatchMode):
    """Compute convolutions and matrix products of bfloat16 in 32 bit, and round their results to bfloat16."""

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        tensors = (leaf for leaf in tree_leaves((args, kwargs)) if isinstance(leaf, Tensor))
        if func._schema.name not in PRODUCTS or all(tensor.dtype != torch.bfloat16 for tensor in tensors):
            return func(*args, **kwargs)
        args, kwargs = tree_map_only(Tensor, Tensor.float, (args, kwargs))
        return tree_map_only(Tensor, Tensor.bfloat16, func(*args, **kwargs))


def train() -> None:
    """Run `monai.bundle` with the arguments of this process, on a processor that has bfloat16 or is as if."""
    there = mixed_precision.has_bfloat16(torch.device("cuda" if torch.cuda.is_available() else "cpu"))
    if not there:
        mixed_precision.has_bfloat16 = lambda device: True
    with nullcontext() if there else Rounded():
        runpy.run_module("monai.bundle", run_name="__main__", alter_sys=True)


def run(bundle: str, overlays: Sequence[str], folder: Path, options: dict[str, Any]) -> list[float]:
    """Train once, unless that has been done; the mean loss of every epoch."""
    root, done = ROOT / "bundles" / bundle, folder / "done.txt"
    settings = "\n".join(
        f"{key}: {value}" for key, value in {"bundle": bundle, "overlays": overlays, **options}.items()
    )
    if done.exists() and done.read_text() != settings:
        sys.exit(f"{done}: found\n{done.read_text()}\nexpected\n{settings}\n: give another output_dir")
    if not done.exists():
        configs = [str(root / f"configs/{name}.yaml") for name in ("train", *overlays)]
        keys = {"config_file": configs, "bundle_root": root, "output_dir": folder, "ckpt_dir": folder / "models"}
        line = [sys.executable, "-W", "ignore", "-c", "from benchmarks.mixed_precision import train; train()"]
        line += ["run", "training", *(f"--{key}={value}" for key, value in {**keys, **options}.items())]
        environment = {**os.environ, "OMP_NUM_THREADS": "1"}
        ended = subprocess.run(line, cwd=ROOT, env=environment, capture_output=True, text=True)
        if ended.returncode:
            sys.exit(ended.stderr[-3000:])
        done.write_text(settings)
    with (folder / "metrics.csv").open() as rows:
        return [float(row["loss"]) for row in csv.DictReader(rows)]


def summary(losses: dict[tuple[str, int], list[float]]) -> str:
    """Table of the losses by epoch, and how far apart they are by precision and by seed.

    Args:
        losses: (`off` or `bf16`, seed) → mean loss of each epoch.
    """
    seeds = sorted({seed for _, seed in losses})
    lines = ["| epoch | 32 bit | bfloat16 | difference |", "| --- | --- | --- | --- |"]
    for epoch in range(len(losses["off", seeds[0]])):
        columns = {amp: [losses[amp, seed][epoch] for seed in seeds] for amp in PRECISIONS}
        means = {amp: statistics.mean(column) for amp, column in columns.items()}
        texts = [f"{means[amp]:.4f} ({min(columns[amp]):.4f}–{max(columns[amp]):.4f})" for amp in PRECISIONS]
        lines.append(f"| {epoch + 1} | {' | '.join(texts)} | {means['bf16'] - means['off']:+.4f} |")

    def apart(pairs: list[tuple[tuple[str, int], tuple[str, int]]]) -> float:
        return statistics.mean(abs(x - y) for a, b in pairs for x, y in zip(losses[a], losses[b], strict=True))

    precision = apart([(("off", seed), ("bf16", seed)) for seed in seeds])
    seed = apart([(("off", a), ("off", b)) for a, b in combinations(seeds, 2)])
    lines += ["", f"mean difference, same seed, other precision: {precision:.4f}; 32 bit, other seed: {seed:.4f}"]
    return "\n".join(lines)


def main(
    dataset_dir: str,
    output_dir: str,
    bundle: str = "hybridmim_pretrain",
    overlays: str = "small",
    seeds: int = 3,
    jobs: int = 1,
    **options: Any,
) -> None:
    """Train with every seed in both precisions, and print the losses.

    Args:
        dataset_dir: the bundle's.
        output_dir: a folder for each run.
        bundle: folder in `bundles`.
        overlays: of train.yaml, separated by commas.
        seeds: how many; at least 2.
        jobs: trainings at a time, of one thread each.
        options: other keys of train.yaml.
    """
    if seeds < 2:
        sys.exit(f"--seeds: at least 2 are needed, to know their spread; found {seeds}")
    names = [name for name in (overlays.split(",") if isinstance(overlays, str) else overlays) if name]
    out = Path(output_dir).resolve()
    keys = {"dataset_dir": Path(dataset_dir).resolve(), **options}

    def train_one(key: tuple[str, int]) -> list[float]:
        amp, seed = key
        return run(bundle, names, out / f"{amp}_seed{seed}", {**keys, "amp": amp, "seed": seed, "overwrite": True})

    todo = list(product(PRECISIONS, range(seeds)))
    with ThreadPoolExecutor(jobs) as pool:
        losses = dict(zip(todo, pool.map(train_one, todo), strict=True))
    print(f"{bundle}, {', '.join(names) or 'full size'}: mean loss of each epoch, {seeds} seeds (lowest–highest)\n")
    print(summary(losses))


if __name__ == "__main__":
    fire.Fire(main)
