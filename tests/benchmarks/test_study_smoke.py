"""The smallest study for real: every method is pre-trained, fine-tuned and tested by commands of the bundles."""

import csv
import json
import os
import subprocess
import sys
from pathlib import Path

from PIL import Image

from tools.samples.sample_data import sample_data

ROOT = Path(__file__).resolve().parents[2]


def start(*words):
    done = subprocess.run(
        [sys.executable, "-m", "benchmarks.study", *map(str, words)],
        cwd=ROOT,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        timeout=1800,
        check=False,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


def test_the_smoke_preset(tmp_path):
    sample_data(str(tmp_path / "data"), kind="hippocampus", cases=8)
    folder = tmp_path / "study"
    # two at a time: tiny networks are many times slower with two threads on a busy machine
    words = ("--dataset_dir", tmp_path / "data", "--output_dir", folder, "--preset", "smoke", "--jobs", 2)
    printed = start(*words)
    assert "runs are done" in printed

    records = {path.parent.name: json.loads(path.read_text()) for path in folder.glob("runs/*/done.json")}
    assert printed.count("started") == len(records) == len(list(folder.glob("runs/*")))
    pretrained = {name for name in records if name.startswith("pretrain")}
    assert {name.split("_")[2] for name in pretrained} == {"simclr", "simmim", "mae", "hybridmim"}
    for name, record in records.items():
        assert 1e8 < record["peak_memory"] < 1e10
        assert record["steps"] == 0 or 0 < record["seconds_per_step"] < record["seconds"]
        assert (folder / "runs" / name / "command.sh").is_file()
    assert not list(folder.glob("runs/*/models/checkpoint_epoch=*.pt"))

    with (folder / "results.csv").open(newline="") as file:
        results = list(csv.DictReader(file))
    assert {(row["method"], row["label_fraction"]) for row in results} == {
        *(("scratch", "0.5"), ("scratch", "1.0")),
        *((method, "1.0") for method in ("hybridmim", "mae")),
    }
    assert {row["class"] for row in results} == {"anterior", "posterior", "mean"}
    assert all(0 <= float(row["dice"]) <= 1 and row["cases"] == "2" for row in results)

    text = (folder / "report.md").read_text()
    for title in ("Table 1.", "Table 2.", "Table 3.", "Table 5.", "Learning rates", "Machine and versions"):
        assert f"## {title}" in text
    for name in ("curves", "labels", "cost"):
        assert Image.open(folder / f"figures/{name}.png").width > 1000

    before = {path: path.stat().st_mtime_ns for path in folder.glob("runs/**/*")}
    (folder / "report.md").unlink()
    assert "started" not in start(*words)
    assert {path: path.stat().st_mtime_ns for path in folder.glob("runs/**/*")} == before
    assert (folder / "report.md").read_text() == text
    (folder / "report.md").unlink()
    start("report", "--output_dir", folder)
    assert (folder / "report.md").read_text() == text
