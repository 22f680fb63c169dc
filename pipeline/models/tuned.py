"""Which form the layers of auxiliary heads have: ours, tuned to a CPU, or PyTorch's own (``precision.layers``).

    precision.layers = "tuned"  |  "plain"  |  ["pooling", ...]     the layers that stay tuned
    heads are built tuned  --use_plain-->  every other layer is replaced by the module that it stands for

A plain layer holds the same parameters and buffers under the same names, so weights, seeds and checkpoints do not
depend on the choice; rounding does.
"""

from __future__ import annotations

from collections.abc import Collection
from typing import ClassVar

from torch import nn


class Tuned(nn.Module):
    """A layer in another form than the module of PyTorch that it stands for: the same function up to rounding.

    Attributes:
        tuned: its name in ``precision.layers``.
    """

    tuned: ClassVar[str]

    def plain(self) -> nn.Module:
        """The module that it stands for, with the same parameters and buffers (not copies)."""
        raise NotImplementedError

    def _shared_with(self, plain: nn.Module) -> nn.Module:
        """``plain``, built on the meta device, with the tensors of this layer."""
        for name, weight in self.named_parameters(recurse=False):
            setattr(plain, name, weight)
        for name, buffer in self.named_buffers(recurse=False):
            setattr(plain, name, buffer)
        return plain.train(self.training)


def use_plain(network: nn.Module, names: Collection[str]) -> list[tuple[nn.Module, str, Tuned]]:
    """Put plain modules in the place of the tuned layers ``names`` within a network.

    Returns:
        What was replaced: (parent, name in it, tuned layer).
    """
    found = [
        (parent, name, layer)
        for parent in network.modules()
        for name, layer in parent.named_children()
        if isinstance(layer, Tuned) and layer.tuned in names
    ]
    for parent, name, layer in found:
        setattr(parent, name, layer.plain())
    return found
