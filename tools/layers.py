"""Layers of MONAI's networks, computed in less time and memory: the same parameters, the same numbers up to rounding.

`accelerate` gives the layers of a network faster `forward`s. The state dict does not change, so weights load into plain
MONAI networks and back. What is faster, and by how much, is measured by `python -m benchmarks.pretrain_step`.
"""

from __future__ import annotations

import math
from collections.abc import Collection, Iterator
from typing import Any

import torch
import torch.nn.functional as F
from monai.networks.blocks.dynunet_block import UnetResBlock
from monai.networks.nets.basic_unet import TwoConv, UpCat
from monai.networks.nets.swin_unetr import SwinTransformerBlock, WindowAttention
from torch import Tensor, nn
from torch.func import functional_call
from torch.utils.checkpoint import checkpoint

LAST = torch.channels_last_3d
MEANS = ("norm", "deconvolution", "weight_gradient", "dropout", "pooling", "attention", "padding", "activations")
SCORES = {"cpu": 2**19, "cuda": 2**28}  # attention scores at a time: as many as stay in the cache; 1 GB


def accelerate(network: nn.Module, checkpointing: bool = False, means: Collection[str] = MEANS) -> nn.Module:
    """Give the layers of a network faster `forward`s, in place, and return it.

    Args:
        network: any network; layers of other kinds stay as they are.
        checkpointing: whether to compute the features inside blocks again in the backward pass, not to keep them.
        means: which layers to change, of `MEANS`.
    """
    layers = _BLOCKS * checkpointing + [_LAYERS[name] for name in means]
    for module in network.modules():
        for old, new in layers:
            if type(module) is old:
                module.__class__ = new
    return network


def channels_last(input: Tensor) -> bool:
    """Whether a layer computes with the channels of a voxel side by side: on CPUs, without gradient.

    Convolutions of few channels take a bit more than half the time so. Training keeps the usual layout, which its norms
    and the weight gradient are made for.
    """
    known = input.dtype in (torch.float32, torch.float64, torch.bfloat16)
    return input.is_cpu and input.ndim == 5 and known and not torch.is_grad_enabled()


def _last(tensor: Tensor) -> Tensor:
    """The same numbers, channels last."""
    c, h, w, d = tensor.shape[1:]
    if c == 1:  # already so, but PyTorch tells it from the strides
        return tensor.contiguous().as_strided(tensor.shape, (h * w * d, 1, w * d, d, 1))
    return tensor.contiguous(memory_format=LAST)


class FastInstanceNorm3d(nn.InstanceNorm3d):
    """Instance norm as a group norm of one channel per group, which PyTorch computes in half the time on CPUs."""

    def forward(self, input: Tensor) -> Tensor:
        """[B, C, H, W, D] → same shape."""
        if not input.is_cpu or self.track_running_stats:  # on GPUs, autocast would compute a group norm in 32 bit
            return super().forward(input)
        if self.takes(input):
            return self.normalize(input, torch.empty_like(input))
        return F.group_norm(input, input.shape[1], self.weight, self.bias, self.eps)

    def takes(self, input: Tensor) -> bool:
        """Whether `normalize` takes it: it comes from a layer that computed channels last, in more than 8 bits."""
        last = not input.is_contiguous() and input.is_contiguous(memory_format=LAST)
        return last and channels_last(input) and input.dtype != torch.bfloat16

    def normalize(self, input: Tensor, out: Tensor) -> Tensor:
        """Write the normalised input, channels last, to `out`, which may be the input.

        PyTorch's own norms add up all voxels in one number in this layout, and are wrong in the fourth digit. This adds
        up by planes, and takes the mean away before it squares, so that a large mean does not hide a small variance.
        """
        mean = input.mean((2, 3, 4))
        variance = torch.zeros_like(mean)
        for crop, centre, total in zip(input, mean[..., None, None], variance, strict=True):
            for plane in crop.unbind(1):
                total += (plane - centre).square_().sum((1, 2))
        scale = (variance / input[0, 0].numel()).add_(self.eps).rsqrt_()
        scale = scale if self.weight is None else scale * self.weight
        shift = -mean * scale if self.bias is None else self.bias - mean * scale
        return torch.addcmul(shift[..., None, None, None], input, scale[..., None, None, None], out=out)


