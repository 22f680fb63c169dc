"""The cost of a step in BP units, against counts by hand; its operations."""

from __future__ import annotations

from collections import OrderedDict

import own_tasks
import pytest
import tiny_sequences
import torch
from torch import Tensor, nn

from pipeline.base.flow import TensorSpec
from pipeline.base.numerics import Numerics
from pipeline.base.recipes import load_config
from pipeline.local.task import Classification
from pipeline.models import backbones
from pipeline.models.backbones import Blocks, blocks_of
from pipeline.models.unbuilt import planned_blocks
from pipeline.plan import cost as cost_module
from pipeline.plan.assembly import make_plan
from pipeline.plan.cost import StepCost, planned_cost, step_cost
from pipeline.plan.counting import _Operations

SHAPE = (3, 16, 16)
CPU = Numerics(torch.device("cpu"), torch.float32, channels_last=True)


def cost(*assignments: str) -> StepCost:
    config = load_config("cifar10-resnet32-bp", assignments=["model.name=resnet20", *assignments])
    return step_cost(config, SHAPE, 10)


def test_backpropagation_costs_one_unit() -> None:
    result = cost("model.modules=1")
    assert result.bp_units == 1.0 and result.heads == 0.0
    # Three products for each convolution, two for the first, whose input needs no gradient; 16 images have 256 pixels.
    stem, pixels = 2 * 3 * 16 * 9 * 256, 256
    stage = [2 * c * c * 9 * pixels / scale for c, scale in ((16, 1), (32, 4), (64, 16))]
    widening = sum(2 * (9 + 1) * c * 2 * c * pixels / scale for c, scale in ((16, 4), (32, 16)))
    blocks = 6 * stage[0] + 5 * (stage[1] + stage[2]) + widening
    assert result.bp_flops == pytest.approx(2 * stem + 3 * blocks + 3 * 2 * 64 * 10)


def test_a_head_costs_its_forward_and_two_gradients() -> None:
    """Greedy heads: global pooling and one linear layer; the trunk saves the input gradients at the boundaries."""
    result = cost("model.modules=4", "method.name=greedy")
    assert [round(m.independent * result.bp_flops) for m in result.modules] == [
        3 * 2 * channels * 10 for channels in (16, 32, 64, 0)
    ]
    assert all(m.relay == m.cascade == 0.0 for m in result.modules)
    assert 0.7 < result.trunk < 1.0
    assert result.bp_units == pytest.approx(result.trunk + result.heads)


def test_a_cascade_adds_relays_and_heads() -> None:
    plain = cost("model.modules=4", "method.name=dgl")
    cascade = cost("model.modules=4", "method.name=dgl", "hierarchy.cascade_span=2")
    assert [m.cascade > 0 for m in cascade.modules] == [False, True, True, False]
    assert [m.relay > 0 for m in cascade.modules] == [False, True, True, False]
    assert [m.forward for m in cascade.modules] == [m.forward for m in plain.modules]
    assert cascade.bp_units > plain.bp_units


def test_the_factorised_decoder_costs_less_than_the_plain_one() -> None:
    settings = ("model.modules=4", "method.name=infopro", "patches.grid=2")
    factorised, plain = cost(*settings), cost(*settings, "precision.layers=plain")
    assert factorised.trunk == plain.trunk
    assert factorised.modules[0].independent == plain.modules[0].independent  # already at full size
    assert factorised.modules[2].independent < 0.7 * plain.modules[2].independent


def test_counting_leaves_the_random_numbers_alone() -> None:
    torch.manual_seed(5)
    expected = torch.rand(3)
    torch.manual_seed(5)
    cost("model.modules=2", "method.name=dgl")
    assert torch.equal(torch.rand(3), expected)


HEADS = {
    "infopro": ["method.name=infopro", "method.head=1c2f", "hierarchy.cascade_span=2", "patches.grid=2"],
    "released": ["method.name=infopro", "hierarchy.variant=released", "hierarchy.cascade_span=2", "patches.grid=2"],
    "contrast": ["method.name=infopro-contrast"],
    "predsim": ["method.name=predsim", "hierarchy.cascade_span=3"],
    "dgl": ["method.name=dgl", "optim.name=adamw", "optim.clip_norm=1.0", "train.nonfinite=skip"],
}


