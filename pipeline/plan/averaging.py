"""What the replicas of a plan send each other: gradients and losses, summed over the twins of every stage.

    all-reduce over R twins    every rank sends 2 (R-1)/R of the bytes: its part of the sum, then the sum of a part
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence

from pipeline.models.backbones import Blocks
from pipeline.models.unbuilt import without_memory
from pipeline.plan.assembly import Plan
from pipeline.plan.simulate import ModuleCost


def averaged_bytes(plan: Plan, module: int, blocks: Blocks) -> int:
    """Bytes that a rank sends in a step to average the gradients of a local module and its heads; 0 of one replica."""
    parts = [blocks[name] for name in plan.cut.modules[module]]
    parts += [without_memory(build) for build in plan.level_builders(module).values()]
    whole = sum(p.nbytes for part in parts for p in part.parameters() if p.requires_grad)
    return round(2 * (plan.replicas - 1) / plan.replicas * whole)


def with_averaging(
    plan: Plan, costs: Sequence[ModuleCost], blocks: Blocks, link: tuple[float, float]
) -> Sequence[ModuleCost]:
    """The costs with updates that wait for the sums over a ``link`` of (seconds, bytes per second). Nothing else is
    taken to be done meanwhile, so a run is as fast or faster."""
    if plan.replicas == 1:
        return costs
    latency_s, bytes_per_s = link
    turns = 2 * (plan.replicas - 1)
    return [
        dataclasses.replace(
            cost, update_s=cost.update_s + turns * latency_s + averaged_bytes(plan, index, blocks) / bytes_per_s
        )
        for index, cost in enumerate(costs)
    ]
