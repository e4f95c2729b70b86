"""Converts a network's output to masks of the classes, and to a label map in the geometry of the file."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping
from functools import partial
from typing import Any

import torch
from monai.data import MetaTensor
from monai.transforms import Invertd, Transform
from monai.utils import convert_to_tensor
from torch import Tensor

from tools.data.classes import Classes, label_map, own_values, require_activation
from tools.losses import class_masks
from tools.results.way_back import WayBack, find_way_back


class ToMasksd(Transform):
    """Logits `pred` [C, H, W, D] and label map `label` [1, H, W, D] → masks of the classes [K, H, W, D], for metrics.

    Args:
        classes: class name → label values.
        activation: softmax (C = K + 1, background first) or sigmoid (C = K).
    """

    def __init__(self, classes: Classes, activation: str) -> None:
        self.classes = dict(classes)
        self.activation = require_activation(activation, classes)

    def __call__(self, data: Mapping[str, Any]) -> dict[str, Any]:
        """Replace both."""
        logits = data["pred"]
        if self.activation == "sigmoid":
            masks = logits > 0  # a probability above one half
        else:
            chosen = logits.argmax(0)
            masks = torch.stack([chosen == k for k in range(1, len(self.classes) + 1)])
        return {**data, "pred": masks.float(), "label": class_masks(data["label"], self.classes).float()}


class ToLabelMapd(Transform):
    """Logits `pred` [C, h, w, d] of a preprocessed `image` → uint8 label map [1, H, W, D] in the geometry of its file.

    The inverse of the preprocessing is applied to probabilities, not labels; then the largest probability (softmax) or
    those above 0.5 (sigmoid) give the labels. So borders are smooth. Plane by plane, all classes are interpolated
    and compared, so that the memory does not grow with their number. Where the preprocessing has other steps than
    ours, MONAI inverts it, one class after the other.

    Args:
        classes: class name → label values.
        activation: softmax (C = K + 1, background first) or sigmoid (C = K).
        transform: preprocessing to invert.
        probabilities: whether to add `prob`, float16 [C, H, W, D], in the same geometry.
    """

    def __init__(self, classes: Classes, activation: str, transform: Callable, probabilities: bool = False) -> None:
        self.classes = dict(classes)
        self.own = own_values(classes)
        self.activation = require_activation(activation, classes)
        self.activate = partial(torch.softmax, dim=0) if activation == "softmax" else torch.sigmoid
        self.probabilities = probabilities
        self.invert = Invertd(keys="pred", orig_keys="image", transform=transform, nearest_interp=False)

    def __call__(self, data: Mapping[str, Any]) -> dict[str, Any]:
        """Replace `pred`."""
        way = find_way_back(data["image"])
        labels, kept, meta = self._by_monai(data) if way is None else self._by_planes(data["pred"], way)
        # for scans with several channel files, MONAI's meta data has a channel axis, so that its writer misreads the
        # affine of a label map, and cannot save scans with permuted axes
        meta["original_channel_dim"] = math.nan
        out = {**data, "pred": MetaTensor(labels[None], meta=meta)}
        if self.probabilities:
            out["prob"] = MetaTensor(kept, meta=meta)
        return out

    def _by_planes(self, pred: Tensor, way: WayBack) -> tuple[Tensor, Tensor, dict[str, Any]]:
        logits = convert_to_tensor(pred, track_meta=False)
        labels = torch.empty(way.shape, dtype=torch.uint8, device=logits.device)
        channels = len(logits) if self.probabilities else 0
        kept = torch.empty((channels, *way.shape), dtype=torch.float16, device=logits.device)
        for n, plane in enumerate(way.planes(logits, self.activate)):
            way.view(labels)[n], way.view(kept)[:, n] = self._labels(plane)
        return labels, kept, way.meta

    def _by_monai(self, data: Mapping[str, Any]) -> tuple[Tensor, Tensor, dict[str, Any]]:
        meta: dict[str, Any] = {}

        def inverted() -> Iterator[Tensor]:
            for probability in self.activate(data["pred"].float()):
                one = self.invert({"pred": probability[None], "image": data["image"]})["pred"]
                meta.update(one.meta)
                yield one.as_tensor()[0]

        return *self._labels(inverted()), meta

    def _labels(self, probabilities: Iterator[Tensor]) -> tuple[Tensor, Tensor]:
        """Each class's probability, of any shape → uint8 labels of this shape; float16 [C, ...], or empty."""
        kept: list[Tensor] = []

        def each() -> Iterator[Tensor]:
            for probability in probabilities:
                if self.probabilities:
                    kept.append(probability.half())
                yield probability

        if self.activation == "softmax":
            labels = self._exclusive(each())
        else:
            labels = label_map([probability > 0.5 for probability in each()], self.classes)[0]
        return labels, torch.stack(kept) if kept else labels.new_empty(0, *labels.shape, dtype=torch.float16)

    def _exclusive(self, probabilities: Iterator[Tensor]) -> Tensor:
        best = next(probabilities)  # the background
        chosen = torch.zeros_like(best, dtype=torch.uint8)
        for value, probability in zip(self.own.values(), probabilities, strict=True):
            larger = (probability > best).view(torch.uint8)
            # values rise from class to class; a masked fill takes 20 times as long
            chosen = torch.maximum(chosen, larger * value)
            best = torch.maximum(best, probability)
        return chosen
