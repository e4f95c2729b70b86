"""How scans are prepared for a network: voxel size, intensities, foreground; the config's way, or that of weights.

Weights work on scans that are prepared as in their training, which their card records.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from operator import eq
from pathlib import Path
from typing import Any

import numpy as np
from monai.transforms import (
    NormalizeIntensityd,
    ScaleIntensityRanged,
    ScaleIntensityRangePercentilesd,
    Transform,
)
from monai.utils import ensure_tuple_rep

from tools.common.cards import CardError, card_path, read_card
from tools.common.text import size_text
from tools.data.transforms import Above, Nonzero

ORIENTATION = "RAS"  # of the bundles' configs
TRAINING = ("own", "as_pretrained")
INFERENCE = ("as_trained", "own")
ABOVE_MASKS = 0.001  # the least intensity in pre-training, whose masked voxels are 0


@dataclass(frozen=True)
class Preparation:
    """How scans are prepared.

    Attributes:
        spacing: voxel size after resampling, mm; None: as in the file.
        intensity: transform that scales the intensities of `image`.
        foreground: selects the voxels whose bounding box is kept; image of any shape → bool of the same shape.
        lines: rows of the start table.
    """

    spacing: Sequence[float] | None
    intensity: Transform
    foreground: Callable
    lines: list[tuple[str, str]] = field(default_factory=list)

    def plain(self) -> dict[str, Any]:
        """As plain data, for a card. What cannot be described has the name of its class."""
        name = type(self.foreground).__name__
        return {
            "orientation": ORIENTATION,
            "spacing": None if self.spacing is None else list(self.spacing),
            "intensity": _plain_intensity(self.intensity),
            "foreground_above": {"Above": getattr(self.foreground, "threshold", None), "Nonzero": None}.get(name, name),
        }

    def require_same(self, weights: str | Path) -> None:
        """Check that scans were prepared in this way for these weights, if they have a card.

        Raises:
            CardError: the card says another preparation, is damaged or of a later version.
        """
        card, own = read_card(weights), self.plain()
        if card is not None and card["preparation"] != own:
            raise CardError(
                f"resume: found {_text(own)}, expected {_text(card['preparation'])}, with which the run began "
                f"({card_path(weights)}); resume it with the options and overlays of its first start"
            )


def prepare_training(
    spacing: Sequence[float] | None,
    intensity: Transform,
    foreground: Callable,
    weights: str | None,
    preprocessing: str | None = None,
) -> Preparation:
    """Return how scans are prepared for a training.

    Args:
        spacing: the config's, as in `Preparation`.
        intensity: the config's.
        foreground: the config's.
        weights: file that the training starts from, or None. If its card says another preparation, the start table
            says so.
        preprocessing: `own`: the config's; `as_pretrained`: that of the weights; None: there is no choice.

    Raises:
        CardError: the card is missing but needed, is damaged, or its preparation is unknown here.
        ValueError: `preprocessing` is unknown.
    """
    own = Preparation(spacing, intensity, foreground)
    if preprocessing not in (None, *TRAINING):
        raise ValueError(f"preprocessing: found {preprocessing!r}, expected {' or '.join(TRAINING)}")
    card = None if weights is None else read_card(weights)
    if card is None:
        if preprocessing == "as_pretrained":
            lacks = "pretrained is null" if weights is None else f"{card_path(weights)} does not exist"
            raise CardError(
                f"preprocessing: found as_pretrained, but {lacks}; expected --pretrained with the weights of a "
                "pre-training and their card, or --preprocessing own"
            )
        return _saying(own, f"of this config: {_text(own.plain())}")
    source, before = card_path(weights), card["preparation"]
    if preprocessing == "as_pretrained":
        return _saying(_of_card(source, before, own), f"as in pre-training ({source}): {_text(before)}")
    offer = "" if preprocessing is None else "; --preprocessing as_pretrained takes it over"
    warnings = [
        ("WARNING", f"{what}: {here} here, {there} in pre-training ({source}){offer}")
        for what, here, there in _differences(own.plain(), before)
    ]
    return _saying(own, f"of this config: {_text(own.plain())}", warnings)


def prepare_as_trained(
    own: Preparation,
    ckpt_path: str | Path,
    preparation: str = "as_trained",
    roi_size: Sequence[int] | None = None,
) -> Preparation:
    """Return how scans are prepared for weights that segment: as their card says.

    Args:
        own: the config's, which is used if the weights have no card. The start table names every difference.
        ckpt_path: file of the weights.
        preparation: `as_trained`, or `own`: the config's in any case.
        roi_size: size of the windows, voxels: the start table warns of one that is not that of the crops in training.

    Raises:
        CardError: the card is damaged, or its preparation is unknown here.
        ValueError: `preparation` is unknown.
    """
    if preparation not in INFERENCE:
        raise ValueError(f"preparation: found {preparation!r}, expected {' or '.join(INFERENCE)}")
    card, source = read_card(ckpt_path), card_path(ckpt_path)
    if card is None:
        return _saying(own, f"of this config, because {source} does not exist: {_text(own.plain())}")
    before = card["preparation"]
    differences = _differences(own.plain(), before)
    crops, windows = card.get("roi_size"), []
    if None not in (roi_size, crops) and (size := ensure_tuple_rep(roi_size, 3)) != tuple(crops):
        told = f"windows of {size_text(size)}, crops of {size_text(crops)} in training: results can be much worse"
        windows = [("WARNING", f'{told} (--roi_size "{list(crops)}")')]  # norms depend on the size
    if preparation == "own":
        warnings = [
            ("WARNING", f"{what}: {here} here, {there} in training ({source})") for what, here, there in differences
        ]
        return _saying(own, f"of this config: {_text(own.plain())}", [*warnings, *windows])
    unused = [("", f"not this config's {what}, {here} (--preparation own)") for what, here, _ in differences]
    return _saying(_of_card(source, before, own), f"as in training ({source}): {_text(before)}", [*unused, *windows])


def _saying(preparation: Preparation, text: str, more: Sequence[tuple[str, str]] = ()) -> Preparation:
    return replace(preparation, lines=[("preparation", text), *more])


# ---- preparations as plain data -------------------------------------------------------------------------------


def _plain_intensity(transform: Transform) -> dict[str, Any]:
    scaler = getattr(transform, "scaler", None)
    if isinstance(transform, ScaleIntensityRanged) and scaler.clip:
        return {"scaling": "window", "range": [scaler.a_min, scaler.a_max], "to": [scaler.b_min, scaler.b_max]}
    if isinstance(transform, ScaleIntensityRangePercentilesd) and scaler.clip and scaler.channel_wise:
        return {"scaling": "percentiles", "range": [scaler.lower, scaler.upper], "to": [scaler.b_min, scaler.b_max]}
    if isinstance(transform, NormalizeIntensityd):
        normalizer = transform.normalizer
        if normalizer.nonzero and normalizer.channel_wise and normalizer.subtrahend is None is normalizer.divisor:
            return {"scaling": "z_score"}
    return {"scaling": type(transform).__name__}


def _of_card(path: Path, plain: Mapping[str, Any], own: Preparation) -> Preparation:
    """Build what a card describes; if that is the config's own, return it, whatever it is made of.

    Raises:
        CardError: a value is not possible, or unknown here.
    """
    if plain == own.plain():
        return own
    try:
        if plain["orientation"] != ORIENTATION:
            raise ValueError(f"orientation: found {plain['orientation']!r}, expected {ORIENTATION!r}")
        if plain["spacing"] is not None:
            _require_numbers("spacing", plain["spacing"], 3)
        above = plain["foreground_above"]
        if isinstance(above, str):
            raise ValueError(
                f"foreground_above: found {above!r}, expected a number, or null for the voxels that are not 0"
            )
        foreground = Nonzero() if above is None else Above(above)
        return Preparation(plain["spacing"], _intensity(plain["intensity"]), foreground)
    except ValueError as error:
        raise CardError(
            f"{path}: preparation.{error}; it cannot be taken over: set spacing, intensity and foreground in a config, "
            "with --preprocessing own in training, --preparation own in evaluation and inference"
        ) from error


def _intensity(plain: Mapping[str, Any]) -> Transform:
    scaling = plain["scaling"]
    if scaling == "z_score":
        return NormalizeIntensityd("image", nonzero=True, channel_wise=True)
    if scaling not in ("window", "percentiles"):
        raise ValueError(f"intensity.scaling: found {scaling!r}, expected window, percentiles or z_score")
    ends = [
        *_require_numbers("intensity.range", plain.get("range"), 2),
        *_require_numbers("intensity.to", plain.get("to"), 2),
    ]
    if scaling == "window":
        return ScaleIntensityRanged("image", *ends, clip=True)
    return ScaleIntensityRangePercentilesd("image", *ends, clip=True, channel_wise=True)


def _require_numbers(key: str, values: Any, count: int) -> list[float]:
    numbers = values if isinstance(values, list) else []
    if len(numbers) != count or any(type(number) not in (int, float) for number in numbers):
        raise ValueError(f"{key}: found {values!r}, expected {count} numbers")
    return numbers


def _differences(here: Mapping[str, Any], there: Mapping[str, Any]) -> list[tuple[str, str, str]]:
    """What differs, as (what, here, there)."""
    compared = {"spacing": (_spacing_text, eq), "intensity": (_intensity_text, _same_image)}
    return [
        (key, text(here[key]), text(there[key]))
        for key, (text, same) in compared.items()
        if not same(here[key], there[key])
    ]


def _same_image(here: Mapping[str, Any], there: Mapping[str, Any]) -> bool:
    """Whether intensities are scaled alike but for the little by which pre-training keeps them above 0, its masks."""
    ends = [scaling.get("to", ()) for scaling in (here, there)]
    return {**here, "to": ()} == {**there, "to": ()} and np.allclose(*ends, rtol=0, atol=ABOVE_MASKS)


def _text(plain: Mapping[str, Any]) -> str:
    above = plain["foreground_above"]
    foreground = "not 0" if above is None else f"above {above}"
    return f"{_spacing_text(plain['spacing'])}, {_intensity_text(plain['intensity'])}, foreground {foreground}"


def _spacing_text(spacing: Sequence[float] | None) -> str:
    return "voxels as in the file" if spacing is None else f"voxels of {size_text(spacing)} mm"


def _intensity_text(intensity: Mapping[str, Any]) -> str:
    ends = f" {intensity['range']} → {intensity.get('to')}" if "range" in intensity else ""
    return f"{intensity['scaling']}{ends}"
