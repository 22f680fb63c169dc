"""What one step of a local module takes, action by action: its time, or the memory that it holds and needs on top."""

from __future__ import annotations

import statistics
import time
from collections import defaultdict
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch

from pipeline.base.alive import Alive
from pipeline.local.local_module import LocalModule
from pipeline.stage.schedule import Action, Kind
from pipeline.stage.watch import Watch

HEADS = frozenset({Kind.CASCADE, Kind.INDEPENDENT, Kind.FINAL})


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
    """Watches the memory of one step of a module: what stays until its backward, and the most that its actions need.

    On a GPU the allocator counts. On a CPU, and where nothing is computed, the tensors do that are made in the step and
    still alive; what a kernel allocates and frees inside one operation is not seen there. Parameters' gradients are
    left out, as far as they are there before an action: they belong to the module's state.
    """

    def __init__(self, device: torch.device, module: LocalModule) -> None:
        super().__init__()
        self._device = device
        self._parameters = [p for part in (*module.blocks.values(), *module.levels.values()) for p in part.parameters()]
        self._alive = Alive()
        self._kept = 0
        self._most = {True: 0, False: 0}  # of heads; of everything else
        self._base = torch.cuda.memory_allocated(device) if device.type == "cuda" else 0

    @contextmanager
    def working(self, actions: Sequence[Action], step: int, waited: Callable[[], float]) -> Iterator[None]:
        state = self._gradients()
        if self._device.type == "cuda":
            torch.cuda.reset_peak_memory_stats(self._device)
            yield
            peak = torch.cuda.max_memory_allocated(self._device) - self._base
            after = torch.cuda.memory_allocated(self._device) - self._base
        else:
            self._alive.most = self._alive.now
            with self._alive:
                yield
            peak, after = self._alive.most, self._alive.now
        kind = actions[0].kind
        if kind is not Kind.UPDATE:
            self._most[kind in HEADS] = max(self._most[kind in HEADS], peak - state)
        if kind not in (Kind.BACKWARD, Kind.UPDATE):
            self._kept = max(self._kept, after - self._gradients())

    @property
    def graph_bytes(self) -> int:
        """What stays from the forward to the backward: the graph, and the gradient of the output from every level."""
        return self._kept

    @property
    def work_bytes(self) -> int:
        """The most that forward, relay or backward adds."""
        return max(0, self._most[False] - self._kept)

    @property
    def head_bytes(self) -> int:
        """The most that a level's heads add."""
        return max(0, self._most[True] - self._kept)

    def _gradients(self) -> int:
        return sum(p.grad.nbytes for p in self._parameters if p.grad is not None)
