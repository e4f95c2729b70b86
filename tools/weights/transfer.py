"""Loads pre-trained weights into a segmentation network, with a report on every tensor.

A network has an encoder, a decoder of several levels, and an output layer, which is always initialised at random,
because pre-training used it to reconstruct an image. Each tensor of the network is *loaded* unchanged, *adapted* (a
first convolution, to another number of input channels; position embeddings, to another window), or *left out* with a
reason. If too few of the requested tensors can be filled, nothing is loaded and an error says why.
"""

from __future__ import annotations

import math
import re
from collections import Counter
from collections.abc import Collection, Iterable, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from monai.bundle import ConfigParser
from monai.networks.blocks import Convolution
from monai.networks.blocks.dynunet_block import UnetBasicBlock, UnetResBlock
from monai.networks.nets import UNETR, BasicUNet, SwinUNETR
from torch import Tensor, nn

from tools.common.cards import card_path, digest, read_card, require_own
from tools.common.tables import print_table
from tools.common.text import bytes_text, parse_bool, size_text
from tools.weights.checkpoints import WeightsError, describe, read_checkpoint, read_weights
from tools.weights.networks import describe_network, is_other_encoder, network_text, way_to

PARTS = ("encoder", "all")  # parts of the network that can be requested
Grid = tuple[int, int, int]  # tokens along the three axes

# arguments of `load_pretrained` and their keys in a bundle's config
SETTINGS = {name: f"pretrained_{name}" for name in ("parts", "decoder_levels", "min_fraction", "rescale", "roi_size")}

# Levels of the modules of BasicUNet, SwinUNETR, UNETR and ViT: 0 is the encoder, then the decoder from its deepest
# level. Convolutions on the skip paths (`encoder…`) have the decoder level that they feed, so the same name has
# different levels in different networks.
LEVELS = (
    {
        **dict.fromkeys(("conv_0", "down_1", "down_2", "down_3", "down_4"), 0),
        **{"upcat_4": 1, "upcat_3": 2, "upcat_2": 3, "upcat_1": 4},
    },
    {
        "swinViT": 0,
        **{"encoder10": 1, "encoder4": 2, "encoder3": 3, "encoder2": 4, "encoder1": 5},
        **{"decoder5": 1, "decoder4": 2, "decoder3": 3, "decoder2": 4, "decoder1": 5},
    },
    {
        "vit": 0,
        **{"encoder4": 1, "encoder3": 2, "encoder2": 3, "encoder1": 4},
        **{"decoder5": 1, "decoder4": 2, "decoder3": 3, "decoder2": 4},
    },
    dict.fromkeys(("patch_embedding", "blocks", "norm"), 0),
)
ENCODER = {module for levels in LEVELS for module, level in levels.items() if level == 0}
OUTPUT = {"final_conv", "out"}

# Names of the encoder's stages: what a file has of them, and the network lacks, changes every feature after it.
STAGES = re.compile(
    r"(swinViT\.(layers\d+c?|patch_embed)|vit\.(blocks\.\d+|patch_embedding)|conv_\d+|down_\d+)"
    r"\.(?!(norm_)?cross_attn)"  # which MONAI 1.5 has and does not use
)
ALONE = ("swinViT.", "vit.")  # prefixes that files of a published encoder lack
INPUT_CONVOLUTIONS = (
    "conv_0.conv_0.conv.weight",
    "swinViT.patch_embed.proj.weight",
    "vit.patch_embedding.patch_embeddings.weight",
    "patch_embedding.patch_embeddings.weight",
    "encoder1.layer.conv1.conv.weight",
    "encoder1.layer.conv3.conv.weight",
)
POSITIONS = "vit.patch_embedding.position_embeddings"  # [1, tokens, E]; the last axis of the image runs fastest
OTHER_SHAPE = "shape"  # first word of the reason
TOKEN = 16  # voxels of a UNETR's token, along each axis
INSTANCE_NORMS = (nn.InstanceNorm1d, nn.InstanceNorm2d, nn.InstanceNorm3d)


