"""The fingerprint of a data set: what a plan of its training is made from.

As in nnU-Net (Isensee et al., Nature Methods 18:203-211, 2021): spacings, sizes and the intensities inside labels; here
also the volume and the place of each class.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cache, partial
from typing import Any

import numpy as np
from monai.data import affine_to_spacing
from monai.transforms import Compose, Orientationd
from scipy.ndimage import center_of_mass

from tools.data.loading import LoadScand
from tools.data.preparation import ORIENTATION
from tools.data.processes import in_processes
from tools.data.scans import ScanError

QUANTILES = np.linspace(0, 1, 1001)  # of the intensities of a case, in place of all of them
SIDES = (("L", "R"), ("P", "A"), ("I", "S"))
AIR = -500.0  # HU; what is above belongs to the patient


@dataclass(frozen=True)
class Case:
    """What is measured on a case; axes point right, to the front and up (RAS).

    Attributes:
        shape: voxels of the file.
        spacing: mm.
        body: size of the bounding box of what is no air (CT) or not 0, mm.
        filled: share of the voxels that are not 0 in any channel.
        intensities: quantiles of the first channel inside of the labels, or of the body without labels.
        volumes: label value → mm³.
        centres: label value → centre of mass from the first voxel, mm.
    """

    shape: tuple[int, int, int]
    spacing: tuple[float, float, float]
    body: tuple[float, float, float]
    filled: float
    intensities: Sequence[float]
    volumes: Mapping[int, float] = field(default_factory=dict)
    centres: Mapping[int, tuple[float, float, float]] = field(default_factory=dict)


@cache
def _loader(keys: tuple[str, ...]) -> Compose:
    return Compose([LoadScand(list(keys)), Orientationd(list(keys), ORIENTATION, labels=SIDES)])


def measure(item: dict[str, Any], hounsfield: bool) -> Case:
    """Read a case, with its label if it has one.

    Args:
        item: `{"image": path or paths, "label": path}`.
        hounsfield: whether the image is CT in HU.
    """
    data = _loader(("image", "label") if "label" in item else ("image",))(item)
    image = np.asarray(data["image"])
    spacing = tuple(affine_to_spacing(data["image"].affine).tolist())
    inside = (image[0] > AIR) if hounsfield else (image != 0).any(axis=0)
    ends = [np.flatnonzero(inside.any(axis=tuple({0, 1, 2} - {axis}))) for axis in range(3)]
    sides = [end[-1] - end[0] + 1 if end.size else size for end, size in zip(ends, inside.shape, strict=True)]
    body = tuple(float(side * mm) for side, mm in zip(sides, spacing, strict=True))
    volumes, centres = {}, {}
    if "label" in data:
        label = np.rint(np.asarray(data["label"][0])).astype(int)
        counts = {value: int(n) for value, n in enumerate(np.bincount(label[label > 0])) if n}
        volumes = {value: n * float(np.prod(spacing)) for value, n in counts.items()}
        places = center_of_mass(np.ones(label.shape, bool), label, list(counts)) if counts else []
        centres = {
            value: tuple(float(at * mm) for at, mm in zip(place, spacing, strict=True))
            for value, place in zip(counts, places, strict=True)
        }
        inside = label > 0
    found = image[0][inside]
    intensities = np.quantile(found, QUANTILES).tolist() if found.size else []
    filled = float((image != 0).any(axis=0).mean())
    return Case(image.shape[1:], spacing, body, filled, intensities, volumes, centres)


def fingerprint(items: Sequence[dict[str, Any]], hounsfield: bool, workers: int = 4) -> list[Case]:
    """Measure all cases, which `inspect_scans` has found usable, in processes.

    Raises:
        ScanError: a case could not be read again.
    """
    return list(_measured(items, in_processes(partial(measure, hounsfield=hounsfield), items, max(workers, 1))))


def _measured(items: Sequence[dict[str, Any]], results: Iterator[Case | str]) -> Iterator[Case]:
    for item, result in zip(items, results, strict=True):
        if isinstance(result, str):
            raise ScanError(f"{item['image']} {result}, expected to read it as in the check before")
        yield result
