"""A case whose label can be read off its image, and that looks like itself in no mirror and under no turn."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import nibabel as nib
import numpy as np

SHAPE = (46, 52, 34)  # voxels, in RAS
SPACING = (1.1, 0.9, 1.3)  # mm, in RAS
BODY = (slice(3, 44), slice(2, 50), slice(1, 31))  # outside is air; other margins on every side
CELLS = (3, 3, 2)  # places of the classes in the body


@dataclass(frozen=True)
class Phantom:
    """One box for each label value, in a body that is surrounded by air.

    Attributes:
        levels: what a voxel is made of, [H, W, D] in RAS: -1 air, 0 body, then the label values in their order.
        label: label map [H, W, D] in RAS.
        image: intensities [C, H, W, D] in RAS: one value for each level and channel.
    """

    levels: np.ndarray
    label: np.ndarray
    image: np.ndarray

    @property
    def body(self) -> np.ndarray:
        """The levels without the air around the body."""
        return self.levels[BODY]


def make_phantom(values: Sequence[int], intensity: Callable[[int, int], float], channels: int, seed: int = 0):
    """Phantom with a box for each of the label values.

    Args:
        values: label values; the first is level 1.
        intensity: level and channel → the value of its voxels.
        channels: of the image.
        seed: moves the boxes.
    """
    levels = np.full(SHAPE, -1)
    levels[BODY] = 0
    body = levels[BODY]  # a view
    side = [size // n for size, n in zip(body.shape, CELLS, strict=True)]
    places = list(np.ndindex(*CELLS))
    for number in range(len(values)):
        # one class alone must not lie in the middle either
        at = places[(5 * number + seed + 1) % len(places)]
        shift = [(number + seed + axis) % 2 for axis in range(3)]
        start = [place * s + 3 + extra for place, s, extra in zip(at, side, shift, strict=True)]
        size = (6 + number % 2, 9 + (number + 1) % 2, 8)
        body[tuple(slice(a, a + n) for a, n in zip(start, size, strict=True))] = number + 1
    label = np.array([0, 0, *values], np.uint8)[levels + 1]
    table = np.array([[intensity(level, c) for level in range(-1, len(values) + 1)] for c in range(channels)])
    return Phantom(levels, label, np.stack([row[levels + 1] for row in table]))


def save_in(orientation: str, array: np.ndarray, path: Path) -> Path:
    """Write an array that is in RAS as a NIfTI file that keeps its voxels in another orientation."""
    path.parent.mkdir(parents=True, exist_ok=True)
    affine = np.diag((*SPACING, 1.0))
    affine[:3, 3] = -21, 13, 40
    turn = nib.orientations.ornt_transform(
        nib.orientations.axcodes2ornt("RAS"), nib.orientations.axcodes2ornt(orientation)
    )
    nib.save(nib.Nifti1Image(array, affine).as_reoriented(turn), path)
    return path


def without_figures(config: dict) -> dict[str, bool]:
    """Overrides of a train.yaml: the picture after each validation takes longer than the training of a tiny network."""
    handlers = enumerate(config["validate"]["handlers"])
    return {f"validate#handlers#{n}#_disabled_": True for n, h in handlers if h["_target_"].endswith("Figure")}
