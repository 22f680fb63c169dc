"""Schedule `async`: the weights that a late module's forward has used, kept until the backward of that batch.

    step          t                 t + 1                       t + 2
    forward       copy_t <- theta   copy_t+1 <- theta           copy_t <- theta      a used-up copy is written again
    backward                        into copy_t.grad
    update                          theta.grad = copy_t.grad

The backward of a batch works on the weights that produced it, and its gradients are applied to the newest ones. The
heads run at once, on the newest weights; their gradients wait for the same update.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from pipeline.base.flow import Flow, passed


@dataclass
class Stash:
    """What a late module keeps of one step until its update: the weights of its forward, the gradients of its heads."""

    weights: dict[str, dict[str, Tensor]]  # block -> parameter -> copy, a leaf
    head_gradients: list[Tensor | None]

    def leaves(self) -> list[Tensor]:
        """The copies in the order of the module's parameters."""
        return [copy for block in self.weights.values() for copy in block.values()]


class Stashes:
    """The stashes of one module.

    Args:
        blocks: of the module, by name.
        head_parameters: of its heads.

    Attributes:
        open: by step, until its update.
    """

    def __init__(self, blocks: OrderedDict[str, nn.Module], head_parameters: Sequence[nn.Parameter]) -> None:
        self._blocks = blocks
        self._head_parameters = head_parameters
        self.open: dict[int, Stash] = {}
        self._spare: list[Stash] = []  # used up; the next steps write into them

    def __len__(self) -> int:
        """Copies of the weights in memory."""
        return len(self.open) + len(self._spare)

    def take(self, step: int) -> Stash:
        """The stash of ``step``, with the weights as they are when it is first asked for: micro-batches share them."""
        if step not in self.open:
            stash = self.open[step] = self._spare.pop() if self._spare else self.empty()
            parameters: list[Tensor] = [p for block in self._blocks.values() for p in block.parameters()]
            if parameters:
                with torch.no_grad():
                    torch._foreach_copy_(stash.leaves(), parameters)
        return self.open[step]

    def run(self, step: int, flow: Flow) -> Flow:
        """The blocks on the stashed weights of ``step``. BatchNorm's running statistics are not copied: they are no
        weights."""
        for name, block in self._blocks.items():
            flow = passed(torch.func.functional_call(block, self.open[step].weights[name], (flow,)))
        return flow

    @contextmanager
    def heads_of(self, step: int) -> Iterator[None]:
        """Inside, the heads' gradients are those of one step, so that micro-batches of a step add up."""
        self._swap(self.open[step])
        yield
        self._swap(self.open[step])

    def gradients(self, step: int) -> list[Tensor | None]:
        """Those of ``step`` so far: of the module's parameters, then of its heads'."""
        return [leaf.grad for leaf in self.open[step].leaves()] + self.open[step].head_gradients

    def close(self, step: int) -> list[Tensor | None]:
        """The gradients of ``step``. The stash is used up."""
        gradients, stash = self.gradients(step), self.open.pop(step)
        for leaf in stash.leaves():
            leaf.grad = None
        stash.head_gradients = [None] * len(self._head_parameters)
        self._spare.append(stash)
        return gradients

    def empty(self) -> Stash:
        """A new one, its weights not set."""
        copies = {
            name: {key: torch.empty_like(p).requires_grad_(p.requires_grad) for key, p in block.named_parameters()}
            for name, block in self._blocks.items()
        }
        return Stash(copies, [None] * len(self._head_parameters))

    def _swap(self, stash: Stash) -> None:
        for index, parameter in enumerate(self._head_parameters):
            parameter.grad, stash.head_gradients[index] = stash.head_gradients[index], parameter.grad
