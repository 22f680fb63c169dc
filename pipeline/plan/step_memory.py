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

from pipeline.base.config import Config, ScheduleConfig
from pipeline.base.numerics import Numerics, resolve_numerics
from pipeline.local.task import Classification
from pipeline.models.backbones import Blocks
from pipeline.models.unbuilt import no_values, planned_blocks
from pipeline.plan.alone import random_batch, random_gradients, stage_alone
from pipeline.plan.assembly import Plan, make_plan
from pipeline.plan.blank import blank_modules
from pipeline.plan.cost_cut import cut_by_cost
from pipeline.plan.counting import Tally
from pipeline.plan.live_bytes import LiveBytes
from pipeline.plan.rank_memory import rank_memory
from pipeline.plan.simulate import ModuleCost


@dataclass(frozen=True)
class StepMemory:
    """What one rank holds, in bytes. Work space that a library gets for itself is not counted.

    Attributes:
        modules: number of its local modules.
        weights: parameters and buffers of its blocks.
        heads: those of its auxiliary heads.
        optimiser: momentum, moments.
        messages: slots of its queues.
        work: the most that gradients, activations and operations take besides, at one time.
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
    """The peak of a synchronous step of ``config`` on images (C, S, S), for every one of ``ranks`` ranks.

    Args:
        config: with the batch size, precision and placement of the run; ``partition.kind = "auto"`` and "measured"
            are placed by count.
        image_shape: (C, S, S).
        classes: of the data set.
        ranks: processes, each with a device of its own.

    Raises:
        ConfigError: the plan does not exist (see :func:`pipeline.plan.assembly.make_plan`).
    """
    task = Classification(classes, image_shape)
    blocks = planned_blocks(config.model.name, image_shape[0], classes)
    numerics = resolve_numerics(config.precision, torch.device("cpu"), blocks.values())
    config, _ = cut_by_cost(config, blocks, task)
    precision = dataclasses.replace(config.precision, compile=False)
    plan = make_plan(dataclasses.replace(config, schedule=ScheduleConfig(), precision=precision), blocks, task, ranks)
    messages = rank_memory(plan, [ModuleCost()] * len(plan.modules), numerics)
    return tuple(
        _of_rank(plan, stage, blocks, numerics, held) for stage, held in zip(plan.stages, messages, strict=True)
    )


def _of_rank(plan: Plan, stage: range, blocks: Blocks, numerics: Numerics, messages: int) -> StepMemory:
    own = OrderedDict((name, blocks[name]) for index in stage for name in plan.cut.modules[index])
    with torch.random.fork_rng(devices=[]), no_values(), LiveBytes() as live:
        modules = blank_modules(plan.placed((stage,)), own, numerics)
        batch, gradients = random_batch(plan, modules, numerics), random_gradients(plan, modules[-1], numerics)
        alone = stage_alone(plan, modules, batch, gradients, Tally())
        alone.train_step(1, 0)  # it makes what stays: states of the optimiser, constants of heads
        live.peak = live.now
        alone.train_step(1, 1)
        optimiser = sum(value.nbytes for module in modules for _, value in module.optimiser.state())
        received = sum(x.nbytes for x in gradients.values()) + (sum(x.nbytes for x in batch.x.values()) if stage[0] else 0)
        weights = _bytes_of(block for module in modules for block in module.blocks.values())
        heads = _bytes_of(level for module in modules for level in module.levels.values())
        work = live.peak - weights - heads - optimiser - received
    return StepMemory(len(modules), weights, heads, optimiser, messages, work)


def _bytes_of(networks: Iterable[nn.Module]) -> int:
    return sum(tensor.nbytes for network in networks for tensor in (*network.parameters(), *network.buffers()))
