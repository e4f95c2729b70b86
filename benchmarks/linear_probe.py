"""What an encoder's features know of a segmentation before any fine-tuning: a linear map from them to the classes.

    python -m benchmarks.linear_probe --dataset_dir /path/to/Task04_Hippocampus --weights a/backbone.pt,b/backbone.pt

UNet alone. Every level is enlarged to the voxels of the crop. The map is the least-squares solution in which a voxel
weighs 1/√(voxels of its class): no steps, no learning rate, so what differs between rows are the features. It is
fitted on crops from the middle of some labelled cases, and measured by Dice on those of others; this is repeated with
other cases, the same for every row. The first rows are fresh networks: weights that are not above them have learnt
nothing that helps here. Any data set in the layout of a bundle will do, with its classes:

    python -m benchmarks.linear_probe --dataset_dir /path/to/Task_HeadNeckCT --bundle spleen --roi_size "[96,96,64]" \\
        --classes "{'right_parotid': [3], 'left_parotid': [4]}" --spacing '$None' --window "[-175,250]" --weights …
"""

from __future__ import annotations

import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import fire
import torch
import torch.nn.functional as F
from monai.bundle import ConfigParser
from monai.networks.nets import BasicUNet
from monai.transforms import Compose, ResizeWithPadOrCropd
from torch import Tensor

from benchmarks.study.statistics import estimate

Item = tuple[Tensor, Tensor]

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
def probe(
    network: BasicUNet, items: Mapping[int, Item], splits: Sequence[tuple[Sequence[int], Sequence[int]]], classes: int
) -> list[list[float]]:
    """Mean Dice by the features of each of `LEVELS`, for each split.

    Args:
        network: is not trained.
        items: number of the case → image [C, H, W, D] and label [H·W·D].
        splits: numbers of the items that the map is fitted on, and of those that measure it.
        classes: with the background.
    """
    network.eval()
    draw = torch.Generator().manual_seed(0)
    known: dict[int, tuple[list[Tensor], Tensor]] = {}
    for number in sorted({number for fitted, _ in splits for number in fitted}):
        image, label = items[number]
        chosen = torch.randperm(len(label), generator=draw)[:VOXELS]
        known[number] = [level[chosen] for level in features(network, image)], label[chosen]
    maps = []
    for fitted, _ in splits:
        parts = [torch.cat([known[number][0][i] for number in fitted]) for i in range(len(STRIDES))]
        label = torch.cat([known[number][1] for number in fitted])
        maps.append([fit(torch.cat([parts[i] for i in levels], 1), label, classes) for levels in LEVELS])
    found: list[list[list[float]]] = [[[] for _ in LEVELS] for _ in splits]
    for number in sorted({number for _, measured in splits for number in measured}):
        image, label = items[number]
        seen = features(network, image)
        mine = [k for k, (_, measured) in enumerate(splits) if number in measured]
        for which, levels in enumerate(LEVELS):
            x = torch.cat([seen[i] for i in levels], 1)
            *weights, constant = torch.cat([maps[k][which] for k in mine], 1).float()  # of all splits at once
            scores = torch.addmm(constant, x, torch.stack(weights))
            for k, own in zip(mine, scores.split(classes, 1), strict=True):
                found[k][which] += dice(own.argmax(1), label, classes)
    return [[sum(values) / len(values) for values in by_level] for by_level in found]


def random_splits(cases: int, fitted: int, measured: int, count: int) -> list[tuple[list[int], list[int]]]:
    """Draw cases for the map and others to measure it, several times; always the same draws.

    Raises:
        ValueError: there are too few cases.
    """
    if min(fitted, measured, count) < 1 or fitted + measured > cases:
        raise ValueError(
            f"training_cases, measured_cases, splits: found {fitted}, {measured} and {count}, expected 1 or more of "
            f"each, and together at most the {cases} labelled cases"
        )
    draw = torch.Generator().manual_seed(0)
    orders = [torch.randperm(cases, generator=draw).tolist() for _ in range(count)]
    return [(order[:fitted], order[fitted : fitted + measured]) for order in orders]


def _cell(values: Sequence[float]) -> str:
    found = estimate(values)
    return f"{found.mean:.3f}" + (f" ± {found.half_width:.3f}" if found.half_width is not None else "")


def main(
    dataset_dir: str,
    weights: str | Sequence[str] = "",
    datalist: str | None = None,
    bundle: str = "hippocampus",
    overlays: str = "small",
    training_cases: int = 12,
    measured_cases: int = 8,
    splits: int = 5,
    fresh: int = 3,
    **options: Any,
) -> None:
    """Probe fresh networks and weights, and print a table.

    Args:
        dataset_dir: a labelled data set in the layout of the bundle.
        weights: `backbone.pt` of pre-trainings, separated by commas.
        datalist: as in fine-tuning; training and validation cases are taken, no test cases.
        bundle: segmentation bundle whose preprocessing and network are used.
        overlays: of its train.yaml, separated by commas.
        training_cases: so many are fitted on,
        measured_cases: and so many others measure, drawn from all labelled cases,
        splits: so many times; the table has the mean over these, and half of its 95 % interval by Student's t, which is
            narrow, because the splits share cases.
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

    listed = [*cases.training, *cases.validation]
    drawn = random_splits(len(listed), training_cases, measured_cases, splits)
    used = {number for split in drawn for part in split for number in part}
    items: dict[int, Item] = {}
    for number in sorted(used):
        item = prepare(listed[number])
        items[number] = item["image"], item["label"].flatten().long()
    print(f"{training_cases} cases fit the map, {measured_cases} others measure it, {splits} times; mean Dice by level")
    head = [f"1/{stride}" if stride > 1 else "full size" for stride in STRIDES]
    print(f"| encoder | {' | '.join(head)} | all levels |\n|{' --- |' * (len(head) + 2)}")
    starts: list[tuple[str, int, str | None]] = [(f"fresh, seed {seed}", seed, None) for seed in range(fresh)]
    starts += [(path, 0, path) for path in paths]
    for name, seed, path in starts:
        torch.manual_seed(seed)
        network = parsed("transfer", pretrained=path, pretrained_parts="encoder").network
        if not isinstance(network, BasicUNet):
            raise ValueError(f"overlays: found a {type(network).__name__}, expected a UNet")
        found = probe(network, items, drawn, classes)
        print(f"| {name} | {' | '.join(_cell(values) for values in zip(*found, strict=True))} |", flush=True)


if __name__ == "__main__":
    try:
        fire.Fire(main)
    except ValueError as error:  # wrong input: its message says all
        sys.exit(f"{type(error).__name__}: {error}")
