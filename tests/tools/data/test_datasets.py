"""Caches keep what was decoded, nothing that is out of date, and draw what is drawn without them."""

from __future__ import annotations

import os
import re
import subprocess
import sys

import numpy as np
import pytest
import torch
from monai.data import DataLoader, set_rnd
from monai.transforms import (
    Compose,
    EnsureTyped,
    LoadImaged,
    RandCropByPosNegLabeld,
    RandScaleIntensityd,
    RandSpatialCropd,
    ScaleIntensityRanged,
)

from image_files import item, write_nifti
from tools.data.datasets import StoredDataset, make_dataset
from tools.data.store import Store
from tools.data.transforms import Above, AddFileAndSpacingd, LabelPositionsd


class CountingLoad(LoadImaged):
    """Counts how often a file is decoded."""

    def __init__(self, keys="image") -> None:
        super().__init__(keys, ensure_channel_first=True)
        self.count = 0

    def __call__(self, data, reader=None):
        self.count += 1
        return super().__call__(data, reader)


def steps(load, a_max=1000.0):
    return [
        load,
        ScaleIntensityRanged("image", -1000, a_max, 0.001, 1, clip=True),
        AddFileAndSpacingd(),
        EnsureTyped("image", track_meta=False),
    ]


def dataset(path, cache, folder):
    load = CountingLoad()
    return make_dataset(
        [item(path)], Compose([*steps(load), RandScaleIntensityd("image", 0.5, prob=1)]), cache, folder
    ), load


@pytest.mark.parametrize(("cache", "decoded"), [("none", 3), ("memory", 1), ("disk", 1)])
def test_a_scan_is_decoded_once_and_drawn_anew(tmp_path, cache, decoded):
    data, load = dataset(write_nifti(tmp_path / "a.nii"), cache, tmp_path / "cache")
    means = {float(data[0]["image"].mean()) for _ in range(3)}
    assert load.count == decoded
    assert len(means) == 3  # the random part is not cached
    assert data[0]["file"].endswith("a.nii")
    assert data[0]["spacing"].tolist() == [1, 2, 3]


CROP = RandSpatialCropd("image", (6, 6, 6), random_size=False)


def crops(path, folder, load=None, a_max=1000.0):
    """A data set that draws crops, on disk."""
    return make_dataset([item(path)], Compose([*steps(load or CountingLoad(), a_max), CROP]), "disk", folder)


@pytest.fixture
def said(caplog):
    """Returns the warnings of the data sets so far."""

    def read():
        found = [record.getMessage() for record in caplog.records if record.name == "tools.data.datasets"]
        caplog.clear()
        return found

    return read


def test_a_second_run_reads_the_disk_cache_but_not_for_other_settings_or_files(tmp_path):
    path, folder = write_nifti(tmp_path / "a.nii"), tmp_path / "cache"

    def decoded(**settings):
        load = CountingLoad()
        crops(path, folder, load, **settings)[0]
        return load.count

    assert [decoded(), decoded()] == [1, 0]
    assert [decoded(a_max=500.0), decoded(a_max=500.0)] == [1, 0]
    stat = path.stat()
    os.utime(path, ns=(stat.st_atime_ns, stat.st_mtime_ns + 1))
    assert [decoded(), decoded()] == [1, 0]


def test_an_unknown_cache_is_refused(tmp_path):
    with pytest.raises(ValueError, match="cache must be one of none, memory, disk; found 'ram'"):
        make_dataset([], Compose([]), "ram", tmp_path)


# ----------------------------------------------------------------------------------------- entries that are no good


