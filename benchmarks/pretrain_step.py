"""What a pre-training step costs: ours, ours without each of the means that make it fast, and the published recipe.

    python -m benchmarks.pretrain_step                                    # UNet, full size, 2 crops
    python -m benchmarks.pretrain_step --overlays swin_unetr --crops 1    # SwinUNETR, full size
    python -m benchmarks.pretrain_step --overlays small --steps 10        # a network for a laptop

All variants take their steps in turn in one process, so that a machine that gets faster or slower does so for all of
them. A CPU's times are seconds of the processor, a GPU's are seconds of the clock. The peak memory is measured in a
process of its own for each variant (on a GPU: what was allocated). The floor is the multiplications and additions of a
step at the speed of a single convolution, which is measured in the same process.
"""

from __future__ import annotations

import json
import platform
import resource
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from itertools import pairwise
from pathlib import Path
from typing import Any

import fire
import torch
from monai.bundle import ConfigParser
from torch.utils.flop_counter import FlopCounterMode

from tools.common.text import bytes_text
from tools.layers import MEANS

BUNDLE = Path(__file__).resolve().parents[1] / "bundles/hybridmim_pretrain"
PARTS = ("forward", "loss", "backward", "optimizer")
PUBLISHED = "published recipe"
OURS = "as configured"


def _parser(overlays: Sequence[str], overrides: dict[str, Any]) -> ConfigParser:
    """The bundle's own training config."""
    parser = ConfigParser()
    parser.read_config([str(BUNDLE / f"configs/{name}.yaml") for name in ("train", *overlays)])
    parser.update({"bundle_root": str(BUNDLE), **overrides})
    return parser


def _network(means: Sequence[str]) -> str:
    return f"$accelerate(@step, means={list(means)!r}).to(@device)"


def variants(overlays: Sequence[str]) -> dict[str, dict[str, Any]]:
    """Name → keys of train.yaml that differ; the published recipe has those of its step."""
    swin = "swin_unetr" in overlays
    unused = {"attention"} if not swin else {"padding", "activations", "pooling"}
    published = {} if swin else {"dropout_stages": [0]}
    parts: dict[str, dict[str, Any]] = {
        PUBLISHED: {"amp": "off", "network": _network([]), **published},
        OURS: {},
        "32 bit": {"amp": "off"},
        "bfloat16": {"amp": "bf16"},
        "with checkpointing": {"checkpointing": True},
    }
    for name in MEANS:
        if name not in unused:
            parts[f"without {name}"] = {"network": _network([m for m in MEANS if m != name])}
    if not swin:
        parts["views by dropout alone"] = {"views": "dropout"}  # which share the first stage
    geometry = _parser(overlays, {}).get_parsed_content("geometry")
    if geometry.decode_size != geometry.roi_size:
        parts["whole crop decoded"] = {"decode_size": "@roi_size"}
    parts["no contrastive term"] = {"weight_cl": 0.0}
    return parts


class Step:
    """One training step of a variant, in parts."""

    def __init__(self, overlays: Sequence[str], device: str, crops: int, name: str, overrides: dict[str, Any]) -> None:
        torch.manual_seed(0)
        parser = _parser(overlays, {"device": device, **overrides})
        draw = parser.get_parsed_content("draw")[-1]
        draw.set_random_state(0)
        self.image = torch.rand(crops, 1, *draw.geometry.roi_size, device=device) * 0.9 + 0.05
        self.mask = torch.stack([draw({"image": crop})["mask"] for crop in self.image]).to(device)
        if name == PUBLISHED:
            from .published_recipe import PublishedStep  # the bundle's scripts can be imported now

            self.step = PublishedStep(parser.get_parsed_content("backbone"), draw.geometry).to(device).train()
            self.loss = lambda prediction, image, mask: {"loss": prediction}
            self.optimizer = torch.optim.AdamW(self.step.parameters())
            self.predict = self.step
        else:
            self.step = parser.get_parsed_content("network").train()
            self.loss = parser.get_parsed_content("loss")
            self.optimizer = parser.get_parsed_content("train#optimizer")
            inferer = parser.get_parsed_content("train#inferer")
            self.predict = lambda image, mask: inferer(image, self.step, mask)

    def run(self, mark: Callable[[], None] = lambda: None) -> None:
        """Take one step; call `mark` after each of its `PARTS`."""
        prediction = self.predict(self.image, self.mask)
        mark()
        loss = self.loss(prediction, self.image, self.mask)["loss"]
        del prediction
        mark()
        loss.backward()
        mark()
        self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)
        mark()

    def time(self) -> list[float]:
        """Seconds of each part."""
        cuda = self.image.is_cuda
        clock = time.perf_counter if cuda else time.process_time
        marks: list[float] = []

        def mark() -> None:
            if cuda:
                torch.cuda.synchronize()
            marks.append(clock())

        mark()
        self.run(mark)
        return [b - a for a, b in pairwise(marks)]


