"""Networks of auxiliary heads on many patches at once: every patch is a group of channels.

    map (B, G C, h, w)      rows (B, G F)      sequence (B, t, G D)      G patches, of W networks in turn

    convolution       groups = G                             one kernel for all groups, or one for each of W networks
    BatchNorm         G C channels: statistics of each patch, as if it came alone, and in the end the running ones too
    linear            (B G, F) rows
    pooling, ReLU     as they are

Group g has the weights of network g mod W. The arithmetic is that of the networks on one patch after another; sums are
taken in another order, so the bits differ. Only layers that are listed here run so (:func:`can_group`); whatever draws
random numbers or mixes channels in another way does not.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

from pipeline.models.layers import PairedConv2d, PointwiseConv2d, PoolTo2d, RowBatchNorm2d, VectorInput
from pipeline.models.upsampling import FactorisedConv2d, UpsampledConv2d

CONVOLUTIONS = (nn.Conv2d, PairedConv2d, PointwiseConv2d)
NORMS = (nn.BatchNorm1d, nn.BatchNorm2d, RowBatchNorm2d)
ELEMENTWISE = (nn.Identity, nn.ReLU, nn.ReLU6, nn.LeakyReLU, nn.GELU, nn.SiLU, nn.Tanh, nn.Sigmoid)
PER_CHANNEL = (*ELEMENTWISE, nn.AvgPool2d, nn.MaxPool2d, nn.AdaptiveAvgPool2d, PoolTo2d, nn.Flatten)


def can_group(network: nn.Module, dims: int) -> bool:
    """Whether :func:`run` gives what ``network`` gives patch by patch on features of ``dims`` dimensions with the
    batch: 4 of a map, 3 of a sequence."""
    for layer in flat(network):
        if not _known(layer) or layer._forward_hooks or layer._forward_pre_hooks:
            return False
        if dims == 3 and type(layer) is not nn.Linear and type(layer) not in ELEMENTWISE:
            if type(layer) is not VectorInput:
                return False
            dims = 4
    return True


def _known(layer: nn.Module) -> bool:
    if type(layer) in CONVOLUTIONS:
        assert isinstance(layer, nn.Conv2d)
        # a strided 1x1 kernel: see narrow_strided_convolution in pipeline.base.numerics
        strided = layer.kernel_size == (1, 1) and max(layer.stride) > 1
        return layer.groups == 1 and layer.padding_mode == "zeros" and not strided
    if type(layer) in NORMS:
        assert isinstance(layer, nn.BatchNorm1d | nn.BatchNorm2d)
        return layer.affine and layer.track_running_stats and layer.momentum is not None
    if type(layer) is nn.Flatten:
        return (layer.start_dim, layer.end_dim) == (1, -1)
    return type(layer) in (*PER_CHANNEL, nn.Linear, VectorInput)


def flat(network: nn.Module) -> Iterator[nn.Module]:
    """The layers of nested ``nn.Sequential`` in order; a network of another kind is one layer."""
    if type(network) is nn.Sequential:
        for layer in network:
            yield from flat(layer)
    else:
        yield network


def run(networks: Sequence[Sequence[nn.Module]], x: Tensor, groups: int) -> Tensor:
    """W networks of one structure, in training mode, on G patches; group g goes through network g mod W.

    Args:
        networks: the layers of each, as :func:`flat` gives them; they can be grouped (:func:`can_group`).
        x: (B, G C, h, w), of a sequence (B, t, G D).
        groups: G, a multiple of W.
    """
    statistics = RunningStatistics(groups // len(networks))
    for layers in zip(*networks, strict=True):
        first = layers[0]
        if isinstance(first, nn.Conv2d):
            x = convolution(layers, x, groups)
        elif isinstance(first, nn.BatchNorm1d | nn.BatchNorm2d):
            x = _batch_norm(layers, x, groups, statistics)
        elif isinstance(first, nn.Linear):
            x = _linear(layers, x, groups)
        else:
            x = first(x)
    statistics.move()
    return x


def convolution(layers: Sequence[nn.Conv2d], x: Tensor, groups: int) -> Tensor:
    """(B, G C, h, w) -> (B, G O, h', w')."""
    first = layers[0]
    if len(layers) == 1 and isinstance(first, PointwiseConv2d) and x.is_contiguous(memory_format=torch.channels_last):
        batch, _, height, width = x.shape
        pixels = F.linear(x.permute(0, 2, 3, 1).reshape(-1, first.in_channels), first.weight.flatten(1))
        return pixels.view(batch, height, width, -1).permute(0, 3, 1, 2)
    weight = joined([layer.weight for layer in layers], groups)
    bias = None if first.bias is None else joined([layer.bias for layer in layers], groups)
    return F.conv2d(x, weight, bias, first.stride, first.padding, first.dilation, groups)


def upsampled_convolution(layers: Sequence[UpsampledConv2d], x: Tensor, size: tuple[int, int], groups: int) -> Tensor:
    """(B, G C, h, w) -> (B, G O, H, W) with ``size`` = (H, W), see :class:`UpsampledConv2d`."""
    first, (h, w) = layers[0], x.shape[2:]
    if (h, w) == size or not (isinstance(first, FactorisedConv2d) and first.is_cheaper_factorised((h, w), size)):
        x = x if (h, w) == size else F.interpolate(x, size=size, mode="bilinear", align_corners=True)
        return convolution(layers, x, groups)
    batch, channels, out, count = len(x), first.in_channels, first.out_channels, len(layers)
    pixels = x.permute(0, 2, 3, 1).view(batch, h, w, groups // count, count, channels)
    weights = [layer.taps() for layer in layers if isinstance(layer, FactorisedConv2d)]  # all: one structure
    taps = by_network(weights, pixels.permute(4, 0, 3, 1, 2, 5).reshape(count, -1, channels))  # (W, B G/W h w, 9 O)
    y = first.interpolated(taps.reshape(-1, h, w, 9 * out), size)  # (W B G/W, H, O, W)
    y = y.view(count, batch, groups // count, size[0], out, size[1])
    if x.is_contiguous(memory_format=torch.channels_last):
        return y.permute(1, 3, 5, 2, 0, 4).reshape(batch, *size, groups * out).permute(0, 3, 1, 2).to(taps.dtype)
    return y.permute(1, 2, 0, 4, 3, 5).reshape(batch, groups * out, *size).to(taps.dtype)


class _Joined(torch.autograd.Function):
    """``(repeats, W tensors (O, ...)) -> (repeats W O, ...)``: fewer operations than cat and repeat with their own
    backward passes."""

    @staticmethod
    def forward(ctx: Any, repeats: int, *tensors: Tensor) -> Tensor:
        ctx.sides = repeats, len(tensors)
        return torch.cat(tensors * repeats)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, ...]:
        repeats, count = ctx.sides
        if repeats > 1:
            gradient = gradient.unflatten(0, (repeats, -1)).sum(dim=0)
        return None, *(gradient.chunk(count) if count > 1 else (gradient,))


def joined(tensors: Sequence[Tensor | None], groups: int) -> Tensor:
    """The parameters (O, ...) of W layers side by side, repeated until every group has its own: (G O, ...)."""
    present = [tensor for tensor in tensors if tensor is not None]
    if len(present) == groups == 1:
        return present[0]
    every: Tensor = _Joined.apply(groups // len(present), *present)
    return every


def by_network(layers: Sequence[tuple[Tensor, Tensor | None]], x: Tensor) -> Tensor:
    """(W, N, F) -> (W, N, O): rows of W networks times their (weight (O, F), bias (O,))."""
    weights, biases = zip(*layers, strict=True)
    if len(layers) == 1:
        return F.linear(x[0], weights[0], biases[0])[None]
    weight = torch.stack(weights)  # to the left of the product, whose gradient then has its layout
    if biases[0] is None:
        return torch.bmm(weight, x.mT).mT
    return torch.baddbmm(torch.stack(biases)[:, :, None], weight, x.mT).mT


def _linear(layers: Sequence[nn.Linear], x: Tensor, groups: int) -> Tensor:
    """(..., G F) -> (..., G O)."""
    first, count, sides = layers[0], len(layers), x.shape[:-1]
    if count == 1:
        return F.linear(x.reshape(-1, first.in_features), first.weight, first.bias).view(*sides, -1)
    rows = x.reshape(-1, count, first.in_features).transpose(0, 1)
    return by_network([(layer.weight, layer.bias) for layer in layers], rows).transpose(0, 1).reshape(*sides, -1)


class RunningStatistics:
    """Moves BatchNorm's running statistics as one patch after another would, of all layers of some networks together.

    Args:
        times: forward passes that one call stands for.
    """

    def __init__(self, times: int) -> None:
        self._times = times
        self._found: dict[float, list[tuple[Tensor, tuple[Tensor, ...]]]] = {}
        self._counters: list[Tensor] = []

    def add(self, layer: nn.BatchNorm1d | nn.BatchNorm2d, means: Sequence[Tensor], variances: Sequence[Tensor]) -> None:
        """Of one layer: mean and unbiased variance (C,) of every pass, in order."""
        assert layer.momentum is not None and layer.num_batches_tracked is not None
        assert layer.running_mean is not None and layer.running_var is not None
        pairs = self._found.setdefault(layer.momentum, [])
        pairs += [(layer.running_mean, tuple(means)), (layer.running_var, tuple(variances))]
        self._counters.append(layer.num_batches_tracked)

    @torch.no_grad()
    def move(self) -> None:
        """r <- (1 - momentum) r + momentum s, pass by pass."""
        for momentum, pairs in self._found.items():
            running = [tensor for tensor, _ in pairs]
            for now in zip(*(found for _, found in pairs), strict=True):
                torch._foreach_lerp_(running, now, momentum)
        if self._counters:
            torch._foreach_add_(self._counters, self._times)


def _batch_norm(
    layers: Sequence[nn.BatchNorm1d | nn.BatchNorm2d], x: Tensor, groups: int, statistics: RunningStatistics
) -> Tensor:
    """(B, G C, ...) -> the same, every group normalised by its own mean and variance."""
    weight = joined([layer.weight for layer in layers], groups)
    bias = joined([layer.bias for layer in layers], groups)
    moments = weight.new_zeros(2, len(weight))  # with momentum 1 they become this batch's mean and unbiased variance
    mean, variance = moments.unbind()
    y = F.batch_norm(x, mean, variance, weight, bias, training=True, momentum=1.0, eps=layers[0].eps)
    found = moments.view(2 * groups, -1).unbind()
    for number, layer in enumerate(layers):
        statistics.add(layer, found[number : groups : len(layers)], found[groups + number :: len(layers)])
    return y