def test_a_damaged_entry_is_named_and_stored_anew_and_draws_the_same(tmp_path, said):
    path, folder = write_nifti(tmp_path / "a.nii"), tmp_path / "cache"

    def drawn():
        data = crops(path, folder)
        data.transform.set_random_state(3)
        return [data[0]["image"].as_tensor() for _ in range(3)]

    first = drawn()
    (voxels,) = folder.glob("*.b2nd")
    intact = voxels.read_bytes()
    for content in (intact[:-100], bytes(len(intact))):
        voxels.write_bytes(content)
        again = drawn()
        (warning,) = said()
        assert warning.startswith(f"{path}: ")
        assert f"{voxels.name}" in warning
        assert warning.endswith("it is stored anew")
        assert all(map(torch.equal, again, first))
        assert voxels.read_bytes() == intact


def test_an_entry_of_another_version_is_named_and_stored_anew(tmp_path, said):
    path, folder = write_nifti(tmp_path / "a.nii"), tmp_path / "cache"
    crops(path, folder)[0]
    (header,) = folder.glob("*.pt")
    torch.save({**torch.load(header, weights_only=True), "format": 99}, header)
    crops(path, folder)[0]
    assert said() == [f"{path}: {header.name} is of another version: found 99, expected 2; it is stored anew"]
    assert torch.load(header, weights_only=True)["format"] == 2


def test_a_file_that_changes_during_the_run_is_named_and_stored_anew(tmp_path, said):
    path, folder = write_nifti(tmp_path / "a.nii"), tmp_path / "cache"
    data = crops(path, folder)
    assert data[0]["image"].max() > 0.5
    write_nifti(path, np.full((10, 12, 14), -1000, np.int16))
    os.utime(path, ns=(1, 1))
    assert data[0]["image"].max() == pytest.approx(0.001)
    assert said() == [f"{path}: its file has changed since the start of the run; it is stored anew"]


FULL = """
import logging, resource, sys
logging.basicConfig(format="%(name)s: %(message)s", stream=sys.stdout)
from monai.transforms import Compose, LoadImaged
from tools.data.datasets import make_dataset
path, folder = sys.argv[1:]
data = make_dataset([{"image": path}] * 3, Compose([LoadImaged("image", ensure_channel_first=True)]), "disk", folder)
resource.setrlimit(resource.RLIMIT_FSIZE, (4000, 4000))
print(len(list(data)), "drawn")
"""


@pytest.mark.skipif(sys.platform == "win32", reason="no limit of file sizes")
def test_without_room_for_a_scan_there_is_one_warning_and_the_run_goes_on(tmp_path):
    path, folder = write_nifti(tmp_path / "a.nii"), tmp_path / "cache"
    line = [sys.executable, "-W", "ignore", "-c", FULL, str(path), str(folder)]
    lines = subprocess.run(line, capture_output=True, text=True, check=True).stdout.splitlines()
    (warning,) = [line for line in lines if line.startswith("tools.data.datasets: ")]
    assert warning.startswith(f"tools.data.datasets: {folder}: File too large: ")
    assert re.search(r"B free, [\d.]+ kB needed for", warning)
    assert warning.endswith(f" needed for {path}; it is read from its file every time")
    assert lines[-1] == "3 drawn"
    assert list(folder.iterdir()) == []


def test_scans_are_stored_again_when_there_is_room(tmp_path, said):
    path = write_nifti(tmp_path / "a.nii")
    store = Store(tmp_path / "cache", keep_free=1.0)  # as if the disk were full
    load = CountingLoad()
    transform = Compose([*steps(load), CROP])
    data = StoredDataset([item(path)], transform, store)
    for _ in range(3):
        data[0]
    assert load.count == 3
    assert len(said()) == 1
    store.keep_free = 0.0
    for _ in range(3):
        data[0]
    assert load.count == 4


# ------------------------------------------------------------------------------------------------- the same draws


def labelled(tmp_path):
    label = np.zeros((10, 12, 14), np.uint8)
    label[2:5, 6:9, 3:7] = 2
    label[7, 7, 7] = 1
    write_nifti(tmp_path / "label.nii", label)
    return [{**item(write_nifti(tmp_path / "a.nii")), "label": str(tmp_path / "label.nii")}]


