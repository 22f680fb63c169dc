"""The cut: which blocks of the network make which local module. It decides what is trained, and so the result.

    blocks   stem  layer1.0  layer1.1 | layer2.0  layer2.1 | classifier        K = 3 local modules
"""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from dataclasses import dataclass

from pipeline.base.config import ModelConfig
from pipeline.base.cut_tables import EQUAL, HPFF, TABLES, group_sizes
from pipeline.base.errors import ConfigError, suggest

BY_COST, BY_MEMORY = COUNTED = ("cost", "memory")
"""Of ``model.cuts``: what is counted, and chooses only when a run begins; from then on the names of blocks stay."""


@dataclass(frozen=True)
class Cut:
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


def make_cut(blocks: Sequence[str], config: ModelConfig) -> Cut:
    """Cut the named blocks into ``config.modules`` local modules; not by cost or memory, which a name has
    none of (see :mod:`pipeline.plan.cost_cut`). Then ``config.group`` joins consecutive ones:

        cut          stem a | b | c | d | e classifier        K = 5
        group = 2    stem a b   | c d   | e classifier        local modules, each with the levels of one

    Raises:
        ConfigError: more modules than blocks, a named table without an entry for this network and K, names that are no
            blocks or not in their order.
    """
    cut = _cut(blocks, config)
    if config.group == 1:
        return cut
    ends = list(itertools.accumulate(group_sizes(len(cut), config.group)))
    joined = [tuple(itertools.chain(*cut.modules[a:b])) for a, b in itertools.pairwise([0, *ends])]
    return Cut(tuple(joined), len(joined))


def _cut(blocks: Sequence[str], config: ModelConfig) -> Cut:
    """Before modules are joined."""
    if isinstance(config.cuts, tuple):
        return _by_names(blocks, config.cuts)
    wanted = config.modules
    if wanted > len(blocks):
        raise ConfigError(
            f"model.modules = {wanted}, but {config.name} has {len(blocks)} blocks; use at most {len(blocks)}"
        )
    if wanted == 1:
        return Cut((tuple(blocks),), 1)
    assert config.cuts not in COUNTED
    if config.cuts in TABLES:
        by_number = TABLES[config.cuts].get(config.name, {})
        if wanted not in by_number:
            known = ", ".join(str(k) for k in sorted(by_number)) or "no K"
            raise ConfigError(
                f"model.cuts = '{config.cuts}' has {known} for {config.name}, not model.modules = {wanted}; "
                "use one of these, or model.cuts=even"
            )
        return Cut(_from_table(blocks, by_number[wanted]), wanted)
    if config.cuts == "auto" and config.stem == "auto":
        for table in (EQUAL, HPFF):
            sizes = table.get(config.name, {}).get(wanted)
            if sizes is not None and len(sizes) == wanted:
                return Cut(_from_table(blocks, sizes), wanted)
    return Cut(_even(blocks, wanted, config.stem), wanted)


def _by_names(blocks: Sequence[str], names: Sequence[str]) -> Cut:
    """A local module begins with each named block, or with the first block below a name (``layer2``: layer2.0)."""
    starts = [0]
    for name in names:
        below = (index for index, block in enumerate(blocks) if block.startswith(f"{name}."))
        start = blocks.index(name) if name in blocks else next(below, None)
        if start is None:
            raise ConfigError(f"model.cuts: '{name}' is no block of the network; {suggest(name, blocks)}")
        if start <= starts[-1]:
            raise ConfigError(
                f"model.cuts: '{name}' begins with block '{blocks[start]}', which is not behind the beginning of the "
                f"local module before it, '{blocks[starts[-1]]}'; name other blocks, in their order"
            )
        starts.append(start)
    stops = [*starts[1:], len(blocks)]
    return Cut(tuple(tuple(blocks[a:b]) for a, b in zip(starts, stops, strict=True)), len(starts))


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
