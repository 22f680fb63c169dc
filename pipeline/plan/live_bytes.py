"""The bytes of all tensors that are alive, blank ones too: what a step would hold at its peak, without holding it.

torch.distributed._tools.mem_tracker counts the same, but follows modules with hooks that forbid ``torch.autograd.grad``,
which relays use.
"""

from __future__ import annotations

import weakref
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves


class LiveBytes(TorchDispatchMode):
    """Sees the memory of every tensor that operations make within it, until nobody has it any more.

    Attributes:
        now: bytes that are alive.
        peak: the most at any time; may be set back.
    """

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]  # torch has not annotated it
        self.now = 0
        self.peak = 0
        self._alive: dict[int, int] = {}

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        for leaf in tree_leaves(result):
            if isinstance(leaf, Tensor) and not leaf.device.type == "meta":
                self._see(leaf.untyped_storage())
        return result

    def _see(self, storage: torch.UntypedStorage) -> None:
        memory = storage._cdata
        if memory in self._alive:
            return
        self._alive[memory] = storage.nbytes()
        self.now += storage.nbytes()
        self.peak = max(self.peak, self.now)
        weakref.finalize(storage, self._gone, memory).atexit = False

    def _gone(self, memory: int) -> None:
        self.now -= self._alive.pop(memory)
