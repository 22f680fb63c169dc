"""AugLocal: a head continues as the network does, with copies of some of the blocks behind it (Ma et al. 2024,
arXiv 2402.17318).

    the network            0   1   2   3   4   5   6   7   8   9  10  11  12  13  14  15  classifier
    the head behind 0      |                   5                  10                  15  pool, linear      d = 3

    chosen     round(l + (L - 1 - l) / d_l * i), i = 1 .. d_l, of L blocks, behind block l; half to even
    pyramid    d_l = max(1, round(d (1 - t) + t)),  t from 0 at the first head to 1/2 at the last

A copy has the form and the width of its block and weights of its own. Where it gets another width than that block does
it is built anew for it; a stride of 2 stands for each halving that the map is still behind that of its block.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from torch import Tensor, nn

from pipeline.base.config import MethodConfig
from pipeline.base.errors import ConfigError
from pipeline.base.flow import MAIN
from pipeline.local.task import Task
from pipeline.local.term import Term, refuse_head
from pipeline.models.backbones import BasicBlock
from pipeline.models.heads import AuxiliaryHead, FeatureShape, Given
from pipeline.models.later import LaterBlock, fresh_copy
from pipeline.models.layers import PoolTo2d

WANTED = "method.name = 'auglocal'"


class ContinuedHead(AuxiliaryHead):
    """A head behind some blocks.

    Args:
        blocks: one after another.
        head: on what the last one gives.
    """

    def __init__(self, blocks: Sequence[nn.Module], head: AuxiliaryHead) -> None:
        super().__init__()
        self.blocks = nn.Sequential(*blocks)
        self.head = head
        self.asks = head.asks

    def loss(self, feature: Tensor, given: Given) -> Tensor:
        return self.head.loss(self.blocks(feature), given)

    def logits(self, feature: Tensor) -> Tensor | None:
        return self.head.logits(self.blocks(feature))


def terms(config: MethodConfig, task: Task, position: float, later: Sequence[LaterBlock]) -> list[Term]:
    """The one term of the local loss.

    Raises:
        ConfigError: another head is asked for; a block cannot be copied.
    """
    refuse_head(config)
    share = 0.5 * position
    depth = max(1, round(config.depth * (1 - share) + share))
    selected = chosen(_keeping_form(later[:-1]), depth)  # without the one that ends in class scores

    def make(shape: FeatureShape) -> AuxiliaryHead:
        blocks, end = _continued(shape, later, selected)
        return ContinuedHead(blocks, task.head(end, lambda size: _pooled(size[0], task.classes, len(selected) <= 1)))

    return [Term("task", 1.0, make)]


def _keeping_form(blocks: Sequence[LaterBlock]) -> list[LaterBlock]:
    """Without those that pick or pool: the last encoder layer of a vision transformer may end with the class token."""
    return [block for block in blocks if len(block.gives[MAIN].shape) == len(block.takes[MAIN].shape)]


def chosen(candidates: Sequence[LaterBlock], depth: int) -> list[LaterBlock]:
    """At most ``depth`` of the blocks behind a module, evenly spaced, the last one among them."""
    if depth >= len(candidates):
        return list(candidates)
    here, rest = candidates[0].index - 1, len(candidates)
    return [candidates[round(here + rest / depth * i) - here - 1] for i in range(1, depth + 1)]


def _pooled(channels: int, out: int, normalised: bool) -> nn.Sequential:
    norm = [nn.BatchNorm1d(channels)] if normalised else []
    return nn.Sequential(PoolTo2d(1), nn.Flatten(), *norm, nn.Linear(channels, out))


def _continued(
    shape: FeatureShape, later: Sequence[LaterBlock], selected: Sequence[LaterBlock]
) -> tuple[list[nn.Module], FeatureShape]:
    """The copies for a feature, or a patch, of ``shape``, and the shape behind them."""
    blocks: list[nn.Module] = []
    size = later[0].shapes(WANTED)[0][1:] if selected else ()  # of the whole map on the way
    for block in selected:
        takes, gives = block.shapes(WANTED)
        if len(takes) != len(shape) or len(gives) != len(shape):
            raise ConfigError(
                f"{WANTED} puts a copy of block '{block.name}' behind features of {shape}, but it takes {takes} and "
                f"gives {gives}; use dgl or greedy with this network"
            )
        if len(shape) < 3 or (takes[0] == shape[0] and takes[1:] == size):
            stride = 1 if takes[1:] == gives[1:] else -(-takes[1] // gives[1])
            copied = fresh_copy(block, WANTED)
        else:
            stride = 2 if size[0] > gives[1] else 1
            copied = _rebuilt(block, shape[0], gives[0], stride)
        blocks.append(copied)
        size = tuple(-(-side // stride) for side in size)
        shape = (gives[0], *(-(-side // stride) for side in shape[1:])) if len(shape) == 3 else gives
    return blocks, shape


def _rebuilt(later: LaterBlock, channels: int, out: int, stride: int) -> nn.Module:
    """A residual block of the same kind for another number of channels or another stride."""
    block: Any = later.pattern
    kind: Any = type(block)
    if isinstance(block, BasicBlock):
        return BasicBlock(channels, out, stride)
    if kind.__module__ == "torchvision.models.resnet":
        shortcut = None
        if stride != 1 or channels != out:
            shortcut = nn.Sequential(nn.Conv2d(channels, out, 1, stride, bias=False), nn.BatchNorm2d(out))
        planes, conv1, conv2 = out // kind.expansion, block.conv1, block.conv2
        base = 64 if kind.expansion == 1 else conv1.out_channels * 64 // (planes * conv2.groups)
        dilation = 1 if kind.expansion == 1 else conv2.dilation[0]
        rebuilt: nn.Module = kind(channels, planes, stride, shortcut, conv2.groups, base, dilation)
        return rebuilt
    raise ConfigError(
        f"{WANTED} would need block '{later.name}' ({kind.__name__}) for {channels} channels in place of "
        f"{later.shapes(WANTED)[0][0]}, and can build residual blocks only; use dgl or greedy with this network"
    )
