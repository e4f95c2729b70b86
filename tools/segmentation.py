"""Label maps: from a network's output to class masks, to a label map in the file's geometry, and to a picture.

Images carry one integer label map all the way. A class is the list of label values that make it up, so exclusive
organs (`{spleen: [1], liver: [6]}`) and nested tumour regions (`{TC: [1, 4], WT: [1, 2, 4], ET: [4]}`) are one case.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from itertools import combinations
from pathlib import Path
from typing import Any

import ignite.distributed as idist
import torch
from ignite.engine import Engine, Events
from monai.data import MetaTensor
from monai.inferers import SlidingWindowInfererAdapt
from monai.losses import DiceLoss
from monai.transforms import Invertd, Transform
from torch import Tensor, nn

from tools.figures import segmentation_figure

Classes = Mapping[str, Sequence[int]]
ACTIVATIONS = ("softmax", "sigmoid")  # one class for each voxel; or each class by itself, so that they may overlap


def class_masks(label_map: Tensor, classes: Classes) -> Tensor:
    """Label map [..., 1, H, W, D] of integers → bool masks [..., K, H, W, D], one for each class."""
    return torch.cat([torch.isin(label_map, label_map.new_tensor(list(v))) for v in classes.values()], dim=-4)


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
    """One of `ACTIVATIONS`, and classes that it can tell apart.

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


class DiceBCELoss(nn.Module):
    """Dice loss plus binary cross-entropy of each class by itself: for classes that overlap.

    (MONAI's `DiceCELoss` takes the cross-entropy over the classes as if they excluded each other.)

    Args:
        classes: name → label values.
    """

    def __init__(self, classes: Classes) -> None:
        super().__init__()
        self.classes = dict(classes)
        self.dice = DiceLoss(sigmoid=True, batch=True)
        self.cross_entropy = nn.BCEWithLogitsLoss()

    def forward(self, logits: Tensor, label: Tensor) -> Tensor:
        """Logits [B, K, H, W, D], label map [B, 1, H, W, D] → scalar."""
        masks = class_masks(label, self.classes).to(logits.dtype)
        return self.dice(logits, masks) + self.cross_entropy(logits, masks)


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


class ClassDice:
    """Adds `dice_<class>` to the validator's metrics: its mean over the cases that hold the class.

    Args:
        names: of the classes, in the order of `mean_dice`'s channels.
    """

    def __init__(self, names: Sequence[str]) -> None:
        self.names = list(names)

    def attach(self, engine: Engine) -> None:
        """Attach to the validator, whose key metric is MONAI's `MeanDice` with the name `mean_dice`.

        Before handlers that log metrics, which they do at the same event.
        """
        engine.add_event_handler(Events.EPOCH_COMPLETED, self)

    def __call__(self, validator: Engine) -> None:
        """Add them; not a number for a class that no case holds."""
        dice = validator.state.metric_details["mean_dice"]  # [cases, K]
        means = dice.double().nanmean(0).tolist()
        validator.state.metrics.update({f"dice_{name}": mean for name, mean in zip(self.names, means, strict=True)})


class SegmentationFigure:
    """Draws the first validation case after every validation: image, label, prediction in three planes.

    Args:
        figure_dir: folder of the pictures, one PNG for each validation.
        names: of the classes.
    """

    def __init__(self, figure_dir: str | Path, names: Sequence[str]) -> None:
        self.figure_dir = Path(figure_dir)
        self.names = list(names)

    def attach(self, engine: Engine) -> None:
        """Attach to the validator, whose output is a list of `image`, `label` and `pred` (masks of the classes)."""
        if idist.get_rank() == 0:
            engine.add_event_handler(Events.ITERATION_COMPLETED(once=1), self)

    def __call__(self, validator: Engine) -> None:
        """Draw the first case of this batch (its first channel)."""
        output, item = validator.state.output[0], validator.state.batch[0]
        segmentation_figure(
            self.figure_dir / f"segmentation_epoch={validator.state.epoch:04d}.png",
            output["image"][0].cpu(),
            {"label": output["label"], "prediction": output["pred"]},
            names=self.names,
            title=f"{Path(item['file']).name}, epoch {validator.state.epoch}",
            spacing=tuple(item["spacing"].tolist()),
        )
