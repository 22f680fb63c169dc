"""The forms that the work of heads can take, each planned like a run: time and memory of a choice, before it is made.

    patches.at_once     auto | 1 | n          hierarchy.levels     separate | together | auto
    forms               the configured one, and every one that changes one of these keys and thereby what is done
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Iterator, Sequence

from pipeline.base.numerics import Numerics
from pipeline.models.backbones import Blocks
from pipeline.models.unbuilt import without_memory
from pipeline.plan.assembly import Plan
from pipeline.plan.head_costs import head_operations, with_heads_of
from pipeline.plan.level_choice import joinable
from pipeline.plan.module_flops import Uncountable
from pipeline.plan.predicted import predicted
from pipeline.plan.rank_memory import rank_memory
from pipeline.plan.report import PlannedForm
from pipeline.plan.simulate import ModuleCost


def compared_forms(
    plan: Plan,
    costs: Sequence[ModuleCost],
    blocks: Blocks,
    numerics: Numerics,
    link: tuple[float, float],
    *,
    measure: bool,
    operations: int | None,
) -> tuple[PlannedForm, ...]:
    """The forms of ``plan``, on its ranks, the plan itself first; () where there is no other.

    Args:
        plan: placed, its levels chosen.
        costs: of its local modules.
        blocks: the network; it stays as it is.
        numerics: of the run.
        link: seconds of latency and bytes per second between two ranks.
        measure: measure heads where they differ from those of ``plan``; otherwise nothing is known of their time and
            memory.
        operations: of a step of ``plan``; None: count none.
    """
    own = _heads(plan)
    counted = _Operations(plan, operations, blocks, numerics)
    rows = []
    seen = []
    for form in (plan, *_others(plan, blocks)):
        heads = _heads(form)
        if (heads, form.levels_together) in seen:
            continue
        seen.append((heads, form.levels_together))
        differ = {
            role.index
            for role, before, now, then in zip(form.modules, plan.modules, heads, own, strict=True)
            if now != then or role.together != before.together
        }
        known: Sequence[ModuleCost] | None = costs if not differ else None
        if differ and measure:
            try:
                known = with_heads_of(form, differ, costs, blocks, numerics)
            except Uncountable:  # it may need more memory than there is
                known = None
        patches = [pair for module in heads for pair in module]
        rows.append(
            PlannedForm(
                at_once=form.config.patches.at_once,
                levels=form.config.hierarchy.levels,
                patches=(min(patches)[0], max(patches)[0], max(count for _, count in patches)) if patches else None,
                together=len(form.levels_together),
                configured=form is plan,
                step_s=None if known is None else _step_s(form, known, link),
                operations=counted.of(form),
                memory_bytes=None if known is None else rank_memory(form, known, numerics),
            )
        )
    return tuple(rows) if len(rows) > 1 else ()


def _others(plan: Plan, blocks: Blocks) -> Iterator[Plan]:
    """Plans with one key changed, on the ranks of ``plan``."""
    config = plan.config
    if config.patches.grid > 1:
        others = [at_once for at_once in ("auto", 1) if at_once != config.patches.at_once]
        yield from (plan.with_patches_at_once(at_once, blocks) for at_once in others)
    if together := joinable(plan):
        forms: dict[str, frozenset[int]] = {"separate": frozenset(), "together": together}
        for levels, modules in forms.items():
            hierarchy = dataclasses.replace(config.hierarchy, levels=levels)
            other = dataclasses.replace(plan, config=dataclasses.replace(config, hierarchy=hierarchy))
            yield other.with_levels_together(modules)


def _heads(plan: Plan) -> tuple[tuple[tuple[int, int], ...], ...]:
    """Patches that every head of every local module works on together, and how many it has, of those that have
    patches."""
    found = []
    for role in plan.modules:
        shape = plan.feature(role.index)
        builders = plan.level_builders(role.index)
        levels = [without_memory(build) for build in builders.values()]
        if plan.head_memory is not None:
            plan.head_memory.fit(role.index, levels, shape, role.together)
        of_module = []
        for head in (head for level in levels for _, head in level.heads() if head.grid > 1):
            of_module.append((head.largest_block(len(shape) + 1), head.patches(len(shape) + 1)))
        found.append(tuple(of_module))
    return tuple(found)


class _Operations:
    """Operations of a step of any form, from the ``known`` ones of ``plan``; None: count none."""

    def __init__(self, plan: Plan, known: int | None, blocks: Blocks, numerics: Numerics) -> None:
        self._plan = plan
        self._known = known
        self._network = blocks, numerics

    def of(self, form: Plan) -> int | None:
        """Of a step of ``form``; None where that is not known."""
        if self._known is None or form is self._plan:
            return self._known
        try:
            return round(self._known + sum(head_operations(form, *self._network)) - self._own)
        except Uncountable:
            return None

    @functools.cached_property
    def _own(self) -> float:
        """Of the heads of the plan."""
        return sum(head_operations(self._plan, *self._network))


def _step_s(plan: Plan, costs: Sequence[ModuleCost], link: tuple[float, float]) -> float:
    if plan.config.schedule.kind == "free":  # the first stage sets the pace
        return sum(costs[m].step_s(plan.modules[m]) for m in plan.stages[0])
    return predicted(plan, costs, *link)[1].step_s
