"""What flows downstream: a named set of tensors.

One tensor alone is called "x", and blocks take and return it bare. Several travel as a dict, "x" among them, from a
block that returns one to every block after it:

    block(x)                       -> x                          images (B, C, H, W), features (B, T, D), ids (B, T)
    block({"x": x, "mask": mask})  -> {"x": x, "mask": mask}     what a later block needs must be passed on
    block({"x": x, "skip": skip})  -> x                          a skip connection may cross an edge

Auxiliary heads stand on "x". Gradients of a cascade flow back through every tensor of floating point.
"""

from __future__ import annotations

from torch import Tensor

MAIN = "x"
Tensors = dict[str, Tensor]
Flow = Tensor | Tensors


def named(flow: Flow) -> Tensors:
    """The named set, of a bare tensor too."""
    return flow if isinstance(flow, dict) else {MAIN: flow}


def bare(tensors: Tensors) -> Flow:
    """The tensor itself where "x" is all there is."""
    return tensors[MAIN] if len(tensors) == 1 and MAIN in tensors else tensors
