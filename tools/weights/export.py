"""Export: a SwinUNETR that can be traced without doing harm, exact ONNX, and inference from a TorchScript file."""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping, Sequence
from copy import deepcopy
from pathlib import Path
from typing import Any

import torch
from monai.networks import nets
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from tools.weights.checkpoints import WeightsError, require_same


@torch.jit.script_if_tracing
def same_window(image: Tensor, window: list[int]) -> Tensor:
    """The image [B, C, H, W, D] as it is. While a network is traced this is compiled, so that the check is part of it.

    Raises:
        ValueError: H, W and D are not those of the window.
    """
    if image.shape[2:] != window:
        raise ValueError(
            f"window: found {image.shape[2:]}, expected {window}, which this network was traced for: "
            "at any other it would be wrong"
        )
    return image


@torch.jit.script_if_tracing
def zeros_beside(image: Tensor, shape: list[int]) -> Tensor:
    """Zeros on the image's device: in a traced network on that of each input, not on that of the tracing."""
    return torch.zeros(shape, device=image.device)


class _ZerosBeside(TorchFunctionMode):
    """Lets `torch.zeros(shape, device=…)` follow the device of an image."""

    def __init__(self, image: Tensor) -> None:
        super().__init__()
        self.image = image

    def __torch_function__(
        self, func: Callable[..., Any], types: Any, args: Sequence[Any] = (), kwargs: Mapping[str, Any] | None = None
    ) -> Any:
        if func is torch.zeros and kwargs is not None and kwargs.keys() == {"device"}:
            return zeros_beside(self.image, list(args[0]))
        return func(*args, **(kwargs or {}))


class SwinUNETR(nets.SwinUNETR):
    """MONAI's SwinUNETR, with the same parameters and the same output, for `ckpt_export --use_trace True`.

    A traced network keeps what depends on the size of its input as it was, and runs on with wrong numbers at many
    another size; it keeps the device of its attention masks too. This one, once traced, refuses any other window by
    name, and makes its masks on the device of its input. The file does that itself, whoever loads it.
    """

    def forward(self, x_in: Tensor) -> Tensor:
        """Image [B, C, H, W, D] → logits [B, K, H, W, D].

        Raises:
            ValueError: only from a traced network (as `torch.jit.Error`): it was traced for another window.
        """
        if not torch.jit.is_tracing():
            return super().forward(x_in)
        x_in = same_window(x_in, [int(side) for side in x_in.shape[2:]])
        with _ZerosBeside(x_in):
            return super().forward(x_in)


class _StepwiseInstanceNorm(nn.InstanceNorm3d):
    """Instance norm whose means are taken along one axis after the other, so that no sum has many terms."""

    def forward(self, input: Tensor) -> Tensor:
        centred = input - _mean(input)
        normed = centred * torch.rsqrt(_mean(centred * centred) + self.eps)
        if not self.affine:
            return normed
        return normed * self.weight[:, None, None, None] + self.bias[:, None, None, None]


def _mean(volume: Tensor) -> Tensor:
    for axis in (4, 3, 2):
        volume = volume.mean(axis, keepdim=True)
    return volume


def for_onnx(network: nn.Module) -> nn.Module:
    """A copy of a network that computes the same, for `onnx_export`.

    On a CPU onnxruntime adds up all voxels of an instance norm in one 32-bit number, which is inexact for large windows
    of real scans; the norms of this copy add up one axis after the other.

    Args:
        network: 3D, with any weights; those of the copy have the same names.
    """
    network = deepcopy(network)
    for module in list(network.modules()):
        for name, norm in module.named_children():
            if isinstance(norm, nn.InstanceNorm3d) and not norm.track_running_stats:
                stepwise = _StepwiseInstanceNorm(norm.num_features, norm.eps, affine=norm.affine)
                stepwise.load_state_dict(norm.state_dict())
                setattr(module, name, stepwise)
    return network


def load_torchscript(
    path: str | Path, network: nn.Module, roi_size: Sequence[int], device: str | torch.device
) -> torch.jit.ScriptModule:
    """The network in a TorchScript file, if it is what the config describes; it brings its weights.

    Args:
        path: written by `ckpt_export`.
        network: that of the config, with any weights.
        roi_size: of the sliding window, voxels.
        device: where the network will run.

    Raises:
        WeightsError: there is no such file, it is not TorchScript, or it was exported for another number of channels
            or classes, another network, or (a traced one) another window.
    """
    wanted = "expected TorchScript, which `python -m monai.bundle ckpt_export` writes"
    if not Path(path).is_file():
        raise WeightsError(f"{path}: ckpt_path: found no such file, {wanted}")
    try:
        exported = torch.jit.load(str(path), map_location=device)
    except RuntimeError as error:  # without its text, which tells of the insides of an archive
        raise WeightsError(f"{path}: ckpt_path: found what torch.jit.load cannot read, {wanted}") from error
    require_same(path, exported.state_dict(), network.state_dict())
    window = traced_window(exported)
    if window not in (None, list(roi_size)):
        raise WeightsError(
            f"{path}: roi_size: found {window}, which it was traced for, expected {list(roi_size)}; "
            f'export it again with that --input_shape, or infer with --roi_size "{window}"'
        )
    return exported


def traced_window(network: torch.jit.ScriptModule) -> list[int] | None:
    """The one window that a network was traced for, as its own check tells; None if there is no such check."""
    said = ""
    try:
        network(torch.empty(0))  # an image for no network: nothing is computed
    except (torch.jit.Error, RuntimeError) as error:
        said = str(error)
    named = re.search(r"window: found .*, expected \[([\d, ]+)\]", said)
    return None if named is None else [int(side) for side in named[1].split(",")]
