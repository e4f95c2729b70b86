"""What is stored comes back: exactly, or in 16-bit floating point; as far as it is read, and never damaged."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from pathlib import Path

import blosc2
import numpy as np
import psutil
import pytest
import torch
from monai.data import MetaTensor
from monai.transforms import NormalizeIntensity, RandSpatialCropSamplesd, ScaleIntensityRange
from monai.transforms import ScaleIntensityRangePercentiles as Percentiles

from tools.data.store import DamagedError, NotStoredError, Store

ENVIRONMENT = {key: value for key, value in os.environ.items() if key not in ("WORLD_SIZE", "MASTER_PORT")}
SHAPE = (70, 80, 90)  # 2×2×2 chunks


def whole_numbers(low, high, channels=1, seed=0):
    """Random whole numbers [C, H, W, D], with a border of 0."""
    values = torch.randint(low, high, (channels, *SHAPE), generator=torch.Generator().manual_seed(seed)).float()
    values[:, :5] = 0
    return values


def stored(tmp_path, **data):
    store = Store(tmp_path / "cache")
    store.write("scan", data)
    return store.open("scan")


def plain(image):
    return image.as_tensor() if isinstance(image, MetaTensor) else image


@pytest.mark.parametrize(
    "image",
    [
        ScaleIntensityRange(-1000, 1000, 0.001, 1, clip=True)(whole_numbers(-1024, 3000)),
        Percentiles(0.5, 99.5, 0.001, 1, clip=True, channel_wise=True)(whole_numbers(0, 4000, channels=2)),
        NormalizeIntensity(nonzero=True, channel_wise=True)(whole_numbers(0, 2000, channels=4)),
        torch.full((1, *SHAPE), 0.25),
    ],
    ids=["CT window", "MR percentiles", "MR z-score", "constant"],
)
def test_few_values_are_stored_exactly_in_16_bit(tmp_path, image):
    image = plain(image)
    read = stored(tmp_path, image=image).whole()["image"]
    assert read.dtype == torch.float32
    assert torch.equal(read, image)

    # how others read it
    codes = blosc2.open(str(tmp_path / "cache/scan.b2nd"))
    assert codes.dtype == np.uint16
    palettes = torch.load(tmp_path / "cache/scan.pt", weights_only=True)["volumes"]["image"]["palettes"]
    values = np.stack([palette.numpy()[channel] for palette, channel in zip(palettes, codes[:], strict=True)])
    assert np.array_equal(values, image.numpy())


def test_a_damaged_palette_is_found(tmp_path):
    image = whole_numbers(0, 2000)
    stored(tmp_path, image=image)
    path = tmp_path / "cache/scan.pt"
    content = bytearray(path.read_bytes())
    content[content.index(image.unique().numpy().tobytes()) + 401] ^= 0x40
    path.write_bytes(content)
    with pytest.raises(DamagedError, match=r"scan\.pt cannot be read .*is damaged"):
        Store(tmp_path / "cache").open("scan")


def test_reading_crops_leaves_no_memory_behind(tmp_path):
    image = torch.arange(SHAPE[0] * SHAPE[1] * SHAPE[2]).reshape(1, *SHAPE).remainder(20_000).float()
    stored(tmp_path, image=image)
    store, process = Store(tmp_path / "cache"), psutil.Process()
    for count in (50, 500):  # a palette of 20,000 values has 80 kB
        before = process.memory_info().rss
        for _ in range(count):
            entry = store.open("scan")
            assert torch.equal(plain(entry.read("image", (slice(0, 16),) * 3)), plain(image[:, :16, :16, :16]))
    assert process.memory_info().rss - before < 10e6


def test_values_that_are_one_rounding_apart_are_not_confused(tmp_path):
    image = whole_numbers(0, 5) * 0.25
    image[0, 40, 40, 40] = torch.nextafter(torch.tensor(0.25), torch.tensor(1.0))
    read = stored(tmp_path, image=image).whole()["image"]
    assert torch.allclose(read, image, rtol=2**-11, atol=0)
    assert blosc2.open(str(tmp_path / "cache/scan.b2nd")).dtype == np.float16


@pytest.mark.parametrize(("scale", "kept_as"), [(1.0, np.float16), (1e6, np.float32)])
def test_other_values_are_stored_in_floating_point(tmp_path, scale, kept_as):
    image = torch.rand((1, *SHAPE), generator=torch.Generator().manual_seed(0)) * scale
    image[:, :5] = 0  # padding must stay 0
    read = stored(tmp_path, image=image).whole()["image"]
    array = blosc2.open(str(tmp_path / "cache/scan.b2nd"))
    assert array.dtype == kept_as
    assert read.dtype == torch.float32
    assert torch.equal(read, torch.from_numpy(array[:]).float())
    assert torch.allclose(read, image, rtol=2**-11, atol=6e-8)
    assert not read[:, :5].any()


def test_labels_and_everything_else_come_back_as_they_were(tmp_path):
    affine = torch.diag(torch.tensor([1.0, 2.0, 3.0, 1.0], dtype=torch.float64))
    label = (whole_numbers(0, 14)).to(torch.uint8)
    image = MetaTensor(whole_numbers(0, 9), affine=affine, meta={"filename_or_obj": "/a/ct.nii.gz"})
    data = {
        "file": "/a/ct.nii.gz",
        "image": image,
        "spacing": torch.tensor([1.0, 2.0, 3.0]),
        "label": label,
        "foreground_start_coord": np.array([1, 2, 3]),
    }
    read = stored(tmp_path, **data).whole()
    assert list(read) == list(data)
    assert torch.equal(read["label"], label)
    assert read["label"].dtype == torch.uint8
    assert blosc2.open(str(tmp_path / "cache/scan_seg.b2nd")).dtype == np.uint8
    assert torch.equal(read["image"].affine, affine)
    assert read["image"].meta["filename_or_obj"] == read["file"] == "/a/ct.nii.gz"
    assert read["spacing"].tolist() == [1, 2, 3]
    assert read["foreground_start_coord"].tolist() == [1, 2, 3]


def test_a_crop_of_the_stand_in_is_that_crop_of_the_volume(tmp_path):
    turned = torch.tensor([[0, -2.0, 0, 9], [1.5, 0, 0, -7], [0, 0, 3, 4], [0, 0, 0, 1]], dtype=torch.float64)
    image = MetaTensor(whole_numbers(-1000, 1000), affine=turned)
    entry = stored(tmp_path, image=image)
    stand_in = entry.stand_ins()["image"]
    assert stand_in.untyped_storage().nbytes() == 4  # one voxel
    transform = RandSpatialCropSamplesd("image", (20, 30, 40), num_samples=8, random_size=False)
    for seed in range(3):
        expected = transform.set_random_state(seed)({"image": image})
        crops = transform.set_random_state(seed)({"image": stand_in})
        for crop, truth in zip(crops, expected, strict=True):
            voxels = entry.crop("image", crop["image"])
            assert torch.equal(voxels.as_tensor(), truth["image"].as_tensor())
            assert torch.equal(voxels.affine, truth["image"].affine)
            assert voxels.applied_operations == truth["image"].applied_operations


# -------------------------------------------------------------------------------------------------- bad entries


def damage_chunk(path, number):
    """Change one byte of a compressed chunk in a file."""
    array = blosc2.open(str(path))
    chunk = array.schunk.get_chunk(number)
    content = bytearray(path.read_bytes())
    content[content.index(chunk) + len(chunk) - 5] ^= 1
    path.write_bytes(content)


def test_only_the_chunks_of_a_crop_are_read(tmp_path):
    image = whole_numbers(-1000, 1000)
    stored(tmp_path, image=image)
    damage_chunk(tmp_path / "cache/scan.b2nd", 7)  # begins at 64, 64, 64
    entry = Store(tmp_path / "cache").open("scan")
    for start in (0, 32):
        box = (slice(start, start + 32),) * 3
        assert torch.equal(entry.read("image", box), image[(slice(None), *box)])
    with pytest.raises(DamagedError, match=r"chunk 7 of scan\.b2nd is damaged"):
        entry.read("image", (slice(33, 65),) * 3)


def cut(path):
    path.write_bytes(path.read_bytes()[:-3000])


def zero(path):
    path.write_bytes(bytes(path.stat().st_size))


def other_version(path):
    header = torch.load(path, weights_only=True)
    torch.save({**header, "format": 0}, path)


def empty(path):
    path.write_bytes(b"")


def unlike_any_pickle(path):
    """Of these, torch's reader raises an IndexError."""
    path.write_bytes(b"0" * 100)


