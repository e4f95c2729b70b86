"""Data sets that decode and resample each scan once, and then read only the parts that are drawn."""

from __future__ import annotations

import hashlib
import json
import logging
import re
from collections.abc import Callable, Mapping, Sequence
from copy import copy, deepcopy
from pathlib import Path
from typing import Any

import numpy as np
import torch
from monai.data import Dataset, get_track_meta
from monai.transforms import (
    Compose,
    RandCropByPosNegLabeld,
    RandSpatialCropd,
    RandSpatialCropSamplesd,
    Transform,
    reset_ops_id,
)
from monai.transforms.traits import RandomizableTrait

from tools.data.inspection import scan_key
from tools.data.sampling import Draw
from tools.data.scans import paths_of
from tools.data.store import KEEP_FREE, DamagedError, Entry, NotStoredError, Store, memory_folder

logger = logging.getLogger(__name__)

CACHES = ("none", "memory", "disk")
# Crops that look at the shape of a volume only, and the arguments that name the entries that they need for this
CROPS = {
    RandSpatialCropd: (),
    RandSpatialCropSamplesd: (),
    RandCropByPosNegLabeld: ("fg_indices_key", "bg_indices_key"),
}
STORED = "stored"  # entry of a scan whose volumes are stand-ins: where their voxels are


def make_dataset(data: Sequence[Mapping[str, Any]], transform: Compose, cache: str, cache_dir: str | Path) -> Dataset:
    """Create a data set whose deterministic transforms (all before the first random one) run once per scan if cached.

    Args:
        data: items, as `{"image": path}`.
        transform: a `Compose`.
        cache: `none`, `memory` (shared by all processes of this run on this machine) or `disk`; filled when first read.
        cache_dir: folder of the disk cache; entries depend on files, file dates and settings.

    Raises:
        ValueError: `cache` is unknown.
    """
    if cache not in CACHES:
        raise ValueError(f"cache must be one of {', '.join(CACHES)}; found {cache!r}")
    if cache == "memory":
        return StoredDataset(data, transform, Store(memory_folder(), keep_free=KEEP_FREE))
    if cache == "disk":
        return StoredDataset(data, transform, Store(cache_dir))
    return SeededDataset(data, transform)


class SeededDataset(Dataset):
    """MONAI's `Dataset`, whose random transforms are seeded for each draw of a `SeededSampler`."""

    def __getitem__(self, index: int | slice | Sequence[int] | Draw) -> Any:
        """Draw from a scan."""
        if isinstance(index, Draw):
            self.transform.set_random_state(index.seed)
            index = index.index
        return super().__getitem__(index)


class StoredDataset(SeededDataset):
    """Stores the result of the deterministic transforms, and reads only the voxels that a random crop after them draws.

    The crop itself, a transform of MONAI, runs on stand-ins that have the shape of the volumes but take no memory: it
    draws the same boxes as without a store. If the first random transform is none of `CROPS`, volumes are read whole.

    An entry that is damaged, of another version, or whose file has changed is stored anew; a scan that does not fit on
    the disk is read from its file every time. Both are named in a warning.

    Args:
        data: items, as `{"image": path}`.
        transform: deterministic transforms, then random ones.
        store: where the scans are.
    """

    def __init__(self, data: Sequence[Mapping[str, Any]], transform: Compose, store: Store) -> None:
        steps = transform.transforms
        first = transform.get_index_of_first(lambda t: isinstance(t, RandomizableTrait) or not isinstance(t, Transform))
        self.random_from = len(steps) if first is None else first
        reading, self.needed = _read_after_crop(steps[self.random_from :])
        transform = copy(transform)  # with the same steps, and so the same random numbers
        transform.transforms = (*steps[: self.random_from], *reading)
        super().__init__(data, transform)
        self.store = store
        self.settings = hash_transforms(steps[: self.random_from])
        self.names = [self._name(item) for item in data]
        self.lacking = torch.zeros(1, dtype=torch.int64).share_memory_()  # size of a scan that did not fit, in bytes

    def _transform(self, index: int) -> Any:
        """Draw from a scan."""
        scan = _StoredScan(self, index)
        if scan.entry is None:
            data = scan.data
        elif self.needed is not None and self.needed <= scan.entry.rest.keys() and get_track_meta():
            data = {**scan.entry.stand_ins(), STORED: scan}
        else:
            data = scan.read(Entry.whole)
        return self.transform(data, start=self.random_from)

    def _name(self, item: Mapping[str, Any]) -> str:
        """Readable name of an entry, and the hash that identifies it."""
        stem = re.sub(r"\W+", "_", Path(paths_of(item)[0]).name.split(".nii")[0])[:60]
        return f"{stem}-{_digest([dict(item), scan_key(item), self.settings])[:24]}"


