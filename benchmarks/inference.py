"""Time and memory of segmenting a large CT with the BTCV bundle, beside the plain way of MONAI's bundles.

    python -m benchmarks.inference --size 256 --slices 200             # both ways, in turn
    python -m benchmarks.inference --size 512 --slices 700 --plain false

The scan is a synthetic abdomen, stretched to `size`×`size`×`slices` voxels of 0.75×0.75×1 mm, with noise. The network
is that of `small.yaml`, at spacing 1.5×1.5×2.0 mm, fitted for some steps on the labels of this scan: at random, its
labels would change from voxel to voxel. Ours is `run inferring` as it is. Plain is the same with
`SlidingWindowInferer`, softmax, `Spacingd` and `Invertd` of all classes in 64 bit (MONAI's default), and
`AsDiscreted`. Each run is a process of its own.
"""

from __future__ import annotations

import json
import os
import resource
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import fire
import nibabel as nib
import numpy as np
import torch
from monai.bundle import ConfigParser
from monai.losses import DiceCELoss
from torch.nn.functional import interpolate

from tools.common.mixed_precision import amp_dtype
from tools.common.tables import aligned
from tools.common.text import parse_bool
from tools.samples.anatomy import ct_abdomen

BUNDLE = Path(__file__).resolve().parents[1] / "bundles/hybridmim_btcv_seg"
CONFIGS = [str(BUNDLE / f"configs/{name}.yaml") for name in ("inference", "small")]
VOXEL, SPACING = (0.75, 0.75, 1.0), (1.5, 1.5, 2.0)  # mm, of the file and of the network
STAGES = ("read and preprocess", "windows", "back to the file", "save")
PLAIN = [
    {"_target_": "Activationsd", "keys": "pred", "softmax": True},
    {
        "_target_": "Invertd",
        "keys": "pred",
        "orig_keys": "image",
        "transform": "@preprocessing",
        "nearest_interp": False,
    },
    {"_target_": "AsDiscreted", "keys": "pred", "argmax": True},
]


def _parser() -> ConfigParser:
    parser = ConfigParser()
    parser.read_config(CONFIGS)
    return parser


