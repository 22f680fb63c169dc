"""One micro-batch, as the local modules of a stage get it, and what a module keeps of it until its backward."""

from __future__ import annotations

from dataclasses import dataclass, field

from torch import Tensor

from pipeline.base.flow import Tensors
from pipeline.models.spread import Gradient

BatchKey = tuple[int, int]
"""(step, micro-batch)"""


@dataclass(frozen=True)
class MicroBatch:
    """
    Attributes:
        inputs: of a local module, (b, ...) each; "x" among them.
        labels: int64 (b, ...), the target of the task.
        image: uint8 (b, C, H, W), where this module or a later one reconstructs it.
        scale: share of this micro-batch in the batch, b / B.
        local_gradient: of "x", from the local loss of the module before, where a method reconciles the two (see sgr).
    """

    inputs: Tensors
    labels: Tensor
    image: Tensor | None
    scale: float
    local_gradient: Tensor | None = None


@dataclass
class InFlight:
    """What a module keeps of one micro-batch between its forward and its backward.

    Attributes:
        batch: with detached inputs, leaves that require grad when a gradient goes upstream.
        outputs: (b, ...), with their graph.
        weights: the leaves of the graph that get weight gradients.
        rng_seed: of its random numbers.
        own: c_m, the gradient of "x" of the outputs from the cascade level; None once ``independent`` holds it too.
        independent: a_m, likewise from the independent level or the last loss.
        aux: the gradient of an output "aux" of the network from the last loss.
        relayed: c_m has gone upstream.
        received: key -> gradients of the outputs from module m+1.
        local_gradient: of "x" of the outputs from the local loss alone, for module m+1 where it reconciles.
        embedding: detached, what the first block has given, where heads ask for it.
    """

    batch: MicroBatch
    outputs: Tensors
    weights: list[Tensor]
    rng_seed: int
    own: Gradient | None = None
    independent: Gradient | None = None
    aux: Tensor | None = None
    relayed: bool = False
    received: dict[int, Tensors] = field(default_factory=dict)
    local_gradient: Tensor | None = None
    embedding: Tensor | None = None
