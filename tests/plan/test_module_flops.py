"""FLOPs of every local module: those of the whole step, from one module of every kind."""

from __future__ import annotations

from collections import OrderedDict

import pytest
import torch
from torch import Tensor, nn

from pipeline import load_config
from pipeline.base.numerics import Numerics
from pipeline.local.task import Classification
from pipeline.models.backbones import Blocks
from pipeline.models.unbuilt import planned_blocks
from pipeline.plan import module_flops as module_flops_file
from pipeline.plan.assembly import Plan, make_plan
from pipeline.plan.cost import planned_cost
from pipeline.plan.module_flops import Uncountable, module_flops

TASK = Classification(10, (3, 16, 16))
CPU = Numerics(torch.device("cpu"), torch.float32, channels_last=True)


def plan_of(blocks: Blocks, *assignments: str) -> Plan:
    settings = ["model.cuts=even", "precision.compute=fp32", *assignments]
    return make_plan(load_config("cifar10-resnet32-bp", assignments=settings), blocks, TASK, 2)


@pytest.fixture
def counted(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """The modules that were counted."""
    found: list[int] = []
    alone = module_flops_file._alone

    def watched(plan: Plan, blocks: Blocks, numerics: Numerics, index: int) -> float:
        found.append(index)
        return alone(plan, blocks, numerics, index)

    monkeypatch.setattr(module_flops_file, "_alone", watched)
    return found


SETTINGS = {
    "together": ["method.name=infopro", "hierarchy.cascade_span=2", "patches.grid=2", "hierarchy.levels=together"],
    "released": ["method.name=infopro", "hierarchy.variant=released", "hierarchy.cascade_span=2", "patches.grid=2"],
    "predsim": ["method.name=predsim", "hierarchy.cascade_span=3", "schedule.kind=async"],
}


@pytest.mark.parametrize("method", SETTINGS)
def test_they_are_those_of_the_whole_step(method: str) -> None:
    blocks = planned_blocks("resnet20", 3, 10)
    plan = plan_of(blocks, "model.name=resnet20", "model.modules=7", *SETTINGS[method])
    cost = planned_cost(plan, blocks, CPU)
    flops = module_flops(plan, blocks, CPU)
    assert flops == pytest.approx([2 * cost.bp_flops * module.total for module in cost.modules], rel=1e-12)


def test_every_kind_of_module_is_counted_once(counted: list[int]) -> None:
    """The first one, the last one, two that make the maps wider, and one of each width."""
    blocks = planned_blocks("resnet110", 3, 10)
    flops = module_flops(plan_of(blocks, "model.name=resnet110", "model.modules=54", "method.name=dgl"), blocks, CPU)
    assert len(flops) == 54 and counted == [0, 1, 18, 19, 36, 37, 53]


class Repeats(nn.Module):
    """A block whose cost is a number that none of its weights shows."""

    def __init__(self, times: int) -> None:
        super().__init__()
        self.times, self.convolution = times, nn.Conv2d(3, 3, 3, padding=1)

    def forward(self, x: Tensor) -> Tensor:
        for _ in range(self.times):
            x = self.convolution(x)
        return x


def network(*blocks: nn.Module) -> Blocks:
    end = nn.Sequential(nn.Flatten(), nn.Linear(3 * 16 * 16, 10))
    return OrderedDict((f"block{i}", block) for i, block in enumerate((*blocks, end)))


def test_a_setting_makes_another_kind(counted: list[int]) -> None:
    blocks = network(Repeats(1), Repeats(2), Repeats(2), Repeats(7))
    flops = module_flops(plan_of(blocks, "model.modules=5", "method.name=greedy"), blocks, CPU)
    assert flops[1] == flops[2] < flops[3]
    assert counted == [0, 1, 3, 4]


class Chooses(nn.Module):
    """A block that looks at its input."""

    def forward(self, x: Tensor) -> Tensor:
        return x if x.sum() > 0 else -x


def test_a_module_that_looks_at_values_is_named_and_not_computed() -> None:
    blocks = network(nn.Conv2d(3, 3, 3, padding=1), Chooses())
    plan = plan_of(blocks, "model.modules=3", "method.name=greedy")
    with pytest.raises(Uncountable, match=r"^local module 1 \(block1\) cannot be counted without values \(\w+: .*\)$"):
        module_flops(plan, blocks, CPU)


def test_counting_leaves_network_and_random_numbers_alone() -> None:
    torch.manual_seed(5)
    blocks = network(nn.Conv2d(3, 3, 3, padding=1), nn.BatchNorm2d(3))
    before = {f"{n}.{k}": v.clone() for n, block in blocks.items() for k, v in block.state_dict().items()}
    state = torch.get_rng_state()
    module_flops(plan_of(blocks, "model.modules=3", "method.name=dgl"), blocks, CPU)
    assert torch.equal(torch.get_rng_state(), state)
    after = {f"{n}.{k}": v for n, block in blocks.items() for k, v in block.state_dict().items()}
    assert all(torch.equal(after[name], value) for name, value in before.items())
