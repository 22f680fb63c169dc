"""BatchNorm as in HPFF's released code, which evaluates a module n times a step and so moves its statistics n times.

Momentum 1 - 0.9^n gives the same statistics in one evaluation. The stem of module 0 is evaluated once there.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from torch import nn

BatchNorm = nn.modules.batchnorm._BatchNorm


def imitate_repeated(blocks: Mapping[str, nn.Module], evaluations: int) -> list[BatchNorm]:
    """Change the momentum of the layers of ``blocks``, by name, to that of so many evaluations; returns them."""
    repeated: list[BatchNorm] = []
    if evaluations == 1:
        return repeated
    for block in [block for name, block in blocks.items() if name != "stem"]:
        for child in block.modules():
            if isinstance(child, BatchNorm) and child.momentum is not None:
                child.momentum = 1.0 - (1.0 - child.momentum) ** evaluations
                repeated.append(child)
    return repeated


def count_repeated(layers: Sequence[BatchNorm], evaluations: int) -> None:
    """Count the evaluations that were left out."""
    for layer in layers:
        if layer.num_batches_tracked is not None:
            layer.num_batches_tracked += evaluations - 1
