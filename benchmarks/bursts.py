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

import torch
from ranks import Rank

NEIGHBOURS = 8


@dataclass(frozen=True)
class Burst:
    """What one rank knows of a burst.

    Attributes:
        step_s: seconds of one step, by rank.
        work_s: seconds of work in one step, by rank; empty where it is not known.
        sent: bytes sent in one step.
        losses: mean loss of the batch, step by step, of the part of the network that ends in logits.
    """

    step_s: tuple[float, ...]
    work_s: tuple[float, ...]
    sent: float = 0.0
    losses: tuple[float, ...] = ()


@dataclass(frozen=True)
class System:
    """Something that trains.

    Attributes:
        name, method, schedule, ranks, modules, micro_batches: as in :class:`tables.Row`.
        burst: runs on every rank; None where a rank has nothing to say.
    """

    name: str
    method: str
    schedule: str
    ranks: int
    modules: int
    micro_batches: int
    burst: Callable[[Rank], Burst | None]

    @property
    def label(self) -> str:
        """For people: ``dgl, async``, ``torch 1F1B, M = 4``."""
        what = self.name if self.method == "bp" else f"{self.method}, {self.schedule}"
        return what if self.micro_batches == 1 else f"{what}, M = {self.micro_batches}"


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
    return Burst((wall / steps,), work_s, losses=kept)


def take_turns(rank: Rank, systems: Sequence[System], rounds: int) -> list[tuple[int, Burst | None]]:
    """All rounds on one rank: (index of the system, burst), in the order in which they were run.

    System 0 is the reference. The others take turns in another order in every round.
    """
    done: list[tuple[int, Burst | None]] = []
    for number in range(rounds):
        order = list(range(1, len(systems)))
        random.Random(number).shuffle(order)
        turns = [0]
        for start in range(0, len(order), NEIGHBOURS):
            turns += [*order[start : start + NEIGHBOURS], 0]
        for index in turns:
            rank.meet()
            done.append((index, systems[index].burst(rank)))
        if rank.leader:
            print(f"round {number + 1} of {rounds}: {len(turns)} bursts", flush=True)
    return done


@dataclass(frozen=True)
class Turn:
    """One burst of all ranks together.

    Attributes:
        step_s: seconds of one step, of the slowest rank.
        work_s: by rank.
        ratio: of its speed to the neighbouring references.
    """

    step_s: float
    work_s: tuple[float, ...]
    sent: float
    losses: tuple[float, ...]
    ratio: float


def merge(by_rank: Sequence[Sequence[tuple[int, Burst | None]]]) -> dict[int, list[Turn]]:
    """The turns of every system, in order, from what all ranks have recorded."""
    joined: list[tuple[int, Burst]] = []
    for entries in zip(*by_rank, strict=True):
        parts = [burst for _, burst in entries if burst is not None]
        whole = Burst(
            tuple(value for part in parts for value in part.step_s),
            tuple(value for part in parts for value in part.work_s),
            sum(part.sent for part in parts),
            tuple(value for part in parts for value in part.losses),
        )
        joined.append((entries[0][0], whole))
    references = [at for at, (index, _) in enumerate(joined) if index == 0]
    turns: dict[int, list[Turn]] = {}
    for at, (index, burst) in enumerate(joined):
        before = max(place for place in references if place <= at)
        after = min(place for place in references if place >= at)
        reference_s = statistics.harmonic_mean(max(joined[place][1].step_s) for place in (before, after))
        step_s = max(burst.step_s)
        turn = Turn(step_s, burst.work_s, burst.sent, burst.losses, reference_s / step_s)
        turns.setdefault(index, []).append(turn)
    return turns
