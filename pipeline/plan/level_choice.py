"""``hierarchy.levels = "auto"``: on which ranks both levels of a local module run together.

    separate   rank 1   F C R I    rank 0 waits for R: it leaves after the cascade level alone
    together   rank 1   F CI  R    cheaper, but R leaves later

A rank takes the form that is cheaper unless the simulated pipeline then takes longer for a step: the last ranks of a
cascade keep the cascade first where a rank upstream waits for it, the others need not. The two forms round differently,
so in float32 the bits may depend on the placement.
"""

from __future__ import annotations

import itertools
from collections import OrderedDict
from collections.abc import Sequence

import torch

from pipeline.base.flow import TensorSpec
from pipeline.local.both_levels import BothLevels
from pipeline.local.roles import ModulePlan
from pipeline.models.boundaries import META, ROWS, blank
from pipeline.models.heads import Given
from pipeline.models.unbuilt import without_memory
from pipeline.plan.assembly import Plan
from pipeline.plan.predicted import predicted
from pipeline.plan.simulate import ModuleCost

SAME = 1.0 + 1e-9
"""Simulated times that differ by less are sums of the same numbers in another order."""


def joinable(plan: Plan) -> frozenset[int]:
    """The local modules that have both levels, with heads of the same shape that can be done at once."""
    return frozenset(role.index for role in plan.modules if _has_both(role) and _pays(plan, role.index))


def choose_levels(plan: Plan, costs: Sequence[ModuleCost]) -> Plan:
    """The plan with both levels together on those ranks where that is cheaper and makes no step longer, if
    ``hierarchy.levels = "auto"`` asks for that.

    Ranks are asked one after another, those that save most first. The answer depends on the arguments alone.

    Args:
        plan: of a placement; how its levels run does not matter.
        costs: of every local module, with ``together_s`` where its levels may go together.
    """
    if plan.config.hierarchy.levels != "auto":
        return plan
    together: frozenset[int] = frozenset()
    saved = {m: costs[m].separate_s - costs[m].together_s for m in joinable(plan) if costs[m].together_s}
    by_rank = [frozenset(m for m in stage if saved.get(m, 0.0) > 0.0) for stage in plan.stages]
    _, before = predicted(plan.with_levels_together(together), costs)
    step_s = before.step_s
    for modules in sorted(filter(None, by_rank), key=lambda modules: (-sum(saved[m] for m in modules), min(modules))):
        _, then = predicted(plan.with_levels_together(together | modules), costs)
        if then.step_s <= step_s * SAME:
            together, step_s = together | modules, then.step_s
    return plan.with_levels_together(together)


def levels_line(plan: Plan) -> str:
    """For people: on which ranks both levels run together, where that was chosen; else ""."""
    if plan.config.hierarchy.levels != "auto" or not any(_has_both(role) for role in plan.modules):
        return ""
    chosen = plan.levels_together
    forms: dict[bool, list[int]] = {True: [], False: []}
    for rank, stage in enumerate(plan.stages):
        forms[any(module in chosen for module in stage)].append(rank)
    parts = [f"both levels together on rank {_listed(forms[True])} (module {_listed(chosen)})"] if chosen else []
    parts += [f"one after the other on rank {_listed(forms[False])}"] if forms[False] else []
    return (
        f"hierarchy.levels=auto: {', '.join(parts)}; the bits of float32 may therefore depend on the placement, which "
        "those of separate (the default) and of together never do"
    )


def _listed(numbers: Sequence[int]) -> str:
    """``0-2, 5``."""
    runs = (list(run) for _, run in itertools.groupby(enumerate(numbers), lambda pair: pair[1] - pair[0]))
    ends = ((run[0][1], run[-1][1]) for run in runs)
    return ", ".join(str(first) if first == last else f"{first}-{last}" for first, last in ends)


def _has_both(role: ModulePlan) -> bool:
    return role.independent and role.cascade


def _pays(plan: Plan, index: int) -> bool:
    """Whether this module's levels may go together; heads are only planned."""
    shape, task = plan.feature(index), plan.task
    builders = plan.level_builders(index)
    specs = TensorSpec(shape), task.target, task.image
    feature, target, image = (blank(spec, ROWS, torch.float32, META) for spec in specs)
    levels = OrderedDict((name, without_memory(build)) for name, build in builders.items())
    return BothLevels(levels).pays(feature, Given(target, image if index in plan.reconstructing else None))
