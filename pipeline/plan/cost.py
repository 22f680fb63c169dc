"""What a training step costs in floating-point operations, in units of one backpropagation step of the same network.

The step is really executed, on two images of zeros, and PyTorch's counter sees every matrix product and convolution
(elementwise work, BatchNorm and losses count nothing). The schedule's actions say what each operation was for:

    unit = forward + backward of the uncut network = 1 BP step
    step = trunk forward + relays + trunk backward + cascade heads + independent heads
"""

from __future__ import annotations

import dataclasses
from collections import Counter
from dataclasses import dataclass
from typing import Any

import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.flop_counter import flop_registry

from pipeline.base.config import Config, ModelConfig, PrecisionConfig, ScheduleConfig
from pipeline.base.numerics import resolve_numerics
from pipeline.edges.connect import Edges
from pipeline.local.task import Classification, Task
from pipeline.models.backbones import build_blocks
from pipeline.models.layers import PairedConv2d
from pipeline.models.upsampling import UpsampledConv2d
from pipeline.plan.assembly import build_modules, make_plan
from pipeline.stage.inlet import Batch, BatchInlet
from pipeline.stage.schedule import Action, Kind
from pipeline.stage.stage import Stage
from pipeline.stage.watch import Watch

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


class _Operations(TorchDispatchMode):
    """Sums the operations of all products and convolutions by PyTorch's formulas.

    ``FlopCounterMode`` itself follows module boundaries with hooks that forbid ``torch.autograd.grad``, which relays
    use.
    """

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]  # torch has not annotated it
        self.total = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        result = func(*args, **kwargs)
        formula = flop_registry.get(func.overloadpacket)
        if formula is not None:
            self.total += formula(*args, **kwargs, out_val=result)
        return result


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
    bp = _flops(dataclasses.replace(config, model=ModelConfig(config.model.name, modules=1)), task, plain)
    unit = sum(bp.values())
    step = _flops(config, task, plain)
    modules = tuple(
        ModuleUnits(
            module=module,
            forward=step[module, Kind.FORWARD] / unit,
            relay=step[module, Kind.RELAY] / unit,
            backward=step[module, Kind.BACKWARD] / unit,
            cascade=step[module, Kind.CASCADE] / unit,
            independent=step[module, Kind.INDEPENDENT] / unit,
        )
        for module in sorted({module for module, _ in step})
    )
    return StepCost(unit / IMAGES, modules)


def _flops(config: Config, task: Task, plain: bool) -> Counter[tuple[int, Kind]]:
    """Operations of one step over ``IMAGES`` images, by module and kind of action."""
    config = dataclasses.replace(config, precision=PrecisionConfig("fp32"), schedule=ScheduleConfig())
    with torch.random.fork_rng(devices=[]):
        blocks = build_blocks(config.model.name, task.image_shape[0], task.classes)
        numerics = resolve_numerics(config.precision, torch.device("cpu"), blocks.values())
        plan = make_plan(config, blocks, task, ranks=1)
        modules = build_modules(plan, 0, blocks, numerics, fresh=True)
        for layer in (layer for module in modules for level in module.levels.values() for layer in level.modules()):
            if isinstance(layer, UpsampledConv2d):
                layer.factorise = not plain
            elif isinstance(layer, PairedConv2d):
                layer.paired = False  # products with its zeros are no operations of the method
        counter = _Operations()
        totals: Counter[tuple[int, Kind]] = Counter()
        started: list[tuple[Action, int]] = []

        def close() -> None:
            if started:
                action, before = started.pop()
                totals[action.module, action.kind] += counter.total - before

        def before_action(_: int, action: Action) -> None:
            close()
            started.append((action, counter.total))

        image = torch.zeros(IMAGES, *task.image_shape, dtype=torch.uint8)
        x = numerics.boundary(torch.zeros(IMAGES, *task.image_shape))
        inlet = BatchInlet(Batch(x, torch.arange(IMAGES) % task.classes, image))
        stage = Stage(modules, plan.schedules[0], inlet, Edges(), watch=Watch(before_action=before_action))
        with counter:
            stage.train_step(1, 0)
            close()
    return totals
