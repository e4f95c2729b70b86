"""Accelerated networks are the same networks: parameters, output, gradients."""

from __future__ import annotations

from copy import deepcopy
from functools import partial

import pytest
import torch
import torch.nn.functional as F
from monai.data import MetaTensor, list_data_collate
from monai.networks.nets import UNETR, BasicUNet, SwinUNETR
from monai.networks.nets.basic_unet import TwoConv
from torch import nn
from torch.utils.flop_counter import FlopCounterMode

from tools import layers
from tools.layers import MEANS, FastConv3d, FastDropout, _keep_input, accelerate, weight_gradient

NETWORKS = {
    "unet": (lambda: BasicUNet(3, 1, 2, (4, 4, 4, 8, 8, 4)), (48, 32, 32)),
    "swin_unetr": (lambda: SwinUNETR(1, 2, depths=(2, 1, 1, 1), feature_size=12, window_size=3), (64, 64, 64)),
    "unetr": (lambda: UNETR(1, 2, (32, 32, 32), hidden_size=48, mlp_dim=96, num_heads=4), (32, 32, 32)),
}


def output_and_gradients(network, image):
    """In 64 bit, where an error of rounding cannot be mistaken for another."""
    torch.manual_seed(0)
    out = network(image)
    (out * torch.linspace(-1, 1, out.numel()).view(out.shape)).sum().backward()
    return out.detach(), {name: p.grad for name, p in network.named_parameters() if p.grad is not None}


@pytest.fixture(params=NETWORKS)
def plain(request):
    make, size = NETWORKS[request.param]
    torch.manual_seed(0)
    network = make().double()
    for p in network.parameters():  # MONAI starts biases and the like at 0, where a mistake is not seen
        nn.init.normal_(p, std=0.1)
    return network, torch.rand(1, 1, *size, dtype=torch.float64)


@pytest.mark.parametrize("checkpointing", [False, True])
def test_same_parameters_output_and_gradients(plain, checkpointing, monkeypatch):
    monkeypatch.setattr(FastConv3d, "slow_gradient", True)
    network, image = plain
    fast = accelerate(deepcopy(network), checkpointing)
    assert {type(m) for m in fast.modules()} != {type(m) for m in network.modules()}
    assert list(fast.state_dict()) == list(network.state_dict())
    expected, gradients = output_and_gradients(network, image)
    found, fast_gradients = output_and_gradients(fast, image)
    torch.testing.assert_close(found, expected)
    assert fast_gradients.keys() == gradients.keys()
    for name, gradient in gradients.items():
        assert (fast_gradients[name] - gradient).norm() <= 1e-5 * max(1.0, gradient.norm()), name
    with torch.no_grad():
        torch.testing.assert_close(fast.eval()(image), network.eval()(image))


@pytest.mark.parametrize("name", NETWORKS)
def test_in_bfloat16_they_are_as_near_to_32_bit_as_the_plain_ones(name):
    make, size = NETWORKS[name]
    torch.manual_seed(0)
    network, image = make(), torch.rand(1, 1, *size)

    def gradients(network, enabled):
        with torch.autocast("cpu", torch.bfloat16, enabled=enabled):
            out = network(image)
        (out.float() - image).square().mean().backward()
        return torch.cat([p.grad.flatten() for p in network.parameters() if p.grad is not None])

    exact = gradients(deepcopy(network), False)
    plain, fast = (gradients(n, True) for n in (deepcopy(network), accelerate(deepcopy(network))))
    assert (fast - exact).norm() < 1.2 * (plain - exact).norm()


