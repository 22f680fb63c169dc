"""The shapes of what the blocks of a network give, and whether finding them computes anything."""

from __future__ import annotations

from collections.abc import Collection
from typing import Any

from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensor
from torch.utils._python_dispatch import TorchDispatchMode

from pipeline.base.flow import TensorSpec
from pipeline.models.backbones import Blocks
from pipeline.models.boundaries import boundary_specs


def boundary_shapes(
    blocks: Blocks, image_shape: tuple[int, ...], entrances: Collection[str] = ()
) -> dict[str, tuple[int, ...]]:
    """Of "x", without the batch, by block."""
    specs = boundary_specs(blocks, {"x": TensorSpec(image_shape)}, entrances)
    return {name: tensors["x"].shape for name, tensors in specs.items()}


class RealTensors(TorchDispatchMode):
    """Counts the tensors with memory that operations make; those on the meta device and fake ones have none."""

    def __init__(self) -> None:
        super().__init__()
        self.found: list[str] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        if isinstance(result, Tensor) and not result.is_meta and not isinstance(result, FakeTensor):
            self.found.append(f"{func} {tuple(result.shape)}")
        return result
