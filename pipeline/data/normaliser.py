"""From pixels to what a network eats, and back."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from pipeline.base.numerics import Numerics


@dataclass(frozen=True)
class Normaliser:
    """Turns uint8 images into what a network eats: (x / 255 - mean) / std in the boundary dtype and layout."""

    mean: tuple[float, ...]
    std: tuple[float, ...]
    numerics: Numerics

    def __call__(self, image: Tensor) -> Tensor:
        """uint8 (B, C, H, W) -> floating point (B, C, H, W)."""
        dtype = torch.float64 if self.numerics.dtype == torch.float64 else torch.float32
        x = image.to(self.numerics.device, dtype).div_(255.0)
        return self.numerics.boundary(x.sub_(self._per_channel(self.mean, x)).div_(self._per_channel(self.std, x)))

    def invert(self, x: Tensor) -> Tensor:
        """Normalised floating point (B, C, H, W) -> uint8, rounded."""
        image = x.float() * self._per_channel(self.std, x) + self._per_channel(self.mean, x)
        return image.mul_(255.0).round_().clamp_(0, 255).to(torch.uint8)

    @staticmethod
    def _per_channel(values: tuple[float, ...], like: Tensor) -> Tensor:
        return torch.tensor(values, dtype=torch.float32, device=like.device).view(1, -1, 1, 1)
