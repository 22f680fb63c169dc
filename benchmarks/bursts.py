"""The unit of every measurement: a burst of a few steps of one system, in rounds in which all systems take turns.

    round    reference  A B C D E F G H  reference  I J ...  reference
    ratio    burst / mean of the references before and after it

A burst of the local pipeline is a short call of ``train``, timed by the trace that it writes itself.
"""

from __future__ import annotations

import contextlib
import io
import itertools
import math
import random
import statistics
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from networks import SGD
from ranks import Rank, run_ranks
from tables import method_name
from torch import Tensor, nn

from pipeline import LoaderData, from_dict, read_metrics, read_trace, steady_state, train

NEIGHBOURS = 8
Sections = dict[str, dict[str, Any]]


@dataclass(frozen=True)
class Burst:
    """What one rank knows of a burst."""

    step_s: float  # seconds of one step, of the slowest rank that it knows
    work_s: tuple[float, ...]  # seconds of work in one step, by rank; empty where it is not known
    sent: float = 0.0  # bytes in one step
    losses: tuple[float, ...] = ()  # mean of the batch, step by step, of the part of the network that ends in logits


@dataclass(frozen=True)
class System:
    """Something that trains; most names are those of :func:`tables.make_row`."""

    system: str
    method: str
    schedule: str
    ranks: int
    modules: int
    micro_batches: int = 1
    span: int = 1
    burst: Callable[[Any, System], Burst | None] | None = None  # on every rank, given the bench there and this

    @property
    def row(self) -> dict[str, Any]:
        """The part of a row that names it."""
        named = {key: value for key, value in vars(self).items() if key not in ("span", "burst")}
        return {**named, "method": method_name(self.method, self.span)}


def time_steps(rank: Rank, step: Callable[[], float | None], warmup: int, steps: int, cores: int = 1) -> Burst:
    """Run and time ``step() -> loss``; work is the CPU time of this process, over ``cores`` cores. Steps read their
    loss from the device, so a GPU has nothing left to do when they end; its work is not known."""
    losses = [step() for _ in range(warmup)]
    rank.meet()
    cpu, wall = time.process_time(), time.perf_counter()
    losses += [step() for _ in range(steps)]
    if torch.cuda.is_initialized():
        torch.cuda.synchronize()
    wall, cpu = time.perf_counter() - wall, time.process_time() - cpu
    kept = tuple(loss for loss in losses if loss is not None)
    work_s = () if torch.cuda.is_initialized() else (min(cpu / cores, wall) / steps,)
    return Burst(wall / steps, work_s, losses=kept)


@dataclass(frozen=True)
class Turn(Burst):
    """One burst of all ranks together."""

    ratio: float = 1.0  # of its speed to the neighbouring references


def merge(by_rank: Sequence[Sequence[tuple[int, Burst | None]]]) -> dict[int, list[Turn]]:
    """The turns of every system, in order, from what all ranks have recorded."""
    joined: list[tuple[int, Burst]] = []
    for entries in zip(*by_rank, strict=True):
        parts = [burst for _, burst in entries if burst is not None]
        work_s = tuple(seconds for part in parts for seconds in part.work_s)
        losses = tuple(loss for part in parts for loss in part.losses)
        step_s, sent = max(part.step_s for part in parts), sum(part.sent for part in parts)
        joined.append((entries[0][0], Burst(step_s, work_s, sent, losses)))
    references = [at for at, (index, _) in enumerate(joined) if index == 0]
    turns: dict[int, list[Turn]] = {}
    for at, (index, burst) in enumerate(joined):
        around = max(place for place in references if place <= at), min(place for place in references if place >= at)
        reference_s = statistics.harmonic_mean(joined[place][1].step_s for place in around)
        turns.setdefault(index, []).append(Turn(**vars(burst), ratio=reference_s / burst.step_s))
    return turns


Systems = Callable[[Any, int], list[System]]  # (settings, number of ranks) -> what is run


def compete(
    settings: Any, systems: Systems, bench: Callable[..., Any], ranks: int, deadline_s: float
) -> tuple[list[tuple[System, list[Turn]]], list[Any]]:
    """Let ``systems(settings, ranks)`` take turns for ``settings.rounds`` rounds; system 0 is the reference. On every
    rank ``bench(settings, rank)`` is given to all bursts. Returns all systems with their turns, and the benches'
    ``record``s by rank."""
    values = run_ranks(_take_turns, ranks, settings, systems, bench, deadline_s=deadline_s)
    turns = merge([done for done, _ in values])
    found = [(system, turns[index]) for index, system in enumerate(systems(settings, ranks))]
    return found, [record for _, record in values]


def _take_turns(rank: Rank, settings: Any, systems: Systems, bench: Callable[..., Any]) -> tuple[list[Any], Any]:
    """All rounds on one rank, each in another order: (index of the system, burst), as they were run."""
    found, here = systems(settings, rank.count), bench(settings, rank)
    done: list[tuple[int, Burst | None]] = []
    for number in range(settings.rounds):
        order = list(range(1, len(found)))
        random.Random(number).shuffle(order)
        turns = [0]
        for start in range(0, len(order), NEIGHBOURS):
            turns += [*order[start : start + NEIGHBOURS], 0]
        for index in turns:
            rank.meet()
            burst = found[index].burst
            done.append((index, burst and burst(here, found[index])))
        if rank.leader:
            print(f"round {number + 1} of {settings.rounds}: {len(turns)} bursts", flush=True)
    return done, here.record


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
        "model": {"modules": system.modules}, "method": {"name": system.method},
        "hierarchy": {"cascade_span": system.span}, "data": {"batch_size": batch},
        "schedule": {"kind": system.schedule, "micro_batches": system.micro_batches},
        "optim": {"name": "sgd", "schedule": "constant", "warmup_epochs": 0, **SGD},
        "train": {"epochs": 1}, "checkpoint": {"every_epochs": 0}, "precision": {"compute": "fp32"},
        "runtime": {"device": "cpu", "threads": 1, "deadline_s": 300.0},
    }  # fmt: skip


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

    def burst(self, config: Sections, data: LoaderData, network: nn.Sequential) -> Burst | None:
        """Train on :meth:`data`; what rank 0 reads in the run's files, None elsewhere."""
        folder = self.train(config, data, network)
        if not self.rank.leader:
            return None
        steady = steady_state(read_trace(folder / "trace.json"), self.warmup - 1, self.warmup - 1 + self.steps)
        (epoch,) = read_metrics(folder / "metrics.jsonl")
        sent = sum(stage["bytes_sent"] for stage in epoch["stages"]) / (self.warmup + self.steps + 1)
        loss = epoch["train_loss"]
        if not math.isfinite(loss):
            raise RuntimeError(f"the loss of {config} is {loss}")
        return Burst(steady.step_s, steady.stage_s, sent, (loss,))

    def train(self, config: Sections, data: LoaderData, network: nn.Sequential) -> Path:
        """The folder of a run of one epoch."""
        folder = self.rank.folder / f"run{next(self._numbers)}"
        with contextlib.redirect_stdout(io.StringIO()):
            chosen = from_dict({**config, "log": {"curve": False}})
            train(chosen, network=network, data=data, run_dir=folder, quiet=True, trace=True, draw=False)
        self.rank.pin()
        return folder
