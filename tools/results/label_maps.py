"""From a network's output to masks of the classes, and to a label map in the geometry of the file."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from itertools import combinations
from typing import Any

import torch
from monai.data import MetaTensor
from monai.inferers import SlidingWindowInfererAdapt
from monai.transforms import Invertd, Transform
from torch import Tensor

from tools.data.classes import Classes, label_map, own_values, require_activation
from tools.losses import class_masks


class ToMasksd(Transform):
    """For metrics: logits `pred` [C, H, W, D] and label map `label` [1, H, W, D] → masks [K, H, W, D] of the classes.

    Args:
        classes: name → label values.
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
    """Logits `pred` [C, h, w, d] of a preprocessed `image` → uint8 label map [1, H, W, D] in the image's own geometry.

    Probabilities, not labels, are taken back through the preprocessing, one class after the other: the largest
    (softmax) or those above one half (sigmoid) win. So borders are smooth, and memory holds a few volumes of the
    scan's size however many classes there are.

    Args:
        classes: name → label values.
        activation: softmax (C = K + 1, background first) or sigmoid (C = K).
        transform: the preprocessing.
        probabilities: also give `prob`, float16 [C, H, W, D], in the same geometry.
    """

    def __init__(self, classes: Classes, activation: str, transform: Callable, probabilities: bool = False) -> None:
        self.classes = dict(classes)
        self.own = own_values(classes)
        self.activation = require_activation(activation, classes)
        self.probabilities = probabilities
        self.invert = Invertd(keys="pred", orig_keys="image", transform=transform, nearest_interp=False)

    def __call__(self, data: Mapping[str, Any]) -> dict[str, Any]:
        """Replace `pred`."""
        kept: list[MetaTensor] = []
        if self.activation == "softmax":
            pred = self._exclusive(self._inverted(data, kept))
        else:
            pred = self._overlapping(self._inverted(data, kept))
        # of several channel files MONAI keeps that there was a channel axis, and its writer then takes the affine of a
        # label map for that of a plane: scans with permuted axes could not be saved
        pred.meta["original_channel_dim"] = math.nan
        out = {**data, "pred": pred}
        if self.probabilities:
            out["prob"] = MetaTensor(torch.cat(kept).half(), meta=kept[0].meta)
        return out

    def _inverted(self, data: Mapping[str, Any], kept: list[MetaTensor]) -> Iterator[MetaTensor]:
        """Each class's probability [1, H, W, D] in the geometry of the file."""
        logits = data["pred"]
        probabilities = logits.float().softmax(0) if self.activation == "softmax" else logits.float().sigmoid()
        for probability in probabilities:
            one = self.invert({"pred": probability[None], "image": data["image"]})["pred"]
            if self.probabilities:
                kept.append(one)
            yield one

    def _exclusive(self, inverted: Iterator[MetaTensor]) -> MetaTensor:
        best = next(inverted)  # the background
        chosen = torch.zeros_like(best, dtype=torch.uint8)
        for value, probability in zip(self.own.values(), inverted, strict=True):
            chosen[probability > best] = value
            best = torch.maximum(best, probability)
        return chosen

    def _overlapping(self, inverted: Iterator[MetaTensor]) -> MetaTensor:
        masks = []
        for probability in inverted:
            masks.append((probability > 0.5).as_tensor()[0])
        return MetaTensor(label_map(masks, self.classes), meta=probability.meta)


class FlippedInferer(SlidingWindowInfererAdapt):
    """Sliding window whose network output (logits) is the mean over all flips of the window along given axes.

    Args:
        axes: of the volume, 0 to 2; n axes are 2ⁿ passes.
        kwargs: as `SlidingWindowInfererAdapt`.
    """

    def __init__(self, axes: Sequence[int], **kwargs: Any) -> None:
        super().__init__(**kwargs)
        self.flips = [[2 + a for a in some] for n in range(len(axes) + 1) for some in combinations(axes, n)]

    def __call__(self, inputs: Tensor, network: Callable[..., Tensor], *args: Any, **kwargs: Any) -> Tensor:
        """[B, C, H, W, D] → [B, K, H, W, D]."""

        def mean_over_flips(window: Tensor) -> Tensor:
            return sum(network(window.flip(dims)).flip(dims) for dims in self.flips) / len(self.flips)

        return super().__call__(inputs, mean_over_flips, *args, **kwargs)
