"""What it costs to draw crops from a scan: the store of `cache`, MONAI's data sets, and no cache.

    python -m benchmarks.data                # a CT of 512×512×700 voxels and one of 128×128×128
    python -m benchmarks.data --slices 200   # a smaller one

All four run `load` and `draw` of the pre-training bundle: four crops of 96×96×96. They are timed in one process, in
turn, with the same seeds, and draw the same voxels. The memory is the peak while crops are drawn, above that of the
same process before it made its data set, in a process of its own. Then comes a real loop of training steps with
`small.yaml` and two workers: how much of it waits for the loader.
"""

from __future__ import annotations

import json
import platform
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import fire
import nibabel as nib
import numpy as np
import psutil
import torch
from monai.bundle import ConfigParser
from monai.data import CacheDataset, Dataset, PersistentDataset
from scipy.ndimage import gaussian_filter, zoom

from tools.common.text import bytes_text, size_text
from tools.data.datasets import make_dataset
from tools.samples.anatomy import ct_abdomen

BUNDLE = Path(__file__).resolve().parents[1] / "bundles/hybridmim_pretrain"
CROP, CROPS = 96, 4
NOISE = 15.0  # HU, of a CT of the abdomen with thin slices
SIDES: dict[str, Callable[..., Dataset]] = {
    "no cache": lambda data, transform, folder: Dataset(data, transform),
    "MONAI PersistentDataset": lambda data, transform, folder: PersistentDataset(data, transform, folder),
    "MONAI CacheDataset": lambda data, transform, folder: CacheDataset(data, transform, progress=False),
    "store": lambda data, transform, folder: make_dataset(data, transform, "disk", folder),
}


def write_ct(path: Path, shape: tuple[int, int, int]) -> None:
    """A synthetic abdomen, resized to `shape`, with noise, in whole HU."""
    image, _, _ = ct_abdomen(np.random.default_rng(0))
    factors = np.divide(shape, image.shape)
    volume = np.empty(shape, np.int16)
    rng = np.random.default_rng(1)
    for start in range(0, shape[2], 64):  # by slabs, because all at once would take 5 GB
        stop = min(start + 64, shape[2])
        first, last = int(start / factors[2]), min(image.shape[2], int(stop / factors[2]) + 2)
        part = image[:, :, first:last].astype(np.float32)
        slab = zoom(part, (*factors[:2], (stop - start) / part.shape[2]), order=1)
        noise = gaussian_filter(rng.standard_normal(slab.shape, np.float32), 0.7)
        volume[:, :, start:stop] = np.clip(np.rint(slab + noise * (NOISE / noise.std())), -1024, 3071)
    nib.openers.Opener.default_compresslevel = 1
    nib.save(nib.Nifti1Image(volume, np.diag([0.75, 0.75, 1, 1])), path)


def parser(overlays: list[str], **overrides: object) -> ConfigParser:
    """The bundle's training config."""
    config = ConfigParser()
    config.read_config([str(BUNDLE / f"configs/{name}.yaml") for name in ("train", *overlays)])
    config.update({"bundle_root": str(BUNDLE), **overrides})
    return config