def is_encoder(name: str) -> bool:
    """Whether a parameter of a BasicUNet, SwinUNETR or UNETR belongs to the encoder, by its name in the network."""
    return _module(name) in ENCODER


def is_output(name: str) -> bool:
    """Whether a parameter of a BasicUNet, SwinUNETR or UNETR belongs to the output, by its name in the network."""
    return _module(name) in OUTPUT


def part_of(name: str) -> str:
    """Return the part of a parameter, by its name in the network: `encoder`, `decoder` or `output`."""
    return "output" if is_output(name) else "encoder" if is_encoder(name) else "decoder"


def _module(name: str) -> str:
    return name.split(".", 1)[0]


# ------------------------------------------------------------------------------------------------ report of a transfer


@dataclass(frozen=True)
class TensorFate:
    """The result of the transfer for one tensor of the network.

    Attributes:
        name: name in the network's state dict.
        fate: `loaded`, `adapted` or `left out`.
        why: how it was adapted, or why it was left out; empty if it was loaded.
        asked: whether it belongs to the requested parts.
    """

    name: str
    fate: str
    why: str
    asked: bool


@dataclass(frozen=True)
class TransferReport:
    """The report of a transfer.

    Attributes:
        source: the file and its network, which is probable if there is no card; None if there is no file.
        tensors: one entry per tensor of the network, in its order.
        unused: number of unused tensors of the file, by module.
        rescaled: number of convolutions that were scaled to their initial norm.
        origin: name and SHA-256 of the tensors of the file, for the card of the network that is trained from it.
        way: what to type to build the network that the card of the file names; empty without a card.
        heads: what became of the heads of pre-training; empty if they were not asked for.
    """

    source: str | None
    tensors: Sequence[TensorFate] = ()
    unused: dict[str, int] = field(default_factory=dict)
    rescaled: int = 0
    origin: dict[str, str] | None = None
    way: str = ""
    heads: str = ""

    @property
    def asked(self) -> int:
        """Number of requested tensors."""
        return sum(tensor.asked for tensor in self.tensors)

    @property
    def filled(self) -> int:
        """Number of requested tensors that were loaded or adapted."""
        return sum(tensor.asked and tensor.fate != "left out" for tensor in self.tensors)

    def counts(self) -> dict[str, Counter[str]]:
        """For `encoder`, `decoder` and `output`: how many tensors were loaded, adapted and left out."""
        counts = {part: Counter() for part in ("encoder", "decoder", "output")}
        for tensor in self.tensors:
            counts[part_of(tensor.name)][tensor.fate] += 1
        return counts

    def lines(self) -> list[tuple[str, str]]:
        """Rows of the start table: the file, each module of the network, and the total."""
        if self.source is None:
            return [("pretrained", "no file given")]
        modules: dict[str, list[TensorFate]] = {}
        for tensor in self.tensors:
            modules.setdefault(_module(tensor.name), []).append(tensor)
        lines = [("pretrained", self.source), *((name, _fates(tensors)) for name, tensors in modules.items())]
        if self.heads:
            lines.append(("heads", self.heads))
        if self.unused:
            lines.append(("unused", f"{_listed(self.unused)}: in the file, but not in the network"))
        if self.rescaled:
            lines.append(("rescaled", f"{self.rescaled} convolutions, to their initial norm"))
        total = [f"{part} {n.total() - n['left out']} of {n.total()}" for part, n in self.counts().items()]
        return [*lines, ("total", f"{', '.join(total)} tensors filled")]


def _fates(tensors: Sequence[TensorFate]) -> str:
    """Format the results of one module in a line: the number of tensors with each result, and the reasons."""
    counts = Counter(tensor.fate for tensor in tensors)
    texts = []
    for fate in ("loaded", "adapted", "left out"):
        reasons = list(dict.fromkeys(t.why for t in tensors if t.fate == fate and t.why))
        shown = reasons if fate == "adapted" else reasons[:1]  # one number of channels, one grid: never many
        more = ["…"] if len(reasons) > len(shown) else []
        if counts[fate]:
            texts.append(f"{counts[fate]} {fate}" + (f" ({'; '.join([*shown, *more])})" if reasons else ""))
    return ", ".join(texts)


