"""The gradients that a module's backward starts from: their sum, and that nobody holds them longer than needed."""

from __future__ import annotations

import weakref
from typing import Any

import pytest
import torch
from torch import Tensor

from pipeline.base.flow import MAIN
from pipeline.local.output_gradients import OutputGradients, summed
from pipeline.models.spread import Spread, whole


class _Spy(torch.autograd.Function):
    """The identity; its backward notes which of some tensors are still alive."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, watched: list[weakref.ref[Any]], found: list[bool]) -> Tensor:
        ctx.watched, ctx.found = watched, found
        return x * 1.0

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None, None]:
        ctx.found += [watched() is not None for watched in ctx.watched]
        return gradient, None, None


def test_a_backward_holds_neither_its_gradient_nor_the_output_behind_the_node_that_used_them() -> None:
    weight = torch.ones(4, requires_grad=True)
    watched: list[weakref.ref[Any]] = []
    found: list[bool] = []
    h = torch.exp(_Spy.apply(weight * 2.0, watched, found))  # which saves its output
    gradient = torch.ones(4)
    watched += [weakref.ref(gradient.untyped_storage()), weakref.ref(h.untyped_storage())]
    start = OutputGradients({MAIN: h}, [gradient], [])
    del h, gradient
    start.backward([weight])
    assert found == [False, False]
    assert weight.grad is not None and torch.equal(weight.grad, 2.0 * torch.exp(torch.full((4,), 2.0)))


def h_of(rows: int = 3) -> Tensor:
    return torch.zeros(rows, requires_grad=True) * 1.0


def test_the_sum_takes_the_memory_of_what_is_used_up_and_leaves_what_was_received() -> None:
    own, other, received = torch.tensor([1.0, 2.0, 3.0]), torch.ones(3), torch.full((3,), 10.0)
    (total,) = OutputGradients({MAIN: h_of()}, [own, other], [{MAIN: received}]).gradients
    assert total.tolist() == [12.0, 13.0, 14.0] and total.data_ptr() == own.data_ptr()
    assert other.tolist() == [1.0] * 3 and received.tolist() == [10.0] * 3
    (total,) = OutputGradients({MAIN: h_of()}, [None], [{MAIN: received}, {MAIN: other}]).gradients
    assert total.tolist() == [11.0] * 3 and received.tolist() == [10.0] * 3


def test_what_is_kept_stays_as_it_is() -> None:
    own = torch.ones(3)
    (total,) = OutputGradients({MAIN: h_of()}, [own], [{MAIN: torch.ones(3)}], keep=True).gradients
    assert total.tolist() == [2.0] * 3 and own.tolist() == [1.0] * 3


@pytest.mark.parametrize("own", [torch.ones(1).expand(3), torch.ones(3, dtype=torch.bfloat16), torch.ones(6)[::2]])
def test_a_sum_that_has_no_room_there_is_another_tensor(own: Tensor) -> None:
    before = own.clone()
    (total,) = OutputGradients({MAIN: h_of()}, [own], [{MAIN: torch.full((3,), 0.125)}]).gradients
    assert total.tolist() == [1.125] * 3 and total.dtype == torch.float32
    assert torch.equal(own, before)


def test_an_output_without_a_gradient_gets_zeros_if_it_is_the_main_one_and_is_left_out_otherwise() -> None:
    start = OutputGradients({MAIN: h_of(), "skip": h_of(), "mask": torch.zeros(2)}, [None], [None])
    assert len(start.outputs) == 1 and start.gradients[0].tolist() == [0.0] * 3


@pytest.mark.parametrize("layout", [torch.channels_last, torch.contiguous_format])
def test_gradients_of_pooled_maps_are_added_small_and_give_the_bits_of_the_sum_of_whole_ones(
    layout: torch.memory_format,
) -> None:
    feature = torch.zeros(2, 3, 8, 8).contiguous(memory_format=layout)
    one, other = (Spread.of(torch.randn(2, 3, 4, 2), (2, 4), feature) for _ in range(2))
    total = summed([one, other], used_up=True)
    assert isinstance(total, Spread)
    assert torch.equal(total.whole(), one.whole() + other.whole()) and total.whole().stride() == feature.stride()
    expected = torch.nn.functional.interpolate(one.share, scale_factor=(2, 4), mode="nearest")
    assert torch.equal(one.whole(), expected)
    elsewhere = Spread.of(torch.randn(2, 3, 2, 2), (4, 4), feature)
    assert torch.equal(whole(summed([one, elsewhere], used_up=True)), one.whole() + elsewhere.whole())
