"""Before training, all ranks together: the plan of the run, for which rank 0 counts or measures if the placement asks
for it."""

from __future__ import annotations

from collections.abc import Sequence

from pipeline.base.config import Config
from pipeline.base.flow import Specs
from pipeline.base.numerics import Numerics
from pipeline.local.task import Task
from pipeline.models.backbones import Blocks
from pipeline.plan.assembly import Plan, make_plan
from pipeline.plan.cost_profile import Profile
from pipeline.plan.counted_costs import counted_costs
from pipeline.plan.level_choice import choose_levels, joinable
from pipeline.plan.module_flops import Uncountable, module_flops
from pipeline.plan.placement import choose_stages, place
from pipeline.plan.profiling import profile_modules
from pipeline.plan.rank_memory import rank_memory, refuse_too_large
from pipeline.plan.simulate import ModuleCost
from pipeline.ranks.grid import Grid
from pipeline.ranks.runtime import Runtime, ranks_per_device
from pipeline.ranks.team import Team

MEBI = 2**20


def placed_plan(
    config: Config,
    blocks: Blocks,
    task: Task,
    numerics: Numerics,
    runtime: Runtime,
    inputs: Specs | None = None,
    together: Sequence[int] | None = None,
    grid: Grid | None = None,
) -> tuple[Plan, str]:
    """The plan of a run on all ranks, and what to tell people about a choice by cost (else ""). Collective.

    ``partition.kind = "auto"``: rank 0 counts the FLOPs of every kind of module, which takes a second or two; where the
    ranks leave no choice, nobody does. What cannot be counted is placed by count.
    ``partition.kind = "measured"``: rank 0 measures every module on its device, one after another, while the others
    wait; so their time has no share in it.
    ``hierarchy.levels = "auto"``: rank 0 chooses by the costs that it has measured, else by counted ones.

    Args:
        together: the local modules with both levels together, where an earlier start of the run has chosen.
        grid: the ranks as replicas x stages; None: one replica.

    Raises:
        ConfigError: a placement that does not fit; a measured one that needs more memory than its device has.
    """
    grid = grid or Grid(0, 1, runtime.team.size)
    by_count = make_plan(config, blocks, task, grid.stages, inputs, grid.replicas)
    if config.partition.kind == "auto":
        placed, words = _placed_by_flops(by_count, blocks, numerics, runtime.team)
        plan, reason = _with_levels(placed, together, None, blocks, numerics, runtime)
        return plan, "; ".join(filter(None, (words, reason)))
    if config.partition.kind != "measured":
        stages = choose_stages(config.partition, len(by_count.modules), grid.stages)
        return _with_levels(by_count.placed(stages), together, None, blocks, numerics, runtime)
    profile: Profile | None = None

    def after_module() -> None:  # every module by itself is within the deadline of those who wait
        runtime.team.broadcast(None)

    if runtime.team.leads:
        sharing = ranks_per_device(config.runtime.device, numerics.device, runtime.local_world_size)
        settings = config.partition
        profile = profile_modules(
            by_count, blocks, numerics, settings.warmup, settings.steps, sharing, after_module
        )
    else:
        for _ in by_count.modules:
            after_module()
    profile = runtime.team.broadcast(profile)
    assert profile is not None  # rank 0 has measured it
    work = [cost.step_s(role) for cost, role in zip(profile.modules, by_count.modules, strict=True)]
    stages = choose_stages(config.partition, len(work), grid.stages, work)
    plan, _ = _with_levels(by_count.placed(stages), together, profile.modules, blocks, numerics, runtime)
    work = [cost.step_s(role) for cost, role in zip(profile.modules, plan.modules, strict=True)]
    memory = rank_memory(plan, profile.modules, numerics)
    refuse_too_large(memory, profile.device_bytes)
    slowest = max(_load(stage, work) for stage in stages)
    by_count_slowest = max(_load(stage, work) for stage in place(len(work), grid.stages))
    parts = " | ".join(f"{1e3 * _load(stage, work):.0f}" for stage in stages)
    sizes = " | ".join(f"{needed / MEBI:.0f}" for needed in memory)
    return plan, (
        f"measured placement: {parts} ms of work a step, {sizes} MiB; slowest {1e3 * slowest:.0f} ms "
        f"(by count {1e3 * by_count_slowest:.0f} ms)"
    )


def _with_levels(
    plan: Plan,
    together: Sequence[int] | None,
    costs: Sequence[ModuleCost] | None,
    blocks: Blocks,
    numerics: Numerics,
    runtime: Runtime,
) -> tuple[Plan, str]:
    """The plan with both levels ``together``, or as ``costs`` or else counted ones say on rank 0, and why nothing could
    be chosen (else ""). Collective."""
    if plan.config.hierarchy.levels != "auto":
        return plan, ""
    able, reason = joinable(plan), ""
    if together is None and runtime.team.leads:
        try:
            costs = counted_costs(plan, able, blocks, numerics) if costs is None else costs
            together = choose_levels(plan, costs).levels_together
        except Uncountable as error:
            together, reason = (), f"levels separate: {error}"
    chosen, reason = runtime.team.broadcast((together or (), reason))
    return plan.with_levels_together(able.intersection(chosen)), reason


def _placed_by_flops(by_count: Plan, blocks: Blocks, numerics: Numerics, team: Team) -> tuple[Plan, str]:
    ranks = len(by_count.stages)
    if ranks in (1, len(by_count.modules)):
        return by_count, ""
    counted: list[float] | str = []
    if team.leads:
        try:
            counted = module_flops(by_count, blocks, numerics)
        except Uncountable as reason:
            counted = str(reason)
    work = team.broadcast(counted)
    if isinstance(work, str):
        return by_count, f"placement by count: {work}"
    plan = by_count.placed(choose_stages(by_count.config.partition, len(work), ranks, work))
    whole = sum(work) or 1.0
    parts = " | ".join(f"{100 * _load(stage, work) / whole:.0f}" for stage in plan.stages)
    busiest = max(_load(stage, work) for stage in by_count.stages)
    return plan, f"placement by FLOPs: {parts} % of a step (by count {100 * busiest / whole:.0f} % on the busiest rank)"


def _load(stage: range, work: list[float]) -> float:
    return sum(work[module] for module in stage)
