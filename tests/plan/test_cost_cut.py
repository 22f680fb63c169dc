"""The cut by cost: its costs are those of the modules it makes, and no other cut has a cheaper largest module."""

from __future__ import annotations

import itertools
import random
from collections import OrderedDict

import pytest
from tiny import CLASSES, IMAGE, tiny_blocks
from torch import Tensor, nn

from pipeline import Config, ConfigError, load_config
from pipeline.local.task import Classification
from pipeline.models.backbones import Blocks
from pipeline.models.unbuilt import planned_blocks
from pipeline.plan import cost_cut
from pipeline.plan.assembly import make_plan
from pipeline.plan.cost_cut import NUMERICS, cut_by_cost, smallest_largest
from pipeline.plan.module_flops import module_flops

TASK = Classification(CLASSES, IMAGE)


def config(*assignments: str) -> Config:
    return load_config("cifar10-resnet32-bp", assignments=["model.name=resnet20", "model.cuts=cost", *assignments])


def cut(*assignments: str) -> tuple[str, ...] | str:
    return cut_by_cost(config(*assignments), tiny_blocks(), TASK)[0].model.cuts


def every_cut(pieces: int, modules: int) -> list[tuple[int, ...]]:
    return [(*ends, pieces) for ends in itertools.combinations(range(1, pieces), modules - 1)]


@pytest.mark.parametrize("seed", range(20))
def test_no_cut_has_a_cheaper_largest_module_and_no_such_cut_is_more_even(seed: int) -> None:
    """Against all cuts, of costs in which ties are frequent; a module's place counts too, as its heads depend on it."""
    draw = random.Random(seed)
    pieces = draw.randint(1, 8)
    modules = draw.randint(1, pieces)
    costs, heads = ([draw.randint(0, 3) for _ in range(pieces)] for _ in range(2))

    def cost(module: int, start: int, end: int) -> float:
        return sum(costs[start:end]) + (heads[end - 1] if module < modules - 1 else 0)

    def score(ends: tuple[int, ...]) -> tuple[float, float, list[int]]:
        parts = list(itertools.pairwise((0, *ends)))
        squares = sum((end - start) ** 2 for start, end in parts)
        return max(cost(m, *part) for m, part in enumerate(parts)), squares, [-end for end in ends]

    assert smallest_largest(pieces, modules, cost) == min(every_cut(pieces, modules), key=score)


def test_the_cut_of_the_docstring() -> None:
    costs = [3, 1, 1, 1, 2]
    assert smallest_largest(5, 3, lambda module, start, end: sum(costs[start:end])) == (1, 3, 5)
    assert smallest_largest(5, 2, lambda module, start, end: sum(costs[start:end]), alone=True) == (1, 5)
    with pytest.raises(ConfigError, match="can be cut into 5 local modules, not into model.modules = 6"):
        smallest_largest(5, 6, lambda module, start, end: 0)


SETTINGS = {
    "infopro": ["method.name=infopro", "hierarchy.cascade_span=2", "patches.grid=2"],
    "released": ["method.name=infopro", "hierarchy.cascade_span=3", "hierarchy.variant=released", "patches.grid=2"],
    "end to end": ["method.name=predsim", "hierarchy.cascade_span=4"],
    "no cascade": ["method.name=dgl"],
}


@pytest.mark.parametrize("method", SETTINGS)
def test_the_cost_of_a_module_is_that_of_a_step(method: str) -> None:
    """Sums of blocks and heads, against the modules of three cuts counted as they are."""
    settings = config("model.modules=4", *SETTINGS[method])
    blocks = tiny_blocks()
    beginnings, cost = cost_cut._counted(settings, blocks, TASK, TASK.inputs)
    assert beginnings == list(blocks)
    for ends in ((1, 2, 3, 6), (2, 3, 5, 6), (1, 4, 5, 6)):
        names = ", ".join(f'"{beginnings[end]}"' for end in ends[:-1])
        plan = make_plan(config(f"model.cuts=[{names}]", "model.modules=4", *SETTINGS[method]), blocks, TASK, 1)
        expected = module_flops(plan, blocks, NUMERICS)
        assert [cost(m, *part) for m, part in enumerate(itertools.pairwise((0, *ends)))] == expected


