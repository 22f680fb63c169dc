"""What the ranks know of each other while they work: every rank's beat in the store tells what it does or waits for.

    every rank's sentinel, each period (2 s, or a fifth of a shorter deadline):

        beat/<r>  <-  {count, epoch, step, activity, for how many seconds, the rank it waits for}

        0 --watches--> 1 --watches--> 2 --watches--> 3       the next beat in the ring is unchanged for the deadline
        ^                                            |       less a period: silent. All ranks that are silent as well
        +------------------watches-------------------+       are named with it.

    a main thread whose wait has outlasted the deadline follows the beats:

        0 waits for 1 waits for 2 at work, since less than the deadline    slow, no error: go on waiting
                                           since longer                    hung: DeadlineExceeded (before the first
                                                                           step something may take longer)
                                  2 silent                                 stopped, or its machine is gone
        0 waits for 1 waits for 0, all since longer than the deadline      they wait for each other

Nobody compares clocks: a beat tells ages, and whether it is new is judged by the reader's own clock. That clock stands
still while the reader itself is stopped, so a job that is suspended as a whole and goes on later finds nobody silent.
Nothing of this is on the way of a message: the main thread notes a wait only when it has to wait.
"""

from __future__ import annotations

import json
import time
from dataclasses import asdict, dataclass

import torch.distributed as dist

from pipeline.ranks.keys import Key

PERIOD_S = 2.0
"""Longest time between two beats."""
OVERDUE = 2.0
"""Times the limit after which a rank reports itself; a rank that waits for it does so before, and knows more."""
START_S = 10.0
"""How much later the first beat may come: a process that starts may wait for a name server at every connection."""


@dataclass(frozen=True)
class Beat:
    """What a rank says of itself. ``activity`` of its main thread, begun ``age_s`` seconds ago; it is a wait where
    there is a ``peer`` that it waits for. What takes longer than ``limit_s`` has hung."""

    count: int
    modules: str
    epoch: int
    step: int
    activity: str
    age_s: float
    limit_s: float
    peer: int | None


