"""What flows downstream: a named set of tensors.

One tensor alone is called "x", and blocks take and return it bare. Several travel as a dict, "x" among them, from a
block that returns one to every block after it:

    block(x)                       -> x                          images (B, C, H, W), features (B, T, D), ids (B, T)
    block({"x": x, "mask": mask})  -> {"x": x, "mask": mask}     what a later block needs must be passed on
    block({"x": x, "skip": skip})  -> x                          a skip connection may cross an edge

Auxiliary heads stand on "x", and see every map as (B, C, H, W), also where the network has it as (B, H, W, C).
Gradients of a cascade flow back through every tensor of floating point. What the last block gives as "aux" in training
has the last loss too.

Batches may vary in length up to a maximum: then some axes of some tensors do, and the plan knows which (TensorSpec).
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

MAIN, AUX = "x", "aux"
Tensors = dict[str, Tensor]
Flow = Tensor | Tensors


@dataclass(frozen=True)
class TensorSpec:
    """What is known of a tensor before there is one.

    Attributes:
        shape: without the batch, of the longest there is.
        dtype: of floating point: any; it travels in the boundary dtype.
        varies: the axes of ``shape`` that are shorter in shorter batches.
        channels_last: it is a map (H, W, C), as Swin makes them, where others are (C, H, W).
    """

    shape: tuple[int, ...]
    dtype: torch.dtype = torch.float32
    varies: tuple[int, ...] = ()
    channels_last: bool = False

    @property
    def feature(self) -> tuple[int, ...]:
        """The shape that heads see: (C, H, W) of every map."""
        return (self.shape[-1], *self.shape[:-1]) if self.channels_last else self.shape

    def fits(self, tensor: Tensor) -> bool:
        """Whether a tensor (B, ...) has this shape, varying axes no longer than this."""
        shape = tuple(tensor.shape[1:])
        return len(shape) == len(self.shape) and all(
            size == most or (axis in self.varies and 0 < size < most)
            for axis, (size, most) in enumerate(zip(shape, self.shape, strict=True))
        )


Specs = dict[str, TensorSpec]
"""Of a named set."""
LABEL = TensorSpec((), torch.int64)
"""One class per sample."""


def named(flow: Flow) -> Tensors:
    """The named set, of a bare tensor too."""
    return flow if isinstance(flow, dict) else {MAIN: flow}


def passed(flow: Flow) -> Flow:
    """What a block gets of what the one before it gave: a dict of "x" alone is "x" itself, in every cut."""
    return bare(flow) if isinstance(flow, dict) else flow


def bare(tensors: Tensors) -> Flow:
    """The tensor itself where "x" is all there is."""
    return tensors[MAIN] if len(tensors) == 1 and MAIN in tensors else tensors


def channels_first(x: Tensor) -> Tensor:
    """A map (B, H, W, C) as (B, C, H, W), on the same memory."""
    return x.permute(0, 3, 1, 2)


def channels_last(x: Tensor) -> Tensor:
    """A map (B, C, H, W) as (B, H, W, C), on the same memory."""
    return x.permute(0, 2, 3, 1)
