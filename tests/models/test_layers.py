"""Faster layers of heads against the layers of PyTorch that they stand for."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import Tensor, nn

from pipeline.models.layers import PairedConv2d, PointwiseConv2d, PoolTo2d, RowBatchNorm2d

EXACT = {"rtol": 1e-10, "atol": 1e-12}


def gradients(layer: nn.Module, x: Tensor) -> tuple[Tensor, list[Tensor]]:
    """Output, and the gradients of input and parameters under a fixed random gradient of the output."""
    leaf = x.clone(memory_format=torch.preserve_format).requires_grad_()
    y = layer(leaf)
    weights = torch.randn(y.shape, dtype=y.dtype, generator=torch.Generator().manual_seed(1))
    return y, list(torch.autograd.grad(y, [leaf, *layer.parameters()], weights))


def assert_same(mine: nn.Module, other: nn.Module, x: Tensor) -> None:
    (y, found), (expected_y, expected) = gradients(mine, x), gradients(other, x)
    torch.testing.assert_close(y, expected_y, **EXACT)
    for a, b in zip(found, expected, strict=True):
        torch.testing.assert_close(a, b, **EXACT)
    for name, value in other.state_dict().items():
        torch.testing.assert_close(mine.state_dict()[name], value, **EXACT)


def nhwc(*shape: int) -> Tensor:
    torch.manual_seed(0)
    return torch.randn(*shape, dtype=torch.float64).contiguous(memory_format=torch.channels_last) * 3.0 + 1.0


@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("shape", [(4, 12, 6, 5), (2, 3, 1, 1), (4, 16, 6, 6)])
def test_batchnorm_by_rows(shape: tuple[int, ...], training: bool) -> None:
    mine, other = RowBatchNorm2d(shape[1]).double(), nn.BatchNorm2d(shape[1]).double()
    with torch.no_grad():
        mine.weight.uniform_(0.5, 2.0)
        mine.bias.normal_()
    other.load_state_dict(mine.state_dict())
    for layer in (mine, other):
        layer.train(training)
    for step in range(2):  # running statistics move twice
        assert_same(mine, other, nhwc(*shape) * (step + 1))


def test_batchnorm_before_an_inplace_relu() -> None:
    mine = nn.Sequential(RowBatchNorm2d(12), nn.ReLU(inplace=True)).double()
    other = nn.Sequential(nn.BatchNorm2d(12), nn.ReLU()).double()
    assert_same(mine, other, nhwc(3, 12, 4, 4))


@pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last])
def test_pointwise_convolution(layout: torch.memory_format) -> None:
    mine = PointwiseConv2d(6, 10).double().to(memory_format=layout)
    other = nn.Conv2d(6, 10, 1, bias=False).double()
    other.load_state_dict(mine.state_dict())
    assert_same(mine, other, nhwc(3, 6, 4, 2).contiguous(memory_format=layout))


@pytest.mark.parametrize("out", [3, 4, 5])
@pytest.mark.parametrize("size", [(6, 8), (1, 2), (4, 5)])
def test_convolution_of_two_pixels_at_a_time(size: tuple[int, int], out: int) -> None:
    mine = PairedConv2d(12, out).double().to(memory_format=torch.channels_last)
    other = nn.Conv2d(12, out, 3, padding=1).double()
    other.load_state_dict(mine.state_dict())
    assert_same(mine, other, nhwc(3, 12, *size))
    assert mine(nhwc(3, 12, *size)).is_contiguous(memory_format=torch.channels_last)


def test_convolution_of_two_pixels_at_a_time_under_autocast() -> None:
    mine = PairedConv2d(12, 3).to(memory_format=torch.channels_last)
    x = nhwc(2, 12, 4, 4).float()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert mine(x).dtype == torch.bfloat16


@pytest.mark.parametrize("size", [(8, 8), (2, 2), (1, 1), (5, 7), (4, 6)])
@pytest.mark.parametrize("side", [1, 2])
def test_pooling(side: int, size: tuple[int, int]) -> None:
    assert_same(PoolTo2d(side), nn.AdaptiveAvgPool2d(side), nhwc(3, 4, *size))
    assert_same(PoolTo2d(side), nn.AdaptiveAvgPool2d(side), nhwc(3, 4, *size).contiguous())


def test_global_pooling_gives_a_dense_gradient() -> None:
    leaf = nhwc(2, 4, 4, 4).requires_grad_()
    (gradient,) = torch.autograd.grad(PoolTo2d(1)(leaf).sum(), leaf)
    assert gradient.is_contiguous(memory_format=torch.channels_last)


def test_layers_can_be_copied() -> None:
    layer = copy.deepcopy(RowBatchNorm2d(12))
    assert list(layer.state_dict()) == list(nn.BatchNorm2d(12).state_dict())