class Heartbeat:
    """The beat of this rank and what it has heard of the others.

    The main thread tells it what it does (``describe``, ``progress``, ``begin``, ``end``) and asks for a ``verdict``;
    the sentinel thread calls ``tick`` at least twice per ``period_s``, and ``idle`` when it is done with the store.
    """

    def __init__(self, rank: int, world_size: int, deadline_s: float, setup_deadline_s: float) -> None:
        self.period_s = min(PERIOD_S, deadline_s / 5)
        self._rank = rank
        self._ring = [(rank + n) % world_size for n in range(1, world_size)]
        self._deadline_s = deadline_s
        self._setup_deadline_s = max(setup_deadline_s, deadline_s)
        self._limit_s = deadline_s - self.period_s
        self._counted = (0.0, time.monotonic())
        self._modules = "starting"
        self._now = (-1, -1, "starting", 0.0)  # epoch, step, activity, when it began
        self._wait: tuple[int, str, float] | None = None  # for which rank, for what, since when
        self._count = 0
        self._posted = -self.period_s
        self._asking: float | None = None
        self._texts: dict[int, bytes] = {}
        self._beats: dict[int, Beat] = {}
        self._heard = dict.fromkeys(self._ring, START_S)  # when the last new beat came

    # -- the main thread -----------------------------------------------------------------------------------------------

    def start(self) -> None:
        """Let this rank's time begin now: the sentinel ticks from here on."""
        self._counted = (0.0, time.monotonic())

    def describe(self, modules: str) -> None:
        """Say with the next tick what this rank runs."""
        self._modules = modules
        self._posted = -self.period_s

    def progress(self, epoch: int, step: int, activity: str) -> None:
        """Note what this rank does from now on."""
        self._now = (epoch, step, activity, self._clock())

    def place(self) -> tuple[int, int, str]:
        """Epoch, step (-1 before the first) and activity as of the last ``progress``."""
        return self._now[:3]

    def begin(self, peer: int, what: str) -> None:
        """Note that this rank waits for ``peer``; ``what``: as ``"for the gradient of ..."``."""
        self._wait = (peer, what, self._clock())

    def end(self) -> None:
        """The wait is over; the activity goes on."""
        self._wait = None
        self.moves()

    def moves(self) -> None:
        """Note that what this rank does gets on."""
        self.progress(*self.place())

    def verdict(self, peer: int) -> str | None:
        """Why ``peer`` has let this rank wait for longer than the deadline; None if the rank at the root of it is slow,
        but moves."""
        if self.unanswered_s():
            return f"the store has not answered for {self.unanswered_s():.1f} s (its host stopped? machine gone?)"
        chain, rank = [self._rank], peer
        while rank not in chain:
            if self._silence(rank) >= self._limit_s:
                return self.line_for_the_silent()
            chain.append(rank)
            beat = self._beats.get(rank)
            if beat is None:
                return None
            if beat.peer is None:
                if beat.age_s < beat.limit_s:
                    return None
                return f"{self._story(chain[1:])} - {_advice(beat)}"
            rank = beat.peer
        ring = chain[chain.index(rank) :]
        if min(self._beat(member).age_s for member in ring) < self._deadline_s:
            return None
        return f"{self._story(ring)}: they wait for each other"

    # -- the sentinel thread -------------------------------------------------------------------------------------------

    def tick(self, store: dist.Store) -> None:
        """Post this rank's beat if one is due, and read the others. Raises RuntimeError: the store is gone."""
        now, self._asking = self._clock(), time.monotonic()
        self._counted = (now, self._asking)
        if now - self._posted >= self.period_s:
            self._posted = now
            self._count += 1
            store.set(Key.BEAT(rank=self._rank), json.dumps(asdict(self._beat(self._rank))))
        # A key that is not there yet would block multi_get.
        known = [rank for rank in self._ring if rank in self._texts or store.check([Key.BEAT(rank=rank)])]
        for rank, text in zip(known, store.multi_get([Key.BEAT(rank=rank) for rank in known]), strict=True):
            if text != self._texts.get(rank):
                self._beats[rank] = Beat(**json.loads(text))
                self._texts[rank] = text
                self._heard[rank] = now

    def idle(self) -> None:
        """Nothing is asked of the store at present."""
        self._asking = None

    def overdue(self) -> str | None:
        """What this rank has been at for much too long, whether somebody waits for it or not; None: it moves."""
        beat = self._beat(self._rank)
        if beat.peer is not None or beat.age_s < OVERDUE * beat.limit_s:
            return None
        return f"{self.saying(self._rank)} - {_advice(beat)}"

    def next_is_silent(self) -> int | None:
        """The rank that this one watches, if nothing has been heard of it for too long."""
        rank = self._ring[0]
        return rank if self._silence(rank) >= self._limit_s else None

    # -- both ----------------------------------------------------------------------------------------------------------

    def unanswered_s(self) -> float:
        """For how many seconds the store has not answered, if that is too long; else 0."""
        asking = self._asking
        waited = 0.0 if asking is None else time.monotonic() - asking
        return waited if waited >= self._limit_s else 0.0

    def line_for_the_silent(self) -> str:
        """Who has been silent for too long, and who waits for them."""
        # Beats are a period apart: who stopped at the same time may have been heard of a little later.
        silent = [rank for rank in self._ring if self._silence(rank) >= self._limit_s - 2 * self.period_s]
        named = ", ".join(
            f"{self._name(rank)} has not been heard of for {self._silence(rank):.1f} s" for rank in sorted(silent)
        )
        others = [rank for rank in sorted([self._rank, *self._ring]) if rank not in silent and self._known(rank)]
        waiting = [rank for rank in others if self._beat(rank).peer in silent]
        witnesses = "; ".join(self.saying(rank) for rank in waiting or [self._rank])
        return f"{named} (stopped? machine gone? runtime.deadline_s = {self._deadline_s:g}); {witnesses}"

    def saying(self, rank: int) -> str:
        """What ``rank`` has last said of itself."""
        if not self._known(rank):
            return f"rank {rank} has not said anything yet"
        beat = self._beat(rank)
        age_s = beat.age_s + (self._silence(rank) if rank != self._rank else 0.0)
        if beat.peer is not None:
            return f"rank {rank} waits {beat.activity} since {age_s:.1f} s"
        where = f" of epoch {beat.epoch} step {beat.step}" if beat.step >= 0 else ""
        return f"{self._name(rank)} has been at '{beat.activity}'{where} for {age_s:.1f} s"

    def _story(self, chain: list[int]) -> str:
        return "; ".join(self.saying(rank) for rank in chain)

    def _name(self, rank: int) -> str:
        return f"rank {rank} ({self._beat(rank).modules})" if self._known(rank) else f"rank {rank}"

    def _known(self, rank: int) -> bool:
        return rank == self._rank or rank in self._beats

    def _beat(self, rank: int) -> Beat:
        """Of another rank the last one heard; of this rank the present one."""
        if rank != self._rank:
            return self._beats[rank]
        (epoch, step, activity, since), peer = self._now, None
        if (wait := self._wait) is not None:
            peer, activity, since = wait
        limit_s = self._setup_deadline_s if step < 0 else self._deadline_s
        return Beat(self._count, self._modules, epoch, step, activity, self._clock() - since, limit_s, peer)

    def _silence(self, rank: int) -> float:
        return self._clock() - self._heard[rank]

    def _clock(self) -> float:
        """Seconds that this process has run: of the time without a tick it counts one period at most."""
        counted, ticked = self._counted
        return counted + min(time.monotonic() - ticked, self.period_s)


def _advice(beat: Beat) -> str:
    return f"raise runtime.{'setup_deadline_s' if beat.step < 0 else 'deadline_s'} if this really takes so long"