def prepare(folder: Path, size: int, slices: int, roi: int, steps: int) -> None:
    """Write the scan, and weights that were fitted to it."""
    (folder / "scan").mkdir()
    hu, labels, _ = ct_abdomen(np.random.default_rng(0))
    shape = np.array([size, size, slices])
    whole = interpolate(torch.tensor(hu)[None, None].float(), size=tuple(shape), mode="trilinear")[0, 0].numpy()
    whole += 10 * np.random.default_rng(1).standard_normal(whole.shape, dtype=np.float32)
    nib.save(nib.Nifti1Image(whole.round().astype(np.int16), np.diag([*VOXEL, 1])), folder / "scan/ct.nii.gz")

    grid = tuple(int(n) for n in np.round(shape * VOXEL / SPACING))
    parser = _parser()
    low, high = parser["window"]
    image = (
        interpolate(torch.tensor(whole)[None, None], size=grid, mode="trilinear").sub(low).div(high - low).clamp(0, 1)
    )
    label = interpolate(torch.tensor(labels)[None, None].float(), size=grid)
    torch.manual_seed(0)
    network, loss = parser.get_parsed_content("network_def"), DiceCELoss(to_onehot_y=True, softmax=True, batch=True)
    optimizer = torch.optim.AdamW(network.parameters(), lr=3e-3)
    rng, edge = np.random.default_rng(2), [min(roi, 64, n) // 16 * 16 for n in grid]
    for _ in range(steps):
        starts = (rng.integers(0, n - e + 1) for n, e in zip(grid, edge, strict=True))
        box = (..., *(slice(start, start + e) for start, e in zip(starts, edge, strict=True)))
        optimizer.zero_grad()
        loss(network(image[box]), label[box]).backward()
        optimizer.step()
    torch.save(network.state_dict(), folder / "model.pt")


def child(folder: str, plain: bool, roi: int, amp: str) -> None:
    """Segment the scan in `folder`, in this process; print times of each stage and the peak of memory as JSON."""
    place, parser = Path(folder), _parser()
    kind = "plain" if plain else "ours"
    parser.update(
        {
            "bundle_root": str(BUNDLE),
            "device": "cpu",
            "dataset_dir": str(place / "scan"),
            "output_dir": str(place / kind),
            "ckpt_path": str(place / "model.pt"),
            "spacing": list(SPACING),
            "roi_size": [roi] * 3,
            "amp": amp,
        }
    )
    if plain:
        parser["network"] = "$@network_def.to(@device)"
        ours = ("amp", "device", "flip_axes")
        window = {key: value for key, value in parser["inferer"].items() if key not in ours}
        parser["inferer"] = {**window, "_target_": "SlidingWindowInferer"}
        parser["postprocessing#transforms"] = PLAIN + parser["postprocessing#transforms"][1:]
        for step in parser["preprocessing#transforms"]:
            if isinstance(step, dict) and step["_target_"] == "Spacingd":
                step.pop("dtype", None)
    spent = {stage: [0.0, 0.0] for stage in STAGES}
    probabilities = []

    def timed(stage: str, function: Callable) -> Callable:
        def run(*args: Any, **kwargs: Any) -> Any:
            began = time.perf_counter(), time.process_time()
            result = function(*args, **kwargs)
            spent[stage][0] += time.perf_counter() - began[0]
            spent[stage][1] += time.process_time() - began[1]
            if type(function).__name__ == "Invertd":
                probabilities.append(result["pred"])
            return result

        return run

    content = {key: parser.get_parsed_content(key) for key in ("evaluator", "dataset", "postprocessing", "network_def")}
    content["network_def"].load_state_dict(torch.load(place / "model.pt", weights_only=True))
    content["dataset"].transform = timed(STAGES[0], content["dataset"].transform)
    content["evaluator"].inferer = timed(STAGES[1], content["evaluator"].inferer)
    steps = content["postprocessing"].transforms
    *back, save = [step for step in steps if not getattr(step, "_disabled_", False)]
    content["postprocessing"].transforms = [*(timed(STAGES[2], step) for step in back), timed(STAGES[3], save)]
    content["evaluator"].run()
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024  # kB on Linux
    if plain:
        first, second = probabilities[0].as_tensor().topk(2, dim=0).values
        np.save(place / "margin.npy", (first - second).numpy())
    print(json.dumps({"spent": spent, "peak": peak}))


def _measure(folder: Path, plain: bool, roi: int, amp: str) -> dict[str, Any]:
    """In a process of its own."""
    line = [sys.executable, "-m", "benchmarks.inference", "child", str(folder), str(plain), str(roi), amp]
    done = subprocess.run(line, capture_output=True, text=True, check=False, env={**os.environ})
    if done.returncode:
        raise SystemExit(f"{'plain' if plain else 'ours'}: exit status {done.returncode}\n{done.stderr[-2000:]}")
    return json.loads(done.stdout.strip().splitlines()[-1])


def _labels(folder: Path, kind: str) -> np.ndarray:
    (path,) = (folder / kind).rglob("*_seg.nii.gz")
    return np.asarray(nib.load(path).dataobj)


def main(
    size: int = 512,
    slices: int = 700,
    plain: bool | str = True,
    roi: int = 96,
    steps: int = 60,
    repeats: int = 1,
    amp: str = "auto",
) -> dict[str, float]:
    """Measure, and print tables.

    Args:
        size: voxels of the scan across, 0.75 mm each.
        slices: voxels of the scan along the body, 1 mm each.
        plain: whether to run the plain way too; it needs 30 GB for 512×512×700 voxels.
        roi: edge of the windows, voxels.
        steps: of fitting the network.
        repeats: runs of each way, in turn; the fastest counts.
        amp: mixed precision of our way, as in inference.yaml; the plain one computes in 32 bit.

    Returns:
        `voxels`, and with `plain` the number of those that `differ`, and their largest `margin` between the two
        largest probabilities.
    """
    plain, dtype = parse_bool(plain), amp_dtype(amp, "cpu")
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        prepare(folder, size, slices, roi, steps)
        kinds = {"ours": False, "plain": True} if plain else {"ours": False}
        runs: dict[str, list] = {kind: [] for kind in kinds}
        for _ in range(repeats):
            for kind, which in kinds.items():
                runs[kind].append(_measure(folder, which, roi, amp))
        ours = _labels(folder, "ours")
        found = {"voxels": float(ours.size), "classes": float(len(np.unique(ours)))}
        if plain:
            differ, margin = ours != _labels(folder, "plain"), np.load(folder / "margin.npy")
            found |= {"differ": float(differ.sum()), "margin": float(margin[differ].max()) if differ.any() else 0.0}
    print(
        f"{size}×{size}×{slices} voxels, 14 classes, windows of {roi}³, {torch.get_num_threads()} threads, "
        f"ours in {dtype}"
    )
    print("seconds of wall clock / of the processor")
    rows = []
    for stage in (*STAGES, "all"):
        stages = STAGES if stage == "all" else (stage,)
        best = [[min(sum(run["spent"][s][k] for s in stages) for run in runs[kind]) for k in (0, 1)] for kind in kinds]
        ratio = f"{best[-1][1] / best[0][1]:.2f}" if plain else ""
        rows.append([stage, *(f"{wall:.1f} / {processor:.1f}" for wall, processor in best), ratio])
    peaks = [min(run["peak"] for run in runs[kind]) for kind in kinds]
    rows.append(["peak memory", *(f"{peak / 1e9:.2f} GB" for peak in peaks), f"{peaks[-1] / peaks[0]:.2f}" * plain])
    print(aligned([["", *kinds, "plain / ours" if plain else ""], *rows], numbers=True))
    print(f"labels in the result: {found['classes']:.0f}")
    if plain:
        print(f"labels differ in {found['differ']:.0f} voxels, with a margin of at most {found['margin']:.1e}")
    return found


if __name__ == "__main__":
    if sys.argv[1:2] == ["child"]:
        fire.Fire(child, sys.argv[2:])
    else:
        fire.Fire(main, serialize=lambda _: "")  # it has printed its tables
