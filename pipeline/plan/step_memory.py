"""The memory of a training step, by rank, without a device and without that memory: the real step on blank tensors.

    rank r   weights | heads | optimiser | messages      the same all the time
             gradients and activations                   the rest of the peak, at the batch size of the run
"""

from __future__ import annotations

import dataclasses
from collections import OrderedDict
from collections.abc import Iterable
from dataclasses import dataclass

import torch
from torch import nn

from pipeline.base.alive import Alive
from pipeline.base.config import Config
from pipeline.base.numerics import Numerics
from pipeline.base.validation import with_values
from pipeline.models.backbones import Blocks
from pipeline.models.unbuilt import no_values, without_memory
from pipeline.plan.alone import random_batch, random_gradients, stands
from pipeline.plan.assembly import Plan
from pipeline.plan.blank import blank_modules
from pipeline.plan.counting import Reads
from pipeline.plan.named import plan_of_name
from pipeline.plan.rank_memory import rank_memory
from pipeline.plan.simulate import ModuleCost
from pipeline.stage.inlet import BatchInlet
from pipeline.stage.stage import Stage


@dataclass(frozen=True)
class StepMemory:
    """What one rank holds, in bytes. Work space that a library gets for itself is not counted.

    Attributes:
        modules: number of its local modules.
        weights: parameters and buffers of its blocks.
        heads: those of its auxiliary heads.
        optimiser: momentum, moments, averages of weights, sums of gradients.
        messages: slots of its queues; a received activation or gradient is used where it is.
        work: the most that gradients, activations, a batch of the data and operations take besides, at one time.
    """

    modules: int
    weights: int
    heads: int
    optimiser: int
    messages: int
    work: int

    @property
    def peak(self) -> int:
        """All of it."""
        return self.weights + self.heads + self.optimiser + self.messages + self.work


def step_memory(config: Config, image_shape: tuple[int, ...], classes: int, ranks: int = 1) -> tuple[StepMemory, ...]:
    """The peak of a step of ``config`` on images (C, S, S), for every one of ``ranks`` ranks. Layers
    take the form that they have on a CPU.

    Args:
        config: with the batch size, precision, schedule and placement of the run; ``partition.kind = "auto"`` and
            "measured" are placed by count.
        image_shape: (C, S, S).
        classes: of the data set.
        ranks: processes, each with a device of its own.

    Raises:
        ConfigError: the plan does not exist (see :func:`pipeline.plan.assembly.make_plan`).
    """
    several = min(config.train.accumulate, 2)  # more batches of an update are no more memory
    config = with_values(config, {"precision.compile": False, "train.accumulate": several})
    plan, blocks, numerics = plan_of_name(config, image_shape, classes, ranks)
    messages = rank_memory(plan, [ModuleCost()] * len(plan.modules), numerics)
    known: dict[str, StepMemory] = {}
    found = []
    for rank, held in enumerate(messages):
        kind = _kind(plan, rank, blocks)
        if kind not in known:
            known[kind] = _of_rank(plan, rank, blocks, numerics)
        found.append(dataclasses.replace(known[kind], messages=held))
    return tuple(found)


def _kind(plan: Plan, rank: int, blocks: Blocks) -> str:
    """What decides the memory of a rank besides its messages: the ranks of a deep network are of a few kinds."""
    stage = plan.stages[rank]
    networks = [blocks[name] for index in stage for name in plan.cut.modules[index]]
    tensors = [tuple(tensor.shape) for network in networks for tensor in (*network.parameters(), *network.buffers())]
    roles = [(plan.modules[m].final, plan.modules[m].merged, plan.modules[m].needs_input_gradient) for m in stage]
    heads = [(name, without_memory(build)) for m in stage for name, build in plan.level_builders(m).items()]
    actions = [(a.kind, a.module - stage[0], a.micro_batch, a.lag, a.every) for a in plan.schedules[rank]]
    ends = [plan.given(stage[0]), *(plan.boundaries[index] for index in stage)]
    asks = [index in plan.reconstructing for index in stage]
    received = len(plan.gradient_order(rank + 1)) if rank + 1 < len(plan.stages) else 0
    return repr((rank == 0, networks, tensors, roles, heads, actions, ends, asks, received))


def _of_rank(plan: Plan, rank: int, blocks: Blocks, numerics: Numerics) -> StepMemory:
    """Without its messages."""
    stage, parts = plan.stages[rank], plan.config.schedule.micro_batches
    own = OrderedDict((name, blocks[name]) for index in stage for name in plan.cut.modules[index])
    with torch.random.fork_rng(devices=[]), no_values():
        alive = Alive(as_alone=True)
        with alive:
            modules = blank_modules(plan.placed((stage,)), own, numerics)
        batch, gradients = random_batch(plan, modules, numerics, parts), random_gradients(plan, modules[-1], numerics)
        following = plan.gradient_order(rank + 1) if rank + 1 < len(plan.stages) else ()
        edges = stands(plan, stage, gradients)
        alone = Stage(modules, plan.schedules[rank], BatchInlet(batch, parts), edges, following, watch=Reads())
        steps = 1 + plan.config.train.accumulate + max(action.lag for action in plan.schedules[rank])
        with alive:
            for step in range(steps):  # the first ones make what stays: states of the optimiser, constants of heads
                alive.most = alive.now
                alone.train_step(1, step)
        optimiser = sum(value.nbytes for module in modules for value in module.kept_tensors())
        weights = _bytes_of(block for module in modules for block in module.blocks.values())
        heads = _bytes_of(level for module in modules for level in module.levels.values())
        data = 0
        if rank == 0:
            inputs = batch.x.values() if isinstance(batch.x, dict) else [batch.x]
            images = [] if batch.image is None else [batch.image]
            data = sum(tensor.nbytes for tensor in (*inputs, batch.labels, *images))
        work = alive.most - weights - heads - optimiser + data
    return StepMemory(len(modules), weights, heads, optimiser, 0, work)


def _bytes_of(networks: Iterable[nn.Module]) -> int:
    return sum(tensor.nbytes for network in networks for tensor in (*network.parameters(), *network.buffers()))
