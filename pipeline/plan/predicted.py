"""The pace of a plan once its pipeline is full, from the costs of its modules."""

from __future__ import annotations

import math
from collections.abc import Sequence

from pipeline.plan.assembly import Plan
from pipeline.plan.simulate import ModuleCost, Simulation, simulate
from pipeline.stage.events import SteadyState, steady_state

STEPS = 24
"""Simulated steps besides those that late work needs; the first half fills the pipeline."""


def predicted(
    plan: Plan, costs: Sequence[ModuleCost], latency_s: float = 0.0, bytes_per_s: float = math.inf
) -> tuple[Simulation, SteadyState]:
    """Simulate ``plan`` with ``costs`` of every local module over links of this latency and bandwidth."""
    late = max(action.lag for schedule in plan.schedules for action in schedule)
    simulation = simulate(
        plan.modules,
        plan.schedules,
        costs,
        STEPS + late,
        depth=plan.config.runtime.queue_depth,
        latency_s=latency_s,
        bytes_per_s=bytes_per_s,
        replay=plan.config.schedule.kind == "free",
    )
    return simulation, steady_state(simulation.events(), STEPS // 2, STEPS - 1)
