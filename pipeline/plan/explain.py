"""A run explained before it is started: placement, predicted step time, bubble, memory and traffic, without training.

    configuration -> blocks, heads -> cost of every module -> placement -> simulated pipeline -> PlanReport
                                      (measured here, or a profile)
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

from pipeline.base.config import Config
from pipeline.base.errors import ConfigError
from pipeline.base.numerics import Numerics, resolve_numerics
from pipeline.base.paths import path_of
from pipeline.base.validation import validate
from pipeline.data import open_data
from pipeline.data.catalogue import known_entry
from pipeline.data.named import task_of
from pipeline.local.compilation import refuse_without_compiler
from pipeline.local.task import Task, classification
from pipeline.models.backbones import Blocks
from pipeline.models.unbuilt import planned_blocks, without_memory
from pipeline.plan.assembly import Plan, describe, make_plan, untrained_lines
from pipeline.plan.averaging import averaged_bytes, with_averaging
from pipeline.plan.cost import StepCost, planned_cost
from pipeline.plan.cost_cut import cut_by_cost
from pipeline.plan.cost_profile import Profile
from pipeline.plan.counted_costs import counted_costs
from pipeline.plan.forms import compared_forms
from pipeline.plan.level_choice import choose_levels, joinable, levels_line
from pipeline.plan.module_flops import Uncountable, module_flops
from pipeline.plan.placement import choose_stages, given, place, split_by_cost
from pipeline.plan.predicted import STEPS, predicted
from pipeline.plan.profiling import profile_modules, work_of
from pipeline.plan.rank_memory import rank_memory, refuse_too_large
from pipeline.plan.report import Placement, PlannedForm, PlannedModule, PlannedRank, PlanReport
from pipeline.plan.scaled import scaled_profile, smaller_step
from pipeline.plan.simulate import ModuleCost
from pipeline.ranks.grid import grid_of
from pipeline.ranks.runtime import choose_device, keep_freed_memory, ranks_per_device, set_threads, threads_restored
from pipeline.stage.events import SteadyState
from pipeline.stage.schedule import Kind

MARGIN = 4
"""Steps before and after the two complete ones that a report keeps for a chart: other ranks are at them meanwhile."""


def measure(config: Config, ranks: int) -> Profile:
    """Profile the local modules of ``config`` on this machine, as one of ``ranks`` ranks would run them.

    Raises:
        ConfigError: whatever would stop a run of this configuration on ``ranks`` ranks.
    """
    config = validate(config)
    network = _Network(config)
    config, _ = cut_by_cost(config, network.blocks, network.task)
    return _measure(config, ranks, network, _plan_by_count(config, network, ranks), whole=True)


def message_bytes(config: Config, ranks: int) -> list[tuple[int, int]]:
    """Bytes of one activation down and of one gradient up between every two neighbouring ranks of a replica, placed by
    count; a gradient of a run without any counts 0.

    Raises:
        ConfigError: whatever would stop a run of this configuration on ``ranks`` ranks.
    """
    network = _Network(validate(config))
    config, _ = cut_by_cost(config, network.blocks, network.task)
    plan = _plan_by_count(config, network, ranks)
    wire = (network.numerics.dtype, network.numerics.channels_last)
    return [
        (
            plan.activation_spec(upper, *wire).nbytes,
            plan.gradient_spec(upper + 1, *wire).nbytes if plan.gradient_order(upper + 1) else 0,
        )
        for upper in range(len(plan.stages) - 1)
    ]


def explain(
    config: Config,
    ranks: int,
    profile: Profile | None = None,
    *,
    count: bool = False,
    forms: bool = False,
    whole: bool = False,
    latency_s: float = 0.0,
    bytes_per_s: float = math.inf,
) -> PlanReport:
    """What ``config`` would do on ``ranks`` ranks.

    Args:
        config: from :func:`pipeline.load_config`; ``partition.kind`` chooses the placement.
        ranks: number of processes, each on a device like the profiled one. With ``parallel.replicas`` the report is
            of one of these pipelines, with the time that averaging takes where nothing hides it.
        profile: costs of the modules; None: :func:`measure` them here, once nothing else is left to refuse.
        count: give FLOPs, in BP units, and operations of every module too, which takes a few seconds.
        forms: plan the other forms that the work of the heads can take too. Without a ``profile`` their heads are
            measured, which takes less time than measuring the modules did.
        whole: measure whole steps, however long they take. Else one of more than some seconds is measured on fewer or
            smaller images, and its memory is counted (see :mod:`pipeline.plan.scaled`).
        latency_s: seconds that a message takes besides its transfer.
        bytes_per_s: bandwidth between two ranks.

    Raises:
        ConfigError: whatever would stop a run, except too little memory, which the report only states; a profile that
            is for another number of modules or another batch.
    """
    config = validate(config)
    if not (0 <= latency_s < math.inf and bytes_per_s > 0):
        raise ConfigError(f"a link of {latency_s:g} s and {bytes_per_s:g} bytes/s; use a latency >= 0 and a rate > 0")
    network = _Network(config)
    config, cut = cut_by_cost(config, network.blocks, network.task)
    plan = _plan_by_count(config, network, ranks)
    measured = profile is None
    if profile is None:
        profile = _measure(config, ranks, network, plan, whole)
    else:
        profile.check(len(plan.modules), plan.rows, work_of(plan))
    numerics = network.numerics
    if profile.dtype:  # of the device that is planned for, which need not be this one
        numerics = dataclasses.replace(numerics, dtype=profile.torch_dtype)
    stages_of_one = len(plan.stages)
    link = (latency_s, bytes_per_s)
    costs: Sequence[ModuleCost] = with_averaging(plan, profile.modules, network.blocks, link)
    work = [cost.step_s(role) for cost, role in zip(costs, plan.modules, strict=True)]
    if max(work) <= 0:
        raise ConfigError("the profile has no time for any action; give forward_s and backward_s of the modules")
    chosen = config.partition.kind
    counted = count or chosen == "auto"
    flops: Sequence[float] | None = work if counted else None  # any numbers do where there is nothing to choose
    reason = ""
    if counted and 1 < stages_of_one < len(work):
        try:
            flops = module_flops(plan, network.blocks, numerics)
        except Uncountable as error:
            flops, reason = None, f"placement by count: {error}"
    stages = plan.stages  # by count
    if chosen != "auto" or flops is not None:
        stages = choose_stages(config.partition, len(work), stages_of_one, flops if chosen == "auto" else work)
    candidates = {chosen: stages}
    candidates |= {"count": place(len(work), stages_of_one), "measured": split_by_cost(work, stages_of_one)}
    if flops is not None:
        candidates["auto"] = split_by_cost(flops, stages_of_one)
    by_form, unknown = costs, ""
    if config.hierarchy.levels == "auto" and measured and chosen != "measured":  # as a run would decide
        try:
            by_form = counted_costs(plan, joinable(plan), network.blocks, numerics)
        except Uncountable as error:
            by_form, unknown = (ModuleCost(),) * len(costs), f"levels separate: {error}"
    runs = {}
    for kind, candidate in candidates.items():
        plan = choose_levels(plan.placed(candidate), by_form)
        runs[kind] = (plan, *predicted(plan, costs, *link))
    plan, simulation, steady = runs[chosen]
    units = planned_cost(plan, network.blocks, numerics) if count else None
    work = [cost.step_s(role) for cost, role in zip(costs, plan.modules, strict=True)]
    bound_s = max(sum(work[m] for m in stage) for stage in stages)
    if config.schedule.kind == "free":  # every stage at its own pace; the first one sees every batch
        bound_s = sum(work[m] for m in stages[0])
        steady = dataclasses.replace(steady, step_s=bound_s)
    memory = rank_memory(plan, costs, numerics)
    compared: tuple[PlannedForm, ...] = ()
    if forms:
        operations = units.operations if units is not None else None
        with _threads_of_a_rank(config, ranks, numerics):
            compared = compared_forms(
                plan, costs, network.blocks, numerics, link,
                measure=measured and not profile.scaled_from, operations=operations,
            )
    first = STEPS // 2
    return PlanReport(
        lines=_lines(plan, numerics, profile, link, (cut, reason if chosen == "auto" else "", unknown)),
        modules=_modules(plan, network.blocks, costs, work, units),
        ranks=_ranks(plan, numerics, work, steady, memory, network.blocks),
        step_s=steady.step_s,
        bound_s=bound_s,
        alone_s=plan.replicas * sum(work),
        batch_size=config.data.batch_size,
        placements=tuple(
            Placement(kind, tuple(map(len, placed.stages)), run.step_s) for kind, (placed, _, run) in runs.items()
        ),
        schedules=tuple(tuple(map(str, schedule)) for schedule in plan.schedules),
        profile=profile,
        events=simulation.events(first - MARGIN, first + 2 + MARGIN),
        first_step=first,
        refusal=_refusal(memory, profile),
        bp_operations=units.bp_operations if units is not None else None,
        forms=compared,
        replicas=plan.replicas,
    )


class _Network:
    """The network of a configuration, without weights, what it is for, and how one rank computes."""

    def __init__(self, config: Config) -> None:
        self.task = _task(config)
        channels, *sides = self.task.image_shape
        self.blocks: Blocks = planned_blocks(config.model.name, channels, self.task.classes, sides=tuple(sides))
        device, _ = choose_device(config.runtime.device, 0, 1)
        self.numerics: Numerics = resolve_numerics(config.precision, device, self.blocks.values())


def _plan_by_count(config: Config, network: _Network, ranks: int) -> Plan:
    if ranks < 1:
        raise ConfigError(f"ranks = {ranks} must be at least 1")
    if config.precision.compile:
        refuse_without_compiler(network.numerics.device)
    grid = grid_of(config, 0, ranks)
    plan = make_plan(config, network.blocks, network.task, grid.stages, replicas=grid.replicas)
    if config.partition.kind == "given":
        given(config.partition.stages, len(plan.modules), grid.stages)
    return plan


def _measure(config: Config, ranks: int, network: _Network, plan: Plan, whole: bool) -> Profile:
    """What :func:`measure` does, once everything that can be refused has not been; not ``whole``: on fewer or smaller
    images where a step takes long."""
    numerics, settings = network.numerics, config.partition
    if numerics.device.type == "cpu":
        keep_freed_memory()  # as a rank of a run does
    with _threads_of_a_rank(config, ranks, numerics):
        sharing = ranks_per_device(config.runtime.device, numerics.device, ranks)
        smaller = None if whole else smaller_step(plan, network.blocks, numerics)
        if smaller is not None:
            return scaled_profile(plan, *smaller, network.blocks, numerics, sharing)
        return profile_modules(plan, network.blocks, numerics, settings.warmup, settings.steps, sharing)


def _task(config: Config) -> Task:
    """What the data are for; only of an image folder that is not known without opening it."""
    data = config.data
    if (task := task_of(config)) is not None:
        return task
    if (entry := known_entry(data)) is not None:
        return classification(config, entry.classes, entry.image_shape)
    root = Path(path_of(data.root)).expanduser()
    cache_gib = 0.0 if root.is_dir() else data.cache_gib  # decode no more than is needed
    opened = open_data(data.name, data.root, image_size=data.image_size, cache_gib=cache_gib)
    return classification(config, len(opened.classes), opened.image_shape)


@contextmanager
def _threads_of_a_rank(config: Config, ranks: int, numerics: Numerics) -> Iterator[None]:
    """On a CPU every rank has its share of the cores."""
    with threads_restored():
        if numerics.device.type == "cpu":
            set_threads(config.runtime.threads, ranks)
        yield


def _modules(
    plan: Plan, blocks: Blocks, costs: Sequence[ModuleCost], work: Sequence[float], units: StepCost | None
) -> tuple[PlannedModule, ...]:
    rank_of = {m: rank for rank, stage in enumerate(plan.stages) for m in stage}
    rows = []
    for role, cost in zip(plan.modules, costs, strict=True):
        builders = plan.level_builders(role.index)
        heads = sum(p.numel() for build in builders.values() for p in without_memory(build).parameters())
        kinds = {action.kind for action in plan.schedules[rank_of[role.index]] if action.module == role.index}
        kinds -= {Kind.SHARE, Kind.ADOPT}  # a copy of a block: no work to speak of
        names = plan.cut.modules[role.index]
        cost = cost.in_role(role)
        rows.append(
            PlannedModule(
                index=role.index,
                rank=rank_of[role.index],
                blocks=plan.cut.label(role.index),
                levels=(*builders, *(["final"] if role.final else [])),
                parameters=sum(p.numel() for name in names for p in blocks[name].parameters()),
                head_parameters=heads,
                seconds={
                    kind.value: getattr(cost, f"{kind.name.lower()}_s") for kind in Kind if kind in kinds
                },
                step_s=work[role.index],
                memory_bytes=cost.memory_bytes,
                bp_units=units.modules[role.index].total if units is not None else None,
                operations=units.modules[role.index].operations if units is not None else None,
            )
        )
    return tuple(rows)


def _ranks(
    plan: Plan,
    numerics: Numerics,
    work: Sequence[float],
    steady: SteadyState,
    memory: Sequence[int],
    blocks: Blocks,
) -> tuple[PlannedRank, ...]:
    wire = (numerics.dtype, numerics.channels_last)
    rows = []
    free = plan.config.schedule.kind == "free"
    for rank, stage in enumerate(plan.stages):
        own = sum(work[m] for m in stage)
        down = up = 0
        if rank + 1 < len(plan.stages):
            down = plan.config.schedule.micro_batches * plan.activation_spec(rank, *wire).nbytes
        if rank > 0 and plan.gradient_order(rank):
            up = len(plan.gradient_order(rank)) * plan.gradient_spec(rank, *wire).nbytes
        if rank > 0 and plan.upstream is not None:
            weights = plan.upstream.spec(stage[0] - 1, numerics.weight_dtype)
            up += weights.nbytes // plan.upstream.declared.every if weights is not None else 0
        rows.append(
            PlannedRank(
                rank=rank,
                modules=(stage[0], stage[-1]),
                work_s=own,
                # Until the queues are full the first ranks run ahead; in the end the slowest sets the pace.
                busy=1.0 if free else own / steady.step_s,
                memory_bytes=memory[rank],
                sent_down_bytes=down,
                sent_up_bytes=up,
                levels_together=tuple(m for m in stage if plan.modules[m].together),
                averaged_bytes=sum(averaged_bytes(plan, m, blocks) for m in stage),
            )
        )
    return tuple(rows)


def _lines(
    plan: Plan, numerics: Numerics, profile: Profile, link: tuple[float, float], notes: Sequence[str]
) -> tuple[str, ...]:
    """What is planned, ``notes`` about how it was chosen (those that are not empty), and on which assumptions the
    prediction rests."""
    headline, how, *_ = describe(plan, numerics, [])
    shape = "x".join(map(str, plan.task.image_shape))
    latency_s, bytes_per_s = link
    wire = "messages take no time" if latency_s == 0 and math.isinf(bytes_per_s) else (
        f"messages take {latency_s * 1e6:g} us and move {bytes_per_s / 1e9:g} GB/s"
    )
    where = profile.device or "an unnamed device"
    what = "its share of a CPU" if numerics.device.type == "cpu" else "a device of its own"
    measured = f", measured {profile.date}" if profile.date else ""
    if profile.scaled_from:
        measured += f" on {profile.scaled_from}, times scaled by the pixels, memory counted"
    lines = (
        headline,
        how,
        *untrained_lines(plan),
        *notes,
        levels_line(plan),
        f"images {shape}, {plan.task.classes} classes; each rank on {what} like {where}{measured}; {wire}",
    )
    return tuple(filter(None, lines))


def _refusal(memory: Sequence[int], profile: Profile) -> str | None:
    if not profile.device_bytes:
        return None
    try:
        refuse_too_large(memory, profile.device_bytes)
    except ConfigError as error:
        return str(error)
    return None