@pytest.mark.parametrize("size", [(1, 4, 4), (2, 2, 2), (2, 6, 4), (3, 3, 3)])
def test_the_weight_gradient_of_a_flat_volume_in_bfloat16(size):
    """PyTorch's own reads memory that nobody wrote on processors with AVX-512; here that holds no numbers."""
    torch.manual_seed(0)
    plain = nn.Conv3d(32, 32, 3, padding=1)
    image, upstream = (torch.randn(2, 32, *size).bfloat16().float() for _ in range(2))
    plain(image).backward(upstream)
    for _ in range(6):
        fast = accelerate(nn.Conv3d(32, 32, 3, padding=1))
        fast.load_state_dict(plain.state_dict())
        freed = [torch.full((2**n,), torch.nan, dtype=torch.bfloat16) for n in range(3, 21)]
        del freed
        with torch.autocast("cpu", torch.bfloat16):
            out = fast(image)
        out.backward(upstream.bfloat16())
        error = (fast.weight.grad - plain.weight.grad).norm() / plain.weight.grad.norm()
        assert error < 0.005


@pytest.mark.parametrize("crops", [1, 2])
def test_without_gradient_they_compute_channels_last(plain, crops):
    network, image = plain
    network = network.float().eval()
    image = torch.rand(crops, *image.shape[1:])
    fast = accelerate(deepcopy(network))
    formats = []
    for layer in fast.modules():
        if isinstance(layer, FastConv3d):
            layer.register_forward_hook(lambda _layer, _inputs, out: formats.append(out))
    with torch.no_grad():
        before = image.clone()
        found, expected = fast(image), deepcopy(network).double()(image.double())
        assert torch.equal(image, before)
        assert (found - expected).abs().max() < 1e-4 * expected.abs().max()
    # PyTorch computes small convolutions of a single crop in another way
    assert crops == 1 or all(out.is_contiguous(memory_format=torch.channels_last_3d) for out in formats)


def test_so_they_do_in_bfloat16_and_no_layer_goes_back_to_32_bit():
    torch.manual_seed(0)
    network, image = BasicUNet(3, 1, 3, (8, 8, 16, 32, 32, 8)).eval(), torch.rand(2, 1, 32, 32, 32)
    fast = accelerate(deepcopy(network))
    outputs = []
    for layer in fast.modules():
        if isinstance(layer, nn.Conv3d | nn.MaxPool3d | nn.ConvTranspose3d | nn.InstanceNorm3d):
            layer.register_forward_hook(lambda _layer, _inputs, out: outputs.append(out))
    with torch.no_grad():
        exact = network(image)
        with torch.autocast("cpu", torch.bfloat16):
            plain, found = network(image), fast(image)
    assert len(outputs) > 40
    assert all(out.dtype == torch.bfloat16 for out in outputs)
    assert all(out.is_contiguous(memory_format=torch.channels_last_3d) for out in outputs)
    assert (found - exact).norm() < 1.2 * (plain - exact).norm()


@pytest.mark.parametrize(("mean", "deviation", "error"), [(4, 3, 2e-5), (100, 0.1, 2e-3)])
def test_the_norm_channels_last_is_as_exact_as_the_plain_one(mean, deviation, error):
    torch.manual_seed(0)
    image = deviation * torch.randn(2, 5, 64, 48, 40) + mean
    plain = nn.InstanceNorm3d(5, affine=True)
    with torch.no_grad():
        for p in plain.parameters():
            nn.init.normal_(p)
        fast, given = accelerate(deepcopy(plain)), image.contiguous(memory_format=torch.channels_last_3d)
        found, expected = fast(given), deepcopy(plain).double()(image.double())
        assert torch.equal(given, image)  # is not overwritten
    assert (found - expected).abs().max() < error


def test_training_keeps_the_usual_layout():
    """Though its norms are computed where gradients are off."""
    fast = accelerate(BasicUNet(3, 1, 2, (4, 4, 4, 8, 8, 4)))
    outputs = []
    for layer in fast.modules():
        if isinstance(layer, nn.Conv3d | nn.InstanceNorm3d | TwoConv):
            layer.register_forward_hook(lambda _layer, _inputs, out: outputs.append(out))
    fast(torch.rand(2, 1, 32, 32, 32))
    assert len(outputs) > 23
    assert all(out.is_contiguous() for out in outputs)


