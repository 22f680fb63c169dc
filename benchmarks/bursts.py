"""The unit of every measurement: a burst of a few steps of one system, in rounds in which all systems take turns.

    round    reference  A B C D E F G H  reference  I J ...  reference
    ratio    burst / mean of the references before and after it
"""

from __future__ import annotations

import random
import statistics
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from ranks import Rank, run_ranks
from tables import method_name

NEIGHBOURS = 8


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
    """Run and time ``step() -> loss``; work is the CPU time of this process, over ``cores`` cores.

    Steps read their loss from the device, so a GPU has nothing left to do when they end; its work is not known.
    """
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


def compete(
    settings: Any, systems: Callable[[Any, int], list[System]], bench: Callable[..., Any], ranks: int, deadline_s: float
) -> tuple[list[tuple[System, list[Turn]]], list[Any]]:
    """Let ``systems(settings, ranks)`` take turns for ``settings.rounds`` rounds. System 0 is the reference.

    Args:
        bench: ``bench(settings, rank)`` is made once on every rank and given to all bursts there; what is to be known
            of it afterwards is its ``record``.

    Returns:
        Every system with its turns, and the records by rank.
    """
    values = run_ranks(_take_turns, ranks, settings, systems, bench, deadline_s=deadline_s)
    turns = merge([done for done, _ in values])
    found = [(system, turns[index]) for index, system in enumerate(systems(settings, ranks))]
    return found, [record for _, record in values]


def _take_turns(
    rank: Rank, settings: Any, systems: Callable[[Any, int], list[System]], bench: Callable[..., Any]
) -> tuple[list[tuple[int, Burst | None]], Any]:
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
