"""Cut points of the papers, even splits, and placement on ranks."""

from __future__ import annotations

import itertools
import random

import pytest

from pipeline.base.config import ModelConfig, PartitionConfig
from pipeline.base.errors import ConfigError
from pipeline.models.backbones import backbone_names, build_blocks
from pipeline.plan.cut import TABLES, choose_stages, cut, given, place, split_by_cost


def ends(name: str, modules: int, cuts: str = "auto", stem: str = "auto") -> list[str]:
    """Last block of every module but the last."""
    blocks = build_blocks(name, 3, 10)
    partition = cut(list(blocks), ModelConfig(name, modules, cuts, stem))
    assert [block for names in partition.modules for block in names] == list(blocks)
    return [names[-1] for names in partition.modules[:-1]]


def short(*cut_points: str) -> list[str]:
    """"1.2" of the papers' tables -> "layer1.2"."""
    return [f"layer{point}" for point in cut_points]


def test_the_papers_cut_points() -> None:
    assert ends("resnet32", 2, "equal") == short("2.1")
    assert ends("resnet32", 4, "equal") == short("1.2", "2.1", "3.0")
    assert ends("resnet32", 8, "equal") == short("1.0", "1.2", "1.4", "2.1", "2.3", "3.0", "3.2")
    assert ends("resnet110", 2, "equal") == short("2.8")
    assert ends("resnet110", 4, "equal") == short("1.11", "2.7", "3.3")
    assert ends("resnet110", 8, "equal") == short("1.4", "1.11", "2.0", "2.7", "2.14", "3.3", "3.10")
    stages = {1: (1, 4, 7, 10, 13, 16), 2: (1, 4, 7, 11, 15), 3: (1, 5, 9, 13)}
    assert ends("resnet110", 16, "equal") == [f"layer{s}.{b}" for s, blocks in stages.items() for b in blocks]
    first = (1, 2, 4, 5, 7, 9, 11, 13, 14, 16, 17)
    stages = {1: first, 2: first, 3: (1, 3, 4, 6, 7, 9, 11, 13, 15)}
    assert ends("resnet110", 32, "hpff") == [f"layer{s}.{b}" for s, blocks in stages.items() for b in blocks]
    assert ends("resnet110", 4, "balanced") == short("1.6", "1.14", "2.8")
    assert ends("resnet110", 3, "balanced") == short("1.9", "2.2")
    assert ends("resnet110", 3, "balanced-stl10") == short("1.8", "2.1")


def test_the_stem_variants_of_sixteen_modules() -> None:
    own = ends("resnet32", 16)
    assert own[0] == "stem" and len(own) == 15
    merged = ends("resnet32", 16, "hpff")
    assert merged[0] == "layer1.0" and len(merged) == 14  # the released code builds 15 modules for K = 16
    assert len(ends("resnet110", 55, "hpff")) == 53
    assert ends("resnet32", 3, stem="own")[0] == "stem"


@pytest.mark.parametrize("name", backbone_names())
def test_any_number_of_modules_up_to_one_per_block(name: str) -> None:
    blocks = list(build_blocks(name, 3, 10))
    for modules in range(1, len(blocks) + 1):
        partition = cut(blocks, ModelConfig(name, modules, "even"))
        assert len(partition) == modules
        assert all(partition.modules)
    with pytest.raises(ConfigError, match=f"has {len(blocks)} blocks; use at most {len(blocks)}"):
        cut(blocks, ModelConfig(name, len(blocks) + 1))


def test_every_table_fits_its_network() -> None:
    for cuts, networks in TABLES.items():
        for name, by_modules in networks.items():
            for modules in by_modules:
                ends(name, modules, cuts)


def test_a_table_without_this_k_is_refused_by_name() -> None:
    with pytest.raises(ConfigError, match=r"model.cuts = 'balanced' has 2, 3, 4 for resnet110, not model.modules = 5"):
        cut(list(build_blocks("resnet110", 3, 10)), ModelConfig("resnet110", 5, "balanced"))


def test_ranks_own_consecutive_modules() -> None:
    for modules in range(1, 12):
        for ranks in range(1, modules + 1):
            stages = place(modules, ranks)
            assert [m for stage in stages for m in stage] == list(range(modules))
            sizes = [len(stage) for stage in stages]
            assert max(sizes) - min(sizes) <= 1
    with pytest.raises(ConfigError, match="5 processes for 4 local modules"):
        place(4, 5)


def loads(costs: list[int], stages: tuple[range, ...]) -> list[int]:
    assert [m for stage in stages for m in stage] == list(range(len(costs)))
    assert all(len(stage) > 0 for stage in stages)
    return [sum(costs[m] for m in stage) for stage in stages]


def every_split(modules: int, ranks: int) -> list[tuple[range, ...]]:
    cuts = itertools.combinations(range(1, modules), ranks - 1)
    return [tuple(itertools.starmap(range, itertools.pairwise((0, *inner, modules)))) for inner in cuts]


def test_the_split_by_cost_has_the_smallest_maximum_and_then_the_lightest_first_ranks() -> None:
    dice = random.Random(0)
    for _ in range(300):
        modules = dice.randint(1, 9)
        ranks = dice.randint(1, modules)
        costs = [dice.choice([0, 1, 2, 3, 5, 8]) for _ in range(modules)]
        found = loads(costs, split_by_cost(costs, ranks))
        every = [loads(costs, split) for split in every_split(modules, ranks)]
        assert (max(found), list(itertools.accumulate(found))) == min(
            (max(other), list(itertools.accumulate(other))) for other in every
        )


def test_thousands_of_modules_are_split_at_once() -> None:
    dice = random.Random(1)
    costs = [dice.random() for _ in range(4096)]
    for ranks in (1, 7, 1000, 4096):
        stages = split_by_cost(costs, ranks)
        largest = max(sum(costs[m] for m in stage) for stage in stages)
        assert len(stages) == ranks
        assert largest <= sum(costs) / ranks + max(costs)


def test_expensive_early_modules_get_ranks_of_their_own() -> None:
    assert [len(stage) for stage in split_by_cost([8.0, 4.0, 2.0, 1.0, 1.0], 3)] == [1, 1, 3]


def test_given_sizes_are_used_or_refused() -> None:
    assert given((1, 3), 4, 2) == (range(0, 1), range(1, 4))
    for sizes, ranks, message in (
        ((1, 3), 3, r"partition.stages = \[1, 3\] has 2 sizes for 3 processes; give one size per process"),
        ((0, 4), 2, "every process needs at least 1 local module"),
        ((1, 2), 2, r"adds up to 3, but model.modules gives 4 local modules; make them 4"),
    ):
        with pytest.raises(ConfigError, match=message):
            given(sizes, 4, ranks)


def test_the_kind_of_partition_chooses_the_placement() -> None:
    costs = [4.0, 1.0, 1.0, 1.0]
    sizes = {}
    for config in (PartitionConfig(), PartitionConfig("measured"), PartitionConfig("given", (3, 1))):
        sizes[config.kind] = [len(stage) for stage in choose_stages(config, 4, 2, costs)]
    assert sizes == {"count": [2, 2], "measured": [1, 3], "given": [3, 1]}
