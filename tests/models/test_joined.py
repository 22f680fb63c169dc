"""Parameters side by side: values and gradients of plain concatenation, in one copy and one sum."""

from __future__ import annotations

import pytest
import torch
from helpers_calls import Calls
from torch import Tensor, nn

from pipeline.models.joined import joined

NHWC = torch.channels_last


def parameters(networks: int) -> list[list[nn.Parameter]]:
    """Of a convolution in each layout, of BatchNorm, of a linear layer, and one with gaps in memory."""
    torch.manual_seed(0)
    made = [
        lambda: torch.randn(4, 3, 3, 3),
        lambda: torch.randn(4, 3, 3, 3).contiguous(memory_format=NHWC),
        lambda: torch.randn(5),
        lambda: torch.randn(6, 2),
        lambda: torch.randn(6, 4)[:, ::2],
    ]
    return [[nn.Parameter(make().double()) for _ in range(networks)] for make in made]


@pytest.mark.parametrize(("networks", "repeats"), [(1, 1), (1, 4), (2, 1), (2, 3)])
def test_values_and_gradients_are_those_of_concatenation(networks: int, repeats: int) -> None:
    mine, other = parameters(networks), parameters(networks)
    found = joined(mine, repeats)
    expected = [torch.cat(of_place * repeats) for of_place in other]
    for one, two in zip(found, expected, strict=True):
        torch.testing.assert_close(one, two, rtol=0, atol=0)
    weights = [torch.randn_like(one) for one in expected]
    for outputs in (found, expected):
        sum((one * weight).sum() for one, weight in zip(outputs, weights, strict=True)).backward()
    for of_mine, of_other in zip(mine, other, strict=True):
        for one, two in zip(of_mine, of_other, strict=True):
            torch.testing.assert_close(one.grad, two.grad, rtol=1e-15, atol=1e-15)


def test_a_joined_weight_keeps_the_layout_of_its_parts() -> None:
    assert [one.is_contiguous(memory_format=NHWC) for one in joined(parameters(2), 3)[:2]] == [False, True]


def test_a_frozen_parameter_gets_no_gradient() -> None:
    weight, bias = nn.Parameter(torch.ones(3), requires_grad=False), nn.Parameter(torch.ones(3))
    (_, twice) = joined([[weight], [bias]], 2)
    twice.sum().backward()
    assert weight.grad is None and bias.grad is not None and bias.grad.tolist() == [2.0] * 3


def test_a_joined_parameter_more_costs_views_only() -> None:
    def calls(places: int) -> int:
        parts: list[list[Tensor]] = [[nn.Parameter(torch.ones(3))] for _ in range(places)]
        with Calls() as seen:
            sum_of_all = [one.sum() for one in joined(parts, 4)]
            torch.autograd.backward(sum_of_all)
        return seen.count

    assert calls(3) - calls(2) == calls(12) - calls(11) < 10
