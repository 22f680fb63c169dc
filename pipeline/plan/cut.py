"""Blocks -> local modules -> ranks."""

from __future__ import annotations

import itertools
import math
from collections.abc import Sequence
from dataclasses import dataclass

from pipeline.base.config import ModelConfig, PartitionConfig
from pipeline.base.errors import ConfigError

# Residual blocks per module, the stem folded into the first module (ALGORITHMS 2.2).
# InfoPro's K = 16 of ResNet-32 is written with the stem as a module of its own: 0 residual blocks in module 0.
EQUAL: dict[str, dict[int, tuple[int, ...]]] = {
    "resnet32": {
        2: (7, 8),
        3: (5, 5, 5),
        4: (3, 4, 4, 4),
        8: (1, 2, 2, 2, 2, 2, 2, 2),
        16: (0,) + (1,) * 15,
    },
    "resnet110": {
        2: (27, 27),
        3: (18, 18, 18),
        4: (12, 14, 14, 14),
        8: (5,) + (7,) * 7,
        16: (2,) + (3,) * 8 + (4,) * 7,
    },
}
HPFF: dict[str, dict[int, tuple[int, ...]]] = {
    "resnet32": {8: EQUAL["resnet32"][8], 16: (1,) * 15},
    "resnet110": {
        32: (2, 1, 2, 1, 2, 2, 2, 2, 1, 2, 1) + (2, 1, 2, 1, 2, 2, 2, 2, 1, 2, 1) + (2, 2, 1, 2, 1, 2, 2, 2, 2, 2),
        55: (1,) * 54,
    },
}
BALANCED: dict[str, dict[int, tuple[int, ...]]] = {
    "resnet110": {2: (15, 39), 3: (10, 11, 33), 4: (7, 8, 12, 27)},
}
BALANCED_STL10: dict[str, dict[int, tuple[int, ...]]] = {
    "resnet110": {2: (15, 39), 3: (9, 11, 34), 4: (7, 8, 12, 27)},
}
TABLES = {"equal": EQUAL, "hpff": HPFF, "balanced": BALANCED, "balanced-stl10": BALANCED_STL10}


@dataclass(frozen=True)
class Partition:
    """The cut of a network.

    Attributes:
        modules: block names of every local module, in order.
        requested: K as asked for; the released HPFF cuts build one module less for K = 16 and K = 55.
    """

    modules: tuple[tuple[str, ...], ...]
    requested: int

    def __len__(self) -> int:
        return len(self.modules)

    def label(self, module: int) -> str:
        """First and last block of a module, for people: ``layer1.3-layer2.1``."""
        names = self.modules[module]
        return names[0] if len(names) == 1 else f"{names[0]}-{names[-1]}"


def cut(blocks: Sequence[str], config: ModelConfig) -> Partition:
    """Cut the named blocks into ``config.modules`` local modules.

    Raises:
        ConfigError: more modules than blocks, or a named table without an entry for this network and K.
    """
    wanted = config.modules
    if wanted > len(blocks):
        raise ConfigError(
            f"model.modules = {wanted}, but {config.name} has {len(blocks)} blocks; use at most {len(blocks)}"
        )
    if wanted == 1:
        return Partition((tuple(blocks),), 1)
    if config.cuts in TABLES:
        table = TABLES[config.cuts].get(config.name, {})
        if wanted not in table:
            known = ", ".join(str(k) for k in sorted(table)) or "no K"
            raise ConfigError(
                f"model.cuts = '{config.cuts}' has {known} for {config.name}, not model.modules = {wanted}; "
                "use one of these, or model.cuts=even"
            )
        return Partition(_from_table(blocks, table[wanted]), wanted)
    if config.cuts == "auto" and config.stem == "auto":
        for table in (EQUAL, HPFF):
            sizes = table.get(config.name, {}).get(wanted)
            if sizes is not None and len(sizes) == wanted:
                return Partition(_from_table(blocks, sizes), wanted)
    return Partition(_even(blocks, wanted, config.stem), wanted)


def _from_table(blocks: Sequence[str], sizes: Sequence[int]) -> tuple[tuple[str, ...], ...]:
    """``sizes`` counts residual blocks; the stem joins the first module, the classifier the last."""
    counts = list(sizes)
    counts[0] += 1
    counts[-1] += 1
    return _split(blocks, counts)


def _even(blocks: Sequence[str], wanted: int, stem: str) -> tuple[tuple[str, ...], ...]:
    """As even as possible, longer modules first. The last block (the classifier) is no work of its own, so it is not
    counted while there are enough others; ``stem`` says whether the first block is counted, alone, or not."""
    first = 1 if stem in ("merged", "own") else 0
    last = 1 if len(blocks) - 1 - first >= wanted - (stem == "own") else 0
    parts = wanted - (1 if stem == "own" else 0)
    units = len(blocks) - first - last
    if parts < 1 or units < parts:
        raise ConfigError(
            f"model.stem = '{stem}' leaves {units} blocks for {parts} modules; use model.stem=auto or fewer modules"
        )
    counts = [units // parts + (1 if index < units % parts else 0) for index in range(parts)]
    if stem == "merged":
        counts[0] += 1
    if stem == "own":
        counts.insert(0, 1)
    counts[-1] += last
    return _split(blocks, counts)


def _split(blocks: Sequence[str], counts: Sequence[int]) -> tuple[tuple[str, ...], ...]:
    assert sum(counts) == len(blocks), (counts, len(blocks))
    modules, start = [], 0
    for count in counts:
        modules.append(tuple(blocks[start : start + count]))
        start += count
    return tuple(modules)


def choose_stages(
    config: PartitionConfig, modules: int, ranks: int, costs: Sequence[float] | None = None
) -> tuple[range, ...]:
    """Consecutive local modules of every rank, as ``config.kind`` asks; ``costs`` of every module for "measured".

    Raises:
        ConfigError: more ranks than modules, or ``config.stages`` that do not fit.
    """
    if config.kind == "given":
        return given(config.stages, modules, ranks)
    if config.kind == "measured":
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
