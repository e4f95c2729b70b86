"""The progress bar of evaluation and inference, on a real evaluator that reads real files."""

from __future__ import annotations

import pytest
import torch
from monai.data import DataLoader, Dataset
from monai.engines import SupervisedEvaluator
from monai.transforms import Compose, LoadImaged

from image_files import write_nifti
from tools.results.progress import CaseProgress


class Broken(torch.nn.Module):
    def forward(self, image):
        raise ValueError("no such network")


def run(tmp_path, network):
    files = [write_nifti(tmp_path / f"scan_{k}.nii.gz") for k in range(3)]
    data = Dataset([{"image": file} for file in files], Compose([LoadImaged("image", ensure_channel_first=True)]))
    loader = DataLoader(data, batch_size=2)
    SupervisedEvaluator(torch.device("cpu"), loader, network, val_handlers=[CaseProgress()]).run()


def test_the_bar_names_the_case_and_counts_to_the_last(tmp_path, capsys):
    run(tmp_path, torch.nn.Identity())
    printed = capsys.readouterr().err
    assert "scan_0.nii.gz" in printed  # of each batch the first
    assert "scan_2.nii.gz: 100%" in printed.split("\r")[-1]
    assert "3/3 [" in printed.split("\r")[-1]


def test_the_bar_ends_before_an_error_is_printed(tmp_path, capsys):
    with pytest.raises(ValueError, match="no such network"):
        run(tmp_path, Broken())
    assert capsys.readouterr().err.endswith("\n")