def make_side(side: str, scan: Path, folder: Path, crop: int = CROP) -> Dataset:
    """A data set of one scan; `folder` is for what it stores."""
    sizes = {"roi_size": [crop] * 3, "region_size": [crop // 3] * 3, "patch_size": [crop // 6] * 3}
    config = parser([], crops_per_volume=CROPS, decode_size="@roi_size", **sizes)
    return SIDES[side]([{"image": str(scan)}], config.get_parsed_content("train#preprocessing"), folder)


def draw(dataset: Dataset, seed: int) -> list[dict]:
    """Four crops."""
    dataset.transform.set_random_state(seed)
    return dataset[0]


Key = tuple[tuple[int, int, int], str]  # shape of the scan, and side


def times(sides: dict[Key, Dataset], turns: int) -> dict[Key, tuple[float, float]]:
    """Median processor and wall time of a draw of each side, in seconds; without a cache it is timed once."""
    found: dict[Key, list[tuple[float, float]]] = {key: [] for key in sides}
    for turn in range(turns + 1):
        for key, dataset in sides.items():
            if turn > 1 and key[1] == "no cache":
                continue
            dataset.transform.set_random_state(turn)
            clocks = time.process_time(), time.perf_counter()
            dataset[0]
            if turn:  # the first one fills the cache
                found[key].append((time.process_time() - clocks[0], time.perf_counter() - clocks[1]))
    return {key: tuple(map(statistics.median, zip(*pairs, strict=True))) for key, pairs in found.items()}


def child(side: str, scan: str, folder: str) -> None:
    """Print the peak memory of drawing, above what the process had before, in bytes. Linux only."""
    config_side = make_side("no cache", Path(scan), Path(folder))  # imports what all sides import
    before = psutil.Process().memory_info().rss
    del config_side
    dataset = make_side(side, Path(scan), Path(folder))
    Path("/proc/self/clear_refs").write_text("5")  # the peak so far is forgotten
    for seed in range(3):
        draw(dataset, seed)
    lines = Path("/proc/self/status").read_text().splitlines()
    peak = next(int(line.split()[1]) * 1024 for line in lines if line.startswith("VmHWM"))
    print(json.dumps(peak - before))


def peak_memory(side: str, scan: Path, folder: Path) -> int:
    """That of `child`, in a process of its own."""
    line = [sys.executable, "-m", "benchmarks.data", "child", side, str(scan), str(folder)]
    return json.loads(subprocess.run(line, capture_output=True, text=True, check=True).stdout.splitlines()[-1])


def waiting(scan: Path, folder: Path, steps: int) -> tuple[float, float]:
    """Seconds that a loop of training steps waits for the loader, and that it takes; after its first batch."""
    config = parser(
        ["small"],
        **{"train#dataset#data": [{"image": str(scan)}] * 4 * (steps + 1), "cache": "disk", "cache_dir": str(folder)},
        num_workers=2,
    )
    loader, network, loss, optimizer = (
        config.get_parsed_content(key) for key in ("train#dataloader", "network", "loss", "train#optimizer")
    )
    network.train()
    batches = iter(loader)
    next(batches)  # starts the workers
    waited, start = 0.0, time.perf_counter()
    for _ in range(steps):
        before = time.perf_counter()
        batch = next(batches)
        waited += time.perf_counter() - before
        image, mask = batch["image"].as_tensor(), batch["mask"]
        loss(network(image, mask), image, mask)["loss"].backward()
        optimizer.step()
        optimizer.zero_grad()
    return waited, time.perf_counter() - start


def main(slices: int = 700, turns: int = 7, steps: int = 20, folder: str = "") -> None:
    """Print the tables.

    Args:
        slices: of the large scan.
        turns: draws of each side that are timed, after one that is not.
        steps: training steps of the loop.
        folder: for scans and caches; by default a temporary one.
    """
    work = Path(folder or tempfile.mkdtemp())
    work.mkdir(parents=True, exist_ok=True)
    large, small = (512, 512, slices), (128, 128, 128)
    print(f"CPU, {torch.get_num_threads()} threads; torch {torch.__version__}, Python {platform.python_version()}")
    scans = {shape: work / f"ct_{shape[2]}.nii.gz" for shape in (large, small)}
    for shape, scan in scans.items():
        if not scan.exists():
            write_ct(scan, shape)
    places = {(shape, name): work / f"{name.split()[-1]}_{shape[2]}" for shape in scans for name in SIDES}
    found = times({key: make_side(key[1], scans[key[0]], place) for key, place in places.items()}, turns)
    for shape, scan in scans.items():
        print(f"\n{size_text(shape)} voxels, {CROPS} crops of {size_text([CROP] * 3)}\n")
        print("| | processor s | wall s | × store | memory | on disk |\n| --- | --- | --- | --- | --- | --- |")
        for name in SIDES:
            place = places[shape, name]
            seconds, wall = found[shape, name]
            stored = sum(file.stat().st_size for file in place.glob("*")) if place.exists() else 0
            print(
                f"| {name} | {seconds:.4f} | {wall:.4f} | {seconds / found[shape, 'store'][0]:.1f} "
                f"| {bytes_text(peak_memory(name, scan, place))} | {bytes_text(stored) if stored else '–'} |",
                flush=True,
            )
    print("\n| processor time, large scan / small scan | |\n| --- | --- |")
    for name in SIDES:
        print(f"| {name} | {found[large, name][0] / found[small, name][0]:.2f} |")
    waited, total = waiting(work / f"ct_{slices}.nii.gz", work / "training", steps)
    print(f"\n{steps} steps, small.yaml, 2 workers: {total:.1f} s, of which {waited / total:.1%} wait for the loader")
    if not folder:
        shutil.rmtree(work)


if __name__ == "__main__":
    fire.Fire({"child": child, "main": main} if sys.argv[1:2] == ["child"] else main)
