"""Export: a SwinUNETR that is safe to trace, exact ONNX, and inference from a TorchScript file."""

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

from tools.weights.checkpoints import WeightsError, require_card, require_same


@torch.jit.script_if_tracing
def same_window(image: Tensor, window: list[int]) -> Tensor:
    """Return the image [B, C, H, W, D] unchanged; in tracing, this is compiled, so that the check is part of the file.

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
    """Zeros on the device of the image: a traced network uses the device of each input, not that of the tracing."""
    return torch.zeros(shape, device=image.device)


class _ZerosBeside(TorchFunctionMode):
    """Makes `torch.zeros(shape, device=…)` use the device of an image."""

    def __init__(self, image: Tensor) -> None:
        super().__init__()
        self.image = image

    def __torch_function__(
        self, func: Callable[..., Any], types: Any, args: Sequence[Any] = (), kwargs: Mapping[str, Any] | None = None
    ) -> Any:
        if func is torch.zeros and kwargs is not None and kwargs.keys() == {"device"}:
            return zeros_beside(self.image, list(args[0]))
        return func(*args, **(kwargs or {}))


class NamesOverlays(nn.Module):
    """Weights of another network are refused in one sentence, which names the overlay; `ckpt_export` loads strictly."""

    def load_state_dict(self, state_dict: Mapping[str, Tensor], strict: bool = True, assign: bool = False) -> Any:
        """Load weights, as any module does.

        Raises:
            WeightsError: they are strict and those of another network.
        """
        if strict:
            require_same("checkpoint", state_dict, self.state_dict())
        return super().load_state_dict(state_dict, strict, assign)


class BasicUNet(NamesOverlays, nets.BasicUNet):
    """MONAI's BasicUNet; weights of another network are refused in one sentence."""


class UNETR(NamesOverlays, nets.UNETR):
    """MONAI's UNETR; weights of another network are refused in one sentence."""


class SwinUNETR(NamesOverlays, nets.SwinUNETR):
    """MONAI's SwinUNETR, with the same parameters and the same output, for `ckpt_export --use_trace True`.

    Tracing freezes everything that depends on the size of the input, so a traced SwinUNETR gives wrong numbers at many
    other sizes; it also freezes the device of the attention masks. This class, once traced, raises an error for other
    window sizes, and creates its masks on the device of the input. Both are part of the exported file.
    """

    def forward(self, x_in: Tensor) -> Tensor:
        """Image [B, C, H, W, D] → logits [B, K, H, W, D].

        Raises:
            ValueError: only in a traced network (as `torch.jit.Error`): it was traced for another window.
        """
        if not torch.jit.is_tracing():
            return super().forward(x_in)
        x_in = same_window(x_in, [int(side) for side in x_in.shape[2:]])
        with _ZerosBeside(x_in):
            return super().forward(x_in)


class _StepwiseInstanceNorm(nn.InstanceNorm3d):
    """Instance norm that averages along one axis after the other, so that no sum has many terms."""

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
    """Return an equivalent copy of a network for `onnx_export`.

    On a CPU, onnxruntime sums all voxels of an instance norm in one 32-bit number, which is inexact for large windows
    of real scans; the norms of the copy average along one axis after the other.

    Args:
        network: 3D network with any weights; the tensors of the copy have the same names.
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
    """Load the network in a TorchScript file, with its weights, and check that it fits the config.

    Args:
        path: file that `ckpt_export` wrote.
        network: network of the config, with any weights.
        roi_size: size of the sliding window, voxels.
        device: device of the loaded network.

    Raises:
        WeightsError: the file does not exist, is not TorchScript, or was exported for another number of channels or
            classes, another network, or (if traced) another window.
        CardError: the card beside it is damaged, of a later version, or of other weights.
    """
    wanted = "expected TorchScript, which `python -m monai.bundle ckpt_export` writes"
    if not Path(path).is_file():
        raise WeightsError(f"{path}: ckpt_path: found no such file, {wanted}")
    try:
        exported = torch.jit.load(str(path), map_location=device)
    except RuntimeError as error:  # without torch's text, which describes the inside of an archive
        raise WeightsError(f"{path}: ckpt_path: found what torch.jit.load cannot read, {wanted}") from error
    require_same(path, exported.state_dict(), network.state_dict())
    require_card(path, exported.state_dict(), network)
    window = traced_window(exported)
    if window not in (None, list(roi_size)):
        raise WeightsError(
            f"{path}: roi_size: found {window}, which it was traced for, expected {list(roi_size)}; "
            f'export it again with that --input_shape, or infer with --roi_size "{window}"'
        )
    return exported


def traced_window(network: torch.jit.ScriptModule) -> list[int] | None:
    """Return the window that a network was traced for, from the error of its own check; None if it has no check."""
    said = ""
    try:
        network(torch.empty(0))  # invalid for every network: nothing is computed
    except (torch.jit.Error, RuntimeError) as error:
        said = str(error)
    named = re.search(r"window: found .*, expected \[([\d, ]+)\]", said)
    return None if named is None else [int(side) for side in named[1].split(",")]
