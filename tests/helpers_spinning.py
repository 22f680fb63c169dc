"""A stand-in for NCCL that runs on the CPU: backend "spinning", and the one device of this process.

A transfer is a kernel: once launched it spins on the device until its other half has come (a sum until all ranks of the
group have begun it), and those of one group follow one another. Whoever waits for the whole device
(:func:`device_wide_wait`: a synchronisation, a cudaFree, the first launch of a kernel) waits for all of them. Bytes are
carried by gloo, whose Work is over only within its ``wait``: that is called by a thread per group, which is the group's
stream.
"""

from __future__ import annotations

import queue
import threading
import time
from collections.abc import Callable
from datetime import timedelta
from typing import Any

import torch
import torch.distributed as dist

SPINNING = "spinning"
_open: set[SpinningWork] = set()
_lock = threading.Lock()
launched = 0
"""Transfers so far, in this process."""


class SpinningWork(dist.Work):
    """One transfer, from its launch to its end."""

    def __init__(self, transfer: Callable[[], dist.Work]) -> None:
        super().__init__()
        self._transfer = transfer
        self._over = threading.Event()
        self._error: RuntimeError | None = None

    def run(self) -> None:
        try:
            self._transfer().wait(timedelta(days=1))
        except RuntimeError as error:
            self._error = error
        with _lock:
            _open.discard(self)
        self._over.set()

    def is_completed(self) -> bool:
        return self._over.is_set()

    def wait(self, timeout: timedelta | None = None) -> bool:
        self._over.wait()
        if self._error is not None:
            raise self._error
        return True


class SpinningGroup(dist.ProcessGroup):
    """A communicator."""

    def __init__(self, store: dist.Store, rank: int, size: int, timeout: timedelta) -> None:
        super().__init__(rank, size)
        self._gloo = dist.ProcessGroupGloo(store, rank, size, timeout)
        self._stream: queue.SimpleQueue[SpinningWork] = queue.SimpleQueue()
        threading.Thread(target=self._run, name=SPINNING, daemon=True).start()

    @property
    def group_name(self) -> str:
        return dist.distributed_c10d._world.pg_names[self]

    def send(self, tensors: list[torch.Tensor], dst: int, tag: int = 0) -> dist.Work:
        return self._launch(lambda: self._gloo.send(tensors, dst, tag))

    def recv(self, tensors: list[torch.Tensor], src: int, tag: int = 0) -> dist.Work:
        return self._launch(lambda: self._gloo.recv(tensors, src, tag))

    def allreduce_coalesced(self, tensors: list[torch.Tensor], options: Any) -> dist.Work:
        return self._launch(lambda: _unseen(lambda: self._gloo.allreduce_coalesced(tensors, options)))

    def broadcast(self, tensors: list[torch.Tensor], options: Any) -> dist.Work:
        return self._launch(lambda: _unseen(lambda: self._gloo.broadcast(tensors, options)))

    def getBackendName(self) -> str:
        return SPINNING

    def shutdown(self) -> None: ...

    def _launch(self, transfer: Callable[[], dist.Work]) -> dist.Work:
        global launched
        work = SpinningWork(transfer)
        with _lock:
            _open.add(work)
            launched += 1
        self._stream.put(work)
        return work

    def _run(self) -> None:
        while True:
            self._stream.get().run()


def _unseen(launch: Callable[[], dist.Work]) -> dist.Work:
    """Gloo's own operations, in threads of its own, are none of the device."""
    with torch._C._DisableTorchDispatch():
        return launch()


def register() -> None:
    """Make the backend known in this process."""
    if SPINNING not in dist.Backend.backend_list:
        dist.Backend.register_backend(SPINNING, SpinningGroup, devices=["cpu"])


def device_wide_wait(limit_s: float) -> None:
    """Wait until every transfer launched so far is over.

    Raises:
        TimeoutError: some still spin after ``limit_s``; on a GPU this call would never return.
    """
    with _lock:
        pending = set(_open)
    end = time.monotonic() + limit_s
    for work in pending:
        if not work._over.wait(max(end - time.monotonic(), 0.0)):
            spinning = sum(not each.is_completed() for each in pending)
            raise TimeoutError(f"{spinning} transfers spin on the device, and no message for them has been sent")


def threads() -> list[str]:
    """Of this process besides the main one and those that stand in for streams."""
    every: list[Any] = threading.enumerate()
    return [t.name for t in every if t is not threading.main_thread() and t.name != SPINNING]
