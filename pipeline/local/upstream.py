"""Weights upstream: a method may let the heads of module m see the weights that module m+1's first block has had.

    module m+1    U0  U1  U2  U3  U4 ...            after its update of every n-th batch it shares a copy     (n = 2)
                  S0      S2      S4
                    \\_ _ _  \\_ _ _
    module m      F0  F1  F2 A0  F3  F4 A2 ...      adopts it a declared number of steps later                (lag 2)

The heads on batch t use the weights after the update of batch s(t), the last multiple of n that is at least ``lag``
steps old: steps since the one in which the module did that update, which schedule `async` does late. So the result
depends neither on timing nor on placement. As with all late work, an epoch ends with everything adopted. Before the
first ones have come a head has what it was built with.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from pipeline.base.errors import ConfigError
from pipeline.base.flow import Tensors
from pipeline.local.roles import ModulePlan
from pipeline.local.to_host import to_host

Shapes = Mapping[str, tuple[int, ...]]
PREFIX, DECLARED = "upstream.", "upstream.declared"


@dataclass(frozen=True)
class Upstream:
    """What a method declares to get weights upstream (:func:`pipeline.local.methods.register_method`).

    Attributes:
        every: steps from one copy to the next.
        lag: steps from the one in which the next module has made an update to the first that uses it; with 1 a module
            waits for the end of the next one's step before, with more it waits only for who is slower than that.

    Raises:
        ConfigError: one of them is less than 1.
    """

    every: int = 1
    lag: int = 1

    def __post_init__(self) -> None:
        for name, value in vars(self).items():
            if value < 1:
                raise ConfigError(f"weights upstream: {name} = {value}; use at least 1")

    @property
    def copies(self) -> int:
        """Most copies that are shared and not yet adopted."""
        return -(-self.lag // self.every)

    def __str__(self) -> str:
        return f"every {self.every} step(s), lag {self.lag}"


def adopts(plan: ModulePlan) -> bool:
    """Whether a module has heads, to which weights of the next module can go."""
    return plan.independent or plan.cascade


def shapes_of(block: nn.Module) -> Shapes:
    """What is shared of a block: its parameters. Buffers, such as BatchNorm's statistics, are none."""
    return {name: tuple(parameter.shape) for name, parameter in block.named_parameters()}


class FlatWeights:
    """Tensors of given names and shapes, side by side in one buffer.

    Args:
        shapes: by name.
        dtype: of all.
        device: where.

    Attributes:
        flat: the buffer, (1, elements).
        named: views of it.
    """

    def __init__(self, shapes: Shapes, dtype: torch.dtype, device: torch.device) -> None:
        sizes = [torch.Size(shape).numel() for shape in shapes.values()]
        self.flat = torch.zeros(1, sum(sizes), dtype=dtype, device=device)
        parts = self.flat[0].split(sizes)
        self.named: Tensors = {
            name: part.view(shape) for (name, shape), part in zip(shapes.items(), parts, strict=True)
        }

    @torch.no_grad()
    def copy(self, parameters: Iterable[Tensor]) -> None:
        """Take on the values of ``parameters``, in order."""
        for mine, parameter in zip(self.named.values(), parameters, strict=True):
            mine.copy_(parameter)


class Mailbox:
    """The weights that have come to one module and are not adopted yet: at most ``declared.copies`` of them, in buffers
    that are used again.

    Args:
        declared: by the method.
        shapes: of what comes.
        dtype: of what comes.
        device: of the module.

    Attributes:
        waiting: by the batch whose update made them.
    """

    def __init__(self, declared: Upstream, shapes: Shapes, dtype: torch.dtype, device: torch.device) -> None:
        self.declared = declared
        self.waiting: dict[int, FlatWeights] = {}
        self._spare = [FlatWeights(shapes, dtype, device) for _ in range(declared.copies)]

    def put(self, step: int, flat: Tensor) -> None:
        """A copy of (1, elements) values after the update of batch ``step``."""
        weights = self._spare.pop()
        weights.flat.copy_(flat)
        self.waiting[step] = weights

    def take(self, step: int) -> Tensors:
        """The weights after the update of batch ``step``; their memory is written again by a later :meth:`put`."""
        weights = self.waiting.pop(step)
        self._spare.append(weights)
        return weights.named

    def state(self) -> Tensors:
        """What a checkpoint keeps, on the CPU or on its way there."""
        state = {DECLARED: torch.tensor([self.declared.every, self.declared.lag])}
        for step, weights in self.waiting.items():
            state[f"{PREFIX}{step}"] = to_host(weights.flat)
        return state

    def restore(self, state: Tensors) -> None:
        """Put a state of :meth:`state` back; other entries are left out.

        Raises:
            ConfigError: it was made with weights of other steps.
        """
        found = Upstream(*state[DECLARED].tolist()) if DECLARED in state else None
        if found != self.declared:
            raise ConfigError(
                f"the checkpoint was made with weights upstream {found or 'not at all'}, the method declares "
                f"{self.declared} now; declare what it was, or start anew"
            )
        for name, flat in state.items():
            if name.startswith(PREFIX) and name != DECLARED:
                self.put(int(name.removeprefix(PREFIX)), flat)
