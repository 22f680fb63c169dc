"""What is alive at a time, against sums by hand."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode

from pipeline.base.alive import Alive
from pipeline.models.backbones import BasicBlock

FLOAT = 4  # bytes


def two_layers() -> tuple[Tensor, Tensor, Tensor]:
    """Images (8, 4), weights (16, 4) and (2, 16)."""
    return torch.empty(8, 4), torch.empty(16, 4, requires_grad=True), torch.empty(2, 16, requires_grad=True)


@pytest.mark.parametrize("blank", [False, True])
def test_a_network_of_two_layers_holds_what_a_sum_by_hand_says(blank: bool) -> None:
    """At most in the backward of the ReLU: its output, the gradients before and behind it; with the images, scores and
    their gradient, and that of the second layer's weights."""
    with FakeTensorMode() if blank else torch.enable_grad(), Alive() as alive:
        x, first, second = two_layers()
        weights = (16 * 4 + 2 * 16) * FLOAT
        assert alive.now == weights + 8 * 4 * FLOAT
        h = torch.relu(x @ first.t())
        assert alive.now == weights + (8 * 4 + 8 * 16) * FLOAT  # the product is gone, the ReLU keeps its output
        y = h @ second.t()
        del h
        alive.most = alive.now
        y.backward(torch.empty(8, 2))
        assert alive.most == weights + (3 * 8 * 16 + 8 * 4 + 2 * 8 * 2 + 2 * 16) * FLOAT
        del y
        assert alive.now == 2 * weights + 8 * 4 * FLOAT  # gradients of weights are left


def test_what_is_seen_through_a_view_counts_once_and_what_was_there_before_does_not() -> None:
    before = torch.empty(100)
    with Alive() as alive:
        a = before[:50] + 1.0
        b = a.view(5, 10).t()
        assert alive.now == 50 * FLOAT
        del a
        assert alive.now == 50 * FLOAT
        del b
        assert (alive.now, alive.most) == (0, 50 * FLOAT)


def peak(block: nn.Module, x: Tensor, as_alone: bool) -> float:
    """Of the backward to the input, in maps."""
    y = block(x)
    gradient = torch.empty_like(y)
    with Alive(as_alone) as alive:
        torch.autograd.grad(y, x, gradient)
    return alive.most / x.nbytes


def test_a_residual_block_alone_needs_a_map_for_the_batch_norm_of_a_cpu_and_none_for_the_sum() -> None:
    """The gradient behind the addition, which the shortcut waits for; of the second ReLU; of BatchNorm, twice. That of
    the sum is none."""
    x = torch.randn(2, 16, 32, 32, requires_grad=True)
    assert peak(BasicBlock(16, 16, 1), x, as_alone=False) == pytest.approx(3.0, abs=0.15)
    assert peak(BasicBlock(16, 16, 1), x, as_alone=True) == pytest.approx(4.0, abs=0.15)
