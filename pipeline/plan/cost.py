"""What a training step costs in floating-point operations, in units of one backpropagation step of the same network.

The step is really executed, on two images, but without memory or arithmetic (see :mod:`pipeline.plan.blank`), and
PyTorch's formulas see every matrix product and convolution (elementwise work, BatchNorm and losses count nothing). The
schedule's actions say what each operation was for:

    unit = forward + backward of the uncut network = 1 BP step
    step = trunk forward + relays + trunk backward + cascade heads + independent heads
"""

from __future__ import annotations

import dataclasses
from collections import Counter
from dataclasses import dataclass

import torch

from pipeline.base.config import Config, ModelConfig, ScheduleConfig
from pipeline.base.errors import LocalpipeError
from pipeline.base.numerics import Numerics, resolve_numerics
from pipeline.edges.connect import Edges
from pipeline.local.local_module import LocalModule
from pipeline.local.task import Classification
from pipeline.models.backbones import Blocks
from pipeline.models.layers import PairedConv2d
from pipeline.models.unbuilt import planned_blocks
from pipeline.models.upsampling import UpsampledConv2d
from pipeline.plan.alone import random_batch
from pipeline.plan.assembly import Plan, make_plan
from pipeline.plan.blank import blank_modules, no_values, real_modules
from pipeline.plan.counting import Part, Tally
from pipeline.stage.inlet import BatchInlet
from pipeline.stage.schedule import Kind
from pipeline.stage.stage import Stage

IMAGES = 2  # BatchNorm needs two


@dataclass(frozen=True)
class ModuleUnits:
    """What one local module adds to a step, in BP units.

    Attributes:
        module: 0-based position.
        forward, relay, backward: of the trunk; a relay is an activation-only backward for a cascade's message.
        cascade, independent: the heads of a level with their backward passes.
    """

    module: int
    forward: float
    relay: float
    backward: float
    cascade: float
    independent: float

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
        bp_flops: operations of one backpropagation step of the whole network, per image (1 multiply-add = 2).
        modules: in order.
    """

    bp_flops: float
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


def step_cost(config: Config, image_shape: tuple[int, ...], classes: int, plain: bool = False) -> StepCost:
    """Count one step of ``config`` on images (C, S, S).

    Args:
        config: precision, schedule and batch size do not matter, the cost is per image and synchronous.
        image_shape: (C, S, S).
        classes: of the data set.
        plain: upsample before convolving, as published, instead of the factorised order.

    Raises:
        ConfigError: the plan does not exist (see :func:`pipeline.plan.assembly.make_plan`).
    """
    task = Classification(classes, image_shape)
    blocks = planned_blocks(config.model.name, image_shape[0], classes)
    numerics = resolve_numerics(config.precision, torch.device("cpu"), blocks.values())
    return planned_cost(make_plan(config, blocks, task, ranks=1), blocks, numerics, plain)


def planned_cost(plan: Plan, blocks: Blocks, numerics: Numerics, plain: bool = False) -> StepCost:
    """:func:`step_cost` of a plan, of any task and placement.

    Args:
        plan: its schedule and its batch size do not matter.
        blocks: the network, which needs no weights and stays as it is.
        numerics: of the run.
        plain: upsample before convolving, as published, instead of the factorised order.
    """
    uncut = dataclasses.replace(plan.config, model=ModelConfig(plan.config.model.name, modules=1))
    bp = _count(make_plan(uncut, blocks, plan.task, 1, plan.inputs), blocks, numerics, plain)
    unit = sum(bp.values())
    step = _count(plan, blocks, numerics, plain)
    modules = tuple(
        ModuleUnits(
            module=module,
            forward=step[module, Kind.FORWARD] / unit,
            relay=step[module, Kind.RELAY] / unit,
            backward=step[module, Kind.BACKWARD] / unit,
            cascade=step[module, Kind.CASCADE] / unit,
            independent=step[module, Kind.INDEPENDENT] / unit,
        )
        for module in range(len(plan.modules))
    )
    return StepCost(unit / IMAGES, modules)


def _count(plan: Plan, blocks: Blocks, numerics: Numerics, plain: bool) -> Counter[Part]:
    """FLOPs of one step over ``IMAGES`` images; what cannot do without values, as a network that decides by them, is
    computed."""
    config = plan.config
    config = dataclasses.replace(
        config,
        schedule=ScheduleConfig(),
        data=dataclasses.replace(config.data, batch_size=IMAGES),
        precision=dataclasses.replace(config.precision, compile=False),
        patches=dataclasses.replace(config.patches, at_once=1),  # PyTorch's formulas are wrong for grouped convolutions
    )
    plan = dataclasses.replace(plan, config=config, stages=()).placed((range(len(plan.modules)),))
    cuda = [numerics.device.index or 0] if numerics.device.type == "cuda" else []
    with torch.random.fork_rng(devices=cuda):
        try:
            with no_values():
                return _flops(plan, blank_modules(plan, blocks, numerics), numerics, plain)
        except LocalpipeError:
            raise
        except Exception:  # whatever it is: the real modules decide
            return _flops(plan, real_modules(plan, blocks, numerics), numerics, plain)


def _flops(plan: Plan, modules: list[LocalModule], numerics: Numerics, plain: bool) -> Counter[Part]:
    for layer in (layer for module in modules for level in module.levels.values() for layer in level.modules()):
        if isinstance(layer, UpsampledConv2d):
            layer.factorise = not plain
        elif isinstance(layer, PairedConv2d):
            layer.paired = False  # products with its zeros are no operations of the method
    tally = Tally()
    inlet = BatchInlet(random_batch(plan, modules, numerics))
    Stage(modules, plan.schedules[0], inlet, Edges(), watch=tally).train_step(1, 0)
    return tally.flops
