"""A store of preprocessed scans in compressed chunks, of which a crop reads only those that it touches.

As in nnU-Net v2, each volume is a Blosc2 file beside a small file for the rest:

    case_001-0f3a….b2nd       the image, [C, H, W, D]
    case_001-0f3a…_seg.b2nd   the label, [1, H, W, D]
    case_001-0f3a….pt         everything else, as `torch.load(weights_only=True)` reads it; written last

Whole numbers are stored as they are. A floating-point volume with at most 65,536 values in each channel, such as a
windowed CT of whole HU, is stored exactly, as 16-bit codes: value = palettes[channel][code]. The palettes are in the
small file (`volumes[key]["palettes"]`). Any other volume, such as a resampled one, is stored in 16-bit floating point.
"""

from __future__ import annotations

import atexit
import errno
import io
import os
import shutil
import tempfile
import zipfile
import zlib
from collections.abc import Callable, Mapping
from contextlib import suppress
from enum import Enum
from itertools import product
from math import ceil
from pathlib import Path
from typing import Any

import blosc2
import numpy as np
import psutil
import torch
from monai.data import MetaTensor
from torch import Tensor

from tools.common.files import atomic_path, disk_room
from tools.common.processes import is_alive, process_mark
from tools.common.text import bytes_text

FORMAT = 2  # increase it when older entries cannot be read any more
CHUNK, BLOCK = 64, 16  # voxels along each axis: unit of reading, and of decompressing
# Zstandard makes files of CT 6 to 14 % smaller, and crops take twice as long
COMPRESSION = {"codec": blosc2.Codec.LZ4, "clevel": 5, "filters": [blosc2.Filter.BITSHUFFLE], "nthreads": 1}
BINS = 1 << 22  # values that differ by less than this part of the range cannot be told apart
PALETTE = 1 << 16  # values that a 16-bit code can name
SHARED_MEMORY = Path("/dev/shm")
RUN_FOLDER = "hybridmim-cache-"  # in memory: one folder for each run
KEEP_FREE = 0.1  # of the shared memory, through which the workers of a data loader send their batches


class DamagedError(Exception):
    """An entry cannot be used; the message says why."""


class NotStoredError(Exception):
    """An entry could not be written; the message names the folder and its room.

    Attributes:
        need: size of the entry in bytes.
    """

    def __init__(self, message: str, need: int) -> None:
        super().__init__(message)
        self.need = need


