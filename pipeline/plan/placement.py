"""Placement: which consecutive local modules each rank owns. It decides how fast a run is, never its result.

    local modules   0  1 | 2  3 | 4        on 3 ranks: by count, by cost (counted or measured), or as given
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Sequence
from dataclasses import dataclass

from pipeline.base.config import PartitionConfig
from pipeline.base.errors import ConfigError


def choose_stages(
    config: PartitionConfig, modules: int, ranks: int, costs: Sequence[float] | None = None
) -> tuple[range, ...]:
    """Consecutive local modules of every rank, as ``config.kind`` asks; ``costs`` of every module for "auto" and
    "measured".

    Raises:
        ConfigError: more ranks than modules, or ``config.stages`` that do not fit.
    """
    if config.kind == "given":
        return given(config.stages, modules, ranks)
    if config.kind in ("auto", "measured"):
        assert costs is not None and len(costs) == modules
        return split_by_cost(costs, ranks)
    return place(modules, ranks)


def place(modules: int, ranks: int) -> tuple[range, ...]:
    """Consecutive local modules of every rank, as even as possible; the ranks at the end get the extra ones.

    The first stages also augment the images and hold the larger maps, so the extra modules go to the end.

    Raises:
        ConfigError: more ranks than modules.
    """
    if ranks > modules:
        raise ConfigError(
            f"{ranks} processes for {modules} local modules; start at most {modules} "
            f"(torchrun --nproc_per_node={modules}) or raise model.modules"
        )
    return _ranges([modules // ranks + (1 if rank >= ranks - modules % ranks else 0) for rank in range(ranks)])


def given(sizes: Sequence[int], modules: int, ranks: int) -> tuple[range, ...]:
    """Consecutive local modules of every rank, ``sizes[r]`` of them on rank r (``partition.stages``).

    Raises:
        ConfigError: not one size per rank, a size below 1, or sizes that do not add up to ``modules``.
    """
    listed = ", ".join(map(str, sizes))
    if len(sizes) != ranks:
        raise ConfigError(
            f"partition.stages = [{listed}] has {len(sizes)} sizes for {ranks} processes; give one size per process"
        )
    if min(sizes) < 1:
        raise ConfigError(f"partition.stages = [{listed}]: every process needs at least 1 local module")
    if sum(sizes) != modules:
        raise ConfigError(
            f"partition.stages = [{listed}] adds up to {sum(sizes)}, but model.modules gives {modules} local modules; "
            f"make them {modules} in all"
        )
    return _ranges(sizes)


def split_by_cost(costs: Sequence[float], ranks: int) -> tuple[range, ...]:
    """Consecutive local modules of every rank so that the most expensive rank is as cheap as possible.

    Of all such splits, the one in which the earlier ranks carry least: the first stage also augments the images.

        costs 3 1 1 1 2 on 3 ranks:   3 | 1 1 | 1 2      (3 | 1 1 1 | 2 is as cheap, 3 | 1 | 1 1 2 costs 4)

    Args:
        costs: of every local module, >= 0, in any unit.
        ranks: number of stages.

    Raises:
        ConfigError: more ranks than modules.
    """
    place(len(costs), ranks)  # refuses too many ranks
    low, high = max(costs), sum(costs)
    best = _fill_from_the_end(costs, ranks, high)
    while low < high:
        limit = (low + high) / 2
        if limit >= high:  # neighbouring floating-point numbers
            limit = low
        tried = _fill_from_the_end(costs, ranks, limit)
        if tried.largest <= limit:
            best, high = tried, tried.largest
        else:  # every limit below this one would give the same sizes again
            low = tried.next_limit
    return _ranges(best.sizes)


@dataclass(frozen=True)
class _Filling:
    """Sizes by rank, the cost of the most expensive rank; where that is above the limit, the smallest limit at which
    anything changes."""

    sizes: tuple[int, ...]
    largest: float
    next_limit: float


def _fill_from_the_end(costs: Sequence[float], ranks: int, limit: float) -> _Filling:
    """Give every rank, from the last to the first, as many modules as ``limit`` allows; the first takes the rest."""
    sizes = []
    end = len(costs)
    largest, next_limit = 0.0, math.inf
    for rank in range(ranks - 1, 0, -1):
        start, load = end - 1, costs[end - 1]
        while start > rank and load + costs[start - 1] <= limit:  # every earlier rank keeps a module
            start -= 1
            load += costs[start]
        if start > rank:
            next_limit = min(next_limit, load + costs[start - 1])
        sizes.append(end - start)
        largest = max(largest, load)
        end = start
    rest = sum(reversed(costs[:end]))
    sizes.append(end)
    return _Filling(tuple(reversed(sizes)), max(largest, rest), min(next_limit, rest) if rest > limit else next_limit)


def _ranges(sizes: Sequence[int]) -> tuple[range, ...]:
    ends = list(itertools.accumulate(sizes))
    return tuple(range(end - size, end) for end, size in zip(ends, sizes, strict=True))
