"""The blocks behind a local module, as patterns for heads that are made of fresh copies of them (AugLocal, MAN).

    local module m | block   block   block   classifier
                       |               |
    heads of m:      copy            copy              of the same form, with weights of their own

Patterns have no weights, so a rank that does not own a block has the same pattern of it, and draws the same copy.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from torch import nn

from pipeline.base.errors import ConfigError
from pipeline.base.flow import MAIN, Specs
from pipeline.models.backbones import Blocks
from pipeline.models.heads import FeatureShape
from pipeline.models.unbuilt import drawn_copy, without_weights


@dataclass(frozen=True)
class LaterBlock:
    """
    Attributes:
        name: of the block.
        index: its place in the network, from 0 on.
        pattern: a copy without weights, on the meta device.
        takes, gives: what flows in and out.
    """

    name: str
    index: int
    pattern: nn.Module
    takes: Specs
    gives: Specs

    def shapes(self, wanted: str) -> tuple[FeatureShape, FeatureShape]:
        """Shapes of "x" before and after it, without the batch.

        Raises:
            ConfigError: more than "x" flows there, or a map is (H, W, C); ``wanted``: the settings that need a copy.
        """
        for specs in (self.takes, self.gives):
            if list(specs) != [MAIN] or specs[MAIN].channels_last:
                flows = "a map of (H, W, C)" if list(specs) == [MAIN] else ", ".join(f"'{name}'" for name in specs)
                raise ConfigError(
                    f"{wanted} puts a copy of block '{self.name}' into a head, but {flows} flows there; heads have a "
                    "feature 'x' with channels first: cut elsewhere, or use dgl or greedy"
                )
        return self.takes[MAIN].feature, self.gives[MAIN].feature


def later_blocks(blocks: Blocks, inputs: Specs, specs: Mapping[str, Specs]) -> tuple[LaterBlock, ...]:
    """Patterns of all blocks of a network.

    Args:
        blocks: which may be planned ones.
        inputs: of the first one.
        specs: what every block gives.
    """
    found, takes = [], inputs
    for index, (name, block) in enumerate(blocks.items()):
        found.append(LaterBlock(name, index, without_weights(block), takes, specs[name]))
        takes = specs[name]
    return tuple(found)


def fresh_copy(later: LaterBlock, wanted: str) -> nn.Module:
    """A block of the same form with weights of its own, see :func:`pipeline.models.unbuilt.drawn_copy`.

    Raises:
        ConfigError: it holds what only its constructor fills; ``wanted``: the settings that need the copy.
    """
    block, left = drawn_copy(later.pattern)
    if left:
        raise ConfigError(
            f"{wanted} puts a copy of block '{later.name}' into a head, but only its own constructor fills "
            f"{', '.join(left[:3])}; use dgl or greedy with this network"
        )
    return block