@pytest.mark.parametrize(
    ("file", "spoil", "reason"),
    [
        ("scan.b2nd", Path.unlink, r"scan\.b2nd is missing"),
        ("scan_seg.b2nd", Path.unlink, r"scan_seg\.b2nd is missing"),
        ("scan.b2nd", cut, r"scan\.b2nd cannot be read|of scan\.b2nd is damaged"),
        ("scan.b2nd", zero, r"scan\.b2nd cannot be read"),
        ("scan.pt", zero, r"scan\.pt cannot be read"),
        ("scan.b2nd", empty, r"scan\.b2nd cannot be read"),
        ("scan.pt", empty, r"scan\.pt cannot be read"),
        ("scan.pt", unlike_any_pickle, r"scan\.pt cannot be read"),
        ("scan.pt", cut, r"scan\.pt cannot be read"),
        ("scan.pt", other_version, r"scan\.pt is of another version: found 0, expected 2"),
    ],
)
def test_what_is_wrong_with_an_entry_is_said(tmp_path, file, spoil, reason):
    stored(tmp_path, image=whole_numbers(-1000, 1000), label=whole_numbers(0, 3).to(torch.uint8))
    spoil(tmp_path / "cache" / file)
    with pytest.raises(DamagedError, match=reason):
        Store(tmp_path / "cache").open("scan").whole()


