"""Tuned layers of heads against the layers of PyTorch that they stand for: value, all gradients, running statistics."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import Tensor, nn

from pipeline.models.layers import PairedConv2d, PointwiseConv2d, PoolTo2d, RowBatchNorm2d
from pipeline.models.tuned import Tuned

TOLERANCE = {torch.float64: 1e-12, torch.float32: 2e-6}
"""Of the norm of a difference: sums of a few hundred products in another order."""
NHWC, NCHW = torch.channels_last, torch.contiguous_format
DTYPES = pytest.mark.parametrize("dtype", TOLERANCE, ids=["float64", "float32"])


def gradients(layer: nn.Module, x: Tensor) -> tuple[Tensor, list[Tensor]]:
    """Output, and the gradients of input and parameters under a fixed random gradient of the output."""
    leaf = x.clone(memory_format=torch.preserve_format).requires_grad_()
    y = layer(leaf)
    weights = torch.randn(y.shape, dtype=y.dtype, generator=torch.Generator().manual_seed(1))
    return y, list(torch.autograd.grad(y, [leaf, *layer.parameters()], weights))


def assert_same(mine: nn.Module, other: nn.Module, x: Tensor) -> None:
    tolerance = TOLERANCE[x.dtype]
    (y, found), (expected_y, expected) = gradients(mine, x), gradients(other, x)
    for a, b in zip([y.detach(), *found], [expected_y.detach(), *expected], strict=True):
        assert a.shape == b.shape and a.dtype == b.dtype
        # an output's own gradient has a norm of about its square root of numel: smaller ones are differences of those
        assert float((a - b).norm()) <= tolerance * max(float(b.norm()), y.numel() ** 0.5)
    for name, value in other.state_dict().items():
        torch.testing.assert_close(mine.state_dict()[name], value, rtol=tolerance, atol=tolerance)


def pair(mine: Tuned, other: nn.Module, dtype: torch.dtype, layout: torch.memory_format = NHWC) -> list[nn.Module]:
    """The layer and PyTorch's, of the same random parameters."""
    mine.to(dtype).to(memory_format=layout)
    with torch.no_grad():
        for index, weight in enumerate(mine.parameters()):
            weight.copy_(torch.randn(weight.shape, generator=torch.Generator().manual_seed(index)))
    other.to(dtype).to(memory_format=layout)
    other.load_state_dict(mine.state_dict())
    return [mine, other]


def image(*shape: int, dtype: torch.dtype, layout: torch.memory_format = NHWC) -> Tensor:
    torch.manual_seed(0)
    return (torch.randn(*shape, dtype=torch.float64) * 3.0 + 1.0).to(dtype).contiguous(memory_format=layout)


@DTYPES
@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("shape", [(4, 12, 6, 5), (2, 3, 1, 1), (5, 1, 3, 7), (4, 16, 6, 6)])
def test_batchnorm_by_rows(shape: tuple[int, ...], training: bool, dtype: torch.dtype) -> None:
    mine, other = pair(RowBatchNorm2d(shape[1]), nn.BatchNorm2d(shape[1]), dtype)
    for layer in (mine, other):
        layer.train(training)
    for step in range(2):  # running statistics move twice
        assert_same(mine, other, image(*shape, dtype=dtype) * (step + 1))
    assert int(mine.num_batches_tracked) == 2 * training


def test_batchnorm_of_another_layout_is_pytorchs_own() -> None:
    mine, other = pair(RowBatchNorm2d(12), nn.BatchNorm2d(12), torch.float32, NCHW)
    x = image(2, 12, 3, 5, dtype=torch.float32, layout=NCHW)
    assert torch.equal(mine(x), other(x))


def test_batchnorm_before_an_inplace_relu() -> None:
    mine = nn.Sequential(RowBatchNorm2d(12), nn.ReLU(inplace=True)).double()
    other = nn.Sequential(nn.BatchNorm2d(12), nn.ReLU()).double()
    assert_same(mine, other, image(3, 12, 4, 4, dtype=torch.float64))


@DTYPES
@pytest.mark.parametrize("layout", [NCHW, NHWC])
@pytest.mark.parametrize("size", [(4, 2), (1, 1), (3, 5)])
def test_pointwise_convolution(size: tuple[int, int], layout: torch.memory_format, dtype: torch.dtype) -> None:
    mine, other = pair(PointwiseConv2d(6, 10), nn.Conv2d(6, 10, 1, bias=False), dtype, layout)
    assert_same(mine, other, image(3, 6, *size, dtype=dtype, layout=layout))


@DTYPES
@pytest.mark.parametrize("out", [3, 4, 5])
@pytest.mark.parametrize("size", [(6, 8), (1, 2), (4, 5), (7, 1)])
def test_convolution_of_two_pixels_at_a_time(size: tuple[int, int], out: int, dtype: torch.dtype) -> None:
    """Of an odd width, or to more than four channels, it is PyTorch's own."""
    mine, other = pair(PairedConv2d(12, out), nn.Conv2d(12, out, 3, padding=1), dtype)
    x = image(3, 12, *size, dtype=dtype)
    assert_same(mine, other, x)
    assert mine(x).is_contiguous(memory_format=NHWC)
    if out > 4 or size[1] % 2:
        assert torch.equal(mine(x), other(x))


def test_convolution_of_two_pixels_at_a_time_needs_no_gradient_of_its_input() -> None:
    mine, other = pair(PairedConv2d(12, 3), nn.Conv2d(12, 3, 3, padding=1), torch.float64)
    x = image(2, 12, 4, 6, dtype=torch.float64)
    for layer in (mine, other):
        layer(x).square().sum().backward()
    for a, b in zip(mine.parameters(), other.parameters(), strict=True):
        torch.testing.assert_close(a.grad, b.grad, rtol=1e-12, atol=1e-12)


def test_convolution_of_two_pixels_at_a_time_under_autocast() -> None:
    mine, other = pair(PairedConv2d(12, 3), nn.Conv2d(12, 3, 3, padding=1), torch.float32)
    x = image(2, 12, 4, 4, dtype=torch.float32)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert mine(x).dtype == torch.bfloat16
        assert torch.equal(mine(x), other(x))


@DTYPES
@pytest.mark.parametrize("layout", [NCHW, NHWC])
@pytest.mark.parametrize("size", [(8, 8), (2, 2), (1, 1), (5, 7), (4, 6)])
@pytest.mark.parametrize("sides", [1, 2, (2, 3)])
def test_pooling(
    sides: int | tuple[int, int], size: tuple[int, int], layout: torch.memory_format, dtype: torch.dtype
) -> None:
    assert_same(PoolTo2d(sides), nn.AdaptiveAvgPool2d(sides), image(3, 4, *size, dtype=dtype, layout=layout))


def test_global_pooling_gives_a_dense_gradient() -> None:
    leaf = image(2, 4, 4, 4, dtype=torch.float64).requires_grad_()
    (gradient,) = torch.autograd.grad(PoolTo2d(1)(leaf).sum(), leaf)
    assert gradient.is_contiguous(memory_format=NHWC)


def test_layers_can_be_copied() -> None:
    layer = copy.deepcopy(RowBatchNorm2d(12))
    assert list(layer.state_dict()) == list(nn.BatchNorm2d(12).state_dict())
