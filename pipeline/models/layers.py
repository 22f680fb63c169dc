"""Layers of PyTorch that auxiliary heads use at sizes for which PyTorch's own kernels are slow on a CPU.

Same parameters, same names, same function up to rounding:

* :class:`RowBatchNorm2d`: PyTorch's channels-last kernels take 8 channels at a time; at 12 channels, the width of
  InfoPro's decoder, their backward pass takes 5 times as long as at 16. Seen as a matrix with one image row of W x C
  values per matrix row, the same sums run over long contiguous rows.
* :class:`PointwiseConv2d`: a 1x1 convolution of a map of a few pixels costs oneDNN more preparation than arithmetic; as
  a matrix product it takes half the time.
* :class:`PairedConv2d`: a convolution to 3 channels, as at the end of InfoPro's decoder, fills 3 of the 8 lanes of a
  vector. Two neighbouring pixels at a time it fills 6.
* :class:`PoolTo2d`: the gradient of PyTorch's global pooling is a broadcast view, on which the ReLU before it is 20
  times slower than on a dense map; and pooling by whole windows needs no adaptive indices.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

from pipeline.models.tuned import Tuned

VECTOR = 8  # float32 values of an AVX2 register; PyTorch's kernels are fast at multiples of it


def _rows(x: Tensor) -> Tensor:
    """(B, C, H, W), channels last, as (B H, W C); a view."""
    batch, channels, height, width = x.shape
    return x.permute(0, 2, 3, 1).reshape(batch * height, width * channels)


class _RowBatchNorm(torch.autograd.Function):
    """``(x, weight, bias, eps) -> y, mean, variance`` (biased) over all but the channels of a channels-last map."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, bias: Tensor, eps: float) -> tuple[Tensor, Tensor, Tensor]:
        width, channels = x.size(3), x.size(1)
        count = x.numel() // channels
        rows = _rows(x)
        mean = rows.sum(dim=0).view(width, channels).sum(dim=0) / count
        centred = rows - mean.repeat(width)
        variance = (centred * centred).sum(dim=0).view(width, channels).sum(dim=0) / count
        inverse = torch.rsqrt(variance + eps)
        y = torch.empty_like(x)
        torch.addcmul(bias.repeat(width), centred, (weight * inverse).repeat(width), out=_rows(y))
        ctx.save_for_backward(centred, weight, inverse)
        ctx.mark_non_differentiable(mean, variance)
        return y, mean, variance

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient: Tensor, *_: Tensor) -> tuple[Tensor, Tensor, Tensor, None]:
        centred, weight, inverse = ctx.saved_tensors
        width, channels = gradient.size(3), gradient.size(1)
        count = gradient.numel() // channels
        rows = _rows(gradient.contiguous(memory_format=torch.channels_last))
        bias_gradient = rows.sum(dim=0).view(width, channels).sum(dim=0)
        product = (rows * centred).sum(dim=0).view(width, channels).sum(dim=0)
        scale = weight * inverse
        offset = -scale * bias_gradient / count
        slope = -scale * inverse.square() * product / count
        x = torch.empty_like(gradient, memory_format=torch.channels_last)
        torch.addcmul(offset.repeat(width), centred, slope.repeat(width), out=_rows(x))
        _rows(x).addcmul_(rows, scale.repeat(width))
        return x, product * inverse, bias_gradient, None


