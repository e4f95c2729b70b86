import csv
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import yaml

from image_files import write_nifti
from tools.commands.compare import compare
from tools.data.scans import ScanError

ROOT = Path(__file__).resolve().parents[3]
CLASSES = {"left": [1], "right_one": [2]}


def run_folder(folder, dice, value, classes=CLASSES, cases=2):
    """What training, evaluation and inference of a run leave."""
    folder.mkdir()
    (folder / "config.yaml").write_text(yaml.safe_dump({"classes": classes}))
    with (folder / "evaluation.csv").open("w", newline="") as file:
        writer = csv.DictWriter(file, ["class", "dice_mean", "cases"])
        writer.writeheader()
        for name, mean in zip([*classes, "mean"], dice, strict=True):
            writer.writerow({"class": name, "dice_mean": mean, "cases": cases})
    (folder / "sub/scan").mkdir(parents=True)
    label = np.zeros((20, 22, 18), np.uint8)
    label[5:12, 5:12, 5:12] = value
    write_nifti(folder / "sub/scan/scan_seg.nii.gz", label)
    return str(folder)


@pytest.fixture
def scan(tmp_path):
    rng = np.random.default_rng(0)
    label = rng.integers(0, 3, (20, 22, 18)).astype(np.uint8)
    image = write_nifti(tmp_path / "scan.nii.gz", (label * 50).astype(np.int16))
    return {"image": str(image), "label": str(write_nifti(tmp_path / "label.nii.gz", label))}


def test_runs_stand_side_by_side(tmp_path, scan, capsys):
    scratch = run_folder(tmp_path / "a", (0.5, "", 0.5), 1)
    better = run_folder(tmp_path / "b", (0.75, "", 0.75), 2)
    compare(str(tmp_path / "out"), **scan, scratch=scratch, pretrained=better)
    with (tmp_path / "out/comparison.csv").open(newline="") as file:
        rows = list(csv.DictReader(file))
    assert rows[0] == {
        **{"class": "left", "scratch": "0.5", "pretrained": "0.75"},
        **{"pretrained - scratch": "+0.2500", "cases": "2"},
    }
    assert rows[1]["pretrained - scratch"] == ""  # a class that no case holds
    printed = capsys.readouterr().out.splitlines()
    assert printed[0] == "Dice over 2 case(s):"
    assert printed[1].split() == ["class", "scratch", "pretrained", "pretrained", "-", "scratch", "cases"]
    assert printed[-2].split() == ["mean", "0.500", "0.750", "+0.250", "2"]
    assert (tmp_path / "out/comparison.png").stat().st_size > 10_000


def test_the_command_does_not_speak_of_decoders_for_gpu_machines(tmp_path, scan):
    folders = {name: run_folder(tmp_path / name, (0.5, "", 0.5), 1) for name in ("a", "b")}
    options = {"output_dir": str(tmp_path / "out"), **scan, **folders}
    words = [f"--{key}={value}" for key, value in options.items()]
    done = subprocess.run([sys.executable, "-m", "tools", "compare", *words], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0 and done.stdout.startswith("Dice over 2 case(s):")
    assert "nvimagecodec" not in done.stderr.lower()  # matplotlib may say that it builds its font cache


def test_one_run_is_no_comparison(tmp_path, scan):
    with pytest.raises(ScanError, match="found 1 runs, expected two or more"):
        compare(str(tmp_path), **scan, scratch=run_folder(tmp_path / "a", (1, 1, 1), 1))


@pytest.mark.parametrize(
    ("missing", "command"),
    [("evaluation.csv", "evaluating"), ("config.yaml", "training"), ("sub/scan/scan_seg.nii.gz", "inferring")],
)
def test_what_a_run_lacks_is_named(tmp_path, scan, missing, command):
    folders = {name: run_folder(tmp_path / name, (1, 1, 1), 1) for name in ("a", "b")}
    (tmp_path / "a" / missing).unlink()
    with pytest.raises(ScanError, match=f"{missing.rsplit('/')[-1]}.*expected .*run {command}"):
        compare(str(tmp_path / "out"), **scan, **folders)


def test_runs_on_other_cases_are_not_compared(tmp_path, scan):
    folders = {
        "a": run_folder(tmp_path / "a", (1, 1, 1), 1),
        "b": run_folder(tmp_path / "b", (1, 1, 1), 1, cases=3),
    }
    with pytest.raises(ScanError, match="b was evaluated on other classes or cases than a"):
        compare(str(tmp_path / "out"), **scan, **folders)
