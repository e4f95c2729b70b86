"""`python -m tools new_bundle`: writes a segmentation bundle for any data set, from the template of the others.

`tools.training.planning` decides, from the fingerprint of the data; here the data are found and the files are written.
"""

from __future__ import annotations

import json
import os
import re
import shlex
import shutil
import textwrap
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass
from itertools import zip_longest
from pathlib import Path
from statistics import median
from typing import Any

import monai
import psutil
import torch
import yaml
from monai.networks.nets import UNETR, BasicUNet, SwinUNETR
from torch import nn

from tools.commands.bundles import render
from tools.common.cards import CardError, card_path, read_card
from tools.common.files import write_json
from tools.common.tables import aligned
from tools.common.text import axis_ranges, first_lines, parse_bool
from tools.data.cases import LAYOUTS, Pairing, pair_cases
from tools.data.classes import Classes, absent_classes, label_values, own_values
from tools.data.datalists import load_datalist, read_datalist
from tools.data.fingerprint import Case, fingerprint
from tools.data.hounsfield import AIR, doubtful_values
from tools.data.inspection import MAX_SCAN_GB, Scan, inspect_scans
from tools.data.kinds import UnfitError
from tools.data.loading import open_scan
from tools.data.preparation import ORIENTATION
from tools.data.scans import ScanError, files_of, require_folder
from tools.samples.anatomy import CHANNELS
from tools.shipping.release import merge_overlay, with_defaults
from tools.shipping.verify import BUNDLES, BundleError, static_checks
from tools.training.planning import Memory, Row, plan_segmentation
from tools.training.requirements import training_memory

LEAST_CASES = 2
FILL_IN = "TO FILL IN"
SHARE = {"cuda": 0.9, "cpu": 0.5}  # of a device's memory that a training may take
MAX_LABEL = 255  # labels are stored in 8 bits
DEFAULT = {"name": "UNet", "unet_features": [64, 64, 128, 256, 512, 64]}  # sizes of the template
SMALL = {"name": "UNet", "unet_features": [16, 16, 32, 64, 128, 16]}  # of small.yaml
WIDTHS = {"unet_features": 16, "swin_feature_size": 12, "vit_hidden_size": 192}  # of a small network, at most
OVERLAYS = {"SwinUNETR": "swin_unetr", "UNETR": "unetr", "ViT": "unetr"}  # network → overlay that brings it


@dataclass(frozen=True)
class Found:
    """What was found in a data set.

    Attributes:
        cases: cases with labels.
        layout: of `tools.data.cases`.
        modalities: names of the channels, if each has a separate file.
        content: its dataset.json or data list, or nothing.
        train: number of cases for training, the first, if a data list has some for validation, too.
    """

    cases: list[dict[str, Any]]
    layout: str
    modalities: list[str] | None
    content: dict[str, Any]
    train: int | None = None