def test_dropout_acts_without_gradient():
    """As in the second view of pre-training."""
    fast = accelerate(BasicUNet(3, 1, 2, (4, 4, 4, 8, 8, 4), dropout=0.5)).train()
    image = torch.rand(1, 1, 32, 32, 32)
    with torch.no_grad():
        assert not torch.equal(fast(image), fast(image))
        assert torch.equal(fast.eval()(image), fast(image))


@pytest.mark.parametrize("size", [(5, 6, 7), (1, 2, 3)])
def test_the_weight_gradient_is_that_of_the_convolution(size):
    torch.manual_seed(0)
    image, gradient = torch.randn(2, 3, *size, dtype=torch.float64), torch.randn(2, 4, *size, dtype=torch.float64)
    weight = torch.randn(4, 3, 3, 3, 3, dtype=torch.float64, requires_grad=True)
    F.conv3d(image, weight, padding=1).backward(gradient)
    torch.testing.assert_close(weight_gradient(image, gradient, block=16), weight.grad)


def test_convolutions_use_it_in_32_bit(monkeypatch):
    monkeypatch.setattr(FastConv3d, "slow_gradient", True)
    used = []
    monkeypatch.setattr(layers, "weight_gradient", lambda *args: used.append(1) or weight_gradient(*args))
    torch.manual_seed(0)
    plain = nn.Conv3d(16, 5, 3, padding=1)
    fast = accelerate(deepcopy(plain))
    image = torch.randn(2, 16, 6, 5, 7, requires_grad=True)
    found, expected = [], []
    for layer, values in ((plain, expected), (fast, found)):
        out = layer(image)
        values += [out, *torch.autograd.grad(out.square().sum(), [image, layer.weight, layer.bias])]
    assert used == [1]
    for a, b in zip(found, expected, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-3)


def test_the_attention_of_all_windows_is_never_kept():
    """Of 64 windows with 125 tokens and 3 heads, it would be 64 × 3 × 125² numbers."""
    sizes = []

    def keep(tensor):
        sizes.append(tensor.numel())
        return tensor

    attention = accelerate(SwinUNETR(1, 1, feature_size=12)).swinViT.layers1[0].blocks[0].attn
    windows = torch.rand(64, 125, 12, requires_grad=True)
    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        attention(windows, None)
    assert max(sizes) < 64 * 3 * 125**2 / 5


def test_a_block_keeps_the_outputs_of_its_convolutions_alone():
    """Those of 8 channels, and its input; not what norm and activation make of them."""
    kept = {}

    def keep(tensor):
        kept[tensor.untyped_storage()._cdata] = tensor
        return tensor

    block = accelerate(BasicUNet(3, 1, 1, (8, 8, 8, 8, 8, 8))).conv_0
    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        out = block(torch.rand(1, 1, 12, 12, 12))
    assert sum(tensor.numel() >= 8 * 12**3 for tensor in kept.values()) == 2
    assert out.untyped_storage()._cdata not in kept


def test_frozen_layers_and_single_gradients():
    torch.manual_seed(0)
    block = accelerate(BasicUNet(3, 1, 1, (8, 8, 8, 8, 8, 8))).conv_0
    image = torch.rand(1, 1, 12, 12, 12, requires_grad=True)
    expected = torch.autograd.grad(block(image).square().sum(), image)[0]
    for parameter in block.parameters():
        parameter.requires_grad_(False)
    torch.testing.assert_close(torch.autograd.grad(block(image).square().sum(), image)[0], expected)


