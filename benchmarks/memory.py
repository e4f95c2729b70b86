"""Whether a long pre-training grows: memory of trainer and workers, open files, and what it writes, as the steps go on.

    python -m benchmarks.memory                     # 3,000 steps, no workers
    python -m benchmarks.memory --num_workers 2

The run is that of the command line, with the network of small.yaml made smaller, on synthetic MR scans, with a
validation every 150 steps. Every process is looked at from outside. Prints a row at each twentieth of the run, and the
largest difference to the row at a fifth of it, when all that is allocated once has been.
"""

from __future__ import annotations

import subprocess
import sys
import tempfile
import time
from contextlib import suppress
from pathlib import Path

import fire
import psutil

from tools.common.tables import aligned, read_metrics
from tools.samples.sample_data import sample_data

ROOT = Path(__file__).resolve().parents[1]
BUNDLE = ROOT / "bundles/hybridmim_pretrain"
STEPS_PER_EPOCH = 10
OPTIONS = {
    **{"unet_features": "[4,4,8,8,16,4]", "roi_size": "[32,32,32]", "decode_size": "[32,32,32]"},
    **{"batch_size": 2, "crops_per_volume": 1, "val_fraction": 0.2, "val_interval": 150, "checkpoint_interval": 25},
}
ROWS, WARM = 20, 4  # rows of the table, and the one that others are compared with
COLUMNS = ["steps", "trainer, MB", "workers, MB", "open files", "metrics.csv, kB", "TensorBoard, kB", "s"]


def look(process: psutil.Process, output_dir: Path) -> list[float]:
    """Resident memory (MB) of a process and of its children, its open files, and the size of what it wrote (kB)."""
    workers = process.children(recursive=True)
    events = output_dir.glob("events.out.tfevents.*")
    return [
        process.memory_info().rss / 1e6,
        sum(worker.memory_info().rss for worker in workers) / 1e6,
        process.num_fds() if hasattr(process, "num_fds") else process.num_handles(),
        (output_dir / "metrics.csv").stat().st_size / 1e3,
        sum(path.stat().st_size for path in events) / 1e3,
    ]


def measure(folder: Path, steps: int, num_workers: int) -> list[list[float]]:
    """Train in a process of its own; the rows of the table.

    Raises:
        SystemExit: the training failed; with the end of what it said.
    """
    sample_data(str(folder / "scans"), "hippocampus", cases=25)
    epochs = max(ROWS, steps // STEPS_PER_EPOCH)
    options = {**OPTIONS, "num_workers": num_workers, "epochs": epochs, "output_dir": folder / "run"}
    options |= {"dataset_dir": folder / "scans/imagesTr", "ckpt_dir": folder / "models", "bundle_root": BUNDLE}
    configs = ",".join(repr(str(BUNDLE / f"configs/{name}.yaml")) for name in ("train", "mri", "small"))
    line = [sys.executable, "-W", "ignore", "-m", "monai.bundle", "run", "training", "--config_file", f"[{configs}]"]
    line += [f"--{key}={value}" for key, value in options.items()]
    rows: list[list[float]] = []
    began = time.monotonic()
    with (folder / "log.txt").open("wb") as log:
        process = subprocess.Popen(line, cwd=ROOT, stdout=log, stderr=subprocess.STDOUT)
    trainer, metrics = psutil.Process(process.pid), folder / "run/metrics.csv"
    while process.poll() is None:
        done = len(read_metrics(metrics)) if metrics.is_file() else 0
        if done >= (len(rows) + 1) * epochs // ROWS:
            with suppress(psutil.NoSuchProcess):  # one that ends just now
                rows.append([done * STEPS_PER_EPOCH, *look(trainer, folder / "run"), time.monotonic() - began])
        time.sleep(0.02)
    if process.returncode:
        sys.exit("\n".join((folder / "log.txt").read_text(errors="replace").splitlines()[-20:]))
    return rows


def main(steps: int = 3000, num_workers: int = 0) -> None:
    """Measure, and print the table.

    Args:
        steps: of training.
        num_workers: processes that load batches.
    """
    with tempfile.TemporaryDirectory() as folder:
        rows = measure(Path(folder), steps, num_workers)
    print(aligned([COLUMNS, *([f"{value:.0f}" for value in row] for row in rows)], numbers=True))
    for column, name in ((1, "trainer"), (2, "workers")):
        warm = rows[WARM - 1][column]
        if warm:
            grown = max(row[column] for row in rows[WARM:]) / warm - 1
            print(f"{name}: at most {grown:+.1%} of what it was after {rows[WARM - 1][0]:.0f} steps")


if __name__ == "__main__":
    fire.Fire(main)