def new_bundle(
    name: str,
    dataset_dir: str,
    datalist: str | None = None,
    classes: Classes | None = None,
    modality: str | None = None,
    pretrained: str | None = None,
    small: bool = False,
    memory_gb: float | None = None,
    bundles_dir: str | Path = BUNDLES,
    workers: int = 4,
    max_scan_gb: float = MAX_SCAN_GB,
) -> None:
    """Write `hybridmim_NAME_seg`: a bundle for a data set of your own, planned from its scans; print what was decided.

    It is written whole or not at all. `docs/planning.md` explains the decisions, which `docs/plan.json` of the bundle
    records.

    Args:
        name: of the bundle: letters, digits and underscores, as kidney.
        dataset_dir: folder of the data: `dataset.json` of the Decathlon or nnU-Net; `imagesTr` with `labelsTr`, or
            `images` with `labels`; or as BTCV or BraTS.
        datalist: Decathlon-style JSON file with `training`, instead; its paths are relative to `dataset_dir`.
        classes: class name → label values, as "{kidney: [1], tumour: [2]}"; None: those of dataset.json, or the values
            found.
        modality: CT or MR; None: as dataset.json says, or by the values of the scans.
        pretrained: weights of a pre-training with their card: network, voxel size and intensities are taken over.
        small: whether the network and the length of the training are those of small.yaml, for a CPU.
        memory_gb: memory that a training step may take; None: of the GPU, or half of what is free without one.
        bundles_dir: folder to write the bundle to.
        workers: number of processes that read.
        max_scan_gb: the largest file that is read, by its voxels.

    Raises:
        ValueError: the name is wrong or taken, or the memory too small.
        ScanError: the data cannot be trained on; the message says what was found and what to do.
        CardError: the weights have no card, or one that cannot be taken over.
    """
    folder, small = _require_new(name, Path(bundles_dir)), parse_bool(small)
    card = None if pretrained is None else _require_card(pretrained)
    found = find_labelled(dataset_dir, datalist)
    scans = _require_usable(found, classes, workers, max_scan_gb)
    named = _require_classes(classes, found.content, scans)
    kind = modality_of(modality, found.content, scans, None if card is None else card["preparation"])
    cases = fingerprint(found.cases, kind == "CT", workers)

    network = card["network"] if card else SMALL if small else DEFAULT
    small = small or any(_width(network, key) <= width for key, width in WIDTHS.items() if key in network)
    activation = "softmax" if [*named.values()] == [[value] for value in range(1, len(named) + 1)] else "sigmoid"
    outputs = len(named) + (activation == "softmax")
    stride = 32 if network["name"] == "SwinUNETR" else 16
    memory = network_memory(network, scans[0].channels, outputs, stride, memory_gb)
    prepared = None if card is None else card["preparation"]
    planned, rows = plan_segmentation(cases, named, kind == "CT", memory, stride, small, prepared, found.train)
    split = ("fold 0 of 5 validates", "the same split on every machine")
    if found.train is not None:
        split = (f"{len(cases) - found.train} validate", "as the data list says")
    rows = [*_found_rows(scans, cases, split, named, kind, activation, network, card, pretrained), *rows]
    facts = {
        **_described(name, Path(dataset_dir), found, scans, named, kind, activation),
        **planned,
        "learning_rate": 0.003 if small else 0.0001,
        "planned": [asdict(row) for row in rows],
    }
    record = {
        "bundle": folder.name,
        "versions": {"torch": torch.__version__, "monai": monai.__version__},
        "cases": len(cases),
        "classes": {key: {"values": list(values), "ml": _millilitres(cases, values)} for key, values in named.items()},
        "decisions": facts["planned"],
        "facts": {key: value for key, value in facts.items() if key != "planned"},
    }
    _write(folder, bundle_text(facts, network, small), record)
    print(plan_text(rows))
    print(_next_steps(folder, dataset_dir, datalist, pretrained))


# --------------------------------------------------------------------------------------------------- what is there


def _require_new(name: str, bundles_dir: Path) -> Path:
    """Folder of the new bundle."""
    if not re.fullmatch(r"[A-Za-z][A-Za-z0-9_]*", str(name)):
        raise ValueError(
            f"name: found {name!r}, expected letters, digits and underscores, a letter first, as kidney or left_lung"
        )
    folder = bundles_dir / f"hybridmim_{name}_seg"
    if folder.exists():
        raise ValueError(f"name: {folder} exists already, expected a new name; or remove that folder first")
    return folder


