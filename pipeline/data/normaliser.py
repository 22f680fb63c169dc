"""From pixels to what a network eats, and back."""

from __future__ import annotations

import torch
from torch import Tensor

from pipeline.base.numerics import Numerics


class Normaliser:
    """Turns uint8 images into what a network eats: (x / 255 - mean) / std in the boundary dtype and layout.

    Args:
        mean, std: of every channel.
        numerics: of the network; images are on its device when they are turned.
    """

    def __init__(self, mean: tuple[float, ...], std: tuple[float, ...], numerics: Numerics) -> None:
        self.numerics = numerics
        # Once: a copy from the host per batch would make the host wait for the device.
        self._mean, self._std = (
            torch.tensor(values, dtype=torch.float32).view(1, -1, 1, 1).to(numerics.device) for values in (mean, std)
        )

    def __call__(self, image: Tensor) -> Tensor:
        """uint8 (B, C, H, W) -> floating point (B, C, H, W)."""
        dtype = torch.float64 if self.numerics.dtype == torch.float64 else torch.float32
        x = image.to(self.numerics.device, dtype).div_(255.0)
        return self.numerics.boundary(x.sub_(self._mean).div_(self._std))

    def invert(self, x: Tensor) -> Tensor:
        """Normalised floating point (B, C, H, W) -> uint8, rounded."""
        image = x.float() * self._std + self._mean
        return image.mul_(255.0).round_().clamp_(0, 255).to(torch.uint8)
