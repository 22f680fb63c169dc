"""What a stage counts of an epoch."""

from __future__ import annotations

from dataclasses import dataclass, field

from torch import Tensor


@dataclass
class Counters:
    """Sums since the last :meth:`pipeline.stage.stage.Stage.take_counters`. Seconds of the device; ``statistics``
    of the task's metrics by (module, level, metric) and ``test_loss_sum`` stay on the device; ``reused``,
    ``skipped`` and ``held_back`` as in :class:`pipeline.edges.replay.ReplayCounts`. ``averaged``: of the test with the
    averages of the weights in their place."""

    busy_s: dict[int, float] = field(default_factory=dict)
    queue_depth_sum: int = 0
    queue_depth_count: int = 0
    steps: int = 0
    images: int = 0
    tested: int = 0
    test_loss_sum: Tensor | float = 0.0
    statistics: dict[tuple[int, str, str], Tensor] = field(default_factory=dict)
    reused: int = 0
    skipped: int = 0
    held_back: int = 0
    averaged: Counters | None = None