class Store:
    """A folder of entries. Any number of processes may read and write it at the same time.

    Args:
        folder: created if it is missing.
        keep_free: fraction of its disk that is not filled.
    """

    def __init__(self, folder: str | Path, keep_free: float = 0.0) -> None:
        self.folder = Path(folder)
        self.keep_free = keep_free
        self.intact: dict[str, np.ndarray] = {}  # file → parts that this process has verified

    def room(self) -> int:
        """Bytes that can still be stored."""
        return disk_room(self.folder, self.keep_free)

    def open(self, name: str) -> Entry | None:
        """The entry of this name; None if there is none.

        Raises:
            DamagedError: it cannot be read, or is of another version.
        """
        path = self.folder / f"{name}.pt"
        try:
            if path.name not in self.intact:  # as chunks are, at its first use in this process
                with zipfile.ZipFile(path) as archive:
                    if part := archive.testzip():  # torch stores checksums and does not read them
                        raise ValueError(f"{part} is damaged")
                self.intact[path.name] = np.ones(1, bool)
            header = torch.load(path, weights_only=True)
            found = header["format"]
            entry = Entry(self, name, header) if found == FORMAT else None
        except FileNotFoundError:
            return None
        except Exception as error:  # of any kind, by a damaged file
            raise DamagedError(f"{path.name} cannot be read ({_first_line(error)})") from error
        if entry is None:
            raise DamagedError(f"{path.name} is of another version: found {found!r}, expected {FORMAT}")
        return entry

    def write(self, name: str, data: Mapping[str, Any]) -> None:
        """Write an entry, completely or not at all. Four-dimensional tensors are its volumes, [C, H, W, D].

        Raises:
            NotStoredError: there is no room, or the folder cannot be written.
        """
        frames, volumes = {}, {}
        for key, value in data.items():
            if not _is_volume(value):
                continue
            array, palettes = _compress(value.detach().cpu().numpy())
            frame = array.to_cframe()
            array = blosc2.ndarray_from_cframe(frame)
            frames[self._file(name, key)] = frame
            volumes[key] = {
                "shape": tuple(value.shape),
                "dtype": value.dtype,
                "palettes": palettes,  # not a metalayer of the file: Blosc2 never frees what it read of one
                "checksums": torch.tensor([zlib.crc32(array.schunk.get_chunk(n)) for n in range(array.schunk.nchunks)]),
                "meta": _plain(value.meta) if isinstance(value, MetaTensor) else None,
                "applied_operations": _plain(value.applied_operations) if isinstance(value, MetaTensor) else None,
            }
        rest = _plain({key: value for key, value in data.items() if key not in volumes})
        header = io.BytesIO()
        torch.save({"format": FORMAT, "keys": list(data), "volumes": volumes, "rest": rest}, header)
        frames[self.folder / f"{name}.pt"] = header.getvalue()  # last: without it there is no entry
        need = sum(map(len, frames.values()))
        try:
            self.folder.mkdir(parents=True, exist_ok=True)
            if need > self.room():
                raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
            for path, content in frames.items():
                self.intact.pop(path.name, None)
                with atomic_path(path) as temporary:
                    temporary.write_bytes(content)
        except OSError as error:
            if not (self.folder / f"{name}.pt").exists():  # volumes of no entry
                with suppress(OSError):
                    for path in frames:
                        path.unlink(missing_ok=True)
            reason = getattr(error.__cause__, "strerror", error.strerror)
            raise NotStoredError(
                f"{self.folder}: {reason}: {bytes_text(self.room())} free, {bytes_text(need)} needed",
                need,
            ) from error

    def _file(self, name: str, key: str) -> Path:
        end = {"image": "", "label": "_seg"}.get(key, f"_{key}")
        return self.folder / f"{name}{end}.b2nd"


