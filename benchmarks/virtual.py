"""Virtual devices: blocks and heads whose arithmetic is a calibrated wait; many ranks then run truthfully on two cores.

    x --(+ a)--> input path: waits F forward, I backward --(+)--> h
                 weight path of w:           W backward ---^

A full backward pass waits I + W, whether or not x needs a gradient; the gradient of x alone waits I, those of the
weights alone W: as in a network of many layers, of which only the first can leave its input gradient out. Everything
else is real: autograd, optimisers, messages, schedules, processes. A micro-batch waits its share of the batch.
"""

from __future__ import annotations

import ctypes
import sys
import time
from collections.abc import Sequence
from dataclasses import astuple, dataclass
from typing import Any

import torch
from torch import Tensor, nn

from pipeline import AuxiliaryHead, Given, Profile, Task, Term, register_method

METHOD = "virtual"
CLASSES = 10
_PR_SET_TIMERSLACK = 29


@dataclass(frozen=True)
class Costs:
    """Seconds of one local module for a whole batch, alone on a device. A full backward pass takes I + W."""

    forward: float  # F
    input_gradient: float  # I
    weight_gradient: float  # W
    head: float  # one level of heads, a third of it forward

    @property
    def module(self) -> float:
        """A step without heads."""
        return self.forward + self.input_gradient + self.weight_gradient

    def scaled(self, factor: float) -> Costs:
        """All times multiplied by ``factor``."""
        return Costs(*(factor * seconds for seconds in astuple(self)))

    def as_entry(self) -> dict[str, float]:
        """The same, for a module in a profile file. Messages and updates take no time there."""
        backward = {"relay_s": self.input_gradient, "backward_s": self.input_gradient + self.weight_gradient}
        return {"forward_s": self.forward, **backward, "cascade_s": self.head, "independent_s": self.head}


def equal_costs(modules: int, unit_s: float, head: float) -> tuple[Costs, ...]:
    """Modules with F = I = W = ``unit_s`` seconds and levels of heads of ``head`` units."""
    return (Costs(unit_s, unit_s, unit_s, head * unit_s),) * modules


def profiled_costs(profile: Profile) -> tuple[Costs, ...]:
    """Of the modules of a profile; where it holds no input gradient alone, that is half of a backward pass. Both levels
    of heads cost what the independent one costs, or the cascade where there is no other."""
    costs = []
    for module in profile.modules:
        inputs = module.relay_s or module.backward_s / 2
        head = module.independent_s or module.cascade_s
        costs.append(Costs(module.forward_s, inputs, max(0.0, module.backward_s - inputs), head))
    return tuple(costs)


class Clock:
    """Waits on one rank, and keeps account of how long they really were (``asked`` and ``waited``, in seconds): a wait
    ends late by what the kernel needs to wake a process, and the next one is shorter by that, so that the sum is right.
    Times are given for ``batch_rows`` rows."""

    def __init__(self, batch_rows: int) -> None:
        self.batch_rows = batch_rows
        self.asked = 0.0
        self.waited = 0.0
        if sys.platform == "linux":  # wake up to 1 ns late instead of 50 us
            ctypes.CDLL(None).prctl(_PR_SET_TIMERSLACK, 1, 0, 0, 0)

    def wait(self, seconds: float) -> None:
        """Let ``seconds`` pass without using the core."""
        self.asked += seconds
        left = self.asked - self.waited
        if left > 0:
            started = time.perf_counter()
            time.sleep(left)
            self.waited += time.perf_counter() - started


class _Timed(torch.autograd.Function):
    """The identity, after a wait; its backward pass waits too. Seconds of a batch, ``rows`` of it."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, clock: Clock, rows: int, forward_s: float, backward_s: float) -> Tensor:
        share = rows / clock.batch_rows
        ctx.clock, ctx.backward_s = clock, backward_s * share
        if forward_s:
            clock.wait(forward_s * share)
        return x.clone()

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None, None, None, None]:
        ctx.clock.wait(ctx.backward_s)
        return gradient, None, None, None, None


class VirtualBlock(nn.Module):
    """A block of a network that takes ``costs``: (b, width) -> (b, width). Without training it takes no time, so that
    tests of shapes and the evaluation after a run are free."""

    def __init__(self, costs: Costs, clock: Clock, width: int) -> None:
        super().__init__()
        self.first = nn.Parameter(torch.zeros(()))
        self.weight = nn.Parameter(torch.zeros(width))
        self._costs, self._clock = costs, clock

    def forward(self, x: Tensor) -> Tensor:
        if not self.training:
            return x + self.first + self.weight
        costs, rows = self._costs, len(x)
        through = _Timed.apply(x + self.first, self._clock, rows, costs.forward, costs.input_gradient)
        y: Tensor = through + _Timed.apply(self.weight, self._clock, rows, 0.0, costs.weight_gradient)
        return y


class VirtualHead(AuxiliaryHead):
    """A head whose loss is the mean square of the feature, after a wait of ``seconds`` in all."""

    def __init__(self, seconds: float, clock: Clock) -> None:
        super().__init__()
        self._seconds, self._clock = seconds, clock

    def loss(self, feature: Tensor, given: Given) -> Tensor:
        third = self._seconds / 3
        rows = len(given.target)
        loss: Tensor = _Timed.apply(feature, self._clock, rows, third, 2 * third).square().mean()
        return loss


def virtual_network(costs: Sequence[Costs], clock: Clock, width: int) -> nn.Sequential:
    """One block per entry of ``costs``; the last one ends in a small linear layer that gives logits."""
    torch.manual_seed(0)
    blocks = [nn.Sequential(VirtualBlock(cost, clock, width)) for cost in costs]
    blocks[-1].append(nn.Linear(width, CLASSES))
    return nn.Sequential(*blocks)


def register_virtual_heads(costs: Costs, clock: Clock, name: str = METHOD) -> None:
    """Make ``method.name = name`` known in this process: one virtual head per level, of equal costs everywhere."""

    def terms(_config: object, _task: Task, _position: float) -> list[Term]:
        return [Term("task", 1.0, lambda _shape: VirtualHead(costs.head, clock))]

    register_method(name, terms)


def features(rows: int, width: int) -> tuple[Tensor, Tensor]:
    """(rows, width) random features and (rows,) labels, always the same."""
    generator = torch.Generator().manual_seed(1)
    return torch.randn(rows, width, generator=generator), torch.randint(CLASSES, (rows,), generator=generator)
