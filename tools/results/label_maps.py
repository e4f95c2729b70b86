"""Converts a network's output to masks of the classes, and to a label map in the geometry of the file."""

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

    The inverse of the preprocessing is applied to probabilities, not labels, one class after the other; then the
    largest probability (softmax) or those above 0.5 (sigmoid) give the labels. So borders are smooth, and the memory
    does not grow with the number of classes.

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
        self.probabilities = probabilities
        self.invert = Invertd(keys="pred", orig_keys="image", transform=transform, nearest_interp=False)

    def __call__(self, data: Mapping[str, Any]) -> dict[str, Any]:
        """Replace `pred`."""
        kept: list[MetaTensor] = []
        if self.activation == "softmax":
            pred = self._exclusive(self._inverted(data, kept))
        else:
            pred = self._overlapping(self._inverted(data, kept))
        # for scans with several channel files, MONAI's meta data has a channel axis, so that its writer misreads the
        # affine of a label map, and cannot save scans with permuted axes
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
    """Sliding window that averages the network's output (logits) over all flips of a window along given axes.

    Args:
        axes: axes of the volume to flip, 0 to 2; n axes take 2ⁿ passes.
        kwargs: arguments of `SlidingWindowInfererAdapt`.
    """

    def __init__(self, axes: Sequence[int], **kwargs: Any) -> None:
        super().__init__(**kwargs)
        self.flips = [[2 + a for a in some] for n in range(len(axes) + 1) for some in combinations(axes, n)]

    def __call__(self, inputs: Tensor, network: Callable[..., Tensor], *args: Any, **kwargs: Any) -> Tensor:
        """[B, C, H, W, D] → [B, K, H, W, D]."""

        def mean_over_flips(window: Tensor) -> Tensor:
            return sum(network(window.flip(dims)).flip(dims) for dims in self.flips) / len(self.flips)

        return super().__call__(inputs, mean_over_flips, *args, **kwargs)