def _require_card(weights: str) -> dict[str, Any]:
    if not Path(weights).is_file():
        raise CardError(f"pretrained: {weights} does not exist, expected backbone.pt of a pre-training")
    card = read_card(weights)
    if card is None:
        raise CardError(
            f"pretrained: {card_path(weights)} does not exist, expected the card that pre-training writes beside its "
            "weights: it says how scans are prepared; copy it, or leave --pretrained out here"
        )
    plain, place = card["preparation"], card_path(weights)
    scaling, ends = plain["intensity"]["scaling"], plain["intensity"].get("to")
    known = scaling == "z_score" or (
        scaling in ("window", "percentiles") and ends is not None and type(plain["foreground_above"]) in (int, float)
    )
    if plain["orientation"] != ORIENTATION or not known:
        raise CardError(
            f"{place}: preparation: found {plain}, expected {ORIENTATION} and window, percentiles or z_score"
        )
    if card["network"]["name"] not in ("UNet", *OVERLAYS):
        raise CardError(f"{place}: network: found {card['network']['name']}, expected UNet, {', '.join(OVERLAYS)}")
    return card


def find_labelled(dataset_dir: str, datalist: str | None) -> Found:
    """Find the cases with labels of a folder in any layout, or of a data list.

    Raises:
        ScanError: there are none, files have no counterpart, or there are too few.
    """
    root, train = require_folder(dataset_dir), None
    if datalist is not None:
        sections = [read_datalist(datalist, dataset_dir, name, labels=True) for name in ("training", "validation")]
        labelled = [[case for case in section if "label" in case] for section in sections]
        pairing, layout, content = Pairing([*labelled[0], *labelled[1]]), "msd", load_datalist(datalist)
        if all(labelled):
            train = len(labelled[0])
        if not pairing.cases:
            raise ScanError(
                f"{datalist}: found {sum(map(len, sections))} entries without 'label', expected some with image and "
                "label"
            )
    else:
        pairing, layout = _pair(root)
        described = root / "dataset.json"
        content = load_datalist(described) if described.is_file() else {}
    if pairing.problems:
        listed = first_lines(pairing.problems)
        raise ScanError(
            f"dataset_dir: {root}: {len(pairing.problems)} problem(s) with its cases:\n{listed}\n"
            "Repair or remove them, or list the cases that are complete in a datalist"
        )
    if len(pairing.cases) < LEAST_CASES:
        raise ScanError(
            f"dataset_dir: found {len(pairing.cases)} labelled case in {root}, expected at least {LEAST_CASES}, one to "
            "train and one to validate: label more"
        )
    image = pairing.cases[0]["image"]
    modalities = None
    if isinstance(image, list):
        modalities = list(CHANNELS) if layout == "brats" else [f"{number:04d}" for number in range(len(image))]
    return Found(pairing.cases, layout, modalities, content, train)


def _pair(root: Path) -> tuple[Pairing, str]:
    """The first layout in which cases are found, else what is wrong with the first."""
    errors: dict[str, str] = {}
    pairings: dict[str, Pairing] = {}
    for layout in ("msd", *(name for name in LAYOUTS if name != "msd")):
        try:
            pairings[layout] = pair_cases(root, layout, CHANNELS)
        except ScanError as error:
            errors[layout] = str(error)
        else:
            if pairings[layout].cases and not pairings[layout].problems:
                return pairings[layout], layout
    if not pairings:
        raise ScanError(
            f"{errors['msd']}; or as BTCV or BraTS, or give a datalist. Scans without labels are for pre-training: "
            "`python -m tools plan`"
        )
    layout = next((name for name, pairing in pairings.items() if pairing.cases), next(iter(pairings)))
    return pairings[layout], layout


def _require_usable(found: Found, classes: Classes | None, workers: int, max_scan_gb: float) -> list[Scan]:
    """Read all cases."""
    channels = channels_of(found.cases[0]["image"])
    values = None if classes is None else label_values(_clean(classes))
    scans = inspect_scans(found.cases, channels, workers, None, values, max_scan_gb)
    bad = [scan for scan in scans if scan.problem is not None]
    if bad:
        listed = first_lines(f"{scan.name}: {scan.problem}" for scan in bad)
        raise ScanError(
            f"dataset_dir: {len(bad)} of {len(scans)} cases cannot be used, expected volumes with labels that fit:\n"
            f"{listed}\nRepair or remove them, or leave them out with a datalist"
        )
    return scans