class _StoredScan:
    """The entry of a scan, which is built if there is none; or its `data`, if they cannot be stored."""

    def __init__(self, dataset: StoredDataset, index: int) -> None:
        self.dataset = dataset
        self.item = dataset.data[index]
        self.name = dataset._name(self.item)
        self.data: dict[str, Any] | None = None
        try:
            self.entry = dataset.store.open(self.name)
        except DamagedError as reason:
            self._rebuild(reason)
        else:
            if self.entry is None and self.name != dataset.names[index]:
                self._rebuild("its file has changed since the start of the run")
            elif self.entry is None:
                self._build()

    def __deepcopy__(self, memo: dict) -> _StoredScan:
        """MONAI's crops copy what they do not crop; this is only read."""
        return self

    def read(self, function: Callable[[Entry], Any]) -> Any:
        """Read from the entry; if it is damaged, once more after storing it anew."""
        try:
            return function(self.entry)
        except DamagedError as reason:
            self._rebuild(reason)
        return function(self.entry)

    def _rebuild(self, reason: DamagedError | str) -> None:
        logger.warning("%s: %s; it is stored anew", ", ".join(paths_of(self.item)), reason)
        self._build()

    def _build(self) -> None:
        """Run the deterministic transforms and store their result."""
        dataset = self.dataset
        data = dataset.transform(deepcopy(self.item), end=dataset.random_from)
        reset_ops_id(data)  # so that transforms of other processes may invert them
        self.entry, self.data = None, data
        if dataset.lacking > dataset.store.room():
            return
        try:
            dataset.store.write(self.name, data)
            self.entry = dataset.store.open(self.name)
        except NotStoredError as error:
            if not dataset.lacking:
                logger.warning("%s for %s; it is read from its file every time", error, paths_of(self.item)[0])
            dataset.lacking[0] = error.need


class _ReadCrops(Transform):
    """Puts the voxels in the place of crops from stand-ins."""

    def __call__(self, data: Mapping[str, Any]) -> dict[str, Any]:
        """Read those of each volume."""
        data = dict(data)
        scan: _StoredScan | None = data.pop(STORED, None)
        if scan is None:  # whole volumes
            return data
        return data | scan.read(lambda entry: {key: entry.crop(key, data[key]) for key in entry.volumes})


def _read_after_crop(steps: Sequence[Callable]) -> tuple[Sequence[Callable], set[str] | None]:
    """Insert the reading of voxels after the first step, if that is one of `CROPS` or a transform that begins with one.

    Returns:
        The steps, and the entries that the crop needs; None if whole volumes must be read.
    """
    first = steps[0] if steps else None
    if type(first) in CROPS:
        needed = {getattr(first, argument) for argument in CROPS[type(first)]}
        return (first, _ReadCrops(), *steps[1:]), needed
    inner = getattr(first, "transform", None)
    if not isinstance(inner, Compose):
        return steps, None
    reading, needed = _read_after_crop(inner.transforms)
    first = copy(first)
    first.transform = copy(inner)
    first.transform.transforms = reading
    return (first, *steps[1:]), needed


def hash_transforms(transforms: Sequence[Any]) -> str:
    """Hash of the classes and settings of the transforms."""
    return _digest([_describe(transform) for transform in transforms])


def _digest(content: Any) -> str:
    return hashlib.sha256(json.dumps(content, sort_keys=True, default=str).encode()).hexdigest()


def _describe(value: Any) -> Any:
    """Settings as plain data: an object is its class and its attributes."""
    if value is None or isinstance(value, (bool, int, float, str)):
        return value
    if isinstance(value, Mapping):
        return {str(k): _describe(v) for k, v in value.items()}
    if isinstance(value, (list, tuple, np.ndarray, torch.Tensor)):
        return [_describe(v) for v in value]
    if isinstance(value, type) or not hasattr(value, "__dict__"):
        return getattr(value, "__qualname__", str(type(value)))
    if callable(value) and hasattr(value, "__code__"):
        return f"{value.__module__}.{value.__qualname__}"
    return {"class": type(value).__qualname__, **_describe(vars(value))}
