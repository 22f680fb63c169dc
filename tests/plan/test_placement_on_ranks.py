"""Placement: consecutive local modules on ranks, by count, by cost, or as given."""

from __future__ import annotations

import itertools
import random

import pytest

from pipeline.base.config import PartitionConfig
from pipeline.base.errors import ConfigError
from pipeline.plan.placement import choose_stages, given, place, split_by_cost


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
    for config in (*map(PartitionConfig, ("count", "auto", "measured")), PartitionConfig("given", (3, 1))):
        sizes[config.kind] = [len(stage) for stage in choose_stages(config, 4, 2, costs)]
    assert sizes == {"count": [2, 2], "auto": [1, 3], "measured": [1, 3], "given": [3, 1]}