class RowBatchNorm2d(nn.BatchNorm2d, Tuned):
    """``nn.BatchNorm2d`` that trains by rows where that is faster; the same function up to rounding.

    Gains 1.03 to 1.04 on InfoPro's heads on whole features and on patches one by one; on patches at once it does not
    run (``benchmarks/heads.py``, AVX-512).
    """

    tuned = "batch-norm"

    def plain(self) -> nn.Module:
        return self._shared_with(nn.BatchNorm2d(self.num_features, self.eps, self.momentum, device="meta"))

    def forward(self, x: Tensor) -> Tensor:
        """(B, C, H, W) -> the same shape."""
        if not self._by_rows(x):
            return super().forward(x)
        assert self.momentum is not None and self.num_batches_tracked is not None
        assert self.running_mean is not None and self.running_var is not None
        outputs: tuple[Tensor, Tensor, Tensor] = _RowBatchNorm.apply(x, self.weight, self.bias, self.eps)
        y, mean, variance = outputs
        count = x.numel() // x.size(1)
        self.num_batches_tracked += 1
        self.running_mean.lerp_(mean, self.momentum)
        self.running_var.lerp_(variance * (count / (count - 1)), self.momentum)  # unbiased, as PyTorch's
        return y

    def _by_rows(self, x: Tensor) -> bool:
        return (
            self.training
            and self.momentum is not None
            and x.device.type == "cpu"
            and x.dtype == self.weight.dtype
            and x.size(1) % VECTOR != 0
            and x.numel() > x.size(1)
            and x.is_contiguous(memory_format=torch.channels_last)
        )


class PointwiseConv2d(nn.Conv2d, Tuned):
    """A 1x1 convolution without bias; on channels-last maps one matrix product over all pixels.

    Gains 1.14 on the heads of DGL + HPFF, 1.04 on a step (``benchmarks/heads.py``, AVX-512).
    """

    tuned = "pointwise"

    def __init__(self, in_channels: int, out_channels: int) -> None:
        super().__init__(in_channels, out_channels, 1, bias=False)

    def plain(self) -> nn.Module:
        return self._shared_with(nn.Conv2d(self.in_channels, self.out_channels, 1, bias=False, device="meta"))

    def forward(self, x: Tensor) -> Tensor:
        """(B, C, H, W) -> (B, O, H, W)."""
        if x.device.type != "cpu" or not x.is_contiguous(memory_format=torch.channels_last):
            return super().forward(x)
        return F.linear(x.permute(0, 2, 3, 1), self.weight.flatten(1)).permute(0, 3, 1, 2)


