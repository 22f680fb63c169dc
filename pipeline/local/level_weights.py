"""The weight of a level of heads in an epoch: a number, or a way from one number to another.

    hierarchy.cascade_weight = [1.0, 0.1]        epoch 1: 1.0    ...  linear  ...    last epoch: 0.1

A weight changes between two epochs only, when no batch is in flight, and depends on the epoch alone: so no placement
and no resume changes the result.
"""

from __future__ import annotations

from pipeline.base.config import LevelWeight


def level_weight(weight: LevelWeight, epoch: int, epochs: int) -> float:
    """The weight in ``epoch`` (1-based) of ``epochs``; of a run of one epoch it is the first value."""
    if not isinstance(weight, tuple):
        return weight
    first, last = weight
    return first + (last - first) * (epoch - 1) / (epochs - 1) if epochs > 1 else first


def has_heads(weight: LevelWeight | None) -> bool:
    """Whether a level has heads: its weight is not 0 all the time."""
    assert weight is not None  # validate has filled in the default
    return max(weight) > 0 if isinstance(weight, tuple) else weight > 0