def _listed(counts: dict[str, int]) -> str:
    shown = [f"{count} of {name}" for name, count in list(counts.items())[:5]]
    return ", ".join(shown) + (", …" if len(counts) > 5 else "")


@dataclass(frozen=True)
class Transfer:
    """A network with transferred weights, and the report.

    Attributes:
        network: the network.
        report: what became of each tensor; without a file, that there was none.
        loaded: names of the tensors that were filled from the file; without a file, those that would be.
    """

    network: nn.Module
    report: TransferReport
    loaded: frozenset[str] = frozenset()


# ---------------------------------------------------------------------------------------------------- the transfer


def load_pretrained(
    network: nn.Module,
    pretrained: str | None,
    parts: str = "encoder",
    decoder_levels: int | None = None,
    min_fraction: float = 0.9,
    rescale: bool = False,
    roi_size: Sequence[int] | None = None,
) -> Transfer:
    """Load the weights of a file into a network, in place.

    Args:
        network: a BasicUNet, SwinUNETR or UNETR with initial weights.
        pretrained: checkpoint of the same type of network; None loads nothing.
        parts: `encoder`, or `all` for encoder and decoder.
        decoder_levels: with `all`, number of decoder levels to load, from the deepest; None for all.
        min_fraction: minimum fraction of the requested tensors that must be filled.
        rescale: whether to scale each loaded convolution before an instance norm to its initial norm. The instance norm
            removes the scale, so the output is the same (up to the epsilon of the norm, which matters if a channel
            hardly varies), but a learning rate then has the same effect on loaded and new convolutions. Applies to the
            decoder of a UNETR, not to its encoder.
        roi_size: crop size of pre-training, voxels; for a UNETR, whose position embeddings [1, tokens, E] are
            interpolated from the token grid of that crop to that of the network. None: as the card says; without one,
            the grid of the network if the number of tokens matches, else a cube.

    Raises:
        ValueError: an argument is out of range, or the type of the network is not supported.
        WeightsError: the file is not readable, has values that are not finite, fills too few tensors, or its position
            embeddings do not fit `roi_size` or need it. Or its card names another network. The network is unchanged.
        CardError: the card beside the file is damaged, of a later version, or of other weights.
    """
    last = _last_level(network, parts, decoder_levels)
    _check_numbers(min_fraction, roi_size)
    rescale, levels = parse_bool(rescale), _levels(network)
    if pretrained is None:
        asked = frozenset(name for name in network.state_dict() if not _not_asked(name, levels, last))
        return Transfer(network, TransferReport(None), asked)
    weights, report = _plan(network, pretrained, last, rescale, roi_size)
    _require(report, min_fraction)
    network.load_state_dict(weights, strict=False)
    return Transfer(network, report, frozenset(weights))


def load_start(
    network: nn.Module,
    backbone: nn.Module,
    init_from: str | None,
    resume: bool | str = False,
    resumed: bool = False,
) -> Transfer:
    """Load weights into a network of pre-training, in place, to train on from them.

    Args:
        network: network with its heads, with initial weights.
        backbone: the part of it that is saved as `backbone.pt`; all of it is filled from the file, its output layer
            too, as far as the file has it.
        init_from: a `model.pt` of pre-training, whose heads are loaded if all of them fit, or other weights, as in
            `load_pretrained`; None loads nothing.
        resume: true, false or auto.
        resumed: whether the run continues an interrupted one, which loads weights of its own.

    Raises:
        ValueError: both `init_from` and `resume: true`.
        WeightsError: as in `load_pretrained`; the encoder must be filled to 90 %.
        CardError: as in `load_pretrained`.
    """
    if str(resume).lower() == "true" and init_from is not None:
        raise ValueError(
            f"init_from: found {init_from}, together with resume: true; expected one of them: resume continues the run "
            "in ckpt_dir, init_from starts a new one from weights (auto does whichever can be done)"
        )
    if init_from is None or resumed:
        return Transfer(network, TransferReport(None))
    weights, report = _plan(backbone, init_from, None, False, None)
    encoder = [tensor for tensor in report.tensors if is_encoder(tensor.name)]
    _require(replace(report, tensors=encoder), 0.9, adjustable=False)
    own = {tensor.data_ptr() for tensor in backbone.state_dict().values()}
    heads = {name: tensor for name, tensor in network.state_dict().items() if tensor.data_ptr() not in own}
    found = {name: tensor for name, tensor in read_weights(init_from).items() if name in heads}
    fit = all(name in found and found[name].shape == tensor.shape for name, tensor in heads.items())
    if not fit:
        found = {}
    for name, tensor in found.items():
        _check_finite(init_from, name, tensor)
    backbone.load_state_dict(weights, strict=False)
    network.load_state_dict(found, strict=False)
    said = f"{len(heads)} tensors {'loaded' if fit else 'new, at random'}"
    return Transfer(network, replace(report, heads=said, unused={} if fit else report.unused))


