"""That bfloat16 is learnt with as a processor that has it would, and what is said of the losses."""

from __future__ import annotations

import pytest
import torch

from benchmarks.mixed_precision import Rounded, main, run, summary
from tools.samples.sample_data import sample_data


def test_products_are_those_of_bfloat16():
    """A convolution and a matrix product, both passes, beside PyTorch's own in bfloat16."""
    torch.manual_seed(0)
    layers = torch.nn.Sequential(torch.nn.Conv3d(4, 8, 3), torch.nn.Flatten(2), torch.nn.Linear(27, 5))
    image = torch.randn(2, 4, 5, 5, 5)

    def gradients() -> list[torch.Tensor]:
        layers.zero_grad()
        with torch.autocast("cpu", torch.bfloat16):
            out = layers(image)
        out.float().square().sum().backward()
        return [out.detach(), *(parameter.grad.clone() for parameter in layers.parameters())]

    own = gradients()
    with Rounded():
        rounded = gradients()
    layers.zero_grad()
    out = layers(image)
    out.square().sum().backward()
    exact = [out.detach(), *(parameter.grad for parameter in layers.parameters())]
    for a, b, c in zip(own, rounded, exact, strict=True):
        assert a.dtype == b.dtype
        size = c.abs().max()
        assert (a.float() - b.float()).abs().max() <= size / 128  # a unit or two in the last place of bfloat16
        assert (b.float() - c).abs().max() > size / 5000  # 32 bit would be closer


def test_the_summary_tells_precision_from_seed():
    losses = {("off", 0): [1.0, 0.5], ("off", 1): [1.2, 0.7], ("bf16", 0): [1.01, 0.5], ("bf16", 1): [1.2, 0.72]}
    text = summary(losses)
    assert "| 2 | 0.6000 (0.5000–0.7000) | 0.6100 (0.5000–0.7200) | +0.0100 |" in text
    assert text.endswith("same seed, other precision: 0.0075; 32 bit, other seed: 0.2000")


def test_one_seed_is_refused(tmp_path):
    with pytest.raises(SystemExit, match="--seeds: at least 2 are needed, to know their spread; found 1"):
        main(str(tmp_path), str(tmp_path / "runs"), seeds=1)


def test_a_run_is_kept_but_not_one_of_other_settings(tmp_path):
    (tmp_path / "metrics.csv").write_text("epoch,loss\n1,0.5\n2,0.25\n")
    (tmp_path / "done.txt").write_text("bundle: hybridmim_pretrain\noverlays: ['small']\nepochs: 2")
    assert run("hybridmim_pretrain", ["small"], tmp_path, {"epochs": 2}) == [0.5, 0.25]
    with pytest.raises(SystemExit, match=r"epochs: 2\nexpected(.|\n)*epochs: 3\n: give another output_dir"):
        run("hybridmim_pretrain", ["small"], tmp_path, {"epochs": 3})


@pytest.mark.slow
def test_both_precisions_train(tmp_path, capsys):
    sample_data(str(tmp_path), kind="hippocampus", cases=3)
    sizes = {"roi_size": [32] * 3, "patch_size": [8] * 3, "region_size": [16] * 3, "decode_size": [32] * 3}
    sizes |= {"unet_features": [4, 4, 8, 8, 16, 4], "epochs": 1, "batch_size": 2, "num_workers": 0, "val_interval": 9}
    main(str(tmp_path / "imagesTr"), str(tmp_path / "runs"), overlays="mri,small", seeds=2, jobs=2, **sizes)
    assert "mean difference, same seed" in capsys.readouterr().out
    bf16, bits32 = (
        float((tmp_path / f"runs/{amp}_seed0/metrics.csv").read_text().splitlines()[1].split(",")[1])
        for amp in ("bf16", "off")
    )
    assert bf16 != bits32  # not the same computation
    assert bf16 == pytest.approx(bits32, rel=0.02)