@pytest.mark.parametrize("size", [20, 40])  # all channels of two crops at once; four at a time
def test_the_gradient_of_norm_and_activation(size):
    """In 32 bit, far from 0, with a scale of each channel's own."""
    torch.manual_seed(0)
    block = accelerate(BasicUNet(3, 1, 1, (8, 8, 8, 8, 8, 8))).conv_0.conv_0.adn
    with torch.no_grad():
        for parameter in block.parameters():
            parameter.normal_()
    image = (torch.randn(2, 8, size, size, size) * torch.rand(8, 1, 1, 1) + 5).requires_grad_()
    gradient = torch.randn_like(image)
    inputs = (image, *block.parameters())
    expected = torch.autograd.grad(block(image), inputs, gradient)
    found = torch.autograd.grad(_keep_input(block, image), inputs, gradient)
    for a, b in zip(found, expected, strict=True):
        wrong = (a - b).abs() > 1e-4 * b.abs().max()
        assert wrong.float().mean() < 1e-5  # but where rounding decides on which side of 0 a voxel lies


def test_scans_with_metadata_that_differ_can_be_learnt_from():
    block = accelerate(BasicUNet(3, 1, 1, (8, 8, 8, 8, 8, 8))).conv_0
    scans = [MetaTensor(torch.rand(1, 12, 12, 12), meta=meta) for meta in ({"sform_code": 1}, {"qform_code": 1})]
    batch = list_data_collate(scans)
    gradients = []
    for image in (batch, batch.as_tensor()):
        block.zero_grad()
        block(image).as_subclass(torch.Tensor).square().sum().backward()
        gradients.append([parameter.grad.clone() for parameter in block.parameters()])
    for found, expected in zip(*gradients, strict=True):
        torch.testing.assert_close(found, expected)


def test_hooks_on_the_parameters_are_called_once():
    """By the pass of the user, not by those that compute features again; so FLOPs can be counted as well."""
    block = accelerate(BasicUNet(3, 1, 1, (8, 8, 8, 8, 8, 8))).conv_0
    calls: dict[str, int] = {name: 0 for name, _ in block.named_parameters()}

    def count(name, gradient):
        calls[name] += 1

    for name, parameter in block.named_parameters():
        parameter.register_hook(partial(count, name))
    with FlopCounterMode(display=False):
        block(torch.rand(1, 1, 12, 12, 12)).square().sum().backward()
    assert set(calls.values()) == {1}


def test_dropout_drops_as_often_as_asked_and_keeps_the_mean():
    torch.manual_seed(0)
    layer = accelerate(nn.Dropout(0.1)).train()
    assert type(layer) is FastDropout
    image = torch.ones(1_000_003, requires_grad=True)
    out = layer(image)
    kept = out > 0
    assert abs(1 - kept.float().mean().item() - 0.1) < 0.001
    assert abs(out.mean().item() - 1) < 0.002
    assert (kept[1:] & kept[:-1]).float().mean().item() == pytest.approx(0.81, abs=0.002)  # neighbours: independent
    out.sum().backward()
    assert torch.equal(image.grad, out.detach())
    assert not torch.equal(layer(image), out)
    assert torch.equal(layer.eval()(image), image)


def test_dropout_leaves_channels_last():
    """As convolutions without gradient write them; else the next one would copy them back."""
    image = (torch.rand(2, 4, 5, 6, 7) + 1).contiguous(memory_format=layers.LAST)
    out = FastDropout(0.5).train()(image)
    assert out.is_contiguous(memory_format=layers.LAST)
    torch.testing.assert_close(out[out > 0], 2 * image[out > 0])


def test_a_part_of_the_means_changes_a_part_of_the_layers():
    network = BasicUNet(3, 1, 1, (4, 4, 4, 4, 4, 4))
    assert type(accelerate(deepcopy(network), means=[])) is BasicUNet
    kinds = {type(m).__name__ for m in accelerate(network, means=["norm"]).modules()}
    assert "FastInstanceNorm3d" in kinds
    assert not kinds & {"FastConv3d", "FastDropout", "FastConvTranspose3d", "FastUpCat"}
    assert set(MEANS) == set(layers._LAYERS)
