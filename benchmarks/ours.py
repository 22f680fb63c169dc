"""A burst of the local pipeline: a short call of ``train``, timed by the trace that it writes itself."""

from __future__ import annotations

import contextlib
import io
import itertools
import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from bursts import Burst, System
from networks import SGD
from ranks import Rank
from torch import Tensor, nn

from pipeline import LoaderData, from_dict, read_metrics, read_trace, steady_state, train

Sections = dict[str, dict[str, Any]]


def local_systems(
    methods: Sequence[tuple[str, int]], ranks: int, modules: int, quick: bool, burst: Any
) -> list[System]:
    """For every (method, cascade span): exact with M = 1, 2, 4 and async; a quick run takes M = 1 only."""
    schedules = [("exact", 1), ("async", 1)] if quick else [("exact", 1), ("exact", 2), ("exact", 4), ("async", 1)]
    return [
        System("localpipe", method, kind, ranks, modules, micro_batches, span, burst)
        for method, span in methods
        for kind, micro_batches in schedules
    ]


def sections(system: System, batch: int) -> Sections:
    """The configuration of a burst of one of our systems: one epoch at a constant learning rate, fp32, one thread."""
    return {
        "model": {"modules": system.modules},
        "method": {"name": system.method},
        "hierarchy": {"cascade_span": system.span},
        "schedule": {"kind": system.schedule, "micro_batches": system.micro_batches},
        "data": {"batch_size": batch},
        "optim": {"name": "sgd", "schedule": "constant", "warmup_epochs": 0, **SGD},
        "train": {"epochs": 1},
        "checkpoint": {"every_epochs": 0},
        "precision": {"compute": "fp32"},
        "runtime": {"device": "cpu", "threads": 1, "deadline_s": 300.0},
    }


@dataclass
class LocalPipeline:
    """Runs configurations one after another in the processes of a job."""

    rank: Rank
    warmup: int  # steps before those that are timed
    steps: int
    _numbers: Any = field(default_factory=itertools.count)

    def data(self, inputs: Tensor, labels: Tensor, **normalisation: Any) -> LoaderData:
        """An epoch of always the same batch, and a tiny test. Its last batch is not timed: while a pipeline drains, its
        first ranks wait."""
        batches = [(inputs, labels)] * (self.warmup + self.steps + 1)
        return LoaderData(batches, [(inputs[:2], labels[:2])], **normalisation)

    def burst(self, config: Sections, data: LoaderData, network: nn.Module) -> Burst | None:
        """Train on :meth:`data`; what rank 0 reads in the run's files, None elsewhere."""
        folder = self._train(config, data, network)
        if not self.rank.leader:
            return None
        steady = steady_state(read_trace(folder / "trace.json"), self.warmup - 1, self.warmup - 1 + self.steps)
        (epoch,) = read_metrics(folder / "metrics.jsonl")
        sent = sum(stage["bytes_sent"] for stage in epoch["stages"]) / (self.warmup + self.steps + 1)
        loss = epoch["train_loss"]
        if not math.isfinite(loss):
            raise RuntimeError(f"the loss of {config} is {loss}")
        return Burst(steady.step_s, steady.stage_s, sent, (loss,))

    def epoch(self, config: Sections, data: LoaderData, network: nn.Module) -> dict[str, Any] | None:
        """Train one epoch of any length; its line of metrics.jsonl on rank 0, None elsewhere."""
        folder = self._train(config, data, network)
        return read_metrics(folder / "metrics.jsonl")[0] if self.rank.leader else None

    def _train(self, config: Sections, data: LoaderData, network: nn.Module) -> Path:
        folder = self.rank.folder / f"run{next(self._numbers)}"
        with contextlib.redirect_stdout(io.StringIO()):
            train(from_dict(config), network=network, data=data, run_dir=folder, quiet=True, trace=True, draw=False)
        self.rank.pin()
        return folder
