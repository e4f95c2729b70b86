"""Mixed precision: `auto`, `bf16`, `fp16` or `off`, on GPUs and on CPUs that compute in bfloat16."""

from __future__ import annotations

import logging
from collections.abc import Mapping
from functools import cache
from typing import Any

import torch
from monai.inferers import SimpleInferer
from torch import Tensor, nn

logger = logging.getLogger(__name__)

CHOICES = ("auto", "bf16", "fp16", "off")


def amp_dtype(amp: str | bool, device: str | torch.device) -> torch.dtype:
    """Return the type in which the network computes; `torch.float32` is no mixed precision.

    Args:
        amp: `auto` (or true): bfloat16 where the device has it, else float16 on GPUs and 32 bit on CPUs. `bf16`,
            `fp16`: this type; where the device lacks it, 32 bit with a warning. `off` (or false): 32 bit.
        device: the network's.

    Raises:
        ValueError: `amp` is none of these.
    """
    choice = {"true": "auto", "false": "off"}.get(str(amp).lower(), str(amp).lower())
    if choice not in CHOICES:
        raise ValueError(f"amp must be one of {', '.join(CHOICES)}; found {amp!r}")
    device = torch.device(device)
    if choice == "off":
        return torch.float32
    if choice == "fp16":
        return torch.float16 if device.type == "cuda" else _without(choice, device, "only GPUs train in float16")
    if has_bfloat16(device):
        return torch.bfloat16
    if choice == "auto":
        return torch.float16 if device.type == "cuda" else torch.float32
    return _without(choice, device, "it has no instructions for bfloat16, which would be slower than 32 bit")


def has_bfloat16(device: torch.device) -> bool:
    """Whether the device computes in bfloat16: a GPU from Ampere on, a CPU with AVX-512 BF16 or AMX."""
    if device.type == "cuda":
        return torch.cuda.is_bf16_supported(including_emulation=False)
    return device.type == "cpu" and bool(_flags().get("avx512_bf16") or _flags().get("amx_bf16"))


def _flags() -> Mapping[str, Any]:
    """What the processor can do; empty in older versions of PyTorch."""
    return getattr(torch.cpu, "get_capabilities", dict)()


@cache  # a run asks several times
def _without(choice: str, device: torch.device, reason: str) -> torch.dtype:
    name = _flags().get("cpu_name", "this CPU") if device.type == "cpu" else device.type
    logger.warning("amp: %s is not possible on %s (%s): computing in 32 bit", choice, name, reason)
    return torch.float32


def needs_scaler(amp: str | bool, device: str | torch.device) -> bool:
    """Whether gradients must be scaled, because float16 would round small ones to 0."""
    return amp_dtype(amp, device) == torch.float16


def autocast(amp: str | bool, device: str | torch.device) -> torch.autocast:
    """Context in which a network computes in the type of `amp_dtype`."""
    dtype = amp_dtype(amp, device)
    return torch.autocast(torch.device(device).type, dtype, enabled=dtype != torch.float32)


class MixedPrecisionInferer(SimpleInferer):
    """One pass of a network in mixed precision.

    (MONAI's engines have mixed precision on GPUs alone, and scale gradients in bfloat16 too, which takes a wait for the
    device at every step.)

    Args:
        amp: as in `amp_dtype`.
        device: the network's.
    """

    def __init__(self, amp: str | bool, device: str | torch.device) -> None:
        super().__init__()
        self.autocast = autocast(amp, device)

    def __call__(self, inputs: Tensor, network: nn.Module, *args: Any, **kwargs: Any) -> Any:
        """Call `network(inputs, …)`; a tensor that it returns is converted to 32 bit, for the loss."""
        with self.autocast:
            out = super().__call__(inputs, network, *args, **kwargs)
        return out.float() if isinstance(out, Tensor) else out