def peak(overlays: Sequence[str], device: str, crops: int, name: str, threads: int) -> int:
    """Peak memory of two steps, bytes, in a process of its own; on a CPU that of the process."""
    line = [sys.executable, "-m", "benchmarks.pretrain_step", "--device", device, "--crops", str(crops)]
    line += ["--overlays", ",".join(overlays), "--threads", str(threads), "--only", name]
    out = subprocess.run(line, check=True, capture_output=True, text=True, cwd=BUNDLE.parents[1])
    return json.loads(out.stdout.splitlines()[-1])["peak"]


def _measure_peak(step: Step) -> int:
    if step.image.is_cuda:
        torch.cuda.reset_peak_memory_stats()
    for _ in range(2):  # the optimizer's moments exist after the first
        step.run()
    if step.image.is_cuda:
        return torch.cuda.max_memory_allocated()
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)


def convolution_rate(device: str, dtype: torch.dtype = torch.float32) -> float:
    """Operations per second of a convolution of 64 to 64 channels, kernel 3, at 48³ voxels."""
    layer = torch.nn.Conv3d(64, 64, 3, padding=1, device=device, dtype=dtype)
    image = torch.rand(1, 64, 48, 48, 48, device=device, dtype=dtype)
    clock = time.process_time if device == "cpu" else time.perf_counter
    seconds = []
    with torch.no_grad():
        for _ in range(4):
            start = clock()
            layer(image)
            if device != "cpu":
                torch.cuda.synchronize()
            seconds.append(clock() - start)
    return 2 * 27 * 64 * 64 * 48**3 / min(seconds)


def main(
    overlays: str = "",
    device: str = "",
    crops: int = 2,
    steps: int = 3,
    threads: int = 1,
    variants_only: str = "",
    only: str = "",
) -> None:
    """Run all variants.

    Args:
        overlays: of train.yaml, separated by commas; empty for the settings of the paper.
        device: by default the GPU, if there is one.
        crops: in a batch.
        steps: of each variant that are timed, after one that is not.
        threads: of the processor.
        variants_only: names of variants, separated by commas, to run only these.
        only: name of a variant, to print its peak memory as JSON.
    """
    torch.set_num_threads(threads)
    device = device or ("cuda" if torch.cuda.is_available() else "cpu")
    names = [name for name in (overlays.split(",") if isinstance(overlays, str) else overlays) if name]
    if only:
        print(json.dumps({"peak": _measure_peak(Step(names, device, crops, only, variants(names)[only]))}))
        return
    chosen = [n for n in (variants_only.split(",") if isinstance(variants_only, str) else variants_only) if n]
    parts = {name: keys for name, keys in variants(names).items() if not chosen or name in chosen}
    machine = torch.cuda.get_device_name() if device != "cpu" else f"CPU {torch.backends.cpu.get_cpu_capability()}"
    print(
        f"{machine}, {threads} thread(s); torch {torch.__version__}, Python {platform.python_version()}; "
        f"{', '.join(names) or 'full size'}, {crops} crop(s), {steps} step(s)"
    )
    peaks = {name: peak(names, device, crops, name, threads) for name in parts}
    built = {name: Step(names, device, crops, name, keys) for name, keys in parts.items()}
    times: dict[str, list[list[float]]] = {name: [] for name in built}
    rates = []
    for turn in range(steps + 1):
        rates.append(convolution_rate(device))
        for name, step in built.items():
            seconds = step.time()
            if turn:
                times[name].append(seconds)
    first = next(iter(built))
    total = {name: statistics.median(map(sum, seconds)) for name, seconds in times.items()}
    print(f"| variant | {' | '.join(PARTS)} | step, s | faster | peak memory | of {first}'s |")
    print("| --- |" + " --- |" * (len(PARTS) + 4))
    for name in built:
        by_part = [statistics.median(column) for column in zip(*times[name], strict=True)]
        ratio = statistics.median(sum(a) / sum(b) for a, b in zip(times[first], times[name], strict=True))
        print(
            f"| {name} | {' | '.join(f'{s:.2f}' for s in by_part)} | {total[name]:.2f} | {ratio:.2f}× "
            f"| {bytes_text(peaks[name])} | {peaks[name] / peaks[first]:.2f}× |"
        )
    if OURS in built:
        with FlopCounterMode(display=False) as counter:
            built[OURS].run()
        rate = statistics.median(rates)
        operations = counter.get_total_flops()
        print(f"floor: {operations / rate:.2f} s ({operations:.3g} operations at {rate:.3g} per second, 32 bit)")


if __name__ == "__main__":
    fire.Fire(main)