def _channel_names(content: Mapping[str, Any]) -> list[str]:
    """Names of the channels by dataset.json of the Decathlon or nnU-Net; none if it does not say."""
    names = content.get("channel_names") or content.get("modality") or {}
    return [_line(name) for name in (names.values() if isinstance(names, Mapping) else [])]


def channels_of(image: str | list[str]) -> int:
    """Number of channels: files, or volumes of a 4D file."""
    if isinstance(image, list):
        return len(image)
    try:
        return (*open_scan(image).shape, 1)[3]
    except UnfitError:  # the check says why
        return 1


# --------------------------------------------------------------------------------------------- classes and modality


def _require_classes(
    classes: Classes | None, content: Mapping[str, Any], scans: Sequence[Scan]
) -> dict[str, list[int]]:
    """Classes as the user, dataset.json or the labels give them, in the order of their values; all are there."""
    present = sorted({value for scan in scans for value in scan.labels} - {0})
    if classes is not None:
        named, source = _clean(classes), "--classes"
    elif content.get("labels"):
        named, source = _clean(_of_json(content["labels"])), "labels of the dataset.json or data list"
    else:
        named, source = {f"class_{value}": [value] for value in present}, "values found"
    way_out = 'name them anew, as --classes "{kidney: [1], tumour: [2]}"'
    unknown = [value for value in present if value not in label_values(named)]
    if unknown:
        raise ScanError(f"classes: found the values {unknown} in the labels, expected of {named} ({source}); {way_out}")
    if not present:
        raise ScanError(f"classes: found no labelled voxel in {len(scans)} labels, expected some; are they masks?")
    if absent := absent_classes(scans, named):
        raise ScanError(
            f"classes: found no voxel of {', '.join(absent)} in {len(scans)} labels (their values are {present}), "
            f"expected each class ({source}) in some; {way_out}"
        )
    if present[-1] > MAX_LABEL:
        raise ScanError(f"classes: found the label value {present[-1]}, expected at most {MAX_LABEL}: renumber them")
    own_values(named)  # a label map can hold them
    return dict(sorted(named.items(), key=lambda item: (min(item[1]), len(item[1]))))


def _of_json(labels: object) -> dict[str, Any]:
    """Classes of a dataset.json: value → name of the Decathlon, or name → value or values of nnU-Net."""
    try:
        pairs = dict(_pairs(labels))
    except (AttributeError, TypeError, ValueError) as error:  # no mapping, no whole numbers
        raise ScanError(
            f"labels: found {labels!r} in the dataset.json or data list, expected value → name, or name → values"
        ) from error
    if "ignore" in pairs:
        raise ScanError(
            f"labels: found 'ignore' ({pairs['ignore']}), expected classes: unlabelled voxels cannot be left out of a "
            "training; label them, or give the whole cases in a datalist"
        )
    return pairs


def _pairs(labels: Mapping[str, Any]) -> Iterable[tuple[str, list[int]]]:
    for key, value in labels.items():
        name, values = (value, key) if isinstance(value, str) else (key, value)
        values = [int(one) for one in (values if isinstance(values, list | tuple) else [values])]
        if values != [0]:
            yield name, values


def _clean(classes: object) -> dict[str, list[int]]:
    """Classes with names that YAML, JSON and columns of tables can hold, and lists of values."""
    form = 'expected names and their label values, as "{kidney: [1], tumour: [2]}"'
    if not isinstance(classes, Mapping) or not classes:
        raise ScanError(f"classes: found {classes!r}, {form}")
    cleaned: dict[str, list[int]] = {}
    for name, given in classes.items():
        values = [given] if isinstance(given, int) else given
        if (
            not isinstance(values, list | tuple)
            or not values
            or any(type(value) is not int or value < 1 for value in values)
        ):
            raise ScanError(f"classes: found {given!r} for {name}, {form}, above 0: 0 is the background")
        plain = identifier(str(name))
        if plain in cleaned:
            raise ScanError(f"classes: found two of the name {plain} in {list(classes)}, expected distinct names")
        cleaned[plain] = list(values)
    return cleaned


