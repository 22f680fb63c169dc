"""The costs of a step that would take long to measure: the times of a smaller one, the memory of the step itself.

    time     fewer images, then smaller ones, until a step takes seconds --measure--> times the share of the pixels
    memory   the whole step on blank tensors                             --count-->   nothing is computed

Images are made smaller only where every boundary is a map that shrinks with them, as in a network of convolutions: its
work grows with the pixels.
"""

from __future__ import annotations

import dataclasses
import math
from collections import OrderedDict
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager

import torch

from pipeline.base.errors import ConfigError
from pipeline.base.numerics import Numerics
from pipeline.models.backbones import Blocks
from pipeline.models.unbuilt import no_values, planned_blocks
from pipeline.plan.alone import random_batch, random_gradients, stage_alone
from pipeline.plan.assembly import Plan, make_plan
from pipeline.plan.blank import blank_modules
from pipeline.plan.cost_profile import Profile
from pipeline.plan.counted_costs import RATES
from pipeline.plan.counting import Reads
from pipeline.plan.level_choice import joinable
from pipeline.plan.module_flops import IMAGES, Uncountable, module_flops
from pipeline.plan.profiling import bytes_of, one_module_a_rank, profile_modules, with_both_forms, work_of
from pipeline.plan.simulate import ModuleCost
from pipeline.plan.watches import MemoryWatch
from pipeline.stage.schedule import Action

LONGEST_STEP_S = 8.0
"""Of all modules, by counted FLOPs at the rates of counted_costs: what takes longer is made smaller."""
FEWEST_IMAGES, SMALLEST_SIDE = 2, 64  # BatchNorm needs two


def smaller_step(plan: Plan, blocks: Blocks, numerics: Numerics) -> tuple[Plan, Blocks] | None:
    """The plan and the planned network of a step like that of ``plan`` that can be measured in seconds; None where that
    one can, or nobody can tell."""
    rate = RATES[numerics.device.type].flops_per_s
    try:
        step_s = sum(module_flops(plan, blocks, numerics)) / IMAGES * plan.rows / rate
    except Uncountable:
        return None
    if step_s <= LONGEST_STEP_S:
        return None
    rows = max(FEWEST_IMAGES, min(plan.micro_batch_rows, int(plan.micro_batch_rows * LONGEST_STEP_S / step_s)))
    step_s *= rows / plan.micro_batch_rows
    data = dataclasses.replace(plan.config.data, batch_size=rows * plan.config.schedule.micro_batches)
    config = dataclasses.replace(plan.config, data=data)
    found = make_plan(config, blocks, plan.task, len(plan.stages), plan.inputs), blocks
    divisor = 1
    channels, *sides = plan.task.image_shape
    while step_s > LONGEST_STEP_S and len(sides) == 2:
        divisor *= 2
        smaller = [side // divisor for side in sides]
        if any(side % divisor for side in sides) or min(smaller) < SMALLEST_SIDE:
            break
        try:
            network = planned_blocks(config.model.name, channels, plan.task.classes, sides=tuple(smaller))
            task = dataclasses.replace(plan.task, image_shape=(channels, *smaller))
            other = make_plan(config, network, task, len(plan.stages))
        except ConfigError:
            break
        if not _shrinks(plan, other, divisor):
            break
        found, step_s = (other, network), step_s / 4
    return found


def _shrinks(plan: Plan, other: Plan, divisor: int) -> bool:
    """Whether every boundary of ``plan`` but that behind the last module is a map, smaller by ``divisor`` in
    ``other``."""
    pairs = zip(plan.boundaries[:-1], other.boundaries[:-1], strict=True)
    shapes = [(mine[name].feature, its[name].feature) for mine, its in pairs for name in mine]
    return all(
        len(large) == 3 and large[0] == small[0] and large[1:] == tuple(side * divisor for side in small[1:])
        for large, small in shapes
    )


def scaled_profile(
    plan: Plan, smaller: Plan, network: Blocks, blocks: Blocks, numerics: Numerics, sharing: int
) -> Profile:
    """The profile of ``plan``: times measured as ``smaller`` with ``network``, bytes counted as it is.

    Args:
        plan, smaller: of any placement.
        network, blocks: of ``smaller`` and ``plan``; they stay as they are.
        numerics: device, dtype, layout.
        sharing: ranks that share the memory of the device.
    """
    settings = plan.config.partition
    measured = profile_modules(smaller, network, numerics, settings.warmup, settings.steps, sharing)
    share = _pixels(plan) / _pixels(smaller)
    both = joinable(plan) if plan.config.hierarchy.levels == "auto" else frozenset()
    costs = []
    for index, times in enumerate(measured.modules):
        counted = _counted(plan, index, blocks, numerics)
        if index in both:
            counted = with_both_forms(counted, _counted(plan.with_levels_together({index}), index, blocks, numerics))
        seconds = {
            field.name: getattr(times, field.name) * (1.0 if field.name == "update_s" else share)
            for field in dataclasses.fields(ModuleCost)
            if field.name.endswith("_s")
        }
        costs.append(dataclasses.replace(counted, **seconds))
    shape = "x".join(map(str, smaller.task.image_shape[1:]))
    return dataclasses.replace(
        measured,
        modules=tuple(costs),
        batch_size=plan.rows,
        micro_batch_size=plan.micro_batch_rows,
        work=work_of(plan),
        scaled_from=f"{smaller.config.data.batch_size} images of {shape}",
    )


def _pixels(plan: Plan) -> int:
    return plan.rows * math.prod(plan.task.image_shape[1:])


def _counted(plan: Plan, index: int, blocks: Blocks, numerics: Numerics) -> ModuleCost:
    """The bytes of a module."""
    alone = one_module_a_rank(plan).placed((range(index, index + 1),))  # updates in its one step
    own = OrderedDict((name, blocks[name]) for name in plan.cut.modules[index])
    with torch.random.fork_rng(devices=[]), no_values():
        (module,) = blank_modules(alone, own, numerics)
        batch, gradients = random_batch(alone, [module], numerics), random_gradients(alone, module, numerics)
        memory = _CountedMemory(torch.device("cpu"), module)  # no allocator sees a blank tensor
        stage = stage_alone(alone, module, batch, gradients, memory)
        stage.train_step(0, 0)
        return bytes_of(plan, module, memory, numerics)


class _CountedMemory(MemoryWatch):
    """Of a step that is not computed."""

    @contextmanager
    def working(self, actions: Sequence[Action], step: int, waited: Callable[[], float]) -> Iterator[None]:
        with super().working(actions, step, waited), Reads().working(actions, step, waited):
            yield
