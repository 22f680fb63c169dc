"""The memory of a step that is not computed, against PyTorch's CPU allocator while the same step is."""

from __future__ import annotations

import pytest
import torch
from helpers_memory import allocator_peak

from pipeline.base.config import Config
from pipeline.base.flow import named
from pipeline.base.numerics import Numerics
from pipeline.base.recipes import load_config
from pipeline.edges.connect import Edges
from pipeline.local.task import Classification
from pipeline.models.unbuilt import planned_blocks
from pipeline.plan.alone import random_batch
from pipeline.plan.assembly import build_modules, make_plan
from pipeline.plan.step_memory import step_memory
from pipeline.stage.inlet import BatchInlet
from pipeline.stage.stage import Stage

IMAGE, CLASSES = (3, 32, 32), 10
HPFF = ("hierarchy.cascade_span=2", "patches.grid=2", "patches.at_once=1")


def config_of(*more: str) -> Config:
    run = ["model.name=resnet20", "data.batch_size=16", "precision.compute=fp32", "partition.kind=count"]
    return load_config("cifar10-resnet32-bp", assignments=[*run, "model.modules=3", "model.cuts=even", *more])


def real_peak(config: Config) -> int:
    """Of a step of all modules in this process, after those that make what stays; without what stays."""
    blocks = planned_blocks(config.model.name, IMAGE[0], CLASSES)
    plan = make_plan(config, blocks, Classification(CLASSES, IMAGE), 1)
    numerics, parts = Numerics(torch.device("cpu"), torch.float32, channels_last=True), config.schedule.micro_batches
    modules = build_modules(plan, 0, blocks, numerics, fresh=True)
    batch = random_batch(plan, modules, numerics, parts)
    stage = Stage(modules, plan.schedules[0], BatchInlet(batch, parts), Edges())
    steps = 1 + max(action.lag for action in plan.schedules[0])
    for step in range(steps):
        stage.train_step(0, step)
    given = [*named(batch.x).values(), batch.labels] + [batch.image] * (batch.image is not None)
    return allocator_peak(lambda: stage.train_step(0, steps)) + sum(tensor.nbytes for tensor in given)


@pytest.mark.parametrize(
    "more",
    [
        ["model.modules=1"],
        ["method.name=greedy", *HPFF],
        ["method.name=infopro", "hierarchy.cascade_span=3", "schedule.micro_batches=2"],
    ],
    ids=["bp", "greedy + hpff", "infopro + k = 3, M = 2"],
)
def test_a_step_holds_what_was_counted(more: list[str]) -> None:
    """Ten per cent are asked for; it is one."""
    config = config_of(*more)
    (memory,) = step_memory(config, IMAGE, CLASSES)
    assert memory.work == pytest.approx(real_peak(config), rel=0.01)


def test_a_rank_holds_its_own_modules_and_the_slots_of_its_messages() -> None:
    """Of activations two that are received, one posted ahead and one held, and one sent; a gradient upstream. The last
    module sends none."""
    config = config_of("method.name=greedy", "hierarchy.cascade_span=2", "runtime.queue_depth=1")
    (alone,), ranks = step_memory(config, IMAGE, CLASSES), step_memory(config, IMAGE, CLASSES, ranks=3)
    assert alone.messages == 0 and alone.modules == 3
    for part in ("weights", "heads", "optimiser", "modules"):
        assert sum(getattr(rank, part) for rank in ranks) == getattr(alone, part)
    before, behind = 16 * 16 * 32 * 32 * 4, 16 * 32 * 16 * 16 * 4
    assert ranks[1].messages == pytest.approx(3 * before + behind, rel=0.01)
    assert ranks[1].peak == ranks[1].weights + ranks[1].heads + ranks[1].optimiser + ranks[1].messages + ranks[1].work


def test_averages_of_weights_and_sums_of_gradients_are_counted() -> None:
    (memory,) = step_memory(config_of("model.modules=1", "train.ema=0.9", "train.accumulate=5000"), IMAGE, CLASSES)
    blocks = planned_blocks("resnet20", IMAGE[0], CLASSES).values()
    momentum = sums = sum(p.nbytes for block in blocks for p in block.parameters())
    assert memory.optimiser == momentum + sums + memory.weights


def test_patches_by_auto_need_no_more_on_the_fullest_rank_than_its_module_alone() -> None:
    """With a module on each rank; all at once would."""
    settings = ["method.name=infopro", "method.head=1c2f", "hierarchy.cascade_span=1", "patches.grid=4"]
    none, auto, all_of_them = (
        max(rank.work for rank in step_memory(config_of(*settings, more), IMAGE, CLASSES, ranks=3))
        for more in ("hierarchy.independent_weight=0", "patches.at_once=auto", "patches.at_once=16")
    )
    assert none <= auto <= 1.02 * none < all_of_them
