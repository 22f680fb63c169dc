"""Memory of tensors without an allocator to ask: which storages operations have made, and which of them are alive.

    with Alive() as alive:         a = f(x)      b = g(a)      del a        h(b)
                         now       a             a b           b            b + what h makes
                         most                                  a b

It sees PyTorch's operations below autograd, a backward pass's too, on tensors without values as well; not what a
kernel allocates and frees by itself. (``torch.distributed._tools.mem_tracker`` does the same for whole modules, with
hooks that forbid ``torch.autograd.grad``, which relays use.)
"""

from __future__ import annotations

import weakref
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

aten = torch.ops.aten


class Alive(TorchDispatchMode):
    """Counts what is made within it; what was there before, or is seen only through a view, is not.

    Args:
        as_alone: count the two things that are not what they are where nobody looks on. BatchNorm's backward on a CPU
            makes the gradient of a map twice; gradients that meet in a backward pass are added in place. The peak of
            a step is then that of PyTorch's CPU allocator.

    Attributes:
        now: bytes of what is alive.
        most: the most of them at a time; may be set back.
    """

    def __init__(self, as_alone: bool = False) -> None:
        super().__init__()  # type: ignore[no-untyped-call]  # torch has not annotated it
        self._as_alone = as_alone
        self.now = self.most = 0
        self._known: set[int] = set()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if func.namespace == "prim":  # a question, such as for the device
            return func(*args, **kwargs)
        there = {storage._cdata for storage in _storages((args, kwargs))}
        result = func(*args, **kwargs)
        for storage in _storages(result):
            if storage._cdata not in there and storage._cdata not in self._known:
                self._known.add(storage._cdata)
                self.now += storage.nbytes()
                weakref.finalize(storage, self._freed, storage._cdata, storage.nbytes()).atexit = False
        if not self._as_alone:
            self.most = max(self.most, self.now)
        elif func is not aten.add.Tensor or torch._C._current_graph_task_id() < 0:  # which is no sum of gradients
            self.most = max(self.most, self.now + _of_kernel(func, args))
        return result

    def _freed(self, key: int, size: int) -> None:
        self._known.discard(key)
        self.now -= size


def _of_kernel(func: Any, args: Any) -> int:
    """Bytes that an operation takes for itself."""
    if func is aten.native_batch_norm_backward.default and args[0].device.type == "cpu" and args[9][0]:
        return int(args[0].nbytes)  # it makes the gradient of its input twice
    return 0


def _storages(tree: Any) -> list[torch.UntypedStorage]:
    return [leaf.untyped_storage() for leaf in tree_leaves(tree) if isinstance(leaf, Tensor)]
