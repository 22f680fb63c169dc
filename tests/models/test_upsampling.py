"""The factorised upsampling convolution against its definition: interpolate, then convolve."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F

from pipeline.models.upsampling import FactorisedConv2d, UpsampledConv2d, shifted_interpolation

TOLERANCE = {torch.float64: 1e-12, torch.float32: 2e-6}
"""Of the norm of a difference."""


def plain(layer: UpsampledConv2d, x: torch.Tensor, size: tuple[int, int]) -> torch.Tensor:
    up = F.interpolate(x, size=size, mode="bilinear", align_corners=True)
    return F.conv2d(up, layer.weight, layer.bias, padding=1)


@pytest.mark.parametrize("dtype", TOLERANCE, ids=["float64", "float32"])
@pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last])
@pytest.mark.parametrize(
    ("low", "size"), [((4, 4), (16, 16)), ((8, 8), (16, 16)), ((5, 3), (11, 17)), ((1, 1), (6, 6)), ((2, 3), (9, 4))]
)
def test_value_and_gradients_are_those_of_the_definition(
    low: tuple[int, int], size: tuple[int, int], layout: torch.memory_format, dtype: torch.dtype
) -> None:
    torch.manual_seed(0)
    layer = FactorisedConv2d(20, 5).to(dtype)
    assert layer.is_cheaper_factorised(low, size)
    x = torch.randn(3, 20, *low, dtype=dtype).contiguous(memory_format=layout).requires_grad_()
    parameters = [x, layer.weight, layer.bias]
    expected = plain(layer, x, size)
    weights = torch.randn_like(expected)
    expected_gradients = torch.autograd.grad(expected, parameters, weights)
    result = layer(x, size)
    found = torch.autograd.grad(result, parameters, weights)
    for mine, other in zip([result.detach(), *found], [expected.detach(), *expected_gradients], strict=True):
        assert float((mine - other).norm()) <= TOLERANCE[dtype] * float(other.norm())


def test_the_layout_of_the_input_is_kept() -> None:
    layer = FactorisedConv2d(16, 4)
    x = torch.randn(2, 16, 4, 4)
    assert layer(x, (16, 16)).is_contiguous()
    nhwc = x.contiguous(memory_format=torch.channels_last)
    assert layer(nhwc, (16, 16)).is_contiguous(memory_format=torch.channels_last)


def test_at_full_size_and_where_it_saves_nothing_the_layer_is_the_plain_convolution() -> None:
    torch.manual_seed(0)
    layer = FactorisedConv2d(3, 2)
    x = torch.randn(2, 3, 8, 8)
    assert torch.equal(layer(x, (8, 8)), F.conv2d(x, layer.weight, layer.bias, padding=1))
    assert not layer.is_cheaper_factorised((8, 8), (9, 9))
    assert torch.equal(layer(x, (9, 9)), plain(layer, x, (9, 9)))
    wide = UpsampledConv2d(64, 12)
    y = torch.randn(2, 64, 4, 4)
    assert torch.equal(wide(y, (16, 16)), plain(wide, y, (16, 16)))


def test_parameters_have_the_names_of_a_convolution() -> None:
    shapes = {name: tuple(value.shape) for name, value in FactorisedConv2d(4, 2).state_dict().items()}
    assert shapes == {"weight": (2, 4, 3, 3), "bias": (2,)}


def test_weights_of_a_position_sum_to_one_for_the_centre_tap() -> None:
    taps = shifted_interpolation(4, 11, torch.float64, torch.device("cpu")).view(11, 4, 3)
    torch.testing.assert_close(taps[:, :, 1].sum(dim=1), torch.ones(11, dtype=torch.float64))
    assert torch.equal(taps[1:, :, 0], taps[:-1, :, 1]) and float(taps[0, :, 0].abs().sum()) == 0.0
    assert torch.equal(taps[:-1, :, 2], taps[1:, :, 1]) and float(taps[-1, :, 2].abs().sum()) == 0.0


def test_under_autocast_it_is_as_close_to_the_exact_result_as_the_plain_form() -> None:
    torch.manual_seed(0)
    layer = FactorisedConv2d(16, 4)
    x = torch.randn(4, 16, 4, 4, requires_grad=True)
    exact = plain(layer, x, (16, 16))
    weights = torch.randn_like(exact)
    results = {}
    for name, run in (("mine", lambda: layer(x, (16, 16))), ("plain", lambda: plain(layer, x, (16, 16)))):
        with torch.autocast("cpu", dtype=torch.bfloat16):
            y = run()
        assert y.dtype == torch.bfloat16
        results[name] = (y.float(), *torch.autograd.grad(y, [x, layer.weight], weights.bfloat16()))
    expected = (exact, *torch.autograd.grad(exact, [x, layer.weight], weights))
    for mine, other, value in zip(results["mine"], results["plain"], expected, strict=True):
        error, plain_error = ((result - value).norm().item() for result in (mine, other))
        assert error < 1.5 * plain_error < 0.05 * value.norm().item()
