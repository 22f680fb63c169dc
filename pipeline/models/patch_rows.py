"""Patches of a map as rows of one batch: a head's BatchNorm sees all patches of an image together.

    (B, C, H, W)      rows of patch 0     B x (C, H/n, W/n)     head once    loss: the mean over all rows
    +---+---+         rows of patch 1     B x                 ----------->   output: of an image the mean of its
    | 0 | 1 |  ---->  rows of patch 2     B x                                patches, or these put together again
    +---+---+         rows of patch 3     B x
    | 2 | 3 |
    +---+---+

A loss that is a mean over rows is the average of the losses of the patches, as in HPFF (eq. 7); statistics are shared.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from pipeline.models.heads import Given
from pipeline.models.patches import patch_slices
from pipeline.models.tokens import Reading


@dataclass(frozen=True)
class AsRows(Reading):
    """(B, C, H, W) -> (n n B, C, H/n, W/n), patch by patch; n divides H and W. What has no two sides goes with every
    patch."""

    n: int

    def feature(self, x: Tensor) -> Tensor:
        if x.dim() < 3:
            return x.repeat(self.n**2, *[1] * (x.dim() - 1))
        rows, columns = patch_slices(x.size(-2), self.n), patch_slices(x.size(-1), self.n)
        return torch.cat([x[..., row, column] for row in rows for column in columns])

    def given(self, given: Given) -> Given:
        image = None if given.image is None else self.feature(given.image)
        inputs = None if given.inputs is None else {name: self.feature(x) for name, x in given.inputs.items()}
        return Given(self.feature(given.target), image, inputs, given.step)

    def rows(self, output: Tensor) -> Tensor:
        patches: Tensor = output.unflatten(0, (self.n**2, -1))
        if output.dim() < 4:
            return patches.mean(dim=0)
        lines = [torch.cat(list(line), dim=-1) for line in patches.unflatten(0, (self.n, self.n))]
        return torch.cat(lines, dim=-2)
