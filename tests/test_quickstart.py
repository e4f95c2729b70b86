"""The quickstart, as a newcomer starts it: what it ends with on a case that nothing was trained on."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from tests.mutate import ROOT, copy_tree
from tools.common.tables import read_metrics

ENVIRONMENT = ("requirements.txt", "pyproject.toml")  # .venv is that of these files: see setup.sh


@pytest.mark.slow
@pytest.mark.skipif(shutil.which("bash") is None, reason="needs bash")
def test_the_quickstart_segments_and_its_pretraining_learns(tmp_path):
    copy_tree(tmp_path)
    _set_up(tmp_path)
    env = {**os.environ, "PYTHONPATH": str(tmp_path)}
    found = subprocess.run(
        ["bash", "quickstart.sh"], cwd=tmp_path, env=env, capture_output=True, text=True, timeout=2400
    )
    assert found.returncode == 0, found.stdout + found.stderr

    print(found.stdout)
    run = tmp_path / "runs/quickstart"
    dice = {row["class"]: float(row["dice_mean"]) for row in read_metrics(run / "pretrained/evaluation.csv")}
    assert {*dice} == {"liver", "spleen", "right_kidney", "left_kidney", "mean"}
    assert dice["mean"] >= 0.8, found.stdout
    last = {name: float(value) for name, value in read_metrics(run / "metrics.csv")[-1].items() if value}
    assert last["val_masked_mse"] < 0.85 * last["val_mean_mse"]
    assert last["val_number_accuracy"] > 1.25 * last["val_number_majority"]
    assert last["val_location_auroc"] > 0.7
    for name in ("report.html", "comparison.png", "figures/curves.png", "hybridmim_organs_seg"):
        assert (run / name).exists()
        assert f"runs/quickstart/{name} " in found.stdout


def _set_up(folder: Path) -> None:
    """The environment in which the tests run as the .venv of a copy, so that nothing is installed."""
    venv = folder / ".venv"
    (venv / "bin").mkdir(parents=True)
    (venv / "bin/python").symlink_to(sys.executable)
    (venv / "bin/activate").write_text(f'PATH="{Path(sys.executable).parent}:$PATH"\n')
    listed = subprocess.run(["cat", *ENVIRONMENT], cwd=ROOT, capture_output=True, check=True).stdout
    (venv / "installed").write_bytes(subprocess.run(["cksum"], input=listed, capture_output=True, check=True).stdout)