def identifier(name: str) -> str:
    """A name of letters, digits and underscores, which YAML reads as a text."""
    plain = re.sub(r"\W+", "_", name).strip("_")
    return plain if plain and yaml.safe_load(plain) == plain else f"class_{plain}"


def modality_of(
    given: str | None, content: Mapping[str, Any], scans: Sequence[Scan], prepared: Mapping[str, Any] | None = None
) -> str:
    """CT, or else the name that was given, or MR.

    Raises:
        ScanError: the values of the scans contradict it.
    """
    names = _channel_names(content)
    said = given or (names[0] if len(names) == 1 else None)
    airless = [scan for scan in scans if scan.low_inside > AIR]
    air = [scan for scan in scans if scan.low_inside < AIR]
    if said is None:
        kind = "CT" if scans[0].channels == 1 and len(air) == len(scans) else "MR"
    elif said.upper().startswith("CT"):
        kind = "CT"
    else:
        kind = said if given else "MR"
    source = "--modality" if given else "dataset.json" if said else "the values"
    if kind == "CT" and 2 * len(airless) > len(scans):
        raise ScanError(
            f"modality: found CT ({source}), but {'; '.join(doubtful_values(airless))}, expected Hounsfield units, in "
            "which air is -1000; convert the scans, or scale each by its own percentiles: --modality MR"
        )
    if kind != "CT" and len(air) == len(scans):
        raise ScanError(
            f"modality: found {said} ({source}), but all {len(scans)} scans have values below {AIR:g}, "
            f"down to {min(scan.low for scan in scans):g}, as CT has; expected --modality CT"
        )
    if prepared is not None and prepared["intensity"]["scaling"] == "window" and kind != "CT":
        raise ScanError(
            f"pretrained: was trained on a window of {prepared['intensity']['range']} HU, but the scans are {kind} "
            f"({source}), expected CT; give weights of a pre-training with mri.yaml, or none"
        )
    return kind


# ------------------------------------------------------------------------------------------------------- the network


def _width(network: Mapping[str, Any], key: str) -> int:
    value = network[key]
    return value[0] if isinstance(value, list) else value


def build(network: Mapping[str, Any], channels: int, outputs: int, side: int) -> nn.Module:
    """Build the network that a card describes, for crops of one side in voxels."""
    kind = network["name"]
    if kind == "UNet":
        return BasicUNet(3, channels, outputs, network["unet_features"])
    if kind == "SwinUNETR":
        return SwinUNETR(
            in_channels=channels,
            out_channels=outputs,
            feature_size=network["swin_feature_size"],
            window_size=network.get("swin_window_size", 7),
            use_v2=network.get("swin_use_v2", False),
        )
    return UNETR(
        channels,
        outputs,
        [side] * 3,
        network.get("unetr_feature_size", 16),
        network["vit_hidden_size"],
        network["vit_mlp_size"],
        network["vit_heads"],
    )


def network_memory(
    network: Mapping[str, Any], channels: int, outputs: int, stride: int, memory_gb: float | None
) -> Memory:
    """Memory of a training step of the network that a card describes."""

    def step(side: int) -> int:
        crop = torch.rand(1, channels, *[side] * 3, device="meta")
        return training_memory(build(network, channels, outputs, side), crop)

    return linear_memory(step, stride, memory_gb)


def linear_memory(step: Callable[[int], int], stride: int, memory_gb: float | None) -> Memory:
    """Memory by the voxels of all crops, from what a step takes with one cubic crop of two sizes; and what there is."""
    sides = (2 * stride, 3 * stride)
    small, large = map(step, sides)
    per_voxel = (large - small) / (sides[1] ** 3 - sides[0] ** 3)
    return Memory(small - per_voxel * sides[0] ** 3, per_voxel, memory_limit(memory_gb))


