"""Mixed precision: on GPUs only, in bfloat16 if supported."""

from __future__ import annotations

import torch

from tools.common.text import parse_bool


def use_amp(amp: bool | str, device: str | torch.device) -> bool:
    """Whether mixed precision is wanted and the device is a GPU."""
    return parse_bool(amp) and torch.device(device).type == "cuda"


def amp_dtype() -> torch.dtype:
    """Return the type for mixed precision: bfloat16 if the GPU supports it, else float16."""
    supported = torch.cuda.is_available() and torch.cuda.is_bf16_supported(including_emulation=False)
    return torch.bfloat16 if supported else torch.float16