def _levels(network: nn.Module) -> dict[str, int]:
    """Return the level of each module; modules without a level are the output layer.

    Raises:
        ValueError: the type of the network is not supported.
    """
    modules = list(dict.fromkeys(_module(name) for name in network.state_dict()))
    for levels in LEVELS:
        if set(modules) <= levels.keys() | OUTPUT:
            return levels
    raise ValueError(
        f"weights are transferred into a BasicUNet, SwinUNETR or UNETR, found a {type(network).__name__} "
        f"with the modules {', '.join(modules[:5])}"
    )


def _last_level(network: nn.Module, parts: str, decoder_levels: int | None) -> int:
    """Return the shallowest level to load; 0 is only the encoder."""
    levels = max(_levels(network).values())
    if parts not in PARTS:
        raise ValueError(f"pretrained_parts must be one of {', '.join(PARTS)}; found {parts!r}")
    if decoder_levels is None:
        return levels if parts == "all" else 0
    if parts == "encoder":
        raise ValueError(
            f"pretrained_decoder_levels {decoder_levels!r} has no effect with pretrained_parts: encoder; "
            "expected null, or pretrained_parts: all"
        )
    if decoder_levels not in range(1, levels + 1):
        raise ValueError(
            f"pretrained_decoder_levels must be 1 … {levels}, the levels of this {type(network).__name__}'s decoder, "
            f"or null for all; found {decoder_levels!r}"
        )
    return decoder_levels


def _check_numbers(min_fraction: float, roi_size: Sequence[int] | None) -> None:
    if not isinstance(min_fraction, int | float) or not 0 <= min_fraction <= 1:
        raise ValueError(f"pretrained_min_fraction must be a number from 0 to 1; found {min_fraction!r}")
    if roi_size is None:
        return
    sides = list(roi_size) if isinstance(roi_size, Sequence) else []
    if len(sides) != 3 or not all(isinstance(side, int) and side > 0 and side % TOKEN == 0 for side in sides):
        raise ValueError(f"pretrained_roi_size must be three multiples of {TOKEN} voxels, or null; found {roi_size!r}")