def memory_limit(memory_gb: float | None) -> float:
    """Bytes that a training may take.

    Raises:
        ValueError: the number is not above 0.
    """
    if memory_gb is not None:
        if not memory_gb > 0:
            raise ValueError(f"memory_gb: found {memory_gb}, expected GB above 0")
        return memory_gb * 1e9
    if torch.cuda.is_available():
        return SHARE["cuda"] * torch.cuda.get_device_properties(0).total_memory
    return SHARE["cpu"] * psutil.virtual_memory().available


# ------------------------------------------------------------------------------------------------- what is written


def _found_rows(
    scans: Sequence[Scan],
    cases: Sequence[Case],
    split: tuple[str, str],
    classes: Classes,
    modality: str,
    activation: str,
    network: Mapping[str, Any],
    card: Mapping[str, Any] | None,
    pretrained: str | None,
) -> list[Row]:
    volumes = ", ".join(f"{name} {_millilitres(cases, values):.3g} ml" for name, values in classes.items())
    sizes = ", ".join(f"{key} {value}" for key, value in network.items() if key not in ("name", "in_channels"))
    return [
        Row(
            "cases",
            f"{len(scans)} of {axis_ranges([case.shape for case in cases])} voxels",
            *split,
        ),
        Row(
            "modality",
            f"{min(scan.low for scan in scans):g} … {max(scan.high for scan in scans):g}",
            modality,
            "by --modality, dataset.json, or air below -200 HU in every scan",
        ),
        Row(
            "classes",
            volumes,
            f"{len(classes)}, {activation}",
            "one class in a voxel"
            if activation == "softmax"
            else "classes overlap, or their values do not count from 1",
        ),
        Row(
            "network",
            f"{Path(pretrained).name}, {card['network']['name']}" if card and pretrained else "no pre-trained weights",
            f"{network['name']}, {sizes}",
            "as in pre-training" if card else "that of the other bundles; --small true for a CPU",
        ),
    ]


def _millilitres(cases: Sequence[Case], values: Sequence[int]) -> float:
    """Median volume of a class where it is."""
    found = [sum(case.volumes.get(value, 0.0) for value in values) for case in cases]
    return round(median(volume for volume in found if volume > 0) / 1000, 3)


def _line(text: object) -> str:
    """A text on one line."""
    return " ".join(str(text).split())


def _described(
    name: str,
    root: Path,
    found: Found,
    scans: Sequence[Scan],
    classes: Classes,
    modality: str,
    activation: str,
) -> dict[str, Any]:
    """Facts that describe the data, with marks where only the user knows."""
    own = own_values(classes)
    labels = [key.replace("_", " ") for key in classes]
    title = name.replace("_", " ")
    data_set = _line(found.content.get("name") or root.resolve().name)
    channels = _channel_names(found.content)
    if len(channels) != scans[0].channels:
        numbered = found.modalities or [f"channel {number}" for number in range(scans[0].channels)]
        channels = numbered if scans[0].channels > 1 else [modality]
    first = [Path(os.path.relpath(path, root)).as_posix() for path in files_of(found.cases[0])]
    described = ["dataset.json"] if (root / "dataset.json").is_file() else []
    softmax = activation == "softmax"
    notes = {} if softmax else dict(zip(classes, labels, strict=True))
    values = {own[key]: key.replace("_", " ") for key in sorted(own, key=own.get)}
    return {
        "name": name,
        "title": title,
        "data_set": data_set,
        "target": ", ".join(labels[:6]) + (f" and {len(labels) - 6} more classes" if len(labels) > 6 else ""),
        "scan": modality if len(channels) == 1 else f"{modality} of {len(channels)} channels",
        "authors": f"{FILL_IN}: authors",
        "data_source": f"{FILL_IN}: origin of the data. {data_set}, {len(scans)} labelled cases",
        "data_license": (
            f"{FILL_IN}: licence and terms of the data, and what they allow for the weights that are trained on them."
        ),
        "citations": [],
        "layout": found.layout,
        "layout_files": ", ".join([*described, *sorted({path.rpartition("/")[0] or "." for path in first})]),
        "folder": re.sub(r"[^\w.-]+", "_", root.resolve().name) or "data",
        "files": "\n".join([*described, *(f"{_line(path)} …" for path in first)]),
        "fold": 0,
        "modality": modality,
        "channels": channels,
        "modalities": found.modalities,
        "classes": dict(classes),
        "class_notes": notes,
        **({} if softmax else {"label_names": values}),
        "activation": activation,
        "tolerance_note": "the longest side of a usual voxel",
        "empty": "skip",
        "size": f"{len(scans)} labelled cases",
        "to_fill_in": FILL_IN,
    }


