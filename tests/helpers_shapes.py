"""The shapes of what the blocks of a network of images give."""

from __future__ import annotations

from collections.abc import Collection

from pipeline.base.flow import TensorSpec
from pipeline.models.backbones import Blocks
from pipeline.models.boundaries import boundary_specs


def boundary_shapes(
    blocks: Blocks, image_shape: tuple[int, ...], entrances: Collection[str] = ()
) -> dict[str, tuple[int, ...]]:
    """Of "x", without the batch, by block."""
    specs = boundary_specs(blocks, {"x": TensorSpec(image_shape)}, entrances)
    return {name: tensors["x"].shape for name, tensors in specs.items()}