class _PairedConvolution(torch.autograd.Function):
    """``(x, weight, bias) -> y``: a 3x3 convolution, zero padded, of a channels-last map (B, C, H, W) with even W.

    Output pixels 2 i and 2 i + 1 together see 4 input columns, so they are one pixel of a convolution with twice the
    channels, kernel 3x4 and stride (1, 2). In channels-last memory its output is that of the plain convolution.

        columns of the kernel of pixel 2 i:      k0 k1 k2  0
        columns of the kernel of pixel 2 i + 1:   0 k0 k1 k2
    """

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
        kernel = _pair_kernel(weight)
        ctx.save_for_backward(x, weight, kernel)
        return _split_pairs(F.conv2d(x, kernel, bias.repeat(2), stride=(1, 2), padding=1))

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, Tensor, Tensor]:
        x, weight, kernel = ctx.saved_tensors
        out = weight.size(0)
        gradient = gradient.contiguous(memory_format=torch.channels_last)
        batch, _, height, width = gradient.shape
        pairs = gradient.permute(0, 2, 3, 1).reshape(batch, height, width // 2, 2 * out).permute(0, 3, 1, 2)
        _, both, _ = torch.ops.aten.convolution_backward(
            pairs, x, kernel, [0], [1, 2], [1, 1], [1, 1], False, [0, 0], 1, [False, True, False]
        )
        weight_gradient = both[:out, :, :, :3] + both[out:, :, :, 1:]
        bias_gradient = _rows(gradient).sum(dim=0).view(width, out).sum(dim=0)
        if not ctx.needs_input_grad[0]:
            return None, weight_gradient, bias_gradient
        turned = _pair_kernel(weight.flip(2, 3).transpose(0, 1))  # the transposed convolution is one of these too
        upstream = _split_pairs(F.conv2d(gradient, turned, stride=(1, 2), padding=1))
        return upstream, weight_gradient, bias_gradient


def _pair_kernel(weight: Tensor) -> Tensor:
    """(O, C, 3, 3) -> (2 O, C, 3, 4), channels last."""
    kernel = torch.cat([F.pad(weight, (0, 1)), F.pad(weight, (1, 0))])
    return kernel.contiguous(memory_format=torch.channels_last)


def _split_pairs(pairs: Tensor) -> Tensor:
    """(B, 2 O, H, W / 2) -> (B, O, H, W), both channels last; a view."""
    batch, both, height, half = pairs.shape
    nhwc = pairs.contiguous(memory_format=torch.channels_last).permute(0, 2, 3, 1)
    return nhwc.reshape(batch, height, 2 * half, both // 2).permute(0, 3, 1, 2)


class PairedConv2d(nn.Conv2d, Tuned):
    """A 3x3 convolution with zero padding and bias, two pixels at a time where that is faster.

    Gains 1.03 on InfoPro's heads on whole features and on patches one by one; on patches at once it does not run
    (``benchmarks/heads.py``, AVX-512).
    """

    tuned = "paired"

    def __init__(self, in_channels: int, out_channels: int) -> None:
        super().__init__(in_channels, out_channels, 3, padding=1)

    def plain(self) -> nn.Module:
        return self._shared_with(nn.Conv2d(self.in_channels, self.out_channels, 3, padding=1, device="meta"))

    def forward(self, x: Tensor) -> Tensor:
        """(B, C, H, W) -> (B, O, H, W)."""
        if not self._fits(x):
            return super().forward(x)
        y: Tensor = _PairedConvolution.apply(x, self.weight, self.bias)
        return y

    def _fits(self, x: Tensor) -> bool:
        return (
            x.device.type == "cpu"
            and x.dtype == self.weight.dtype
            and not torch.is_autocast_enabled("cpu")
            and 2 * self.out_channels <= VECTOR
            and x.size(3) % 2 == 0
            and x.is_contiguous(memory_format=torch.channels_last)
        )


class _GlobalMean(torch.autograd.Function):
    """(B, C, H, W) -> (B, C, 1, 1) with a dense gradient in the layout of the input."""

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        ctx.shape = x.shape
        nhwc = x.is_contiguous(memory_format=torch.channels_last)
        ctx.layout = torch.channels_last if nhwc else torch.contiguous_format
        return x.mean(dim=(2, 3), keepdim=True)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient: Tensor) -> Tensor:
        share = gradient / (ctx.shape[2] * ctx.shape[3])
        dense: Tensor = share.expand(ctx.shape).contiguous(memory_format=ctx.layout)
        return dense


class PoolTo2d(nn.AdaptiveAvgPool2d, Tuned):
    """``nn.AdaptiveAvgPool2d`` to ``sides``, one number or (height, width), with the cheapest exact operation for the
    size at hand.

    Gains 1.35 on the heads of DGL + HPFF, 1.07 on those of InfoPro + HPFF (``benchmarks/heads.py``, AVX-512).
    """

    tuned = "pooling"

    def __init__(self, sides: int | tuple[int, int]) -> None:
        super().__init__(sides)
        self.sides = (sides, sides) if isinstance(sides, int) else sides

    def plain(self) -> nn.Module:
        return nn.AdaptiveAvgPool2d(self.sides).train(self.training)

    def forward(self, x: Tensor) -> Tensor:
        """(B, C, H, W) -> (B, C, *sides)."""
        size, (rows, columns) = (x.size(2), x.size(3)), self.sides
        if size == self.sides:
            return x
        if size == (1, 1):
            return x.expand(-1, -1, rows, columns)
        if self.sides == (1, 1):
            pooled: Tensor = _GlobalMean.apply(x)
            return pooled
        if size[0] % rows == 0 and size[1] % columns == 0:
            return F.avg_pool2d(x, (size[0] // rows, size[1] // columns))
        return super().forward(x)


class VectorInput(nn.Module):
    """Views a vector feature (B, D) as a map (B, D, 1, 1), so that heads for maps serve flat modules too; of a sequence
    (B, T, D) the mean over its T tokens."""

    def forward(self, x: Tensor) -> Tensor:
        x = x.mean(dim=1) if x.dim() == 3 else x
        return x[:, :, None, None] if x.dim() == 2 else x
