"""Classes: each is the list of label values that make it up.

So exclusive organs (`{spleen: [1], liver: [6]}`) and nested tumour regions (`{TC: [1, 4], WT: [1, 2, 4], ET: [4]}`)
are one case. Files hold one label map of whole numbers.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence

import torch
from torch import Tensor

from tools.data.inspection import Scan

Classes = Mapping[str, Sequence[int]]


ACTIVATIONS = ("softmax", "sigmoid")  # one class for each voxel; or each class by itself, so that they may overlap


def label_values(classes: Classes) -> list[int]:
    """Label values that a file may hold beside 0."""
    return sorted({value for values in classes.values() for value in values})


def own_values(classes: Classes) -> dict[str, int]:
    """The label value by which each class is painted: the one that no smaller class within it has.

    Raises:
        ValueError: the classes are neither exclusive nor nested, so that a label map cannot hold them.
    """
    own = {}
    for name, values in classes.items():
        inner = {v for other in classes.values() if set(other) < set(values) for v in other}
        rest = sorted(set(values) - inner)
        if len(rest) != 1:
            raise ValueError(f"classes: {name} has the label values {rest} of its own in {dict(classes)}, expected one")
        own[name] = rest[0]
    if len(set(own.values())) < len(own):
        raise ValueError(f"classes: found the same label value in two classes of {dict(classes)}")
    return own


def label_map(masks: Sequence[Tensor], classes: Classes) -> Tensor:
    """Bool masks [H, W, D], one for each class → uint8 label map [1, H, W, D]; smaller classes lie on larger ones."""
    own = own_values(classes)
    painted = torch.zeros(masks[0].shape, dtype=torch.uint8, device=masks[0].device)
    for name, mask in sorted(zip(classes, masks, strict=True), key=lambda pair: -len(classes[pair[0]])):
        painted[mask] = own[name]
    return painted[None]


def require_activation(activation: str, classes: Classes) -> str:
    """The activation, if it is one of `ACTIVATIONS` and fits the classes.

    Raises:
        ValueError: it is not; or, under softmax, the k-th class is not made of the label value k alone, so that the
            network's channels and the label map would mean different classes.
    """
    if activation not in ACTIVATIONS:
        raise ValueError(f"activation: found {activation!r}, expected one of {', '.join(ACTIVATIONS)}")
    expected = {name: [k] for k, name in enumerate(classes, start=1)}
    if activation == "softmax" and {name: list(values) for name, values in classes.items()} != expected:
        raise ValueError(
            f"classes: found {dict(classes)}, expected label values that count from 1 in their order, as {expected}: "
            "softmax takes the label value for the channel"
        )
    return activation


def absent_classes(scans: Iterable[Scan], classes: Classes) -> list[str]:
    """Names of the classes of which no scan's label holds a voxel."""
    present = {value for scan in scans for value in scan.labels}
    return [name for name, values in classes.items() if present.isdisjoint(values)]


def class_text(classes: Classes) -> str:
    """Classes and the label values that they are made of, in words."""
    return ", ".join(f"{name} {'+'.join(map(str, values))}" for name, values in classes.items())
