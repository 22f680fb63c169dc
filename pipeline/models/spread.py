"""The gradient of a map whose windows are averaged first: as large as the means until somebody wants the whole map.

    map (B, C, H, W) --mean of windows--> (B, C, h, w) --head--> loss
         whole()     <--- every pixel a share of --- Spread       kept until the backward of the module: H W / h w times
                                                                  smaller; a sum of two of them is one too
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True)
class Spread:
    """
    Attributes:
        share: (B, C, h, w), the gradient of every pixel of a window.
        window: its sides.
        layout: of the whole map.
    """

    share: Tensor
    window: tuple[int, int]
    layout: torch.memory_format

    @staticmethod
    def of(means_gradient: Tensor, window: tuple[int, int], feature: Tensor) -> Spread:
        """From the gradient of the means (B, C, h, w) of a ``feature`` (B, C, H, W)."""
        nhwc = feature.is_contiguous(memory_format=torch.channels_last)
        layout = torch.channels_last if nhwc else torch.contiguous_format
        return Spread(means_gradient / (window[0] * window[1]), window, layout)

    def whole(self) -> Tensor:
        """(B, C, H, W)"""
        share = self.share.permute(0, 2, 3, 1)
        batch, h, w, channels = share.shape
        lines = share[:, :, :, None].expand(-1, -1, -1, self.window[1], -1).reshape(batch, h, 1, -1)
        full = lines.expand(-1, -1, self.window[0], -1).reshape(
            batch, h * self.window[0], w * self.window[1], channels
        )
        found = full.permute(0, 3, 1, 2)
        return found if self.layout == torch.channels_last else found.contiguous()

    def fits(self, other: Spread) -> bool:
        """Whether the sum of both whole maps is that of the shares, spread."""
        return (self.window, self.layout, self.share.shape) == (other.window, other.layout, other.share.shape)


Gradient = Tensor | Spread
"""Of a feature."""


def whole(gradient: Gradient) -> Tensor:
    """As a tensor of the feature's shape."""
    return gradient.whole() if isinstance(gradient, Spread) else gradient