def _plan(
    network: nn.Module, path: str | Path, last: int | None, rescale: bool, roi_size: Sequence[int] | None
) -> tuple[dict[str, Tensor], TransferReport]:
    """Return the tensors to load, and the report; loads nothing yet.

    Raises:
        WeightsError: the file is not readable, has values that are not finite or an encoder of other depth, or its
            position embeddings are of another or an unknown crop. Or its card names another network.
        CardError: as in `load_pretrained`.
    """
    _, found = read_checkpoint(path)
    card, own = read_card(path), describe_network(network)
    if card is not None:
        require_own(path, card, found)
        roi_size = card["roi_size"] if roi_size is None else roi_size
        if is_other_encoder(card["network"], own):
            raise WeightsError(
                f"{card_path(path)}: network: found {network_text(card['network'])}, expected "
                f"{network_text(own)}, which this config builds. {way_to(card['network'], own)}"
            )
    expected = network.state_dict()
    match = match_names(found, expected)
    names = match.names
    if match.lacking:
        raise WeightsError(
            f"{path} looks like {describe(found)}; {len(match.lacking)} tensors of its encoder are not in this network "
            f"({_listed(dict(Counter(_short(name, match.prefix) for name in match.lacking)))}), so that its features "
            "would be others: expected the same depth and version (SwinUNETR v2: `--swin_use_v2 true`)"
        )
    for old in names.values():
        _check_finite(path, old, found[old])
    weights, fates, levels = {}, [], _levels(network)
    for name, fresh in expected.items():
        why = _not_asked(name, levels, last)
        asked, fate = not why, "left out"
        if asked and name not in names:
            why = "not in the file"
        elif asked:
            tensor = found[names[name]].to(fresh.dtype)
            if name == POSITIONS and tensor.ndim == 3 and tensor.shape[::2] == fresh.shape[::2]:
                grid = _grid(f"{path}: {names[name]}", tensor.shape[1], network.feat_size, roi_size)
                tensor, why = _on_grid(tensor, grid, network.feat_size)
            else:
                tensor, why = _fitted(name, tensor, fresh.shape)
            if tensor is not None:
                weights[name], fate = tensor, "adapted" if why else "loaded"
        fates.append(TensorFate(name, fate, why, asked))
    rescaled = _rescale(weights, expected, scale_free_convolutions(network)) if rescale else 0
    unused = dict(Counter(_short(name, match.prefix) for name in found if name not in set(names.values())))
    origin = {"file": Path(path).name, "sha256": digest(found) if card is None else card["sha256"]}
    if card is None:
        return weights, TransferReport(f"{path} looks like {describe(found)}", fates, unused, rescaled, origin)
    source, way = f"{path} is {network_text(card['network'])}", way_to(card["network"], own)
    return weights, TransferReport(source, fates, unused, rescaled, origin, way)


def _not_asked(name: str, levels: dict[str, int], last: int | None) -> str:
    """Return why a tensor is not requested; empty if it is. `last` is the last level, None: everything is requested."""
    if last is None:
        return ""
    if is_output(name):
        return "the output layer starts at random"
    level = levels[_module(name)]
    if level <= last:
        return ""
    return f"level {level} of the decoder, requested {last}" if last else "the decoder was not requested"