def bundle_text(facts: Mapping[str, Any], network: Mapping[str, Any], small: bool) -> dict[str, str]:
    """Render a bundle whose own configs have the network, where the template has a UNet of the published size."""
    written = render(facts)
    sizes = {key: value for key, value in network.items() if key not in ("name", "in_channels")}
    own = "".join(f"{key}: {value}\n" for key, value in {**sizes, "epochs": facts["epochs"]}.items())
    names = [*(["small"] if small else []), *([OVERLAYS[network["name"]]] if network["name"] in OVERLAYS else [])]
    for overlay in [*(written[f"configs/{name}.yaml"] for name in names), own]:
        for config in ("configs/train.yaml", "configs/inference.yaml"):
            written[config] = merge_overlay(written[config], overlay)
        written["docs/README.md"] = with_defaults(written["docs/README.md"], yaml.safe_load(overlay))
    return written


def _write(folder: Path, written: Mapping[str, str], record: Mapping[str, Any]) -> None:
    """Write a bundle beside its place, check it, and move it there."""
    part = folder.with_name(f".{os.getpid()}.{folder.name}")
    try:
        for name, text in written.items():
            (part / name).parent.mkdir(parents=True, exist_ok=True)
            (part / name).write_text(text, encoding="utf-8", newline="\n")
        write_json(part / "docs/plan.json", record)
        problems = [problem for check in static_checks(part) for problem in check.problems]
        if problems:
            raise BundleError(f"{folder} would not be fit for use:\n{first_lines(problems)}")
        part.rename(folder)
    finally:
        shutil.rmtree(part, ignore_errors=True)


def plan_text(rows: Sequence[Row]) -> str:
    """Decisions as a table of lines that fit a terminal."""
    lines = [("what", "found", "decided", "why")]
    for row in rows:
        cells = [textwrap.wrap(cell, 36) or [""] for cell in (row.what, row.found, row.decided, row.why)]
        lines += zip_longest(*cells, fillvalue="")
    return aligned(lines)


def _next_steps(folder: Path, dataset_dir: str, datalist: str | None, pretrained: str | None) -> str:
    root = folder.relative_to(Path.cwd()) if folder.is_relative_to(Path.cwd()) else folder
    data = f"--dataset_dir {shlex.quote(dataset_dir)}" + (f" --datalist {shlex.quote(datalist)}" if datalist else "")
    start = f" --pretrained {shlex.quote(pretrained)}" if pretrained else ""

    def run(what: str, configs: Sequence[str], options: str) -> str:
        files = [f"{root}/configs/{config}.yaml" for config in configs]
        config = files[0] if len(files) == 1 else json.dumps(str(files).replace(" ", ""))
        return f"python -m monai.bundle run {what} --config_file {config} --bundle_root {root} {options}"

    lines = [
        run("training", ["train"], f"{data}{start}"),
        run("evaluating", ["train", "evaluate"], data),
        run("inferring", ["inference"], "--dataset_dir /path/to/scans"),
    ]
    return (
        f"\nwritten: {root}\nFill in what {FILL_IN} marks in docs/data_license.txt, docs/README.md and "
        f"configs/metadata.json. Then:\n" + textwrap.indent("\n".join(lines), "  ")
    )
