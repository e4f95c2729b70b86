"""What a pre-training step costs: a decoded box against the whole crop, and a first stage that both views share.

    python -m benchmarks.pretrain_step --overlays small --steps 10

All variants run in one process, in turn, so that a machine that gets faster or slower does so for all of them.
Prints the median time of a step (forward, loss, backward), its ratio to the first row, and the memory: on a GPU
the peak that was allocated, on a CPU what the step keeps for its backward pass, counted by tensor shapes.
"""

from __future__ import annotations

import platform
import statistics
import time
from collections.abc import Callable
from pathlib import Path

import fire
import torch
from monai.bundle import ConfigParser

from tools.common.text import bytes_text
from tools.training.requirements import training_memory

BUNDLE = Path(__file__).resolve().parents[1] / "bundles/hybridmim_pretrain"


def _parser(overlays: list[str], overrides: dict) -> ConfigParser:
    """The bundle's own training config."""
    parser = ConfigParser()
    parser.read_config([str(BUNDLE / f"configs/{name}.yaml") for name in ("train", *overlays)])
    parser.update({"bundle_root": str(BUNDLE), **overrides})
    return parser


def _step(overlays: list[str], device: str, crops: int, overrides: dict) -> tuple[Callable[[], None], int]:
    """One training step, ready to run; and the bytes that it keeps."""
    parser = _parser(overlays, {"device": device, **overrides})
    step, loss = parser.get_parsed_content("network").train(), parser.get_parsed_content("loss")
    mask = parser.get_parsed_content("draw")[-1]
    mask.set_random_state(0)
    image = torch.rand(crops, 1, *mask.geometry.roi_size, device=device) * 0.9 + 0.05
    masks = torch.stack([mask({"image": crop})["mask"] for crop in image]).to(device)

    def run() -> None:
        loss(step(image, masks), image, masks)["loss"].backward()
        step.zero_grad(set_to_none=True)
        if image.is_cuda:
            torch.cuda.synchronize()

    return run, training_memory(step, image.cpu(), masks.cpu())


def main(overlays: str = "small", device: str = "", crops: int = 2, steps: int = 10) -> None:
    """Run all variants.

    Args:
        overlays: of train.yaml, separated by commas; empty for the settings of the paper.
        device: by default the GPU, if there is one.
        crops: in a batch.
        steps: of each variant that are timed, after one that is not.
    """
    torch.manual_seed(0)
    device = device or ("cuda" if torch.cuda.is_available() else "cpu")
    names = [name for name in (overlays.split(",") if isinstance(overlays, str) else overlays) if name]
    parts = {
        "as configured": {},
        "whole crop decoded": {"decode_size": "@roi_size"},
        "published dropout: first stage twice": {"dropout_stages": [0]},
        "no contrastive term": {"weight_cl": 0.0},
    }
    if "swin_unetr" in names:
        del parts["published dropout: first stage twice"]  # a setting of UNet
    geometry = _parser(names, {}).get_parsed_content("geometry")
    if geometry.decode_size == geometry.roi_size:
        del parts["whole crop decoded"]  # as configured
    variants = {name: _step(names, device, crops, overrides) for name, overrides in parts.items()}
    times: dict[str, list[float]] = {name: [] for name in variants}
    peaks: dict[str, int] = {}
    for turn in range(steps + 1):
        for name, (run, _) in variants.items():
            if device != "cpu":
                torch.cuda.reset_peak_memory_stats()
            start = time.perf_counter()
            run()
            if turn:
                times[name].append(time.perf_counter() - start)
            if device != "cpu":
                peaks[name] = torch.cuda.max_memory_allocated()
    machine = torch.cuda.get_device_name() if device != "cpu" else f"CPU, {torch.get_num_threads()} threads"
    print(f"{machine}; torch {torch.__version__}, Python {platform.python_version()}; {crops} crops, {steps} steps")
    print("| variant | s per step | ratio | memory |\n| --- | --- | --- | --- |")
    first = statistics.median(times["as configured"])
    for name, (_, kept) in variants.items():
        median = statistics.median(times[name])
        print(f"| {name} | {median:.3f} | {median / first:.2f} | {bytes_text(peaks.get(name, kept))} |")


if __name__ == "__main__":
    fire.Fire(main)
