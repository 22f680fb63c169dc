"""What the heads of a local module must know of its inputs: how maps lie, and what an embedding makes of ids."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from dataclasses import dataclass

from torch import nn

from pipeline.base.flow import MAIN, Flow, Specs, Tensors, named


@dataclass(frozen=True)
class Maps:
    """Which maps of a local module are (B, H, W, C).

    Attributes:
        inputs: names of its inputs.
        output: whether "x" of its outputs is one.
    """

    inputs: frozenset[str] = frozenset()
    output: bool = False

    @staticmethod
    def of(inputs: Specs, outputs: Specs) -> Maps:
        """From what is known of inputs and outputs."""
        return Maps(
            frozenset(name for name, spec in inputs.items() if spec.channels_last), outputs[MAIN].channels_last
        )


@contextlib.contextmanager
def embedding(first: nn.Module | None, flow: Flow) -> Iterator[Tensors]:
    """Filled with what the first block of a network gives inside, where that is of another shape than "x" of ``flow``;
    None: nobody asks for it."""
    found: Tensors = {}
    shape = named(flow)[MAIN].shape

    def keep(_block: nn.Module, _given: tuple[Flow], output: Flow) -> None:
        if (features := named(output)[MAIN]).shape != shape:
            found[MAIN] = features.detach()

    handle = first.register_forward_hook(keep) if first is not None else None
    try:
        yield found
    finally:
        if handle is not None:
            handle.remove()
