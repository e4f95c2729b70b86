"""Classes: each is a list of label values.

This covers exclusive organs (`{spleen: [1], liver: [6]}`) and nested tumour regions
(`{TC: [1, 4], WT: [1, 2, 4], ET: [4]}`). Files contain one label map of whole numbers.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence

import torch
from torch import Tensor

from tools.data.inspection import Scan

Classes = Mapping[str, Sequence[int]]


ACTIVATIONS = ("softmax", "sigmoid")  # exactly one class per voxel; independent classes, which may overlap


def label_values(classes: Classes) -> list[int]:
    """Label values of all classes, sorted; without 0."""
    return sorted({value for values in classes.values() for value in values})


def own_values(classes: Classes) -> dict[str, int]:
    """Return the value that each class has in a label map: its one value that is in no smaller class within it.

    Raises:
        ValueError: the classes are neither exclusive nor nested, so that a label map cannot represent them.
    """
    own = {}
    for name, values in classes.items():
        inner = {v for other in classes.values() if set(other) < set(values) for v in other}
        rest = sorted(set(values) - inner)
        if len(rest) != 1:
            raise ValueError(f"classes: {name} has the exclusive label values {rest} in {dict(classes)}, expected one")
        own[name] = rest[0]
    if len(set(own.values())) < len(own):
        raise ValueError(f"classes: found the same label value in two classes of {dict(classes)}")
    return own


def label_map(masks: Sequence[Tensor], classes: Classes) -> Tensor:
    """Bool masks [H, W, D], one per class → uint8 label map [1, H, W, D]; smaller classes overwrite larger ones."""
    own = own_values(classes)
    painted = torch.zeros(masks[0].shape, dtype=torch.uint8, device=masks[0].device)
    for name, mask in sorted(zip(classes, masks, strict=True), key=lambda pair: -len(classes[pair[0]])):
        painted[mask] = own[name]
    return painted[None]


def require_activation(activation: str, classes: Classes) -> str:
    """Check that the activation is one of `ACTIVATIONS` and fits the classes; return it.

    Raises:
        ValueError: the activation is unknown; or, with softmax, the label values are not 1, 2, … in the order of the
            classes, so that the channels of the network and the label map would mean different classes.
    """
    if activation not in ACTIVATIONS:
        raise ValueError(f"activation: found {activation!r}, expected one of {', '.join(ACTIVATIONS)}")
    expected = {name: [k] for k, name in enumerate(classes, start=1)}
    if activation == "softmax" and {name: list(values) for name, values in classes.items()} != expected:
        raise ValueError(
            f"classes: found {dict(classes)}, expected label values that count from 1 in their order, as {expected}: "
            "softmax uses the label value as the channel"
        )
    return activation


def absent_classes(scans: Iterable[Scan], classes: Classes) -> list[str]:
    """Names of the classes that are in no scan's label."""
    present = {value for scan in scans for value in scan.labels}
    return [name for name, values in classes.items() if present.isdisjoint(values)]


def other_year_of_brats(scans: Iterable[Scan], classes: Classes) -> str | None:
    """Say it if labels are refused because enhancing tumour has the value of another year of BraTS; else None."""
    for own, other in ((4, 3), (3, 4)):
        refused = any(f"unknown label values: found {other} (" in (scan.problem or "") for scan in scans)
        if refused and label_values(classes) == [1, 2, own]:
            theirs = {name: [other if value == own else value for value in values] for name, values in classes.items()}
            text = str(theirs).replace(" ", "")
            return f'enhancing tumour is 4 in BraTS until 2021 and 3 since 2023: for these labels, --classes "{text}"'
    return None


def class_text(classes: Classes) -> str:
    """Format the classes with their label values."""
    return ", ".join(f"{name} {'+'.join(map(str, values))}" for name, values in classes.items())