class FastConvTranspose3d(nn.ConvTranspose3d):
    """Transposed convolution whose windows do not overlap, as one matrix product, on CPUs."""

    def forward(self, input: Tensor, output_size: list[int] | None = None) -> Tensor:
        """[B, C, H, W, D] → [B, F, 2H, 2W, 2D] (for a kernel of 2)."""
        if not (input.is_cpu and self.disjoint):
            return super().forward(input, output_size)
        b, _, *size = input.shape
        k, f = self.kernel_size, self.out_channels
        whole = [s * n for s, n in zip(size, k, strict=True)]
        if channels_last(input):
            return self.write(input, input.new_empty(b, *whole, f).permute(0, 4, 1, 2, 3))
        windows = (self.weight.flatten(1).T @ input.flatten(2)).view(b, f, *k, *size)
        out = windows.permute(0, 1, 5, 2, 6, 3, 7, 4)
        if self.bias is not None:
            out = out + self.bias.to(out.dtype).view(-1, *[1] * 6)
        return out.reshape(b, f, *whole)

    @property
    def disjoint(self) -> bool:
        """Whether windows neither overlap nor have gaps."""
        plain = self.kernel_size == self.stride and self.groups == 1 and self.dilation == (1, 1, 1)
        return plain and not any(self.padding) and not any(self.output_padding)

    def write(self, input: Tensor, out: Tensor) -> Tensor:
        """Write the output for input [B, C, H, W, D] to `out` [B, F, 2H, 2W, 2D], which may be channels of another."""
        b, _, *size = input.shape
        k, f = self.kernel_size, self.out_channels
        bias = None if self.bias is None else self.bias.repeat(math.prod(k))
        windows = F.linear(input.permute(0, 2, 3, 4, 1), self.weight.permute(2, 3, 4, 1, 0).flatten(0, 3), bias)
        blocks = out
        for axis, n in enumerate(k):
            blocks = blocks.unflatten(2 + 2 * axis, (-1, n))  # [B, F, H, 2, W, 2, D, 2]
        blocks.copy_(windows.view(b, *size, *k, f).permute(0, 7, 1, 4, 2, 5, 3, 6))
        return out


