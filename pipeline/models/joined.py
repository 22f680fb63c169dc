"""The parameters of several networks side by side, as operations on groups of channels need them; one copy for all.

    forward     weight 0 | bias 0 | weight 1 | ...     of W networks, each R times      one cat; the parts are views
    backward    (R, weight 0 | bias 0 | ...)           their gradients                  one cat, one sum over R
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable


class _Joined(torch.autograd.Function):
    """``(R, W, parameters) -> joined``: W parameters (O, ...) of one shape and layout in a row belong together and
    become one tensor (R W O, ...) of that layout."""

    @staticmethod
    def forward(ctx: Any, repeats: int, count: int, *parameters: Tensor) -> tuple[Tensor, ...]:
        ctx.repeats, ctx.count = repeats, count
        ctx.layouts = [(one.shape, one.stride()) for one in parameters[::count]]
        flat = [one if one.dim() == 1 else one.as_strided((one.numel(),), (1,)) for one in parameters]
        buffer = torch.cat([one for i in range(0, len(flat), count) for one in flat[i : i + count] * repeats])
        parts = buffer.split([shape.numel() * count * repeats for shape, _ in ctx.layouts])
        return tuple(
            part if len(shape) == 1 else _at(part, (repeats * count * shape[0], *shape[1:]), stride)
            for part, (shape, stride) in zip(parts, ctx.layouts, strict=True)
        )

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor | None, ...]:
        of_pass = [shape.numel() * ctx.count for shape, _ in ctx.layouts]
        rows = []
        for gradient, (_, stride), each in zip(gradients, ctx.layouts, of_pass, strict=True):
            if gradient.stride() != stride:
                gradient = gradient.new_empty_strided(gradient.shape, stride).copy_(gradient)
            rows.append(_at(gradient, (ctx.repeats, each), (each, 1)))
        sums = torch.cat(rows, dim=1)
        sums = sums.sum(dim=0) if ctx.repeats > 1 else sums[0]
        layouts = [layout for layout in ctx.layouts for _ in range(ctx.count)]
        found = [
            part if len(shape) == 1 else _at(part, shape, stride)
            for part, (shape, stride) in zip(sums.split([shape.numel() for shape, _ in layouts]), layouts, strict=True)
        ]
        return None, None, *found


def _at(x: Tensor, shape: Sequence[int], stride: Sequence[int]) -> Tensor:
    """A view of the memory that ``x`` begins in."""
    return x.as_strided(shape, stride, x.storage_offset())


def joined(parameters: Sequence[Sequence[Tensor]], repeats: int) -> list[Tensor]:
    """W parameters (O, ...) of one shape side by side, in turn, as often as asked: (R W O, ...) for each.

    Args:
        parameters: of one dtype; those of W networks for each place in the network.
        repeats: R.
    """
    if not parameters:
        return []
    count = len(parameters[0])
    if repeats * count == 1:
        return [one for (one,) in parameters]
    dense = [one if _is_dense(one) else one.contiguous() for of_place in parameters for one in of_place]
    return list(_Joined.apply(repeats, count, *dense))


def _is_dense(x: Tensor) -> bool:
    """Whether the first dimension is the outermost in memory and nothing lies between the values."""
    return x.is_contiguous() or (x.dim() == 4 and x.is_contiguous(memory_format=torch.channels_last))
