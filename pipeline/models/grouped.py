"""Networks of auxiliary heads on many patches at once: every patch is a group of channels.

    map (B, G C, h, w)      rows (B, G F)      sequence (B, t, G D)      G patches, of W networks in turn

    convolution       groups = G                             one kernel for all groups, or one for each of W networks
    BatchNorm         G C channels: statistics of each patch, as if it came alone, and in the end the running ones too
    linear            (B G, F) rows
    LayerNorm         of the D values of each group
    pooling, ReLU     as they are

Group g has the weights of network g mod W. The arithmetic is that of the networks on one patch after another; sums are
taken in another order, so the bits differ. Only layers that are listed here run so (:func:`can_group`); whatever draws
random numbers or mixes channels in another way does not.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from pipeline.models.joined import joined
from pipeline.models.layers import PairedConv2d, PointwiseConv2d, PoolTo2d, RowBatchNorm2d, VectorInput
from pipeline.models.upsampling import FactorisedConv2d, UpsampledConv2d

CONVOLUTIONS = (nn.Conv2d, PairedConv2d, PointwiseConv2d)
NORMS = (nn.BatchNorm1d, nn.BatchNorm2d, RowBatchNorm2d)
ELEMENTWISE = (nn.Identity, nn.ReLU, nn.ReLU6, nn.LeakyReLU, nn.GELU, nn.SiLU, nn.Tanh, nn.Sigmoid)
PER_CHANNEL = (*ELEMENTWISE, nn.AvgPool2d, nn.MaxPool2d, nn.AdaptiveAvgPool2d, PoolTo2d, nn.Flatten)


def can_group(network: nn.Module, dims: int) -> bool:
    """Whether :func:`run` gives what ``network`` gives patch by patch on features of ``dims`` dimensions with the
    batch: 4 of a map, 3 of a sequence."""
    if len({one.dtype for one in network.parameters()}) > 1:
        return False
    for layer in flat(network):
        if not _known(layer) or layer._forward_hooks or layer._forward_pre_hooks:
            return False
        if dims != 3 and type(layer) is nn.LayerNorm:
            return False
        if dims == 3 and type(layer) not in (nn.Linear, nn.LayerNorm, *ELEMENTWISE):
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
    if type(layer) is nn.LayerNorm:
        return len(layer.normalized_shape) == 1 and layer.elementwise_affine and layer.bias is not None
    return type(layer) in (*PER_CHANNEL, nn.Linear, VectorInput)


def flat(network: nn.Module) -> Iterator[nn.Module]:
    """The layers of nested ``nn.Sequential`` in order; a network of another kind is one layer."""
    if type(network) is nn.Sequential:
        for layer in network:
            yield from flat(layer)
    else:
        yield network


def run(networks: Sequence[Sequence[nn.Module]], x: Tensor, groups: int, size: tuple[int, int] | None = None) -> Tensor:
    """W networks of one structure, in training mode, on G patches; group g goes through network g mod W.

    Args:
        networks: the layers of each, as :func:`flat` gives them; they can be grouped (:func:`can_group`).
        x: (B, G C, h, w), of a sequence (B, t, G D).
        groups: G, a multiple of W.
        size: (H, W) to which a :class:`UpsampledConv2d` upsamples.
    """
    places = list(zip(*networks, strict=True))
    needed = [_needed(layers, x, size) for layers in places]
    parameters = iter(joined([each for of_place in needed for each in of_place], groups // len(networks)))
    moments = _Moments(places, x, groups)
    for layers, its in zip(places, needed, strict=True):
        first, own = layers[0], [next(parameters) for _ in its]
        if isinstance(first, UpsampledConv2d):
            assert size is not None
            x = _upsampled_convolution(layers, x, size, groups, own)
        elif isinstance(first, nn.Conv2d):
            x = _convolution(first, x, groups, own)
        elif isinstance(first, nn.BatchNorm1d | nn.BatchNorm2d):
            (mean, variance), (weight, bias) = moments.next(), own
            x = F.batch_norm(x, mean, variance, weight, bias, training=True, momentum=1.0, eps=first.eps)
        elif isinstance(first, nn.Linear):
            x = _linear(layers, x, groups)
        elif isinstance(first, nn.LayerNorm):
            x = _layer_norm(layers, x)
        elif type(first) is nn.ReLU:  # in place it would write to a view of rows, which costs four copies
            x = F.relu(x)
        else:
            x = first(x)
    moments.move_running()
    return x


def _needed(layers: Sequence[nn.Module], x: Tensor, size: tuple[int, int] | None) -> list[list[Tensor]]:
    """The parameters of W layers that have to be joined for features like ``x``: weights, and biases where they are."""
    first = layers[0]
    if isinstance(first, FactorisedConv2d) and size is not None and first.factorises(x.shape[2:], size):
        return []
    if len(layers) == 1 and isinstance(first, PointwiseConv2d) and x.is_contiguous(memory_format=torch.channels_last):
        return []
    if not isinstance(first, (nn.Conv2d, *NORMS)):
        return []
    found: list[list[Tensor]] = [[layer.get_parameter("weight") for layer in layers]]
    if first.bias is not None:
        found.append([layer.get_parameter("bias") for layer in layers])
    return found


def _convolution(first: nn.Conv2d, x: Tensor, groups: int, own: Sequence[Tensor]) -> Tensor:
    """(B, G C, h, w) -> (B, G O, h', w'); ``own``: weight and bias joined, none of a 1x1 convolution by pixels."""
    if not own:
        batch, _, height, width = x.shape
        pixels = F.linear(x.permute(0, 2, 3, 1).reshape(-1, first.in_channels), first.weight.flatten(1))
        return pixels.view(batch, height, width, -1).permute(0, 3, 1, 2)
    weight, bias = own if len(own) == 2 else (own[0], None)
    return F.conv2d(x, weight, bias, first.stride, first.padding, first.dilation, groups)


def _upsampled_convolution(
    layers: Sequence[UpsampledConv2d], x: Tensor, size: tuple[int, int], groups: int, own: Sequence[Tensor]
) -> Tensor:
    """(B, G C, h, w) -> (B, G O, H, W) with ``size`` = (H, W), see :class:`UpsampledConv2d`."""
    first, (h, w) = layers[0], x.shape[2:]
    if own:
        x = x if (h, w) == size else F.interpolate(x, size=size, mode="bilinear", align_corners=True)
        return _convolution(first, x, groups, own)
    assert isinstance(first, FactorisedConv2d)
    batch, channels, out, count = len(x), first.in_channels, first.out_channels, len(layers)
    pixels = x.permute(0, 2, 3, 1).view(batch, h, w, groups // count, count, channels)
    weights = [layer.taps() for layer in layers if isinstance(layer, FactorisedConv2d)]  # all: one structure
    taps = by_network(weights, pixels.permute(4, 0, 3, 1, 2, 5).reshape(count, -1, channels))  # (W, B G/W h w, 9 O)
    y = first.interpolated(taps.reshape(-1, h, w, 9 * out), size)  # (W B G/W, H, O, W)
    y = y.view(count, batch, groups // count, size[0], out, size[1])
    if x.is_contiguous(memory_format=torch.channels_last):
        return y.permute(1, 3, 5, 2, 0, 4).reshape(batch, *size, groups * out).permute(0, 3, 1, 2).to(taps.dtype)
    return y.permute(1, 2, 0, 4, 3, 5).reshape(batch, groups * out, *size).to(taps.dtype)


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


def _layer_norm(layers: Sequence[nn.LayerNorm], x: Tensor) -> Tensor:
    """(B, t, G D) -> the same shape."""
    first = layers[0]
    each = x.unflatten(2, (-1, len(layers), *first.normalized_shape))
    values = F.layer_norm(each, first.normalized_shape, eps=first.eps)
    weight, bias = (torch.stack([layer.get_parameter(name) for layer in layers]) for name in ("weight", "bias"))
    return torch.addcmul(bias, values, weight).flatten(2)


class _Moments:
    """Mean and variance of every patch at the BatchNorm layers of a network, and the running statistics, which they
    move as one patch after another would.

    Args:
        places: the layers of W networks.
        x: of which dtype and on which device the statistics of full precision are.
    """

    def __init__(self, places: Sequence[Sequence[nn.Module]], x: Tensor, groups: int) -> None:
        self._norms = [layers for layers in places if isinstance(layers[0], nn.BatchNorm1d | nn.BatchNorm2d)]
        self._passes = groups // len(places[0])
        if not self._norms:
            return
        weights = [layers[0].get_parameter("weight") for layers in self._norms]
        widths = [len(weight) for weight in weights for _ in range(2 * groups)]
        # with momentum 1 these become the batch's means and unbiased variances
        moments = weights[0].new_zeros(sum(widths))
        wholes = [groups * len(weight) for weight in weights for _ in range(2)]
        self._whole = iter(moments.split(wholes))
        self._each = moments.split(widths)

    def next(self) -> tuple[Tensor, Tensor]:
        """Where the next layer's means and variances (G C,) are to be written."""
        return next(self._whole), next(self._whole)

    @torch.no_grad()
    def move_running(self) -> None:
        """r <- (1 - momentum) r + momentum s, pass by pass."""
        found: dict[float, list[tuple[Tensor, tuple[Tensor, ...]]]] = {}
        counters: list[Tensor] = []
        each = iter(self._each) if self._norms else iter(())
        for layers in self._norms:
            means, variances = ([next(each) for _ in range(self._passes * len(layers))] for _ in range(2))
            for number, layer in enumerate(layers):
                assert isinstance(layer, nn.BatchNorm1d | nn.BatchNorm2d)
                assert layer.momentum is not None and layer.num_batches_tracked is not None
                assert layer.running_mean is not None and layer.running_var is not None
                pairs = found.setdefault(layer.momentum, [])
                pairs.append((layer.running_mean, tuple(means[number :: len(layers)])))
                pairs.append((layer.running_var, tuple(variances[number :: len(layers)])))
                counters.append(layer.num_batches_tracked)
        for momentum, pairs in found.items():
            for now in zip(*(moments for _, moments in pairs), strict=True):
                torch._foreach_lerp_([running for running, _ in pairs], now, momentum)
        if counters:
            torch._foreach_add_(counters, self._passes)
