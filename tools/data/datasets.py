"""MONAI's data sets that decode and resample each scan once, selected by name."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from monai.data import CacheDataset, Dataset, PersistentDataset

from tools.data.inspection import scan_key

CACHES = ("none", "memory", "disk")


def make_dataset(
    data: Sequence[Mapping[str, Any]],
    transform: Callable,
    cache: str,
    cache_dir: str | Path,
    num_workers: int = 0,
) -> Dataset:
    """Create a data set whose deterministic transforms (all before the first random one) run once per scan if cached.

    Args:
        data: items, as `{"image": path}`.
        transform: a `Compose`.
        cache: `none`, `memory` (in this process, filled immediately) or `disk` (filled when first read).
        cache_dir: folder of the disk cache; entries depend on files, file dates and settings.
        num_workers: number of threads that fill the memory cache.

    Raises:
        ValueError: `cache` is unknown.
    """
    if cache not in CACHES:
        raise ValueError(f"cache must be one of {', '.join(CACHES)}; found {cache!r}")
    if cache == "memory":
        return CacheDataset(data, transform, num_workers=max(num_workers, 1), progress=len(data) > 20)
    if cache == "disk":
        return PersistentDataset(
            data,
            transform,
            cache_dir,
            hash_func=hash_item,
            hash_transform=hash_transforms,
        )
    return Dataset(data, transform)


def hash_item(item: Mapping[str, Any]) -> bytes:
    """Hash of an item and of the sizes and dates of its files."""
    return _digest([dict(item), scan_key(item)])


def hash_transforms(transforms: Sequence[Any]) -> bytes:
    """Hash of the classes and settings of the transforms."""
    return _digest([_describe(transform) for transform in transforms])


def _digest(content: Any) -> bytes:
    return hashlib.sha256(json.dumps(content, sort_keys=True, default=str).encode()).hexdigest().encode()


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
