"""Caches keep what was decoded, and nothing that is out of date."""

from __future__ import annotations

import os

import pytest
import torch
from monai.transforms import Compose, EnsureTyped, LoadImaged, RandScaleIntensityd, ScaleIntensityRanged

from image_files import item, write_nifti
from tools.data.datasets import make_dataset
from tools.data.transforms import Above, AddFileAndSpacingd


class CountingLoad(LoadImaged):
    """Counts how often a file is decoded."""

    def __init__(self) -> None:
        super().__init__("image", ensure_channel_first=True)
        self.count = 0

    def __call__(self, data, reader=None):
        self.count += 1
        return super().__call__(data, reader)


def dataset(path, cache, folder, a_max=1000.0):
    load = CountingLoad()
    transform = Compose(
        [
            load,
            ScaleIntensityRanged("image", -1000, a_max, 0.001, 1, clip=True),
            AddFileAndSpacingd(),
            EnsureTyped("image", track_meta=False),
            RandScaleIntensityd("image", 0.5, prob=1),
        ]
    )
    return make_dataset([item(path)], transform, cache, folder), load


@pytest.mark.parametrize(("cache", "decoded"), [("none", 3), ("memory", 1), ("disk", 1)])
def test_a_scan_is_decoded_once_and_drawn_anew(tmp_path, cache, decoded):
    data, load = dataset(write_nifti(tmp_path / "a.nii"), cache, tmp_path / "cache")
    means = {float(data[0]["image"].mean()) for _ in range(3)}
    assert load.count == decoded
    assert len(means) == 3  # the random part is not cached
    assert data[0]["file"].endswith("a.nii")
    assert data[0]["spacing"].tolist() == [1, 2, 3]


class Deterministic(CountingLoad):
    """Without state that changes, so that the settings of two data sets can be equal."""

    def __call__(self, data, reader=None):
        return LoadImaged.__call__(self, data, reader)


def value(path, folder, a_max=1000.0):
    transform = Compose(
        [
            Deterministic(),
            ScaleIntensityRanged("image", -1000, a_max, 0.001, 1, clip=True),
            EnsureTyped("image", track_meta=False),
        ]
    )
    return float(make_dataset([item(path)], transform, "disk", folder)[0]["image"].sum())


def test_the_disk_cache_serves_a_second_run_but_not_other_settings_or_files(tmp_path):
    path, folder = write_nifti(tmp_path / "a.nii"), tmp_path / "cache"
    first = value(path, folder)
    (entry,) = folder.glob("*.pt")
    content = torch.load(entry, weights_only=True)
    content["image"] = content["image"] * 0 + 1
    torch.save(content, entry)
    assert value(path, folder) == pytest.approx(content["image"].numel())  # tampered with, so it came from the cache
    assert value(path, folder, a_max=500.0) != first
    stat = path.stat()
    os.utime(path, ns=(stat.st_atime_ns, stat.st_mtime_ns + 1))
    assert value(path, folder) == pytest.approx(first)


def test_an_unknown_cache_is_refused(tmp_path):
    with pytest.raises(ValueError, match="cache must be one of none, memory, disk; found 'ram'"):
        make_dataset([], Compose([]), "ram", tmp_path)


def test_above_takes_everything_if_nothing_is_above():
    image = torch.tensor([0.1, 0.4])
    assert Above(0.25)(image).tolist() == [False, True]
    assert Above(0.5)(image).tolist() == [True, True]
