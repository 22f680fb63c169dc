"""Gradients of the outputs of a local module: summed in a fixed order, and gone as soon as they are used.

    a_m + c_m + received        into the memory of a_m; the last one is not a tensor of this module
         |
      [graph of f_m]            backward: every node frees what it had saved, and the gradient that it was given

``torch.autograd.backward`` holds the gradients that it starts from until it returns, and its caller the outputs: one
map each, at the very moment when most is alive.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from pipeline.base.flow import MAIN, Tensors
from pipeline.models.spread import Gradient, Spread, whole


class OutputGradients:
    """The outputs of a module that have a graph and a gradient, and that gradient.

    Args:
        outputs: of the module, with their graph.
        own: what its heads say of "x", in order; used up: their memory may hold the sum afterwards.
        received: gradients of the outputs, in order; they stay as they are.
        keep: ``own`` is needed again, so it stays as it is too.
    """

    def __init__(
        self, outputs: Tensors, own: Sequence[Gradient | None], received: Sequence[Tensors | None], keep: bool = False
    ) -> None:
        self.outputs: list[Tensor] = []
        self.gradients: list[Tensor] = []
        for name, h in outputs.items():
            if not h.requires_grad:
                continue
            mine = [term for term in (own if name == MAIN else ()) if term is not None]
            others: list[Gradient] = [tensors[name] for tensors in received if tensors is not None and name in tensors]
            if mine or others:
                total = whole(summed(mine + others, used_up=bool(mine) and not keep)).to(h.dtype)
            elif name == MAIN:
                total = torch.zeros_like(h)
            else:
                continue
            self.outputs.append(h)
            self.gradients.append(total)

    def backward(self, leaves: Sequence[Tensor]) -> None:
        """Into ``.grad`` of ``leaves``; frees the graph. Nothing is left here."""
        if leaves and self.outputs:
            root = self._root()
            torch.autograd.backward(root, root.detach(), inputs=list(leaves))

    def upstream(self, inputs: Sequence[Tensor]) -> tuple[Tensor | None, ...]:
        """The gradients of ``inputs``; keeps the graph. Nothing is left here."""
        root = self._root()
        return torch.autograd.grad(root, inputs, root.detach(), retain_graph=True, allow_unused=len(inputs) > 1)

    def _root(self) -> Tensor:
        outputs, gradients, self.outputs, self.gradients = self.outputs, self.gradients, [], []
        with torch.enable_grad():
            root: Tensor = _Handed.apply(gradients, *outputs)
        return root


class _Handed(torch.autograd.Function):
    """A root without a value, whose backward gives the gradients of its inputs away."""

    @staticmethod
    def forward(ctx: Any, gradients: list[Tensor], *outputs: Tensor) -> Tensor:
        ctx.gradients = gradients
        return outputs[0].new_empty(())

    @staticmethod
    def backward(ctx: Any, nothing: Tensor) -> tuple[Tensor | None, ...]:
        handed = tuple(ctx.gradients)
        ctx.gradients.clear()
        return None, *handed


def summed(terms: Sequence[Gradient], used_up: bool) -> Gradient:
    """Sum in the given order; where the first term is ``used_up``, in its memory if it can be."""
    total, *others = terms
    for term in others:
        if isinstance(total, Spread) and isinstance(term, Spread) and total.fits(term):
            total = replace(total, share=total.share + term.share)
        else:
            total, term = whole(total), whole(term)
            total = total.add_(term) if used_up and _takes(total, term) else total + term
        used_up = True
    return total


def _takes(total: Tensor, term: Tensor) -> bool:
    """Whether the sum is the same tensor in the memory of ``total``, which an expanded one has not."""
    alike = total.stride() == term.stride() and torch.result_type(total, term) == total.dtype
    return alike and total.nbytes <= total.untyped_storage().nbytes()