def test_there_is_no_entry_before_it_is_written(tmp_path):
    assert Store(tmp_path / "cache").open("scan") is None


WRITE_TOO_MUCH = """
import resource, sys, torch
from tools.data.store import NotStoredError, Store
resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, 100_000))
try:
    Store(sys.argv[1]).write("scan", {"image": torch.rand(1, 64, 64, 64)})
except NotStoredError as error:
    print(error)
"""


def python(code, *arguments):
    line = [sys.executable, "-W", "ignore", "-c", code, *map(str, arguments)]
    return subprocess.run(line, capture_output=True, text=True, check=True).stdout


@pytest.mark.skipif(sys.platform == "win32", reason="no limit of file sizes")
def test_a_failed_write_leaves_nothing(tmp_path):
    said = python(WRITE_TOO_MUCH, tmp_path / "cache")
    assert said.startswith(f"{tmp_path / 'cache'}: File too large: ")
    assert " free, " in said
    assert said.endswith(" kB needed\n")
    assert list((tmp_path / "cache").iterdir()) == []


def test_a_part_of_the_disk_can_be_kept_free(tmp_path):
    store = Store(tmp_path / "cache", keep_free=1.0)
    with pytest.raises(NotStoredError, match=r"No space left on device: 0 B free, \S+ \wB needed"):
        store.write("scan", {"image": whole_numbers(0, 9)})
    assert store.open("scan") is None


# ------------------------------------------------------------------------------------------------------- memory

HOLD = """
import sys, torch
from tools.data.store import Store, memory_folder
folder = memory_folder()
if len(sys.argv) > 1:
    Store(folder).write(sys.argv[1], {"image": torch.ones(1, 8, 8, 8)})
print(folder, *sorted(p.name for p in folder.glob("*.pt")), flush=True)
sys.stdin.read()
"""


@pytest.fixture
def hold():
    """Starts a process that uses the store in memory until its input ends; returns it, and what it found there."""
    processes = []

    def start(*arguments, **environment):
        line = [sys.executable, "-W", "ignore", "-c", HOLD, *arguments]
        process = subprocess.Popen(
            line, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, env={**ENVIRONMENT, **environment}
        )
        processes.append(process)
        folder, *found = process.stdout.readline().split()
        return process, Path(folder), found

    yield start
    for process in processes:
        process.communicate()


def test_the_store_in_memory_ends_with_its_process(hold):
    process, folder, _ = hold("scan")
    assert (folder / "scan.pt").exists()
    if sys.platform == "linux":
        assert folder.parent == Path("/dev/shm")
    process.communicate()
    assert not folder.exists()


def test_processes_of_one_run_share_the_store_in_memory(hold):
    run = {"WORLD_SIZE": "2", "MASTER_PORT": "64999"}
    first, folder, _ = hold("scan", **run)
    second, same, found = hold(**run)
    _, other, nothing = hold()
    assert (same, found) == (folder, ["scan.pt"])
    assert other != folder
    assert nothing == []
    first.communicate()
    assert (folder / "scan.pt").exists()  # until the last one ends
    second.communicate()
    assert not folder.exists()


def test_what_a_killed_run_left_in_memory_is_removed_by_the_next(hold):
    process, folder, _ = hold("scan")
    process.send_signal(signal.SIGKILL)
    process.wait()
    assert (folder / "scan.pt").exists()
    hold()
    assert not folder.exists()
