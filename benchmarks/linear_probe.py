"""What an encoder's features know of a segmentation before any fine-tuning: a linear map from them to the classes.

    python -m benchmarks.linear_probe --dataset_dir /path/to/Task04_Hippocampus --weights a/backbone.pt,b/backbone.pt

UNet alone. Every level is enlarged to the voxels of the crop. The map is the least-squares solution in which a voxel
weighs 1/√(voxels of its class): no steps, no learning rate, so what differs between rows are the features. It is
fitted on crops from the middle of some training cases, and measured by Dice on those of the validation cases. The first
rows are fresh networks: weights that are not above them have learnt nothing that helps here.
"""

from __future__ import annotations

import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import fire
import torch
import torch.nn.functional as F
from monai.bundle import ConfigParser
from monai.networks.nets import BasicUNet
from monai.transforms import Compose, ResizeWithPadOrCropd
from torch import Tensor

ROOT = Path(__file__).resolve().parents[1]
STRIDES = (1, 2, 4, 8, 16)
LEVELS = [(0,), (1,), (2,), (3,), (4,), (0, 1, 2, 3, 4)]
VOXELS = 8000  # of each training case, drawn at random


def features(network: BasicUNet, image: Tensor) -> list[Tensor]:
    """Image [C, H, W, D] → each level's features at every voxel, [H·W·D, F]."""
    levels = [network.conv_0(image[None])]
    for down in (network.down_1, network.down_2, network.down_3, network.down_4):
        levels.append(down(levels[-1]))
    size = image.shape[1:]
    return [F.interpolate(x, size=size, mode="trilinear", align_corners=False)[0].flatten(1).T for x in levels]


def with_constant(x: Tensor) -> Tensor:
    """Features [N, F] → [N, F + 1] in 64 bit."""
    return torch.cat([x.double(), torch.ones(len(x), 1, dtype=torch.float64)], dim=1)


def fit(x: Tensor, label: Tensor, classes: int) -> Tensor:
    """Features [N, F] and labels [N] → the linear map [F + 1, classes]."""
    x = with_constant(x)
    weight = torch.bincount(label, minlength=classes).clamp(min=1).double().rsqrt()[label][:, None]
    gram = (x * weight).T @ x
    gram += 1e-6 * gram.diagonal().mean() * torch.eye(len(gram), dtype=torch.float64)  # equal features are no error
    return torch.linalg.solve(gram, (x * weight).T @ F.one_hot(label, classes).double())


def dice(predicted: Tensor, label: Tensor, classes: int) -> list[float]:
    """Dice of each class but the background that the case has."""
    return [
        (2 * ((predicted == c) & (label == c)).sum() / ((predicted == c).sum() + (label == c).sum())).item()
        for c in range(1, classes)
        if (label == c).any()
    ]


@torch.no_grad()
def probe(network: BasicUNet, training: Sequence[Any], validation: Sequence[Any], classes: int) -> list[float]:
    """Mean Dice by the features of each of `LEVELS`; items are pairs of image [C, H, W, D] and label [H·W·D]."""
    network.eval()
    draw = torch.Generator().manual_seed(0)
    parts: list[list[Tensor]] = [[] for _ in STRIDES]
    labels = []
    for image, label in training:
        chosen = torch.randperm(len(label), generator=draw)[:VOXELS]
        labels.append(label[chosen])
        for part, level in zip(parts, features(network, image), strict=True):
            part.append(level[chosen])
    known = [torch.cat(part) for part in parts]
    maps = [fit(torch.cat([known[i] for i in levels], 1), torch.cat(labels), classes) for levels in LEVELS]
    found: list[list[float]] = [[] for _ in LEVELS]
    for image, label in validation:
        seen = features(network, image)
        for values, levels, linear in zip(found, LEVELS, maps, strict=True):
            scores = with_constant(torch.cat([seen[i] for i in levels], 1)) @ linear
            values += dice(scores.argmax(1), label, classes)
    return [sum(values) / len(values) for values in found]


def main(
    dataset_dir: str,
    weights: str | Sequence[str] = "",
    datalist: str | None = None,
    bundle: str = "hippocampus",
    overlays: str = "small",
    training_cases: int = 12,
    fresh: int = 3,
    **options: Any,
) -> None:
    """Probe fresh networks and weights, and print a table.

    Args:
        dataset_dir: a labelled data set in the layout of the bundle.
        weights: `backbone.pt` of pre-trainings, separated by commas.
        datalist: as in fine-tuning; its validation cases measure.
        bundle: segmentation bundle whose preprocessing and network are used.
        overlays: of its train.yaml, separated by commas.
        training_cases: so many are fitted on.
        fresh: so many networks that were not trained.
        options: keys of train.yaml, such as `--roi_size "[32,48,32]"`.

    Raises:
        ValueError: there is no such bundle, overlay, key or file, the classes overlap, or the network is no UNet.
    """
    folder = ROOT / f"bundles/hybridmim_{bundle}_seg"
    names, paths = (
        [name for name in (text.split(",") if isinstance(text, str) else text) if name] for text in (overlays, weights)
    )
    files = [folder / f"configs/{name}.yaml" for name in ("train", *names)]
    for path in (*files, *map(Path, paths)):
        if not path.is_file():
            raise ValueError(f"{path}: found no such file, expected a config of a bundle, or weights")
    parser = ConfigParser()
    parser.read_config([str(path) for path in files])
    if unknown := [key for key in options if key not in parser.config]:
        raise ValueError(f"options: found {', '.join(unknown)}, expected keys of {files[0]}")
    asked = {"bundle_root": str(folder), "dataset_dir": dataset_dir, "datalist": datalist, "device": "cpu"}

    def parsed(key: str, **more: Any) -> Any:
        parser.update({**asked, **options, **more})
        parser.parse(reset=True)
        return parser.get_parsed_content(key)

    if (activation := parsed("activation")) != "softmax":
        raise ValueError(f"bundle: {bundle} has activation {activation}, expected softmax: one class for each voxel")
    cases, classes = parsed("cases"), len(parsed("classes")) + 1
    middle = ResizeWithPadOrCropd(keys=["image", "label"], spatial_size=parsed("roi_size"))
    prepare = Compose([*parsed("load"), middle])

    def items(listed: Sequence[Any]) -> list[tuple[Tensor, Tensor]]:
        prepared = [prepare(case) for case in listed]
        return [(item["image"], item["label"].flatten().long()) for item in prepared]

    training, validation = items(cases.training[:training_cases]), items(cases.validation)
    print(f"{len(training)} training cases, {len(validation)} validation cases; mean Dice by the features of a level")
    head = [f"1/{stride}" if stride > 1 else "full size" for stride in STRIDES]
    print(f"| encoder | {' | '.join(head)} | all levels |\n|{' --- |' * (len(head) + 2)}")
    starts: list[tuple[str, int, str | None]] = [(f"fresh, seed {seed}", seed, None) for seed in range(fresh)]
    starts += [(path, 0, path) for path in paths]
    for name, seed, path in starts:
        torch.manual_seed(seed)
        network = parsed("transfer", pretrained=path, pretrained_parts="encoder").network
        if not isinstance(network, BasicUNet):
            raise ValueError(f"overlays: found a {type(network).__name__}, expected a UNet")
        found = probe(network, training, validation, classes)
        print(f"| {name} | {' | '.join(f'{value:.3f}' for value in found)} |", flush=True)


if __name__ == "__main__":
    try:
        fire.Fire(main)
    except ValueError as error:  # wrong input: its message says all
        sys.exit(f"{type(error).__name__}: {error}")
