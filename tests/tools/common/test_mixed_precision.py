"""The type in which a network computes, and that it does."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torch import nn

from tools.common import mixed_precision
from tools.common.mixed_precision import MixedPrecisionInferer, amp_dtype, has_bfloat16, needs_scaler
from tools.common.windows import SlidingWindow


@pytest.mark.parametrize(
    ("amp", "bfloat16", "expected"),
    [
        ("auto", True, torch.bfloat16),
        (True, True, torch.bfloat16),
        ("auto", False, torch.float32),
        ("bf16", True, torch.bfloat16),
        ("off", True, torch.float32),
        (False, True, torch.float32),
        ("false", True, torch.float32),
    ],
)
def test_the_type_on_a_cpu(amp, bfloat16, expected, monkeypatch):
    monkeypatch.setattr(mixed_precision, "has_bfloat16", lambda device: bfloat16)
    assert amp_dtype(amp, "cpu") == expected
    assert not needs_scaler(amp, "cpu")


@pytest.mark.parametrize(("amp", "reason"), [("bf16", "no instructions for bfloat16"), ("fp16", "only GPUs")])
def test_a_type_that_the_processor_lacks_is_replaced_with_a_warning(amp, reason, monkeypatch, caplog):
    monkeypatch.setattr(mixed_precision, "has_bfloat16", lambda device: False)
    mixed_precision._without.cache_clear()
    for _ in range(3):  # as training, validation and the scaler ask
        assert amp_dtype(amp, "cpu") == torch.float32
    (record,) = caplog.records
    assert reason in record.getMessage()
    assert "32 bit" in record.getMessage()


def test_an_unknown_type_is_refused():
    with pytest.raises(ValueError, match=r"amp must be one of auto, bf16, fp16, off; found 'half'"):
        amp_dtype("half", "cpu")


def test_the_flags_of_this_processor_agree_with_those_of_the_system():
    system = Path("/proc/cpuinfo")
    if not system.exists():
        pytest.skip(f"no {system} on this system")
    flags = system.read_text().split()
    assert has_bfloat16(torch.device("cpu")) == ("avx512_bf16" in flags or "amx_bf16" in flags)


@pytest.mark.parametrize("amp", ["bf16", "off"])
def test_inferers_run_the_network_in_that_type(amp, monkeypatch):
    monkeypatch.setattr(mixed_precision, "has_bfloat16", lambda device: True)
    network, seen = nn.Conv3d(1, 1, 1), []
    network.register_forward_hook(lambda module, args, out: seen.append(out.dtype))
    image = torch.rand(1, 1, 4, 4, 4)
    for inferer in (
        MixedPrecisionInferer(amp, "cpu"),
        SlidingWindow(amp, "cpu", roi_size=(4, 4, 4), sw_batch_size=1),
    ):
        with torch.no_grad():
            assert inferer(image, network).dtype == torch.float32
    assert seen == [torch.bfloat16 if amp == "bf16" else torch.float32] * 2