def _fitted(name: str, tensor: Tensor, shape: torch.Size) -> tuple[Tensor | None, str]:
    """Return the tensor in the network's shape, and how it was adapted; or None, and why this is impossible.

    Channels are repeated in cycles: if two become four, the third is a copy of the first. The response to input
    channels that are repeated in the same way does not change.
    """
    if tensor.shape == shape:
        return tensor, ""
    if name in INPUT_CONVOLUTIONS and (tensor.shape[0], *tensor.shape[2:]) == (shape[0], *shape[2:]):
        old, new = tensor.shape[1], shape[1]
        times = f"{old} → {new} input channels"
        if new % old == 0:
            repeats = (1, new // old, *[1] * (tensor.ndim - 2))
            return tensor.repeat(repeats) / (new // old), f"{times}: repeated, divided by {new // old}"
        if old % new == 0:
            return tensor.unflatten(1, (old // new, new)).sum(dim=1), f"{times}: summed"
    return None, f"{OTHER_SHAPE} {list(tensor.shape)} in the file, {list(shape)} in the network"


def _grid(where: str, tokens: int, grid: Grid, roi_size: Sequence[int] | None) -> Grid:
    """Return the token grid of a file's position embeddings, which the file does not contain.

    Args:
        where: file and name of the embeddings, for errors.
        tokens: number of tokens.
        grid: token grid of the network.
        roi_size: crop size of pre-training, voxels; None: the network's grid or a cube.

    Raises:
        WeightsError: the crop has another number of tokens, or is needed but None.
    """
    if roi_size is not None:
        h, w, d = (side // TOKEN for side in roi_size)
        if h * w * d == tokens:
            return h, w, d
        raise WeightsError(
            f"{where} has {tokens} tokens; pretrained_roi_size: found {list(roi_size)}, which has "
            f"{size_text((h, w, d))} = {h * w * d} tokens of {TOKEN}³ voxels, expected the crop of its pre-training"
        )
    if tokens == math.prod(grid):
        return grid
    side = _cube(tokens)
    if side:
        return side, side, side
    raise WeightsError(
        f"{where} has {tokens} tokens, found neither the network's {size_text(grid)} nor a cube; pretrained_roi_size: "
        f"found null, expected the crop of its pre-training, {tokens} tokens of {TOKEN}³ voxels"
    )


def _cube(tokens: int) -> int:
    """Return the side of a cube with this number of tokens; 0 if there is none."""
    side = round(tokens ** (1 / 3))
    return side if side**3 == tokens else 0


def _on_grid(positions: Tensor, old: Grid, new: Grid) -> tuple[Tensor, str]:
    """Interpolate position embeddings [1, tokens, E] to another grid, linearly; also return how they were adapted."""
    if old == new:
        return positions, ""
    volume = positions.unflatten(1, old).movedim(-1, 1)  # [1, E, A, B, C]
    volume = F.interpolate(volume, new, mode="trilinear", align_corners=False)
    return volume.flatten(2).transpose(1, 2), f"position embeddings of {size_text(old)} tokens → {size_text(new)}"


def _check_finite(path: str | Path, name: str, tensor: Tensor) -> None:
    bad = tensor.numel() - int(tensor.isfinite().sum())
    if bad:
        raise WeightsError(
            f"{path}: {name} has {bad} NaN or infinite values among {tensor.numel()}, expected finite values; "
            "the training that wrote it diverged"
        )


def _short(name: str, prefix: str) -> str:
    """Return the module of a tensor in the file, at most three names deep; its own name if that is only the prefix."""
    module = name.rpartition(".")[0]
    return name if f"{module}." in (".", prefix) else ".".join(module.split(".")[:3])


def _require(report: TransferReport, min_fraction: float, adjustable: bool = True) -> None:
    """Refuse a file that fills too few tensors, or none; `adjustable`: the config has keys for what is requested.

    Raises:
        WeightsError: too few tensors can be filled; the message lists the others with the reasons.
    """
    if report.filled and report.filled >= min_fraction * report.asked:
        other = [
            t for t in report.tensors if is_encoder(t.name) and t.why.startswith(OTHER_SHAPE) and t.fate == "left out"
        ]
        other = [t for t in other if t.name not in INPUT_CONVOLUTIONS]
        if other:
            raise WeightsError(
                f"{report.source}; {len(other)} tensors of its encoder have another shape ({other[0].name}: "
                f"{other[0].why}), so that its features would be others: expected the same widths and "
                "heads, and windows of attention (SwinUNETR: `--swin_window_size`)"
            )
        return
    missing = [tensor for tensor in report.tensors if tensor.asked and tensor.fate == "left out"]
    listed = "".join(f"\n  {tensor.name}: {tensor.why}" for tensor in missing[:10])
    more = f"\n  … and {len(missing) - 10} more" if len(missing) > 10 else ""
    raise WeightsError(
        f"{report.source}; it fills {report.filled} of the {report.asked} requested tensors, "
        f"expected at least {min_fraction:.0%}:{listed}{more}\n{_advice(report, min_fraction, adjustable)}"
    )


def _advice(report: TransferReport, min_fraction: float, adjustable: bool) -> str:
    decoder_asked = any(tensor.asked and part_of(tensor.name) == "decoder" for tensor in report.tensors)
    encoder = report.counts()["encoder"]
    filled = encoder.total() - encoder["left out"]
    if decoder_asked and filled and filled >= min_fraction * encoder.total():
        return "Its encoder fits: `--pretrained_parts encoder` loads that alone"
    fewer = ", or accept fewer tensors with --pretrained_min_fraction" if adjustable else ""
    return f"{report.way or way_to({}, {})}{fewer}"


# ------------------------------------------------------------------------------------------------ names in a file


@dataclass(frozen=True)
class Match:
    """How a file names the tensors of a network.

    Attributes:
        prefix: prefix of the names in the file.
        stands_for: prefix in the network that it replaces: empty, `swinViT.` or `vit.`.
        names: name in the network → name in the file, for the tensors that the file has.
        lacking: names in the file of tensors of the encoder's stages that the network does not have.
    """

    prefix: str
    stands_for: str
    names: dict[str, str]
    lacking: Sequence[str] = ()


def match_names(found: Iterable[str], expected: Collection[str]) -> Match:
    """Find the prefix without which most names in a file are names of the network.

    So no list of wrappers is needed (`module.`, `_orig_mod.`, `backbone.`, `student.net.` …). Of two networks in one
    file (student and teacher) the first is used.

    Args:
        found: names in the file.
        expected: names in the network.
    """
    spelled = {_spelled(name): name for name in found}
    votes: Counter[tuple[str, str]] = Counter()
    for name in spelled:
        starts = [0, *(i + 1 for i, letter in enumerate(name) if letter == ".")]
        for start in starts:
            votes.update((name[:start], added) for added in ("", *ALONE) if added + name[start:] in expected)
    if not votes:
        return Match("", "", {})
    prefix, added = votes.most_common(1)[0][0]
    names = {added + name.removeprefix(prefix): old for name, old in spelled.items() if name.startswith(prefix)}
    kinds = {_module(name).rstrip("0123456789") for name in expected}
    unknown = {name: old for name, old in names.items() if name not in expected and STAGES.match(name)}
    lacking = [old for name, old in unknown.items() if _module(name).rstrip("0123456789") in kinds]
    return Match(prefix, added, {name: old for name, old in names.items() if name in expected}, lacking)


def _spelled(name: str) -> str:
    """Convert a name to the current spelling of MONAI's networks.

    The published SwinUNETR encoders have older names. In MONAI's `MaskedAutoEncoderViT`, the last norm of a `ViT` is
    the last of its blocks.
    """
    for old, new in ((".mlp.fc1.", ".mlp.linear1."), (".mlp.fc2.", ".mlp.linear2."), ("swin_vit.", "swinViT.")):
        name = name.replace(old, new)
    return re.sub(r"(^|\.)blocks\.\d+\.(weight|bias)$", r"\1norm.\2", name)


# ------------------------------------------------------------------------------------------------------ rescaling


def scale_free_convolutions(network: nn.Module) -> list[str]:
    """Names of the convolutions before an instance norm, which removes the scale of their weights."""
    names = []
    for name, module in network.named_modules():
        if isinstance(module, Convolution) and hasattr(module, "adn"):
            if isinstance(next(module.adn.children(), None), INSTANCE_NORMS):
                names.append(f"{name}.conv")
        elif isinstance(module, UnetResBlock | UnetBasicBlock):
            norms = {i: getattr(module, f"norm{i}", None) for i in (1, 2, 3)}
            names += [f"{name}.conv{i}.conv" for i, norm in norms.items() if isinstance(norm, INSTANCE_NORMS)]
    return names


def _rescale(weights: dict[str, Tensor], fresh: dict[str, Tensor], convolutions: Sequence[str]) -> int:
    """Scale the loaded convolutions to the norm of the initial ones; return their number."""
    loaded = [name for name in convolutions if f"{name}.weight" in weights]
    for name in loaded:
        size = float(weights[f"{name}.weight"].norm())
        factor = float(fresh[f"{name}.weight"].norm()) / size if size else 1.0
        for tensor in (f"{name}.weight", f"{name}.bias"):
            if tensor in weights:
                weights[tensor] = weights[tensor] * factor
    return len(loaded)


# ------------------------------------------------------------------------------------------------------ command


def inspect(path: str, into: str | None = None, config_file: str | Sequence[str] | None = None) -> None:
    """Print the content of a checkpoint and, without training, what a bundle would load from it.

    Args:
        path: checkpoint file.
        into: folder of the bundle, whose configs/train.yaml is read.
        config_file: configs of the bundle, instead of `into`, to use overlays:
            "['bundles/NAME/configs/train.yaml','bundles/NAME/configs/small.yaml']".

    Raises:
        ValueError: both `into` and `config_file` are given, or a file does not exist.
        WeightsError: the file is not readable, or the bundle's training would refuse it.
    """
    if into is not None and config_file is not None:
        raise ValueError(f"transfer inspect: found --into {into} and --config_file, expected one of them")
    print_table(_file_lines(path))
    if into is not None:
        config_file = f"{into}/configs/train.yaml"
    if config_file is not None:
        print()
        _say_transfer(path, _parser([config_file] if isinstance(config_file, str) else list(config_file)))


def _say_transfer(path: str, parser: ConfigParser) -> None:
    """Print the report that training with this config would print; raise the same errors."""
    settings = {name: parser.get_parsed_content(key) for name, key in SETTINGS.items()}
    network = parser.get_parsed_content("network_def")
    last = _last_level(network, settings["parts"], settings["decoder_levels"])
    _check_numbers(settings["min_fraction"], settings["roi_size"])
    _, report = _plan(network, path, last, parse_bool(settings["rescale"]), settings["roi_size"])
    print_table(report.lines())
    _require(report, settings["min_fraction"])


def _file_lines(path: str) -> list[tuple[str, str]]:
    """Describe a file, in rows of a table."""
    key, state = read_checkpoint(path)
    size = bytes_text(sum(tensor.numel() * tensor.element_size() for tensor in state.values()))
    # names do not depend on sizes, so the smallest networks are enough
    networks = (
        BasicUNet(3, features=(1, 1, 1, 1, 1, 1)),
        SwinUNETR(1, 1, feature_size=12),
        UNETR(1, 1, TOKEN, feature_size=2, hidden_size=1, mlp_dim=1, num_heads=1),
    )
    match = max((match_names(state, network.state_dict()) for network in networks), key=lambda m: len(m.names))
    parts = Counter(part_of(name) for name in match.names)
    rest = dict(Counter(_short(name, match.prefix) for name in state if name not in set(match.names.values())))
    where = "bare" if key is None else f"under the key `{key}`"
    lines = [
        ("file", f"{path}: {len(state)} tensors, {size}, {where}"),
        ("looks like", describe(state)),
        ("names", _beginning(match)),
        *((part, f"{parts[part]} tensors") for part in ("encoder", "decoder", "output")),
    ]
    if POSITIONS in match.names:
        tokens = state[match.names[POSITIONS]].shape[1]
        side = _cube(tokens)
        shape = f"{size_text([side] * 3)} if the crop was a cube" if side else "the crop was no cube"
        lines.append(("tokens", f"{tokens}: {shape} (not stored in the file)"))
    lines += [("other", _listed(rest))] if rest else []
    card = read_card(path)
    if card is None:
        return [*lines, ("card", f"none: {card_path(path)} does not exist")]
    require_own(path, card, state)
    return [*lines, ("card", str(card_path(path))), *((key, _entry_text(value)) for key, value in card.items())]


def _entry_text(value: Any) -> str:
    """Entry of a card as text; an inner level in one line."""
    return ", ".join(f"{key} {inner}" for key, inner in value.items()) if isinstance(value, dict) else str(value)


def _beginning(match: Match) -> str:
    """Describe the prefix of the names in a file, compared with the network."""
    if match.prefix:
        return f"begin with `{match.prefix}`" + (f" in place of `{match.stands_for}`" if match.stands_for else "")
    return f"lack `{match.stands_for}`" if match.stands_for else "as MONAI's"


def _parser(config_files: list[str]) -> ConfigParser:
    """Read the config of a segmentation bundle, with its folder as `bundle_root`."""
    for file in config_files:
        if not Path(file).is_file():
            raise ValueError(f"{file}: no such config file, expected a bundle's train.yaml or overlay")
    parser = ConfigParser()
    parser.read_config(config_files)
    missing = [key for key in ("network_def", *SETTINGS.values()) if key not in parser]
    if missing:
        raise ValueError(
            f"{', '.join(config_files)}: found no {', '.join(missing)}; expected the config of a segmentation bundle"
        )
    parser["bundle_root"] = str(Path(config_files[0]).parents[1])
    return parser