class FastDropout(nn.Dropout):
    """Dropout from 16 random bits per element, on CPUs; the probability is rounded to a multiple of 2⁻¹⁶."""

    def forward(self, input: Tensor) -> Tensor:
        """Any shape → same shape."""
        if not (input.is_cpu and self.training and 0 < self.p < 1):
            return super().forward(input)
        dropped, count = round(self.p * 2**16), input.numel()
        bits = torch.empty(-(-count // 4), dtype=torch.int64).random_(-(2**63), None).view(torch.int16)
        strides = torch.empty_like(input, device="meta").stride()  # channels last stay so
        kept = (bits[:count] >= dropped - 2**15).as_strided(input.shape, strides)
        return _Dropout.apply(input, kept, 2**16 / (2**16 - dropped))


class _Dropout(torch.autograd.Function):
    """What is kept, scaled. PyTorch's product of a number and a truth value takes twice the time."""

    @staticmethod
    def forward(ctx: Any, image: Tensor, kept: Tensor, scale: float) -> Tensor:
        ctx.save_for_backward(kept)
        ctx.scale = scale
        return kept.to(image.dtype).mul_(image).mul_(scale)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None, None]:
        (kept,) = ctx.saved_tensors
        return kept.to(gradient.dtype).mul_(gradient).mul_(ctx.scale), None, None


class FastConv3d(nn.Conv3d):
    """Convolution, channels last where there is no gradient, and else with a weight gradient of our own.

    That is a sum of matrix products, where PyTorch has no kernel of its own for it: on x86 CPUs without AVX-512, in 32
    bit, for kernels of 3 with a stride and a padding of 1. In bfloat16, PyTorch's own is wrong where a volume is
    `too_flat`.
    """

    slow_gradient = torch.backends.cpu.get_cpu_capability() == "AVX2"

    def forward(self, input: Tensor) -> Tensor:
        """[B, C, H, W, D] → [B, F, H, W, D] (for a padding of 1)."""
        kind = (self.kernel_size, self.stride, self.padding, self.dilation)
        if not input.is_cpu or input.ndim != 5 or self.groups != 1 or self.padding_mode != "zeros":
            return super().forward(input)
        if channels_last(input):
            if kind == ((1,) * 3, (1,) * 3, (0,) * 3, (1,) * 3):  # a matrix product
                return F.linear(input.permute(0, 2, 3, 4, 1), self.weight.flatten(1), self.bias).permute(0, 4, 1, 2, 3)
            return self._conv_forward(_last(input), _last(self.weight), self.bias)
        if self.too_flat(input):
            ends = self.padding[0]
            input = F.pad(input, (0, 0, 0, 0, ends, ends))
            return F.conv3d(input, self.weight, self.bias, self.stride, (0, *self.padding[1:]), self.dilation)
        plain = kind == ((3,) * 3, (1,) * 3, (1,) * 3, (1,) * 3) and self.in_channels >= 16
        single = input.dtype == torch.float32 and not torch.is_autocast_enabled("cpu")
        if self.slow_gradient and plain and single and torch.is_grad_enabled() and self.weight.requires_grad:
            return _Convolution.apply(input, self.weight, self.bias)
        return super().forward(input)

    def too_flat(self, input: Tensor) -> bool:
        """Whether oneDNN's weight gradient in bfloat16 would read memory that nobody wrote (PyTorch 2.13, AVX-512).

        It does where the first side of the volume is shorter than the kernel, as at a bottleneck of 2×2×2, unless the
        padding is part of the volume: gradients change from call to call, and some are not finite.
        """
        low = input.dtype == torch.bfloat16 or torch.is_autocast_enabled("cpu")
        return low and torch.is_grad_enabled() and bool(self.padding[0]) and input.shape[2] < self.kernel_size[0]


class _Convolution(torch.autograd.Function):
    """3×3×3 convolution with stride 1 and padding 1."""

    @staticmethod
    def forward(ctx: Any, image: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        ctx.save_for_backward(image, weight)
        return F.conv3d(image, weight, bias, padding=1)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
        image, weight = ctx.saved_tensors
        by_image, by_weight, by_bias = ctx.needs_input_grad
        first = last = None
        if by_image:
            first = torch.nn.grad.conv3d_input(image.shape, weight, gradient, padding=1)
        if by_bias:
            last = gradient.sum((0, 2, 3, 4))
        return first, weight_gradient(image, gradient) if by_weight else None, last


def weight_gradient(image: Tensor, gradient: Tensor, block: int = 4096) -> Tensor:
    """Gradient [F, C, 3, 3, 3] of a convolution's weight, from its input [B, C, …] and its output's gradient [B, F, …].

    In volumes that were padded and flattened, a shift by a voxel is an offset. So the gradient of each of the 27
    weights is the product of the output's gradient and the input at an offset. A few planes are padded at a time, and
    a block of voxels stays in the cache for all 27.
    """
    h, w, d = image.shape[2:]
    volume, row = (w + 2) * (d + 2), d + 2
    offsets = [x * volume + y * row + z for x in range(3) for y in range(3) for z in range(3)]
    planes = max(1, block // volume)
    products = image.new_zeros(27, gradient.shape[1], image.shape[1])
    for inputs, outputs in zip(image, gradient, strict=True):
        for top in range(0, h, planes):
            bottom = min(top + planes, h)
            above, below = max(top - 1, 0), min(bottom + 1, h)
            around = F.pad(inputs[:, above:below], (1, 1, 1, 1, above - top + 1, bottom + 1 - below)).flatten(1)
            slab = F.pad(outputs[:, top:bottom], (0, 2, 0, 2)).flatten(1)
            voxels = (bottom - top - 1) * volume + (w - 1) * row + d
            for start in range(0, voxels, block):
                stop = min(start + block, voxels)
                for product, offset in zip(products, offsets, strict=True):
                    product.addmm_(slab[:, start:stop], around[:, start + offset : stop + offset].T)
    return products.permute(1, 2, 0).reshape(gradient.shape[1], image.shape[1], 3, 3, 3)


class FastMaxPool3d(nn.MaxPool3d):
    """Maximum in the type of its input: CPUs' autocast would convert to 32 bit, which changes no maximum."""

    def forward(self, input: Tensor) -> Tensor:
        """[B, C, H, W, D] → [B, C, H/2, W/2, D/2] (for a kernel of 2)."""
        with torch.autocast("cpu", enabled=False):
            return super().forward(input)


class FastUpCat(UpCat):
    """UNet's upsampling, without a copy of the features where nothing has to be padded.

    Without gradient, the upsampled features are written to their place beside those of the encoder.
    """

    def forward(self, x: Tensor, x_e: Tensor | None) -> Tensor:
        """Features [B, F, H, W, D], and those of the encoder [B, E, 2H, 2W, 2D] → [B, O, 2H, 2W, 2D]."""
        if x_e is None or any(2 * s != e for s, e in zip(x.shape[2:], x_e.shape[2:], strict=True)):
            return super().forward(x, x_e)
        up, e = self.upsample[0], x_e.shape[1]
        if channels_last(x) and len(self.upsample) == 1 and isinstance(up, FastConvTranspose3d) and up.disjoint:
            both = x_e.new_empty(len(x_e), *x_e.shape[2:], e + up.out_channels).permute(0, 4, 1, 2, 3)
            both[:, :e] = x_e
            up.write(x, both[:, e:])
            return self.convs(both)
        return self.convs(torch.cat([x_e, self.upsample(x)], dim=1))


class FastTwoConv(TwoConv):
    """Two convolutions of a UNet that keep the outputs of the convolutions alone for the backward pass.

    Norm and activation, which are cheap, are computed again from these (as in arXiv 1712.02616), where the block has no
    dropout.
    """

    def forward(self, x: Tensor) -> Tensor:
        """[B, C, H, W, D] → [B, F, H, W, D]."""
        if channels_last(x):
            for block in (self.conv_0, self.conv_1):
                x = block.conv(x)
                for layer in block.adn:  # the convolution's output is nobody else's
                    in_place = isinstance(layer, FastInstanceNorm3d) and layer.takes(x)
                    x = layer.normalize(x, x) if in_place else layer(x)
            return x
        drops = any(isinstance(layer, nn.Dropout) and layer.p > 0 for layer in self.modules())
        if drops or not torch.is_grad_enabled():
            return super().forward(x)
        first, second = self.conv_0.adn, self.conv_1.adn
        before = self.conv_0.conv(x)
        between = _keep_input(first, before)
        own = between.untyped_storage()._cdata

        def keep(tensor: Tensor) -> Tensor | None:
            return None if tensor.untyped_storage()._cdata == own else tensor

        def again(kept: Tensor | None) -> Tensor:
            return first(before.detach()) if kept is None else kept

        with torch.autograd.graph.saved_tensors_hooks(keep, again):
            after = self.conv_1.conv(between)
        return _keep_input(second, after)


def _keep_input(layers: nn.Sequential, image: Tensor) -> Tensor:
    """Norm and activation of `image` [B, C, H, W, D], which keep nothing else for the backward pass."""
    parts = [layer for layer in layers if not isinstance(layer, nn.Dropout)]  # FastTwoConv sees to its probability
    plain = image.is_cpu and image.dtype in (torch.float32, torch.float64)
    if plain and list(map(type, parts)) == [FastInstanceNorm3d, nn.LeakyReLU]:
        norm, activation = parts
        if norm.affine and not norm.track_running_stats:
            return _NormActivation.apply(image, norm.weight, norm.bias, norm.eps, activation.negative_slope)
    return _Recomputed.apply(image, layers, *layers.parameters())


class _NormActivation(torch.autograd.Function):
    """Instance norm and leaky ReLU, whose backward pass takes a few channels at a time, which stay in the cache."""

    @staticmethod
    def forward(ctx: Any, image: Tensor, weight: Tensor, bias: Tensor, eps: float, slope: float) -> Tensor:
        crops, channels, *size = image.shape
        normed, mean, scale = torch.native_group_norm(
            image, weight, bias, crops, channels, math.prod(size), channels, eps
        )
        ctx.save_for_backward(image, weight, bias, mean, scale)
        ctx.slope = slope
        return F.leaky_relu_(normed, slope)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, ...]:
        # MONAI's tensors would look for the metadata of every row
        image, weight, bias, mean, scale, gradient = (t.as_subclass(Tensor) for t in (*ctx.saved_tensors, gradient))
        crops, channels = image.shape[:2]
        rows, gradients = image.flatten(2).flatten(0, 1), gradient.flatten(2).flatten(0, 1)
        voxels = rows.shape[1]
        weight, bias, mean, scale = weight.repeat(crops), bias.repeat(crops), mean.flatten(), scale.flatten()
        by_image, by_weight, by_bias = torch.empty_like(rows), torch.empty_like(weight), torch.empty_like(bias)
        step = max(1, 2**18 // voxels)
        for part in (slice(start, start + step) for start in range(0, len(rows), step)):
            few, centre, spread, w = rows[part], mean[part], scale[part], weight[part]
            before = (few - centre[:, None]).mul_((spread * w)[:, None]).add_(bias[part, None])
            grad = torch.ops.aten.leaky_relu_backward(gradients[part], before, ctx.slope, False)
            norm = (grad[None], few[None], centre[None], spread[None], w, 1, len(few), voxels, len(few), [True] * 3)
            by_image[part], by_weight[part], by_bias[part] = torch.ops.aten.native_group_norm_backward(*norm)
        sums = (by.view(crops, channels).sum(0) for by in (by_weight, by_bias))
        return by_image.view_as(image), *sums, None, None


class _Recomputed(torch.autograd.Function):
    """A layer that keeps its input alone, and computes the rest again in the backward pass."""

    @staticmethod
    def forward(ctx: Any, image: Tensor, layer: nn.Module, *parameters: Tensor) -> Tensor:
        ctx.save_for_backward(image, *parameters)
        ctx.layer = layer
        return layer(image)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, ...]:
        # Leaves of their own, so that hooks on the parameters are called once, by the pass that this is a part of.
        leaves = [t.detach().requires_grad_(t.requires_grad) for t in ctx.saved_tensors]
        image, *parameters = leaves
        image.requires_grad_()
        names = [name for name, _ in ctx.layer.named_parameters()]
        with torch.enable_grad():
            again = functional_call(ctx.layer, dict(zip(names, parameters, strict=True)), image)
        torch.autograd.backward(again, gradient)
        return image.grad, None, *(parameter.grad for parameter in parameters)


class FastWindowAttention(WindowAttention):
    """Swin's window attention, a few windows at a time; the backward pass computes the attention again.

    So the attention of all windows, which is most of SwinUNETR's memory, never exists (as in FlashAttention, arXiv
    2205.14135, Section 3.1), and that of a few windows stays in the cache.
    """

    def forward(self, x: Tensor, mask: Tensor | None) -> Tensor:
        """Windows [B·W, N, C], mask [W, N, N] of shifted windows → [B·W, N, C]."""
        if self.training and self.attn_drop.p > 0:
            return super().forward(x, mask)
        b, n, c = x.shape
        qkv = self.qkv(x).view(b, n, 3, self.num_heads, c // self.num_heads).permute(2, 0, 3, 1, 4)
        index = self.relative_position_index[:n, :n].reshape(-1)
        bias = self.relative_position_bias_table[index].view(n, n, -1).permute(2, 0, 1).contiguous()
        x = _Attention.apply(qkv, bias, mask, self.scale)
        return self.proj_drop(self.proj(x.transpose(1, 2).reshape(b, n, c)))


class _Attention(torch.autograd.Function):
    """Attention with a bias; qkv [3, B·W, heads, N, E], bias [heads, N, N], mask [W, N, N] → [B·W, heads, N, E]."""

    @staticmethod
    def forward(ctx: Any, qkv: Tensor, bias: Tensor, mask: Tensor | None, scale: float) -> Tensor:
        out = qkv.new_empty(qkv.shape[1:])
        for part, offset in _parts(qkv, bias, mask):
            q, k, v = qkv[:, part]
            out[part] = F.scaled_dot_product_attention(q, k, v, attn_mask=offset.to(q.dtype), scale=scale)
        ctx.save_for_backward(qkv, bias, mask, out)
        ctx.scale = scale
        return out

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, Tensor, None, None]:
        qkv, bias, mask, out = ctx.saved_tensors
        by_qkv, by_bias = torch.empty_like(qkv), torch.zeros_like(bias)
        for part, offset in _parts(qkv, bias, mask):
            (q, k, v), grad = qkv[:, part].contiguous(), gradient[part].contiguous()
            attention = ((q * ctx.scale) @ k.mT).float().add_(offset).softmax(-1)
            by_qkv[2, part] = attention.to(grad.dtype).mT @ grad
            scores = (grad @ v.mT).float().sub_((grad * out[part]).sum(-1, keepdim=True)).mul_(attention)
            by_bias += scores.sum(0)
            scores = scores.mul_(ctx.scale).to(q.dtype)
            by_qkv[0, part] = scores @ k
            by_qkv[1, part] = scores.mT @ q
        return by_qkv, by_bias, None, None


def _parts(qkv: Tensor, bias: Tensor, mask: Tensor | None) -> Iterator[tuple[slice, Tensor]]:
    """A few windows at a time, and what is added to their scores, [windows or 1, heads, N, N]."""
    total = qkv.shape[1]
    group = total if mask is None else len(mask)
    few = max(1, SCORES["cpu" if qkv.is_cpu else "cuda"] // bias.numel())
    for first in range(0, total, group):
        for start in range(0, group, few):
            stop = min(start + few, group)
            offset = bias[None] if mask is None else bias + mask[start:stop, None]
            yield slice(first + start, first + stop), offset


class _Checkpointed:
    """A block that keeps its input alone for the backward pass, and computes the rest again (arXiv 1604.06174)."""

    def forward(self, *inputs: Tensor) -> Tensor:
        """As the block's."""
        if not torch.is_grad_enabled():
            return super().forward(*inputs)
        return checkpoint(super().forward, *inputs, use_reentrant=False)


class CheckpointedTwoConv(_Checkpointed, TwoConv):
    """Two convolutions of a UNet."""


class CheckpointedBlock(_Checkpointed, UnetResBlock):
    """Residual block of a SwinUNETR or UNETR."""


class CheckpointedSwinBlock(_Checkpointed, SwinTransformerBlock):
    """Transformer block of a SwinUNETR."""


_BLOCKS = [
    (TwoConv, CheckpointedTwoConv),
    (UnetResBlock, CheckpointedBlock),
    (SwinTransformerBlock, CheckpointedSwinBlock),
]
_LAYERS = {
    "norm": (nn.InstanceNorm3d, FastInstanceNorm3d),
    "deconvolution": (nn.ConvTranspose3d, FastConvTranspose3d),
    "weight_gradient": (nn.Conv3d, FastConv3d),
    "dropout": (nn.Dropout, FastDropout),
    "pooling": (nn.MaxPool3d, FastMaxPool3d),
    "attention": (WindowAttention, FastWindowAttention),
    "padding": (UpCat, FastUpCat),
    "activations": (TwoConv, FastTwoConv),
}
