"""What a training step costs, in FLOPs and in calls of PyTorch's operations, and what backpropagation would.

The step is really executed, on two images; a large network's without memory or arithmetic (see
:mod:`pipeline.plan.blank`), which for a small one takes longer than the arithmetic. PyTorch's formulas see every matrix
product and convolution (elementwise work, BatchNorm and losses count nothing). The schedule's actions say what each
operation was for:

    unit = forward + backward of the uncut network = 1 BP step
    step = trunk forward + relays + trunk backward + cascade heads + independent heads

Every operation is a call whatever it computes, and where tensors are small a step takes as long as its calls do. They
are those of the second step: in the first one, an optimiser and some heads still make what they keep.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping
from dataclasses import dataclass

import torch

from pipeline.base.config import Config, ModelConfig
from pipeline.base.errors import LocalpipeError
from pipeline.base.numerics import Numerics
from pipeline.edges.connect import Edges
from pipeline.local.local_module import LocalModule
from pipeline.models.backbones import Blocks
from pipeline.models.layers import PairedConv2d
from pipeline.models.tuned import use_plain
from pipeline.models.unbuilt import no_values
from pipeline.plan.alone import random_batch
from pipeline.plan.assembly import Plan, make_plan
from pipeline.plan.blank import blank_modules, real_modules
from pipeline.plan.counting import Part, Tally
from pipeline.plan.module_flops import IMAGES, counted_step
from pipeline.plan.named import plan_of_name
from pipeline.ranks.runtime import threads_restored
from pipeline.stage.inlet import BatchInlet
from pipeline.stage.schedule import Kind
from pipeline.stage.stage import Stage


@dataclass(frozen=True)
class ModuleUnits:
    """What one local module adds to a step, in BP units.

    Attributes:
        module: 0-based position.
        forward, relay, backward: of the trunk; a relay is an activation-only backward for a cascade's message.
        cascade, independent: the heads of a level with their backward passes.
        operations: calls in all its actions, of losses and updates too; no BP units. What is done for several modules
            at once counts in equal parts.
        launches: those of the operations for which a GPU launches something.
    """

    module: int
    forward: float
    relay: float
    backward: float
    cascade: float
    independent: float
    operations: float
    launches: float

    @property
    def trunk(self) -> float:
        """Without heads."""
        return self.forward + self.relay + self.backward

    @property
    def total(self) -> float:
        """With heads."""
        return self.trunk + self.cascade + self.independent


@dataclass(frozen=True)
class StepCost:
    """Cost of one training step.

    Attributes:
        bp_flops: of one backpropagation step of the whole network, per image (1 multiply-add = 2).
        bp_operations, bp_launches: calls of such a step, of any number of images in one micro-batch.
        modules: in order.
    """

    bp_flops: float
    bp_operations: int
    bp_launches: int
    modules: tuple[ModuleUnits, ...]

    @property
    def bp_units(self) -> float:
        """The whole step in BP units."""
        return sum(module.total for module in self.modules)

    @property
    def trunk(self) -> float:
        """The part without heads, in BP units."""
        return sum(module.trunk for module in self.modules)

    @property
    def heads(self) -> float:
        """The part of the heads, in BP units."""
        return self.bp_units - self.trunk

    @property
    def operations(self) -> int:
        """Calls of a step of one micro-batch, on one rank."""
        return round(sum(module.operations for module in self.modules))

    @property
    def operations_ratio(self) -> float:
        """The same to those of backpropagation."""
        return self.operations / self.bp_operations

    @property
    def launches(self) -> int:
        """Those of :attr:`operations` for which a GPU launches something."""
        return round(sum(module.launches for module in self.modules))

    @property
    def launches_ratio(self) -> float:
        """The same to those of backpropagation."""
        return self.launches / self.bp_launches


def step_cost(config: Config, image_shape: tuple[int, ...], classes: int) -> StepCost:
    """Count one step of ``config`` on images (C, S, S).

    Args:
        config: schedule and batch size do not matter, the cost is per image and synchronous; nor does the dtype for
            FLOPs. ``precision.layers = "plain"``: upsampling before convolving, as published, instead of the
            factorised order. Calls are those on a CPU.
        image_shape: (C, S, S).
        classes: of the data set.

    Raises:
        ConfigError: the plan does not exist (see :func:`pipeline.plan.assembly.make_plan`).
    """
    return planned_cost(*plan_of_name(config, image_shape, classes, ranks=1))


def planned_cost(plan: Plan, blocks: Blocks, numerics: Numerics) -> StepCost:
    """:func:`step_cost` of a plan, of any task and placement.

    Args:
        plan: its schedule and its batch size do not matter.
        blocks: the network, which needs no weights and stays as it is.
        numerics: of the run.
    """
    uncut = dataclasses.replace(plan.config, model=ModelConfig(plan.config.model.name, modules=1))
    bp = _count(make_plan(uncut, blocks, plan.task, 1, plan.inputs), blocks, numerics)
    unit = sum(bp.flops.values())
    step = _count(plan, blocks, numerics)
    modules = tuple(
        ModuleUnits(
            module=module,
            forward=step.flops[module, Kind.FORWARD] / unit,
            relay=step.flops[module, Kind.RELAY] / unit,
            backward=step.flops[module, Kind.BACKWARD] / unit,
            cascade=step.flops[module, Kind.CASCADE] / unit,
            independent=step.flops[module, Kind.INDEPENDENT] / unit,
            operations=sum(step.operations[module, kind] for kind in Kind),
            launches=sum(step.launches[module, kind] for kind in Kind),
        )
        for module in range(len(plan.modules))
    )
    operations, launches = (round(sum(calls.values())) for calls in (bp.operations, bp.launches))
    return StepCost(unit / IMAGES, operations, launches, modules)


@dataclass(frozen=True)
class _Counts:
    """FLOPs of the first step over ``IMAGES`` images, and the calls of the second."""

    flops: Mapping[Part, float]
    operations: Mapping[Part, float]
    launches: Mapping[Part, float]


SMALL = 2**22
"""Numbers in the parameters and in the largest map of a network with which to compute is faster than to do without."""


def _is_small(plan: Plan, blocks: Blocks) -> bool:
    parameters = sum(p.numel() for block in blocks.values() for p in block.parameters())
    maps = [IMAGES * math.prod(spec.shape) for specs in (plan.inputs, *plan.boundaries) for spec in specs.values()]
    return parameters + max(maps) <= SMALL


def _count(plan: Plan, blocks: Blocks, numerics: Numerics) -> _Counts:
    """What cannot do without values, as a network that decides by them, is computed; a small one on a CPU as well."""
    plan = counted_step(plan)
    cuda = [numerics.device.index or 0] if numerics.device.type == "cuda" else []
    with torch.random.fork_rng(devices=cuda):
        if numerics.device.type == "cpu" and _is_small(plan, blocks):
            with threads_restored():
                torch.set_num_threads(1)  # waiting for others takes longer than the work of two images
                return _counts_of(plan, real_modules(plan, blocks, numerics), numerics)
        try:
            with no_values():
                return _counts_of(plan, blank_modules(plan, blocks, numerics), numerics)
        except LocalpipeError:
            raise
        except Exception:  # whatever it is: the real modules decide
            return _counts_of(plan, real_modules(plan, blocks, numerics), numerics)


def _counts_of(plan: Plan, modules: list[LocalModule], numerics: Numerics) -> _Counts:
    levels = [level for module in modules for level in module.levels.values()]
    flops, calls = Tally(), Tally()
    stage = Stage(modules, plan.schedules[0], BatchInlet(random_batch(plan, modules, numerics)), Edges(), watch=flops)
    # Products with the zeros of a paired convolution are no FLOPs of the method.
    replaced = [layer for level in levels for layer in use_plain(level, (PairedConv2d.tuned,))]
    stage.train_step(1, 0)
    for parent, name, layer in replaced:
        setattr(parent, name, layer)
    stage.watch = calls
    stage.train_step(1, 1)
    return _Counts(flops.flops, calls.operations, calls.launches)