def test_the_passes_of_sgr_are_in_the_cost_about() -> None:
    """Against modules counted as they are; without them the cost of all but the first would be half of that."""
    settings = ["method.name=dgl", "method.reconciliation=0.1", "model.modules=4"]
    blocks = tiny_blocks()
    beginnings, cost = cost_cut._counted(config(*settings), blocks, TASK, TASK.inputs)
    ends = (1, 2, 3, 6)
    names = ", ".join(f'"{beginnings[end]}"' for end in ends[:-1])
    plan = make_plan(config(f"model.cuts=[{names}]", *settings), blocks, TASK, 1)
    found = [cost(m, *part) for m, part in enumerate(itertools.pairwise((0, *ends)))]
    assert found == pytest.approx(module_flops(plan, blocks, NUMERICS), rel=0.08)


def test_the_default_job_is_cut_more_evenly_by_cost_than_by_number() -> None:
    blocks = planned_blocks("resnet32", 3, 10)
    digits = Classification(10, (3, 32, 32))
    largest = {}
    for cuts in ("cost", "auto"):
        settings, words = cut_by_cost(load_config(assignments=[f"model.cuts={cuts}"]), blocks, digits)
        flops = module_flops(make_plan(settings, blocks, digits, 4), blocks, NUMERICS)
        largest[cuts] = max(flops) / sum(flops)
        assert words.startswith("cut by FLOPs: ") == (cuts == "cost")
    assert load_config().model.cuts == "cost"
    assert largest["cost"] < 0.27 < 0.31 < largest["auto"]


def test_only_network_method_and_images_decide() -> None:
    method = ["model.modules=4", "method.name=dgl", "hierarchy.cascade_span=2"]
    expected = cut(*method)
    assert expected == cut(
        *method,
        *("schedule.kind=async", "schedule.micro_batches=2", "data.batch_size=8", "optim.name=adamw"),
        *("precision.compute=bf16", "precision.layers=plain", "precision.compile=true", "hierarchy.levels=together"),
        *("partition.kind=measured", "hierarchy.cascade_weight=0.3", "train.seed=5", "runtime.device=cpu"),
    )


def test_the_stem() -> None:
    settings = ["model.modules=3", "method.name=greedy"]
    assert cut(*settings, "model.stem=own")[0] == "a"
    assert cut("model.modules=5", "method.name=greedy", "model.stem=merged") == ("b", "c", "d", "classifier")


def test_one_module_is_not_cut() -> None:
    one = config("model.modules=1")
    assert cut_by_cost(one, tiny_blocks(), TASK) == (one, "")


class InPlace(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return x.relu_()


class Chooses(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return x if x.sum() > 0 else -x


def network(*blocks: nn.Module) -> Blocks:
    end = nn.Sequential(nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(3, CLASSES))
    return OrderedDict((f"block{i}", block) for i, block in enumerate((*blocks, end)))


def convolution(stride: int = 1) -> nn.Module:
    return nn.Conv2d(3, 3, 3, stride, 1)


def test_no_module_begins_where_it_must_not() -> None:
    """Heads on 4 x 4 patches do not fit the last map, and a block changes what it is given."""
    blocks = network(convolution(), InPlace(), convolution(2), convolution(2), convolution())
    settings = config("model.modules=3", "method.name=greedy", "patches.grid=4")
    beginnings, _ = cost_cut._counted(settings, blocks, TASK, TASK.inputs)
    assert beginnings == ["block0", "block2", "block3"]
    found, words = cut_by_cost(settings, blocks, TASK)
    assert found.model.cuts == ("block2", "block3") and words.startswith("cut by FLOPs")


@pytest.mark.parametrize(
    ("blocks", "cuts", "words"),
    [
        ([Chooses(), convolution()], ("block1",), "local module 0 (block0) cannot be counted without values (DataDep"),
        ([InPlace(), InPlace()], ("block1", "block2"), "the network can be cut into 2 local modules, not into "),
    ],
)
def test_a_network_that_cannot_be_counted_is_cut_evenly(
    blocks: list[nn.Module], cuts: tuple[str, ...], words: str
) -> None:
    settings = config(f"model.modules={len(cuts) + 1}", "method.name=greedy")
    found, said = cut_by_cost(settings, network(*blocks), TASK)
    assert found.model.cuts == cuts
    assert said.startswith(f"cut as with model.cuts = 'auto': {words}") and "\n" not in said
