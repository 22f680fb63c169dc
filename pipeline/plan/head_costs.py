"""Measures heads by themselves: one form of them, beside another whose modules have been measured whole.

    module m   [build]  F   C I   C I | C I | C I | C I    -> median times of C and I, peak memory     [drop]
                            first     warm-up, then those     forward, backward, update stay as they were
                            (memory)  that count
"""

from __future__ import annotations

import dataclasses
import statistics
from collections import OrderedDict, defaultdict
from collections.abc import Collection, Sequence
from typing import Any

import torch

from pipeline.base.numerics import Numerics
from pipeline.local.local_module import LocalModule
from pipeline.local.micro_batch import MicroBatch
from pipeline.models.backbones import Blocks
from pipeline.models.unbuilt import no_values
from pipeline.plan.alone import random_batch
from pipeline.plan.assembly import Plan
from pipeline.plan.blank import blank_modules
from pipeline.plan.counting import Tally
from pipeline.plan.module_flops import by_kind, counted_step
from pipeline.plan.profiling import module_alone
from pipeline.plan.simulate import ModuleCost
from pipeline.plan.watches import HEADS, MemoryWatch, Stopwatch
from pipeline.stage.inlet import BatchInlet
from pipeline.stage.schedule import Action, Kind, stage_schedule
from pipeline.stage.watch import Watch

BATCH = (0, 0)
"""Step and micro-batch: the only one there is."""


def with_heads_of(
    plan: Plan, modules: Collection[int], known: Sequence[ModuleCost], blocks: Blocks, numerics: Numerics
) -> tuple[ModuleCost, ...]:
    """``known`` costs of local modules with what the heads of ``plan`` cost; of modules of one kind one is measured.

    Args:
        plan: of any placement; of the same blocks and batch as the known costs. Only heads differ.
        modules: those whose heads do.
        known: of all local modules, in order.
        blocks: the network; it is copied, and planned blocks get weights in the copy.
        numerics: device, dtype, layout.

    Raises:
        Uncountable: it fails, such as for want of memory.
    """

    def measured(index: int) -> dict[str, Any]:
        return _measured(plan, index, blocks, numerics) if index in modules else {}

    found = by_kind(plan, blocks, numerics, measured)
    return tuple(dataclasses.replace(cost, **heads) for cost, heads in zip(known, found, strict=True))


def head_operations(plan: Plan, blocks: Blocks, numerics: Numerics) -> list[float]:
    """Calls of PyTorch's operations by all heads of every local module for one micro-batch, counted without values.

    Raises:
        Uncountable: it fails.
    """
    step = counted_step(plan)
    return by_kind(step, blocks, numerics, lambda index: _counted(step, index, blocks, numerics))


def _counted(step: Plan, index: int, blocks: Blocks, numerics: Numerics) -> float:
    alone = step.placed((range(index, index + 1),))
    own = OrderedDict((name, blocks[name]) for name in step.cut.modules[index])
    heads = [action for action in alone.schedules[0] if action.kind in HEADS]
    with no_values():
        (module,) = blank_modules(alone, own, numerics)
        module.forward(BATCH, _given(step, module, numerics))
        _work(module, heads, Watch())  # the first time some heads still make what they keep
        tally = Tally()
        _work(module, heads, tally)
    return sum(tally.operations.values())


def _given(plan: Plan, module: LocalModule, numerics: Numerics) -> MicroBatch:
    return BatchInlet(random_batch(plan, [module], numerics)).next(0, *BATCH).batch


def _measured(plan: Plan, index: int, blocks: Blocks, numerics: Numerics) -> dict[str, Any]:
    module = module_alone(plan, index, blocks, numerics)
    settings, parts = plan.config.partition, plan.config.schedule.micro_batches
    schedule = stage_schedule(plan.modules, range(index, index + 1), 1)
    forward = [action for action in schedule if action.kind is Kind.FORWARD]
    heads = [action for action in schedule if action.kind in HEADS]
    memory = MemoryWatch(numerics.device, module)
    with torch.compiler.set_stance("force_eager"):  # as where whole modules are measured
        with memory.working(forward, 0, float):
            module.forward(BATCH, _given(plan, module, numerics))
        _work(module, heads, memory)
    times: dict[Kind, list[float]] = defaultdict(list)
    first = max(settings.warmup + plan.config.precision.compile, 1)
    for lap in range(1, first + settings.steps):
        watch = Stopwatch(numerics.device)
        _work(module, heads, watch)
        for kind, lap_s in watch.seconds().items() if lap >= first else ():
            times[kind].append(lap_s * parts)
    found: dict[str, Any] = {f"{kind.name.lower()}_s": statistics.median(laps) for kind, laps in times.items()}
    if module.plan.together:
        found["together_s"] = found.pop("cascade_s")
    return found | {"head_bytes": memory.head_bytes}


def _work(module: LocalModule, heads: Sequence[Action], watch: Watch) -> None:
    """All heads once, their gradients fresh as after an update."""
    for level in module.levels.values():
        level.zero_grad()
    for action in heads:
        with watch.working([action], 0, float):
            match action.kind:
                case Kind.CASCADE:
                    module.cascade(BATCH)
                case Kind.INDEPENDENT:
                    module.independent(BATCH)
                case Kind.FINAL:
                    module.final(BATCH)
