"""What one step of a local module takes, action by action: its time, or the memory that it holds and needs on top."""

from __future__ import annotations

import statistics
import time
from collections import defaultdict
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor

from pipeline.local.local_module import LocalModule
from pipeline.stage.schedule import Action, Kind
from pipeline.stage.watch import Watch


class Stopwatch(Watch):
    """Times actions: host time on a CPU, CUDA events (read at the end, so that nothing waits) on a GPU."""

    def __init__(self, device: torch.device) -> None:
        super().__init__()
        self._device = device
        self._laps: list[tuple[Kind, Any, Any]] = []

    @contextmanager
    def working(self, actions: Sequence[Action], step: int, waited: Callable[[], float]) -> Iterator[None]:
        start = self._time()
        yield
        self._laps.append((actions[0].kind, start, self._time()))

    def seconds(self) -> dict[Kind, float]:
        """By kind; where a kind ran several times (relays of several messages), the mean."""
        if self._device.type == "cuda":
            torch.cuda.current_stream(self._device).synchronize()
        found: dict[Kind, list[float]] = defaultdict(list)
        for kind, start, end in self._laps:
            found[kind].append(end - start if isinstance(start, float) else start.elapsed_time(end) / 1e3)
        return {kind: statistics.fmean(values) for kind, values in found.items()}

    def _time(self) -> Any:
        if self._device.type != "cuda":
            return time.perf_counter()
        event = torch.cuda.Event(enable_timing=True)
        event.record(torch.cuda.current_stream(self._device))
        return event


class MemoryWatch(Watch):
    """Watches the memory of one step: what stays after the forward, and the most that any action adds to it.

    On a GPU the allocator counts. On a CPU it counts the distinct storages that autograd holds, without the weights and
    without the tensors in ``outside``, which belong to the queues.
    """

    def __init__(self, device: torch.device, module: LocalModule, outside: Sequence[Tensor]) -> None:
        super().__init__()
        self._device = device
        owned = [p for part in (*module.blocks.values(), *module.levels.values()) for p in part.parameters()]
        self._known = {tensor.untyped_storage().data_ptr() for tensor in (*owned, *outside)}
        self._held: dict[int, int] = defaultdict(int)
        self._now = self._peak = 0
        self._after_forward = self._most = 0
        self._base = torch.cuda.memory_allocated(device) if device.type == "cuda" else 0

    @contextmanager
    def working(self, actions: Sequence[Action], step: int, waited: Callable[[], float]) -> Iterator[None]:
        if self._device.type == "cuda":
            torch.cuda.reset_peak_memory_stats(self._device)
            yield
            peak = torch.cuda.max_memory_allocated(self._device) - self._base
            after = torch.cuda.memory_allocated(self._device) - self._base
        else:
            self._peak = self._now
            with torch.autograd.graph.saved_tensors_hooks(self._pack, lambda kept: kept.tensor):
                yield
            peak, after = self._peak, self._now
        kind = actions[0].kind
        if kind is Kind.FORWARD:
            self._after_forward = after
        if kind is not Kind.UPDATE:
            self._most = max(self._most, peak)

    def graph_bytes(self, output: Tensor, levels: int) -> int:
        """What stays from the forward to the backward: the graph, and the gradient of the output from every level."""
        return self._after_forward + levels * output.nbytes

    def work_bytes(self) -> int:
        """The most that an action adds."""
        return max(0, self._most - self._after_forward)

    def _pack(self, tensor: Tensor) -> _Kept:
        storage = tensor.untyped_storage()
        pointer, size = storage.data_ptr(), storage.nbytes()
        if pointer not in self._known:
            self._held[pointer] += 1
            if self._held[pointer] == 1:
                self._now += size
                self._peak = max(self._peak, self._now)
        return _Kept(tensor, self)

    def free(self, tensor: Tensor) -> None:
        """Autograd has dropped a tensor that it held."""
        storage = tensor.untyped_storage()
        pointer = storage.data_ptr()
        if pointer not in self._known:
            self._held[pointer] -= 1
            if self._held[pointer] == 0:
                self._now -= storage.nbytes()


class _Kept:
    """A tensor that autograd holds; it tells when autograd drops it."""

    def __init__(self, tensor: Tensor, memory: MemoryWatch) -> None:
        self.tensor = tensor
        self._memory = memory

    def __del__(self) -> None:
        self._memory.free(self.tensor)
