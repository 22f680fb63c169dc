"""A burst of the local pipeline: a short call of ``train``, timed by the trace that it writes itself."""

from __future__ import annotations

import contextlib
import io
import itertools
import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from bursts import Burst
from ranks import Rank
from torch import Tensor, nn

from pipeline import Event, LoaderData, from_dict, read_metrics, read_trace, steady_state, train


class Repeated:
    """``count`` times the same batch, as a loader with a length: nobody waits for data."""

    def __init__(self, count: int, inputs: Tensor, labels: Tensor) -> None:
        self.inputs, self.labels, self.batch_size = inputs, labels, len(labels)
        self._count = count

    def __len__(self) -> int:
        return self._count

    def __iter__(self) -> Iterator[tuple[Tensor, Tensor]]:
        return iter([(self.inputs, self.labels)] * self._count)


@dataclass
class LocalPipeline:
    """Runs configurations one after another in the processes of a job.

    Attributes:
        warmup, steps: steps before those that are timed, and those.
    """

    rank: Rank
    warmup: int
    steps: int
    _numbers: Any = field(default_factory=itertools.count)

    @property
    def batches(self) -> int:
        """Batches of a burst. The last one is not timed: while a pipeline drains, its first ranks wait."""
        return self.warmup + self.steps + 1

    def burst(
        self, sections: Mapping[str, Mapping[str, Any]], data: LoaderData, network: nn.Sequential
    ) -> Burst | None:
        """Train :attr:`batches` steps, which must be one epoch; what rank 0 reads in the run's files."""
        folder = self._train(sections, data, network)
        if not self.rank.leader:
            return None
        step_s, work_s = rates(read_trace(folder / "trace.json"), self.warmup, self.steps)
        (epoch,) = read_metrics(folder / "metrics.jsonl")
        sent = sum(stage["bytes_sent"] for stage in epoch["stages"]) / self.batches
        loss = epoch["train_loss"]
        if not math.isfinite(loss):
            raise RuntimeError(f"the loss of {dict(sections)} is {loss}")
        return Burst(step_s, work_s, sent, (loss,))

    def epoch(
        self, sections: Mapping[str, Mapping[str, Any]], data: LoaderData, network: nn.Sequential
    ) -> dict[str, Any] | None:
        """Train one epoch; its line of metrics.jsonl on rank 0, None elsewhere."""
        folder = self._train(sections, data, network)
        return read_metrics(folder / "metrics.jsonl")[0] if self.rank.leader else None

    def _train(self, sections: Mapping[str, Mapping[str, Any]], data: LoaderData, network: nn.Sequential) -> Path:
        folder = self.rank.folder / f"run{next(self._numbers)}"
        sections = {**sections, "checkpoint": {"every_epochs": 0}}
        with contextlib.redirect_stdout(io.StringIO()):
            train(from_dict(sections), network=network, data=data, run_dir=folder, quiet=True, trace=True, draw=False)
        self.rank.pin()
        return folder


def rates(events: tuple[Event, ...], warmup: int, steps: int) -> tuple[tuple[float, ...], tuple[float, ...]]:
    """Seconds and seconds of work of one step, by rank, each over its own ``steps`` steps after ``warmup``.

    A rank before the slowest one may run ahead until the queues are full; the slowest rank is the speed.
    """
    step_s, work_s = [], []
    for rank in range(1 + max(event.rank for event in events)):
        own = steady_state([event for event in events if event.rank == rank], warmup - 1, warmup - 1 + steps)
        step_s.append(own.step_s)
        work_s.append(own.bound_s)
    return tuple(step_s), tuple(work_s)
