"""One local module by itself, on random data: the stage of a run, between neighbours that only pretend.

    random micro-batch --> Stage(module m) --> nobody           the same step as in training, so that what is measured
              nobody <--                   <-- random gradient  here is what a run does
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from pipeline.base.flow import MAIN, Specs, Tensors
from pipeline.base.numerics import Numerics
from pipeline.edges.wire import Header, MessageKind
from pipeline.local.local_module import LocalModule
from pipeline.local.task import Task
from pipeline.models.boundaries import blank
from pipeline.models.heads import IMAGE
from pipeline.plan.assembly import Plan
from pipeline.stage.gradients import GRADIENT
from pipeline.stage.inlet import Batch, BatchInlet, payload
from pipeline.stage.schedule import stage_schedule
from pipeline.stage.stage import Stage
from pipeline.stage.watch import Watch


class Nobody:
    """In place of the end of an edge to a neighbour: takes every message."""

    wait_s = 0.0

    def send(self, header: Header, **tensors: Tensor) -> None:
        """Dropped."""


@dataclass(frozen=True)
class Pretender:
    """In place of the end of an edge from the next stage: the same message, whichever is wanted."""

    fields: Tensors
    wait_s = 0.0

    def take(self, kind: MessageKind, /, epoch: int, step: int, micro_batch: int, key: int = 0) -> Pretender:
        """At once."""
        return self

    def release(self) -> None:
        """It stays."""


@dataclass(frozen=True)
class Stands:
    """In place of the edges of a rank, see :class:`pipeline.stage.neighbours.Neighbours`."""

    activation_out: Nobody | None
    gradient_in: Pretender
    gradient_out: Nobody | None
    weights_in: None = None
    weights_out: None = None


def random_batch(plan: Plan, modules: Sequence[LocalModule], numerics: Numerics, parts: int = 1) -> Batch:
    """So many micro-batches at the entrance of the first of ``modules``."""
    index, rows, task = modules[0].plan.index, parts * plan.micro_batch_rows, plan.task
    generator = torch.Generator().manual_seed(index)
    x = _random(plan.given(index), rows, generator, numerics)
    labels = _random_target(task, rows, generator).to(numerics.device)
    image, asked = None, None
    if any(IMAGE in module.asks for module in modules):
        image = _random({MAIN: task.image}, rows, generator, numerics)[MAIN]
    if index > 0 and modules[0].plan.reconciles:
        asked = _random(plan.given(index), rows, generator, numerics)[MAIN] / rows
    return Batch(x, labels, image, asked)


def random_gradients(plan: Plan, module: LocalModule, numerics: Numerics) -> Tensors:
    """As the next stage would send them."""
    rows, index = plan.micro_batch_rows, module.plan.index
    generator = torch.Generator().manual_seed(index)
    outputs = {name: spec for name, spec in plan.boundaries[index].items() if spec.dtype.is_floating_point}
    return {name: x / rows for name, x in _random(outputs, rows, generator, numerics).items()}


def _random_target(task: Task, rows: int, generator: torch.Generator) -> Tensor:
    """Any of the classes, or random numbers where the target is of floating point."""
    shape, dtype = (rows, *task.target.shape), task.target.dtype
    if dtype.is_floating_point:
        return torch.randn(shape, generator=generator, dtype=dtype)
    return torch.randint(task.classes, shape, generator=generator, dtype=dtype)


def _random(specs: Specs, rows: int, generator: torch.Generator, numerics: Numerics) -> Tensors:
    """Of the greatest length: random numbers or pixels; ids of 0, which every table has; masks that hide nothing."""
    tensors = {}
    for name, spec in specs.items():
        x = blank(spec, rows, torch.float32, torch.device("cpu"))
        if x.is_floating_point():
            x.normal_(generator=generator)
        elif x.dtype == torch.uint8:
            x.random_(generator=generator)
        tensors[name] = numerics.boundary(x.to(numerics.device))
    return tensors


def stands(plan: Plan, stage: range, gradients: Tensors) -> Stands:
    """In place of the edges of a rank that owns the local modules ``stage``; ``gradients`` come from the next one."""
    return Stands(
        activation_out=Nobody() if stage[-1] + 1 < len(plan.modules) else None,
        gradient_in=Pretender(payload(gradients, GRADIENT)),
        gradient_out=Nobody() if stage[0] > 0 else None,
    )


def stage_alone(plan: Plan, module: LocalModule, batch: Batch, gradients: Tensors, watch: Watch) -> Stage:
    """A stage that owns ``module`` alone and trains it on ``batch`` in every step of one micro-batch, nothing late."""
    index = module.plan.index
    return Stage(
        [module],
        stage_schedule(plan.modules, range(index, index + 1), 1),
        BatchInlet(batch),
        stands(plan, range(index, index + 1), gradients),
        gradient_order=[(0, (index, 0, key)) for key in module.plan.incoming],
        watch=watch,
    )