@pytest.mark.parametrize("positions", [True, False])
def test_crops_around_labels_are_the_same_with_and_without_positions_that_are_kept(tmp_path, positions):
    keys = {"fg_indices_key": "foreground", "bg_indices_key": "background"} if positions else {}

    def drawn(cache):
        both = ["image", "label"]
        transform = Compose(
            [
                *steps(CountingLoad(both)),
                EnsureTyped("label", dtype=torch.uint8, track_meta=False),
                *([LabelPositionsd()] if positions else []),
                RandCropByPosNegLabeld(both, "label", (4, 4, 4), num_samples=3, **keys),
            ]
        )
        data = make_dataset(labelled(tmp_path), transform, cache, tmp_path / "cache")
        data.transform.set_random_state(5)
        return [crop for _ in range(4) for crop in data[0]]

    for crop, truth in zip(drawn("disk"), drawn("none"), strict=True):
        assert crop.keys() == truth.keys()
        for key in ("image", "label"):
            assert torch.equal(crop[key].as_tensor(), truth[key].as_tensor())
            assert crop[key].dtype == truth[key].dtype
            assert torch.equal(crop[key].affine, truth[key].affine)


def test_positions_are_those_of_the_label_and_at_most_so_many(tmp_path):
    label = torch.zeros((1, 6, 7, 8), dtype=torch.uint8)
    label[0, 1:3, 2, 3:6] = 4
    label[0, 5, 6, 7] = 1
    found = LabelPositionsd()({"label": label, "file": "/a/one.nii"})
    assert found["foreground"].tolist() == label.flatten().nonzero().flatten().tolist()
    assert found["background"].tolist() == (label.flatten() == 0).nonzero().flatten().tolist()

    few = LabelPositionsd(most=5)
    drawn = few({"label": label, "file": "/a/one.nii"})
    assert all(label.flatten()[drawn["foreground"].long()])
    assert not any(label.flatten()[drawn["background"].long()])
    assert len(set(drawn["foreground"].tolist())) == len(set(drawn["background"].tolist())) == 5
    again, other = (few({"label": label, "file": file}) for file in ("/b/one.nii", "/a/two.nii"))
    assert torch.equal(again["background"], drawn["background"])
    assert not torch.equal(other["background"], drawn["background"])


def test_all_positions_are_equally_likely_to_be_kept():
    label = torch.zeros((1, 4, 5, 5), dtype=torch.uint8)
    label[0, 1:3] = 1
    kept = torch.zeros(100)
    for n in range(400):
        kept[LabelPositionsd(most=10)({"label": label, "file": f"{n}.nii"})["foreground"].long()] += 1
    assert kept[:25].sum() == kept[75:].sum() == 0
    assert kept[25:75].min() > 40  # of 80 that are expected; the standard deviation is 8
    assert kept[25:75].max() < 120


@pytest.mark.parametrize("workers", [0, 2])
def test_workers_share_what_one_of_them_has_stored(tmp_path, workers):
    paths = [write_nifti(tmp_path / f"{n}.nii") for n in range(4)]
    for cache in ("memory", "disk"):
        load = CountingLoad()
        transform = Compose([*steps(load), CROP])
        data = make_dataset([item(path) for path in paths], transform, cache, tmp_path / "cache")
        drawn = []
        for _ in range(2):
            torch.manual_seed(0)
            if not workers:
                set_rnd(data, 0)
            drawn.append([batch["image"] for batch in DataLoader(data, batch_size=2, num_workers=workers)])
        assert all(map(torch.equal, *drawn))
        assert all((data.store.folder / f"{name}.b2nd").exists() for name in data.names)
        assert load.count == (0 if workers else 4)  # workers count in their own processes


def test_above_takes_everything_if_nothing_is_above():
    image = torch.tensor([0.1, 0.4])
    assert Above(0.25)(image).tolist() == [False, True]
    assert Above(0.5)(image).tolist() == [True, True]
