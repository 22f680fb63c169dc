"""What PyTorch is asked to do in a step: how many operations, how many of them a GPU launches something
for, and how many floating-point operations are in them.

    module 0   F  I  U     operation: one call of the dispatcher, which is one kernel or a few on a GPU; views count too
    module 1   F  I  B  U  launch: an operation that computes or copies; neither a view nor memory alone
                           FLOPs: of matrix products and convolutions; elementwise work, BatchNorm and losses count none
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, nullcontext
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.flop_counter import flop_registry

from pipeline.stage.schedule import Action, Kind
from pipeline.stage.watch import Watch

Part = tuple[int, Kind]
"""Of a step: the actions of one kind of one module."""


aten = torch.ops.aten
NO_LAUNCH = frozenset({
    aten.detach.default, aten.alias.default, aten._unsafe_view.default,
    aten.empty.memory_format, aten.empty_like.default, aten.empty_strided.default,
    aten.new_empty.default, aten.new_empty_strided.default,
})  # fmt: skip
"""Besides views: the same memory, or memory alone."""


class Tally(Watch):
    """Counts the work of a stage.

    Attributes:
        operations, launches, flops: by module and kind of action; what is done for several modules at once counts in
            equal parts.
    """

    def __init__(self) -> None:
        super().__init__()
        self.operations: dict[Part, float] = defaultdict(float)
        self.launches: dict[Part, float] = defaultdict(float)
        self.flops: dict[Part, float] = defaultdict(float)

    @contextmanager
    def working(self, actions: Sequence[Action], step: int, waited: Callable[[], float]) -> Iterator[None]:
        kind = actions[0].kind
        with _Operations(reads=kind is Kind.UPDATE) as counted:
            yield
        for action in actions:
            self.operations[action.module, kind] += counted.calls / len(actions)
            self.launches[action.module, kind] += counted.launches / len(actions)
            self.flops[action.module, kind] += counted.flops / len(actions)


class Reads(Watch):
    """Lets a stage without values do its updates, and counts nothing."""

    @contextmanager
    def working(self, actions: Sequence[Action], step: int, waited: Callable[[], float]) -> Iterator[None]:
        with _Operations(reads=True) if actions[0].kind is Kind.UPDATE else nullcontext():
            yield


class _Operations(TorchDispatchMode):
    """Sees every operation below autograd; ``FlopCounterMode`` itself follows module boundaries with hooks that forbid
    ``torch.autograd.grad``, which relays use.

    Args:
        reads: a value that is read is 1, without looking: there is none where nothing is computed, and an update only
            asks whether losses and gradients are finite.
    """

    def __init__(self, reads: bool) -> None:
        super().__init__()  # type: ignore[no-untyped-call]  # torch has not annotated it
        self.calls = 0
        self.launches = 0
        self.flops = 0
        self._reads = reads

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if func.namespace == "prim":  # a question, such as for the device
            return func(*args, **kwargs)
        self.calls += 1
        self.launches += not (func.is_view or func in NO_LAUNCH)
        if self._reads and func is torch.ops.aten._local_scalar_dense.default:
            return 1.0 if args[0].is_floating_point() else 1
        result = func(*args, **kwargs)
        if func is torch.ops.aten.convolution_backward.default and args[9] > 1:
            self.flops += _grouped_convolution_backward(*args)
        elif (formula := flop_registry.get(func.overloadpacket)) is not None:
            self.flops += formula(*args, **kwargs, out_val=result)
        return result


def _grouped_convolution_backward(gradient: Tensor, x: Tensor, weight: Tensor, *rest: Any) -> int:
    """As many FLOPs as the forward for each of the two gradients that is wanted; PyTorch's own formula multiplies every
    output channel of a grouped convolution with every input channel."""
    wanted: list[bool] = rest[-1][:2]
    return 2 * gradient.numel() * weight[0].numel() * sum(wanted)
