"""MAN and MAN++: heads look at the next module through its first block (Su et al. 2024 and 2026, arXiv 2507.16279).

    module m    h --+--> learned copy (psi) ------- x s ------> y --> auxiliary heads, of any method
                    +--> moving average (phi) -- x (2 - s) --+        gradients reach psi, s, h and through phi, not phi
                              ^
    module m+1  first block --+ its parameters, every n-th step, upstream      phi <- mu^n phi + (1 - mu^n) theta

Both are copies of the form of that block, with weights of their own. MAN has s = 1, MAN++ learns it, from 1 on.
BatchNorm's statistics are those of each copy: only parameters are averaged.

The released code averages in every step, after the backward of module m and so before the update of module m+1: what
is used with batch t has seen the weights up to the update of batch t - 2. ``n = 1`` and a lag of 2, the defaults, are
that, but for the weights that training began with, which it averages too and which are never sent here.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from pipeline.base.config import MethodConfig
from pipeline.base.errors import ConfigError
from pipeline.base.flow import Tensors
from pipeline.local.upstream import Upstream
from pipeline.models.later import LaterBlock, fresh_copy


class MomentumFront(nn.Module):
    """h (B, ...) -> y (B, ...), of the shape of what the block gives.

    Args:
        block: the next module's first one.
        settings: of the method.

    Attributes:
        shape: of y, without the batch.

    Raises:
        ConfigError: the block cannot be copied.
    """

    def __init__(self, block: LaterBlock, settings: MethodConfig) -> None:
        super().__init__()
        wanted = f"method.front = '{settings.front}'"
        _, self.shape = block.shapes(wanted)
        if len(self.shape) < 2:
            raise ConfigError(
                f"{wanted} puts a copy of block '{block.name}', with which the next local module begins, before the "
                f"heads, but that gives {self.shape}, no features; cut before another block"
            )
        self.learned = fresh_copy(block, wanted)
        self.average = fresh_copy(block, wanted).requires_grad_(False)
        self.balance = nn.Parameter(torch.ones(())) if settings.front == "man++" else None
        self._keep = settings.average**settings.average_every

    def forward(self, feature: Tensor) -> Tensor:
        learned, average = self.learned(feature), self.average(feature)
        if self.balance is not None:
            learned, average = self.balance * learned, (2.0 - self.balance) * average
        y: Tensor = learned + average
        return y

    @torch.no_grad()
    def receive_weights(self, weights: Tensors) -> None:
        """Move the average towards the parameters of the block, by their names."""
        for name, mine in self.average.named_parameters():
            mine.lerp_(weights[name], 1.0 - self._keep)


def front(settings: MethodConfig, later: Sequence[LaterBlock]) -> MomentumFront | None:
    """What stands before the heads of a module with the blocks ``later`` behind it; None: nothing does."""
    return None if settings.front == "none" else MomentumFront(later[0], settings)


def declared(settings: MethodConfig) -> Upstream | None:
    """The weights upstream that it needs."""
    return None if settings.front == "none" else Upstream(settings.average_every, settings.average_lag)