class Entry:
    """A stored scan, whose volumes are read in parts.

    Attributes:
        volumes: key → shape, type, meta data, checksums of the chunks, and palettes, if the file holds codes.
        rest: all other entries of the scan.
    """

    def __init__(self, store: Store, name: str, header: Mapping[str, Any]) -> None:
        self.store = store
        self.name = name
        self.keys: list[str] = header["keys"]
        self.volumes: dict[str, dict[str, Any]] = header["volumes"]
        self.rest: dict[str, Any] = header["rest"]
        self.arrays: dict[str, blosc2.NDArray] = {}

    def whole(self) -> dict[str, Any]:
        """The scan as it was stored, with all voxels.

        Raises:
            DamagedError: a file is missing or damaged.
        """
        return self._data(self.read)

    def stand_ins(self) -> dict[str, Any]:
        """The scan as it was stored, but with volumes of the right shape that have no memory and no voxels."""
        return self._data(
            lambda key: torch.zeros((), dtype=self.volumes[key]["dtype"]).expand(self.volumes[key]["shape"])
        )

    def _data(self, voxels: Callable[[str], Tensor]) -> dict[str, Any]:
        return {k: self._with_meta(k, voxels(k)) if k in self.volumes else self.rest[k] for k in self.keys}

    def crop(self, key: str, crop: Tensor) -> Tensor:
        """The voxels that belong to a crop of `stand_ins()[key]`: its affine matrix tells where it lies.

        Raises:
            DamagedError: a file is missing or damaged.
        """
        if not isinstance(crop, MetaTensor):  # not cropped
            return self.read(key)
        meta = self.volumes[key]["meta"]
        whole = np.eye(4) if meta is None else meta["affine"].numpy()
        first = np.linalg.solve(whole, crop.affine.numpy())[:3, 3].round().astype(int).tolist()
        box = tuple(slice(start, start + size) for start, size in zip(first, crop.shape[1:], strict=True))
        return MetaTensor(self.read(key, box)).copy_meta_from(crop, copy_attr=False)

    def read(self, key: str, box: tuple[slice, slice, slice] | None = None) -> Tensor:
        """The voxels of a volume in all channels, or those of a box (start and stop of each axis).

        Raises:
            DamagedError: the file is missing, or one of the chunks that are read is.
        """
        volume = self.volumes[key]
        box = box or tuple(slice(0, size) for size in volume["shape"][1:])
        path = self.store._file(self.name, key)
        try:
            array = self._open(key, path)
            self._verify(array, path.name, volume["checksums"], box)
            values = array[(slice(None), *box)]
        except FileNotFoundError as error:
            raise DamagedError(f"{path.name} is missing") from error
        except (OSError, RuntimeError, ValueError, TypeError) as error:
            raise DamagedError(f"{path.name} cannot be read ({_first_line(error)})") from error
        if volume["palettes"]:
            codes, values = values, np.empty(values.shape, np.float32)
            for palette, channel, out in zip(volume["palettes"], codes, values, strict=True):
                levels = palette.numpy()
                for code, value in zip(channel, out, strict=True):  # a plane stays in the processor's cache
                    levels.take(code, out=value, mode="clip")  # faster than "raise"
        return torch.from_numpy(values).to(volume["dtype"])

    def _open(self, key: str, path: Path) -> blosc2.NDArray:
        if key not in self.arrays:
            # not mapped into memory: that saves a tenth of the time, but a disk that fails would end the process
            self.arrays[key] = blosc2.open(str(path), mode="r", dparams={"nthreads": 1})
        return self.arrays[key]

    def _verify(self, array: blosc2.NDArray, file: str, checksums: Tensor, box: tuple[slice, ...]) -> None:
        """Compare the checksums of the chunks in a box, at their first use in this process."""
        intact = self.store.intact.setdefault(file, np.zeros(len(checksums), bool))
        if len(intact) != array.schunk.nchunks:
            raise DamagedError(f"{file} has {array.schunk.nchunks} chunks, expected {len(intact)}")
        sides = list(zip(array.shape[1:], array.chunks[1:], strict=True))
        grid = [ceil(size / side) for size, side in sides]
        touched = [range(s.start // side, ceil(s.stop / side)) for s, (_, side) in zip(box, sides, strict=True)]
        for place in product(*touched):
            n = int(np.ravel_multi_index(place, grid))
            if not intact[n] and zlib.crc32(array.schunk.get_chunk(n)) != int(checksums[n]):
                raise DamagedError(f"chunk {n} of {file} is damaged")
            intact[n] = True

    def _with_meta(self, key: str, voxels: Tensor) -> Tensor:
        volume = self.volumes[key]
        if volume["meta"] is None:
            return voxels
        return MetaTensor(voxels, meta=volume["meta"], applied_operations=volume["applied_operations"])


def _plain(value: Any) -> Any:
    """Without the types that `torch.load(weights_only=True)` refuses: NumPy's, and MONAI's names, which are enums."""
    if isinstance(value, Enum):
        return value.value
    if isinstance(value, Mapping):
        return {_plain(k): _plain(v) for k, v in value.items()}
    if isinstance(value, list | tuple):
        return type(value)(map(_plain, value))
    if isinstance(value, np.ndarray):
        return torch.from_numpy(value) if value.dtype.kind in "biuf" else value.tolist()
    return value.item() if isinstance(value, np.generic) else value


def _is_volume(value: Any) -> bool:
    return isinstance(value, Tensor) and value.ndim == 4


def _first_line(error: Exception) -> str:
    return (str(error).strip() or type(error).__name__).splitlines()[0]


# ------------------------------------------------------------------------------------------------------ encoding


def _compress(volume: np.ndarray) -> tuple[blosc2.NDArray, list[Tensor]]:
    """Volume [C, H, W, D] → compressed array, in memory, and, if it holds codes, the channels' palettes (float32)."""
    if volume.dtype.kind != "f":
        return _array(volume), []
    coded = []
    for channel in volume:
        coded.append(_code(channel))
        if coded[-1] is None:
            half = np.abs(volume).max(initial=0) <= np.finfo(np.float16).max
            return _array(volume.astype(np.float16) if half else volume), []
    return _array(np.stack([codes for codes, _ in coded])), [torch.from_numpy(palette) for _, palette in coded]


def _array(volume: np.ndarray) -> blosc2.NDArray:
    channels, *size = volume.shape
    chunks = (channels, *(min(CHUNK, side) for side in size))
    blocks = (1, *(min(BLOCK, side) for side in size))
    return blosc2.asarray(np.ascontiguousarray(volume), chunks=chunks, blocks=blocks, cparams=COMPRESSION)


def _code(channel: np.ndarray) -> tuple[np.ndarray, np.ndarray] | None:
    """Codes (uint16) and palette (float32) of a channel [H, W, D] with few values; None if it has too many.

    Each value falls into one of 4 million bins of equal width, so that no voxel has to be sorted; that no bin holds two
    values is checked voxel by voxel.
    """
    low, high = (float(end) for end in (channel.min(), channel.max()))
    if channel.dtype != np.float32 or not np.isfinite(high - low):
        return None
    scale = np.float32((BINS - 1) / (high - low) if high > low else 0)
    slabs = [channel[start : start + 16] for start in range(0, len(channel), 16)]  # bounds the memory
    values = np.full(BINS, np.nan, np.float32)
    for slab in slabs:
        bins = _bins(slab, low, scale)
        values[bins] = slab
        if (values[bins] != slab).any():  # two values in one bin
            return None
    used = ~np.isnan(values)
    palette = values[used]
    if len(palette) > PALETTE:
        return None
    code = (np.cumsum(used) - 1).astype(np.uint16)
    codes = np.empty(channel.shape, np.uint16)
    for slab, part in zip(slabs, np.split(codes, range(16, len(channel), 16)), strict=True):
        part[...] = code[_bins(slab, low, scale)]
        if (palette[part] != slab).any():
            return None
    return codes, palette


def _bins(slab: np.ndarray, low: float, scale: np.float32) -> np.ndarray:
    bins = slab - np.float32(low)
    bins *= scale
    return bins.astype(np.int32)


# ------------------------------------------------------------------------------------------------- room and memory


def memory_root() -> Path:
    """Folder for files that stay in memory: shared memory, or else temporary files, which the system keeps there.

    Containers often have only 64 MB of shared memory; it is not used if it is smaller than a tenth of the memory.
    """
    memory = psutil.virtual_memory().total
    if os.access(SHARED_MEMORY, os.W_OK) and shutil.disk_usage(SHARED_MEMORY).total >= memory / 10:
        return SHARED_MEMORY
    return Path(tempfile.gettempdir())


def memory_folder() -> Path:
    """Folder in memory for all processes of this run on this machine; removed when the last of them ends.

    What killed runs have left is removed. Processes that torchrun or the like starts have a port in common, which names
    the folder; a file in it names each process.
    """
    root = memory_root()
    for folder in root.glob(f"{RUN_FOLDER}*"):
        _remove_unused(folder)
    several = int(os.environ.get("WORLD_SIZE", 1)) > 1
    folder = root / f"{RUN_FOLDER}{'port-' + os.environ['MASTER_PORT'] if several else os.getpid()}"
    mark = folder / f"{process_mark()}.process"
    while not mark.exists():
        folder.mkdir(mode=0o700, exist_ok=True)
        with suppress(FileNotFoundError):  # another start has removed the folder, as it did not name a process yet
            mark.touch()
            atexit.register(_leave, mark)
    return folder


def _leave(mark: Path) -> None:
    if mark.stem == process_mark():  # not in a process that was forked from this one
        mark.unlink(missing_ok=True)
        _remove_unused(mark.parent)


def _remove_unused(folder: Path) -> None:
    """Remove the folder of a run, if none of its processes is alive."""
    if not any(is_alive(mark.stem) for mark in folder.glob("*.process")):
        shutil.rmtree(folder, ignore_errors=True)
