"""How far the clocks of two ranks are apart, asked through the store.

    rank r    asked ----> told     half of the round trip bounds the error: rank 0 has read its clock somewhere between
                 \\      /
    rank 0        there
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from pipeline.ranks.keys import Key
from pipeline.ranks.team import Team


@dataclass(frozen=True)
class Offset:
    """``seconds``: what to add to this rank's clock to get rank 0's; ``error_s``: how far off that can be."""

    seconds: float
    error_s: float


def clock_offset(team: Team, clock: Callable[[], float], rounds: int = 5) -> Offset:
    """Compare ``clock`` with rank 0's. Collective, once per run: rank 0 answers each rank in turn, and the exchange
    with the shortest round trip counts.

    Raises DeadlineExceeded naming the rank that does not come, DistError.
    """
    for other in range(1, team.size):
        if team.leads:
            for index in range(rounds):
                asked = Key.CLOCK(what="ask", rank=other, index=index)
                if index == 0:
                    team.wait_for({other: asked}, "compare clocks")
                team.store.get(asked)  # blocks: to poll would take longer
                team.set(Key.CLOCK(what="tell", rank=other, index=index), repr(clock()))
        elif team.rank == other:
            return min((_exchange(team, clock, index) for index in range(rounds)), key=lambda found: found.error_s)
    return Offset(0.0, 0.0)


def _exchange(team: Team, clock: Callable[[], float], index: int) -> Offset:
    asked = clock()
    team.set(Key.CLOCK(what="ask", rank=team.rank, index=index), "")
    told = Key.CLOCK(what="tell", rank=team.rank, index=index)
    if index == 0:
        team.wait_for({0: told}, "compare clocks")
    there = float(team.store.get(told))
    back = clock()
    return Offset(there - (asked + back) / 2, (back - asked) / 2)
