"""Rules that plan a training from the fingerprint of its data; `docs/planning.md` gives their reasons and sources.

Every rule is a pure function, without files or a machine. Axes point right, to the front and up (RAS).
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import combinations
from math import ceil, prod
from typing import Any

import numpy as np

from tools.common.text import axis_ranges, bytes_text, size_text
from tools.data.classes import Classes
from tools.data.fingerprint import Case

AXES = ("left-right", "posterior-anterior", "inferior-superior")
MOST_VOXELS = 128**3  # of a crop, and of one with the small network
MOST_VOXELS_SMALL = 48 * 64 * 48
START_VOXELS = 256**3  # of the crop that is then made smaller
ANISOTROPIC = 3  # times the other voxel sides
COARSER = 1.03
COVERED = 0.25  # share of a case that a crop shows
LEAST_VOXELS = 512  # of the smallest class: a cube of eight voxels
MOST_CROPS = 4  # in a batch
MOST_CROPS_PRETRAINING = 8
REGION, REGION_SMALL = 32, 16  # voxels, of pre-training and of its small.yaml
PATCH, PATCH_SMALL = 16, 8
VALIDATED = 0.1  # share of the scans: val_fraction
GROWN = 8  # times the volume of a voxel, at most, where no class bounds it
MOST_WORKERS = 8
LEAST_CROPS = 2
BATCH_SHARE = 0.05  # of the voxels of all cases
CLIPPED = 5  # of the 1001 quantiles at each end: 0.5 and 99.5 %
SKULL_STRIPPED = 0.75  # filled share, below which a scan counts as cut out
STEPS, STEPS_SMALL = 12_000, 1_500
LEAST_EPOCHS = 20
OVERLAPS = (0.5, 0.25, 0.1)  # of windows in validations
MOST_WINDOWS = 64  # of a case
IN_MEMORY = 4e9  # bytes of a cache
STORED_VOXEL = 1.5  # bytes
FOLDS = 5
SIDES: tuple[tuple[frozenset[str], frozenset[str]], ...] = (  # words in the names of classes, by axis
    (frozenset({"left", "lt", "l"}), frozenset({"right", "rt", "r"})),
    (frozenset({"posterior", "dorsal", "back"}), frozenset({"anterior", "ventral", "front"})),
    (frozenset({"inferior", "lower", "caudal", "bottom"}), frozenset({"superior", "upper", "cranial", "top"})),
)
ALONE = frozenset({"left", "right"})  # the others in pairs only: the inferior vena cava has no counterpart
ALIKE = 2.0  # largest ratio of the volumes of two classes that could be taken for each other
LEAST_CASES = 3  # in which two classes lie in the same way


@dataclass(frozen=True)
class Row:
    """A decision.

    Attributes:
        what: what is decided, by its key in the config.
        found: what it depends on in the data.
        decided: value.
        why: rule.
    """

    what: str
    found: str
    decided: str
    why: str


@dataclass(frozen=True)
class Memory:
    """Memory of a training step, bytes: `fixed + per_voxel` × voxels of all crops; and how much there is."""

    fixed: float
    per_voxel: float
    limit: float

    @property
    def voxels(self) -> int:
        """Voxels that fit."""
        return max(0, int((self.limit - self.fixed) / self.per_voxel))


# ------------------------------------------------------------------------------------------------- voxels and crops


def target_spacing(spacings: Sequence[Sequence[float]], body: Sequence[float]) -> list[float]:
    """Median voxel size; along the thick axis of anisotropic scans, that of their thinnest tenth.

    Args:
        spacings: of each case, mm.
        body: median size of a case, mm.
    """
    target = np.median(np.asarray(spacings, dtype=float), axis=0)
    voxels = np.asarray(body) / target
    thick = int(target.argmax())
    others = [axis for axis in range(3) if axis != thick]
    if target[thick] > ANISOTROPIC * target[others].max() and voxels[thick] * ANISOTROPIC < voxels[others].min():
        thin = np.percentile(np.asarray(spacings, dtype=float)[:, thick], 10)
        target[thick] = max(float(thin), float(target[others].max()))
    return target.tolist()


def coarsened(spacing: Sequence[float], body: Sequence[float], most_voxels: int, smallest: float) -> list[float]:
    """Enlarge voxels until a crop covers a quarter of a case, as long as the smallest class keeps its form.

    Axes with voxels of less than half the longest side are enlarged first.

    Args:
        spacing: mm.
        body: size of a case, mm.
        most_voxels: of a crop.
        smallest: volume of the smallest class, mm³.
    """
    sides = np.asarray(spacing, dtype=float)
    while COVERED * np.prod(np.asarray(body) / sides) > most_voxels:
        finer = sides * 2 < sides.max()
        larger = np.where(finer if finer.any() else True, sides * COARSER, sides)
        if smallest < LEAST_VOXELS * np.prod(larger):
            break
        sides = larger
    return [round(float(side), 2) for side in sides]


def crop_size(spacing: Sequence[float], body: Sequence[float], stride: int, most_voxels: int) -> list[int]:
    """Size of a crop, voxels: a cube in mm, no larger than a case, in multiples of the stride, at least two.

    As long as it has too many voxels, the axis is shortened along which it covers most of a case.
    """
    size = np.asarray(body, dtype=float) / np.asarray(spacing)
    cube = (START_VOXELS * np.prod(spacing)) ** (1 / 3) / np.asarray(spacing)
    crop = np.maximum(np.ceil(np.minimum(cube, size) / stride - 1e-6), 2).astype(int) * stride
    while prod(crop.tolist()) > most_voxels and (crop > 2 * stride).any():
        covered = np.where(crop > 2 * stride, crop / size, -1)
        crop[covered.argmax()] -= stride
    return crop.tolist()


def batch(crop: Sequence[int], voxels: int, case_voxels: float, cases: int, most: int = MOST_CROPS) -> tuple[int, int]:
    """Cases in a batch, and crops of each.

    Args:
        crop: voxels.
        voxels: that fit into memory.
        case_voxels: of a case.
        cases: for training.
        most: crops.
    """
    room = max(voxels // prod(crop), 1)
    share = int(BATCH_SHARE * case_voxels * cases / prod(crop))
    crops = min(room, most, max(share, LEAST_CROPS))
    each = min(crops, cases, LEAST_CROPS)
    return each, crops // each


def windows(size: Sequence[float], crop: Sequence[int], overlap: float) -> int:
    """Number of windows over a volume."""
    steps = (ceil(max(s - c, 0) / max(int(c * (1 - overlap)), 1)) + 1 for s, c in zip(size, crop, strict=True))
    return prod(steps)


def validation_overlap(size: Sequence[float], crop: Sequence[int]) -> float:
    """Largest overlap with which a case takes few windows."""
    return next((overlap for overlap in OVERLAPS if windows(size, crop, overlap) <= MOST_WINDOWS), OVERLAPS[-1])


def training_cases(cases: int) -> int:
    """Number of cases for training, without those of the first fold."""
    return max(1, cases - ceil(cases / FOLDS))


def epochs(cases: int, batch_size: int, steps: int) -> int:
    """Number of epochs, in tens, that gives so many steps."""
    return max(LEAST_EPOCHS, ceil(steps / ceil(cases / batch_size) / 10) * 10)


# ------------------------------------------------------------------------------------------- intensities, mirroring


def window(intensities: Sequence[Sequence[float]]) -> list[int]:
    """HU from the 0.5th to the 99.5th percentile inside of the labels of all cases.

    Args:
        intensities: quantiles of each case.
    """
    together = np.concatenate([np.asarray(one, dtype=float) for one in intensities if len(one)])
    low, high = np.percentile(together, [CLIPPED / 10, 100 - CLIPPED / 10])
    return [int(np.floor(low)), max(int(np.ceil(high)), int(np.floor(low)) + 1)]


def is_cut_out(filled: Sequence[float]) -> bool:
    """Whether scans are 0 around the organ, as skull-stripped ones are."""
    return float(np.median(filled)) < SKULL_STRIPPED


def no_flips(classes: Classes, cases: Sequence[Case]) -> dict[str, str]:
    """Axes along which scans must not be mirrored, with the reason: classes would change their places.

    A class whose name has a side, or two classes of about one volume of which one always lies on the same side.
    """
    reasons: dict[str, str] = {}
    words = {name: set(re.findall(r"[a-z]+", name.lower())) for name in classes}
    for axis, (first, second) in zip(AXES, SIDES, strict=True):
        sides = [[name for name in classes if words[name] & side] for side in (first, second)]
        alone = [name for side in sides for name in side if words[name] & ALONE]
        if named := ([*sides[0][:1], *sides[1][:1]] if all(sides) else alone[:1]):
            reasons[axis] = f"{' and '.join(named)} {'have' if len(named) > 1 else 'has'} a side"
    for one, other in combinations(classes, 2):
        axis = _apart([_relation(case, classes[one], classes[other]) for case in cases])
        if axis is not None:
            reasons.setdefault(AXES[axis], f"{one} and {other} are of about one size and lie on their own sides")
    return {axis: reasons[axis] for axis in AXES if axis in reasons}


def _relation(case: Case, one: Sequence[int], other: Sequence[int]) -> np.ndarray | None:
    """From one class to another, mm [3]; None if one is missing, or they differ in volume."""
    volumes = [sum(case.volumes.get(value, 0.0) for value in values) for values in (one, other)]
    if min(volumes) == 0 or max(volumes) > ALIKE * min(volumes):
        return None
    centres = [
        sum(np.asarray(case.centres[value]) * case.volumes[value] for value in values if value in case.volumes) / volume
        for values, volume in zip((one, other), volumes, strict=True)
    ]
    return centres[1] - centres[0]


def _apart(relations: Sequence[np.ndarray | None]) -> int | None:
    """The axis along which two classes are always apart in the same direction, more than along the others."""
    known = [relation for relation in relations if relation is not None]
    if len(known) < max(LEAST_CASES, len(relations) / 2):
        return None
    axis = int(np.median(np.abs(known), axis=0).argmax())
    same = len({bool(relation[axis] > 0) for relation in known}) == 1
    return axis if same else None


# ------------------------------------------------------------------------------------------------------- whole plans


@dataclass(frozen=True)
class Geometry:
    """Voxels and crops of a plan, with what they depend on."""

    spacing: list[float] | None
    roi_size: list[int]
    body: list[float]  # median, mm
    size: list[float]  # median after resampling, voxels


def plan_geometry(
    cases: Sequence[Case], smallest: float, stride: int, most_voxels: int, given: Sequence[float] | str | None = "plan"
) -> Geometry:
    """Spacing and crop.

    Args:
        cases: fingerprint.
        smallest: volume of the smallest class, mm³.
        stride: of the network, voxels.
        most_voxels: of a crop.
        given: spacing of weights, None: as in the files; or `plan`.
    """
    body = np.median([case.body for case in cases], axis=0).tolist()
    usual = np.median([case.spacing for case in cases], axis=0).tolist()
    if given == "plan":
        spacing = target_spacing([case.spacing for case in cases], body)
        spacing = coarsened(spacing, body, most_voxels, smallest)
    else:
        spacing = given if given is None else [float(side) for side in given]
    size = [mm / side for mm, side in zip(body, spacing or usual, strict=True)]
    return Geometry(spacing, crop_size(spacing or usual, body, stride, most_voxels), body, size)


def crop_voxels(memory: Memory, stride: int, most: int, crops: int = 1) -> int:
    """Voxels of a crop: two fit into memory, or `crops` of the smallest.

    Raises:
        ValueError: not even the smallest fits.
    """
    least = (2 * stride) ** 3
    if memory.voxels < crops * least:
        needed = (memory.fixed + memory.per_voxel * crops * least) / 1e9
        raise ValueError(
            f"memory_gb: found {memory.limit / 1e9:.3g} GB, expected at least {needed:.2g} GB for a batch of {crops} "
            f"crop(s) of {size_text([2 * stride] * 3)} voxels, the smallest of this network; use more, or --small true"
        )
    return max(least, min(most, memory.voxels // LEAST_CROPS))


def plan_segmentation(
    cases: Sequence[Case],
    classes: Classes,
    hounsfield: bool,
    memory: Memory,
    stride: int = 16,
    small: bool = False,
    prepared: Mapping[str, Any] | None = None,
    train: int | None = None,
) -> tuple[dict[str, Any], list[Row]]:
    """Decide how a segmentation is trained.

    Args:
        cases: fingerprint, with labels.
        classes: class name → label values.
        hounsfield: whether scans are CT in HU.
        memory: of a training step of the network.
        stride: of the network.
        small: whether the network is that of `small.yaml`.
        prepared: entry `preparation` of the card of weights, which is then taken over.
        train: number of cases for training; None: all but the first fold.

    Returns:
        Facts of the bundle, and the decisions as a table.

    Raises:
        ValueError: the memory is too small.
    """
    volumes = {name: _volumes(cases, values) for name, values in classes.items()}
    smallest = min(volumes, key=lambda name: float(np.median(volumes[name])))
    least = float(np.median(volumes[smallest]))
    most = crop_voxels(memory, stride, MOST_VOXELS_SMALL if small else MOST_VOXELS)
    given = "plan" if prepared is None else prepared["spacing"]
    geometry = plan_geometry(cases, least, stride, most, given)
    train = train or training_cases(len(cases))
    most_crops = LEAST_CROPS if small else MOST_CROPS
    batch_size, crops = batch(geometry.roi_size, memory.voxels, prod(geometry.size), train, most_crops)
    steps = STEPS_SMALL if small else STEPS
    facts: dict[str, Any] = {
        **_intensity(cases, hounsfield, prepared),
        "spacing": geometry.spacing,
        "own_spacing": f"{axis_ranges([case.spacing for case in cases])} mm",
        "roi_size": geometry.roi_size,
        "val_overlap": validation_overlap(geometry.size, geometry.roi_size),
        "flip_probability": 0.1 if hounsfield else 0.5,
        "no_flips": no_flips(classes, cases),
        "batch_size": batch_size,
        "crops_per_volume": crops,
        "epochs": epochs(train, batch_size, steps),
        "cache": "memory" if STORED_VOXEL * prod(geometry.size) * len(cases) < IN_MEMORY else "disk",
        "surface_tolerance": ceil(2 * max(np.median([case.spacing for case in cases], axis=0))) / 2,
    }
    facts["noise"] = 0.1 if facts["intensity"] == "z_score" else 0.03
    facts["flip_axes"] = [next((n for n, axis in enumerate(AXES) if axis not in facts["no_flips"]), 0)]
    if not small:
        laptop = plan_geometry(cases, least, stride, MOST_VOXELS_SMALL, given)
        if (laptop.spacing, laptop.roi_size) != (geometry.spacing, geometry.roi_size):
            facts["small"] = {"spacing": laptop.spacing, "roi_size": laptop.roi_size}
    taken = "as in pre-training, because the weights know nothing else"
    used = memory.fixed + memory.per_voxel * prod(geometry.roi_size) * batch_size * crops
    rows = [
        Row(
            "spacing",
            f"{facts['own_spacing']}; smallest class {smallest}, {least / 1000:.3g} ml",
            "as in the files" if geometry.spacing is None else f"{size_text(geometry.spacing)} mm",
            taken
            if prepared
            else "median; coarser until a crop covers a quarter of a case and the smallest class just keeps its form",
        ),
        Row(
            "roi_size",
            f"cases of {size_text(round(side) for side in geometry.size)} voxels",
            size_text(geometry.roi_size),
            f"a cube in mm, within a case, multiples of {stride}; two fit into {bytes_text(memory.limit)}",
        ),
        Row(
            "batch_size × crops_per_volume",
            f"{train} cases to train; {bytes_text(memory.limit)}",
            f"{batch_size} × {crops}, about {bytes_text(used)}",
            "two crops, for a CPU" if small else "as many crops as fit, two to four, at most 5 % of all voxels",
        ),
        _intensity_row(cases, facts, taken if prepared else None),
        Row(
            "flip_probability",
            "; ".join(f"{axis}: {why}" for axis, why in facts["no_flips"].items()) or "no class with a side",
            ", ".join(f"{0 if axis in facts['no_flips'] else facts['flip_probability']:g} {axis}" for axis in AXES),
            "none along an axis on which classes have their sides",
        ),
        Row(
            "val_overlap",
            f"{windows(geometry.size, geometry.roi_size, facts['val_overlap'])} windows in a case",
            f"{facts['val_overlap']:g}",
            f"the largest with at most {MOST_WINDOWS} windows in a case",
        ),
        Row(
            "epochs",
            f"{train} cases, {batch_size} in a batch",
            str(facts["epochs"]),
            f"about {steps} steps, at least {LEAST_EPOCHS} epochs",
        ),
        Row(
            "cache",
            f"{len(cases)} cases of {prod(geometry.size) / 1e6:.2g} million voxels",
            facts["cache"],
            f"in memory below {bytes_text(IN_MEMORY)}, of 1.5 bytes a voxel",
        ),
    ]
    return facts, rows


def plan_pretraining(
    cases: Sequence[Case], hounsfield: bool, memory: Memory, cores: int, room: float, small: bool = False
) -> tuple[dict[str, Any], list[Row]]:
    """Decide how scans without labels are pre-trained on.

    Args:
        cases: fingerprint.
        hounsfield: whether scans are CT in HU.
        memory: of a step, by the voxels of all crops.
        cores: processor cores.
        room: bytes of shared memory for a cache.
        small: whether `small.yaml` of pre-training is used.

    Returns:
        Values of top-level keys of `train.yaml`, without the scaling of intensities, and the decisions as a table.

    Raises:
        ValueError: the memory is too small.
    """
    region = REGION_SMALL if small else REGION
    most = crop_voxels(memory, region, MOST_VOXELS_SMALL if small else MOST_VOXELS, LEAST_CROPS)
    usual = np.median([case.spacing for case in cases], axis=0)
    geometry = plan_geometry(cases, GROWN * LEAST_VOXELS * float(np.prod(usual)), region, most)
    train = len(cases) - max(1, round(VALIDATED * len(cases)))
    crops_per_volume = 1 if small and train > 1 else 2
    fit = max(memory.voxels // prod(geometry.roi_size), 1)
    batch_size = max(1, min(fit, MOST_CROPS_PRETRAINING) // crops_per_volume)
    need = STORED_VOXEL * prod(geometry.size) * len(cases)
    values = {
        "hounsfield": hounsfield,
        "spacing": geometry.spacing,
        "roi_size": geometry.roi_size,
        "region_size": [region] * 3,
        "patch_size": [PATCH_SMALL if small else PATCH] * 3,
        "decode_size": [2 * region] * 3,
        "batch_size": min(batch_size, train),
        "crops_per_volume": crops_per_volume,
        "num_workers": max(0, min(MOST_WORKERS, cores - 2)),
        "cache": "memory" if need < room / 2 else "disk",
    }
    low, high = (f(case.intensities[end] for case in cases) for f, end in ((min, 0), (max, -1)))
    rows = [
        Row(
            "spacing",
            f"{axis_ranges([case.spacing for case in cases])} mm",
            f"{size_text(values['spacing'])} mm",
            f"median; coarser until a crop covers a quarter of a scan, up to {GROWN} times the volume",
        ),
        Row(
            "roi_size",
            f"scans of {size_text(round(side) for side in geometry.size)} voxels",
            f"{size_text(values['roi_size'])}, regions of {region}",
            f"a cube in mm, within a scan, multiples of {region}; two fit into {bytes_text(memory.limit)}",
        ),
        Row(
            "intensity",
            f"{low:.4g} … {high:.4g}",
            "the window of train.yaml" if hounsfield else "percentiles of each scan, as mri.yaml",
            "HU have a meaning" if hounsfield else "intensities have no unit",
        ),
        Row(
            "batch_size × crops_per_volume",
            f"{train} scans to train; {bytes_text(memory.limit)}",
            f"{values['batch_size']} × {crops_per_volume}",
            f"as many crops as fit, {MOST_CROPS_PRETRAINING} at most; the contrastive term compares them",
        ),
        Row("num_workers", f"{cores} cores", str(values["num_workers"]), f"all but two, {MOST_WORKERS} at most"),
        Row(
            "cache",
            f"about {bytes_text(need)}; {bytes_text(room)} of shared memory",
            values["cache"],
            "memory if half of it is enough",
        ),
    ]
    return values, rows


def _volumes(cases: Sequence[Case], values: Sequence[int]) -> list[float]:
    found = (sum(case.volumes.get(value, 0.0) for value in values) for case in cases)
    return [volume for volume in found if volume > 0]


def _intensity(cases: Sequence[Case], hounsfield: bool, prepared: Mapping[str, Any] | None) -> dict[str, Any]:
    """Facts about the scaling of intensities."""
    if prepared is not None:
        plain = prepared["intensity"]
        name = {"window": "hu_window", "percentiles": "percentiles", "z_score": "z_score"}[plain["scaling"]]
        ends = {} if name == "z_score" else {"scaled_to": plain["to"], "foreground_above": prepared["foreground_above"]}
        key = {"hu_window": "window", "percentiles": "percentiles"}.get(name)
        return {"intensity": name, **ends, **({key: plain["range"]} if key else {})}
    if hounsfield:
        return {"intensity": "hu_window", "window": window([case.intensities for case in cases])}
    if is_cut_out([case.filled for case in cases]):
        return {"intensity": "z_score"}
    return {"intensity": "percentiles", "percentiles": [0.5, 99.5]}


def _intensity_row(cases: Sequence[Case], facts: Mapping[str, Any], taken: str | None) -> Row:
    kind = facts["intensity"]
    inside = [case.intensities for case in cases if len(case.intensities)]
    found = f"inside labels {min(one[CLIPPED] for one in inside):.4g} … {max(one[-1 - CLIPPED] for one in inside):.4g}"
    filled = f"{100 * float(np.median([case.filled for case in cases])):.0f} % of the voxels are not 0"
    decided, why = {
        "hu_window": (
            f"{facts.get('window')} HU",
            "0.5th to 99.5th percentile inside of the labels of all cases, as in nnU-Net",
        ),
        "percentiles": (f"percentiles {facts.get('percentiles')}", "of each scan: intensities have no unit"),
        "z_score": ("mean 0, standard deviation 1 over what is not 0", "scans are cut out, with 0 around"),
    }[kind]
    return Row("intensity", found if kind == "hu_window" else f"{found}; {filled}", decided, taken or why)