@pytest.fixture
def computed(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """The numbers of local modules whose step was really computed, although no network is small."""
    monkeypatch.setattr(cost_module, "SMALL", 0)
    real: list[str] = []
    build = cost_module.real_modules

    def built(plan: cost_module.Plan, blocks: Blocks, numerics: Numerics) -> list[cost_module.LocalModule]:
        real.append(len(plan.modules))
        return build(plan, blocks, numerics)

    monkeypatch.setattr(cost_module, "real_modules", built)
    return real


@pytest.mark.parametrize("method", HEADS)
def test_a_step_without_values_does_what_the_real_step_does(
    method: str, computed: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    settings = ["model.name=resnet20", "model.modules=3", "precision.compute=fp32", *HEADS[method]]
    blocks = planned_blocks("resnet20", 3, 10)
    plan = make_plan(load_config("cifar10-resnet32-bp", assignments=settings), blocks, Classification(10, SHAPE), 1)
    blank = cost_module._count(plan, blocks, CPU)
    assert not computed
    monkeypatch.setattr(cost_module, "blank_modules", lambda *_: 1 / 0)
    real = cost_module._count(plan, blocks, CPU)
    assert computed == [3]
    assert blank.flops == real.flops
    # Not the same to the last one: PyTorch itself asks whether a tensor is real before it writes into a view of it, and
    # on a CPU reads one-hot labels to check them.
    assert blank.operations == pytest.approx(real.operations, rel=0.02)


DGL = ["method.name=dgl", "patches.at_once=1"]


def test_every_module_has_its_operations() -> None:
    bp = cost("model.modules=1")
    assert bp.operations == bp.bp_operations and bp.operations_ratio == 1.0
    assert bp.launches == bp.bp_launches and bp.launches_ratio == 1.0
    heads, patches = (cost("model.modules=4", *DGL, f"patches.grid={grid}") for grid in (1, 2))
    assert heads.bp_operations == patches.bp_operations == bp.bp_operations
    assert heads.operations == sum(module.operations for module in heads.modules) > bp.operations
    assert [a.operations < b.operations for a, b in zip(heads.modules, patches.modules, strict=True)] == [1, 1, 1, 0]
    assert heads.modules[3].operations == patches.modules[3].operations  # it has no head


def test_the_backpropagation_to_compare_with_is_the_same_for_the_released_variant() -> None:
    """Which counts what BatchNorm has seen once more for every cascade that runs a module again."""
    paper, released = (cost("model.modules=4", *DGL, f"hierarchy.variant={variant}", "hierarchy.cascade_span=2")
                       for variant in ("paper", "released"))  # fmt: skip
    assert released.bp_operations == paper.bp_operations and released.bp_launches == paper.bp_launches


def test_patches_at_once_are_fewer_operations_and_as_many_flops() -> None:
    settings = ["model.modules=2", "method.name=infopro", "method.head=1c2f", "patches.grid=4"]
    one_by_one, together = (cost(*settings, f"patches.at_once={number}") for number in (1, 16))
    assert together.modules[0].operations < one_by_one.modules[0].operations / 3
    assert [module.total for module in together.modules] == [module.total for module in one_by_one.modules]


def test_counting_needs_no_memory(computed: list[str], monkeypatch: pytest.MonkeyPatch) -> None:
    """A network of 4 TB of weights, and as much again for gradients and momentum."""
    wide, sizes = 10**6, [3 * 16 * 16, 10**6, 10**6, 10]

    def build(channels: int, classes: int, sides: object) -> Blocks:
        layers = [nn.Sequential(nn.Flatten(), nn.Linear(sizes[0], wide)), nn.Linear(wide, wide), nn.Linear(wide, 10)]
        return OrderedDict((f"layer{i}", layer) for i, layer in enumerate(layers))

    monkeypatch.setitem(backbones._BACKBONES, "huge", build)
    result = cost("model.name=huge", "model.modules=3", "model.cuts=even", "method.name=greedy")
    first, *others = [2 * a * b for a, b in zip(sizes, sizes[1:], strict=False)]
    assert result.bp_flops == 2 * first + 3 * sum(others)
    assert result.modules[1].forward == pytest.approx(others[0] / result.bp_flops)
    assert not computed


class Chooses(nn.Module):
    """A block that looks at its input."""

    def forward(self, x: Tensor) -> Tensor:
        return x if x.sum() > 0 else -x


def test_a_network_that_looks_at_values_is_computed(computed: list[str], monkeypatch: pytest.MonkeyPatch) -> None:
    def build(channels: int, classes: int, sides: object) -> Blocks:
        layers = [nn.Conv2d(3, 8, 3), Chooses(), nn.Sequential(nn.Flatten(), nn.Linear(8 * 14 * 14, 10))]
        return OrderedDict((f"layer{i}", layer) for i, layer in enumerate(layers))

    monkeypatch.setitem(backbones._BACKBONES, "chooses", build)
    result = cost("model.name=chooses", "model.modules=2", "model.cuts=even", "method.name=greedy")
    assert result.bp_flops == 2 * (2 * 3 * 8 * 9 * 14 * 14) + 3 * (2 * 8 * 14 * 14 * 10)
    assert computed == [1, 2]


@pytest.mark.parametrize("task", [own_tasks.SEGMENTATION, own_tasks.NEXT_TOKEN], ids=["segmentation", "next token"])
def test_another_task_is_counted_too(task: own_tasks.Segmentation | own_tasks.NextToken, computed: list[str]) -> None:
    network = own_tasks.network(task)
    before = [weight.clone() for weight in network.parameters()]
    config = load_config("cifar10-resnet32-bp", assignments=["model.modules=3", "model.cuts=even", "method.name=dgl"])
    blocks = blocks_of(network)
    result = planned_cost(make_plan(config, blocks, task, 2), blocks, CPU)
    assert not computed
    assert [module.independent > 0 for module in result.modules] == [True, True, False]
    assert all(torch.equal(a, b) for a, b in zip(before, network.parameters(), strict=True))


def test_named_tensors_of_any_length_are_counted(computed: list[str]) -> None:
    settings = ["model.modules=5", "model.cuts=even", "method.name=greedy", "patches.grid=1"]
    config = load_config("cifar10-resnet32-bp", assignments=settings)
    blocks = blocks_of(tiny_sequences.blocks())
    longest = (tiny_sequences.LONGEST,)
    inputs = {"x": TensorSpec(longest, torch.int64, (0,)), "mask": TensorSpec(longest, torch.bool, (0,))}
    plan = make_plan(config, blocks, Classification(tiny_sequences.CLASSES, longest), 1, inputs)
    result = planned_cost(plan, blocks, CPU)
    length, width = tiny_sequences.LONGEST, tiny_sequences.WIDTH
    mix = 2 * (2 * length * length * width) + 2 * length * width * width  # attention, and one linear layer
    assert result.modules[1].forward * result.bp_flops == pytest.approx(mix)
    assert not computed


@pytest.mark.parametrize("compute", ["bf16", "fp64"])
def test_the_precision_does_not_change_the_flops(compute: str) -> None:
    settings = ["model.modules=3", *HEADS["infopro"], "patches.grid=1"]
    found, expected = (cost(*settings, f"precision.compute={name}") for name in (compute, "fp32"))
    assert found.bp_flops == expected.bp_flops
    assert [module.total for module in found.modules] == [module.total for module in expected.modules]


def test_views_and_memory_alone_launch_nothing() -> None:
    x = torch.ones(4, 3)
    with _Operations(reads=False) as counted:
        torch.empty(2)
        turned = x.t().detach()
        y = torch.relu(turned.reshape(-1))  # a copy, since the turned rows are not in order
        y[2:5].view(3, 1).add_(1.0)
    assert counted.launches == len(["clone", "relu", "add_"]) < counted.calls
