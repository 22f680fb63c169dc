"""Generated scenes: reddish circles, greenish squares and bluish triangles on a textured ground, with a class for every
pixel.

They need no files, so that segmentation can be tried and tested anywhere. A scene depends on its number only.
"""

from __future__ import annotations

import torch
from torch import Tensor

from pipeline.data.images import CachedImages

CLASSES = ("ground", "circle", "square", "triangle")
SIDE = 32
TRAIN, TEST = 512, 128
_SHAPES_PER_SCENE = 4


def load_shapes() -> tuple[CachedImages, CachedImages]:
    """Training and test set: pixels uint8 (N, 3, 32, 32), labels uint8 (N, 32, 32)."""
    return _scenes(range(TRAIN)), _scenes(range(TRAIN, TRAIN + TEST))


def _scenes(numbers: range) -> CachedImages:
    scenes = [_scene(number) for number in numbers]
    return CachedImages(torch.stack([pixels for pixels, _ in scenes]), torch.stack([labels for _, labels in scenes]))


def _scene(number: int) -> tuple[Tensor, Tensor]:
    """uint8 (3, 32, 32) and uint8 (32, 32); later shapes lie on earlier ones."""
    draw = torch.Generator().manual_seed(number)
    y, x = torch.meshgrid(torch.arange(SIDE), torch.arange(SIDE), indexing="ij")
    waves = torch.rand(3, 3, generator=draw)  # per colour: two frequencies and a phase
    phase = waves[:, 0, None, None] * x + waves[:, 1, None, None] * y + 6.3 * waves[:, 2, None, None]
    pixels = 100.0 + 40.0 * phase.sin() + 20.0 * torch.randn(3, SIDE, SIDE, generator=draw)
    labels = torch.zeros(SIDE, SIDE, dtype=torch.uint8)
    for _ in range(_SHAPES_PER_SCENE):
        kind = int(torch.randint(1, len(CLASSES), (), generator=draw))
        row, column, radius = (torch.rand(3, generator=draw) * torch.tensor([SIDE, SIDE, 5.0])).tolist()
        inside = _inside(CLASSES[kind], y - row, x - column, 4.0 + radius)
        hue = torch.where(torch.arange(3) == kind - 1, 170.0, 70.0)
        colour = hue[:, None] + 80.0 * torch.rand(3, 1, generator=draw)
        pixels[:, inside] = colour + 10.0 * torch.randn(3, int(inside.sum()), generator=draw)
        labels[inside] = kind
    return pixels.clamp_(0, 255).to(torch.uint8), labels


def _inside(kind: str, y: Tensor, x: Tensor, radius: float) -> Tensor:
    """bool (32, 32): where a shape around the origin covers a pixel ``y`` below and ``x`` to the right of it."""
    if kind == "circle":
        return y**2 + x**2 <= radius**2
    if kind == "square":
        return (y.abs() <= radius) & (x.abs() <= radius)
    return (y.abs() <= radius) & (2 * x.abs() <= y + radius)
