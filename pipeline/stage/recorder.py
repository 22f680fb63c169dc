"""Records what one rank did, cheaply enough for every step, and puts all ranks on one clock.

On a GPU an action ends when its kernels end, not when they have been queued: marks are CUDA events then, read only when
the run is over, so that recording never waits for the device.
"""

from __future__ import annotations

import itertools
import socket
import time
from collections.abc import Iterable, Sequence
from pathlib import Path

import torch

from pipeline.edges.wire import Header, MessageKind
from pipeline.ranks.clocks import clock_offset
from pipeline.ranks.team import Team
from pipeline.stage.events import SEND, WAIT, Event
from pipeline.stage.schedule import Action

Mark = float | torch.cuda.Event
LIMIT = 200_000
"""Actions kept of one rank, and messages: about 100 MB as a trace file."""
SHORTEST_WAIT_S = 20e-6


class Recorder:
    """Events of one rank.

    Args:
        rank: whose.
        device: CUDA marks are events on its current stream, others are host time.
        offset_s: what to add to this host's monotonic clock to get that of rank 0.
    """

    def __init__(self, rank: int, device: torch.device, offset_s: float = 0.0) -> None:
        self._rank = rank
        self._cuda = device.type == "cuda"
        self._offset_s = offset_s
        self._marks: list[tuple[Sequence[Action], int, Mark, Mark, Mark, float]] = []
        self._sent: list[Event] = []
        self.full = False
        self._origin: tuple[torch.cuda.Event, float] | None = None
        if self._cuda:
            origin = torch.cuda.Event(enable_timing=True)
            origin.record()
            origin.synchronize()
            self._origin = (origin, time.perf_counter())

    def mark(self) -> Mark:
        """Now."""
        if not self._cuda:
            return time.perf_counter()
        event = torch.cuda.Event(enable_timing=True)
        event.record()
        return event

    def actions(self, actions: Sequence[Action], step: int, arrived: Mark, started: Mark, blocked_s: float) -> None:
        """Actions that were done together in ``step`` and end now: reached at ``arrived``, begun at ``started`` when
        their messages were there; ``blocked_s`` seconds of it went by waiting for room in a queue."""
        self.full = len(self._marks) >= LIMIT
        if not self.full:
            self._marks.append((actions, step, arrived, started, self.mark(), blocked_s))

    def sent(self, module: int, header: Header, posted_s: float, taken_s: float) -> None:
        """A message of ``module`` was on its way from ``posted_s`` to ``taken_s``, host time. From any thread."""
        if header.kind in (MessageKind.TRAIN, MessageKind.GRADIENT, MessageKind.WEIGHTS) and len(self._sent) < LIMIT:
            start, end = posted_s + self._offset_s, taken_s + self._offset_s
            self._sent.append(Event(self._rank, SEND, module, header.micro_batch, header.step, start, end))

    def events(self) -> list[Event]:
        """Everything so far, in order of time; on a GPU this waits for what the stream has been given."""
        if self._cuda:
            torch.cuda.current_stream().synchronize()
        found: list[Event] = []
        for actions, step, *marks, blocked_s in self._marks:
            arrived, started, ended = (self._seconds(mark) for mark in marks)
            # On a GPU the device may have worked while the host was blocked: its time is the kernels' alone.
            work_end = ended - (blocked_s if blocked_s > SHORTEST_WAIT_S and not self._cuda else 0.0)
            each = (work_end - started) / len(actions)  # of what is done together, nobody knows who took how long
            bounds = [started, *(started + index * each for index in range(1, len(actions))), work_end]
            about = [(action.module, action.micro_batch, step - action.lag) for action in actions]
            if started - arrived > SHORTEST_WAIT_S:
                found.append(Event(self._rank, WAIT, *about[0], arrived, started))
            for action, its, span in zip(actions, about, itertools.pairwise(bounds), strict=True):
                found.append(Event(self._rank, action.kind.value, *its, *span))
            if work_end < ended:
                found.append(Event(self._rank, WAIT, *about[-1], work_end, ended))
        return sorted(found + self._sent, key=lambda event: event.start_s)

    def _seconds(self, mark: Mark) -> float:
        if self._origin is None or isinstance(mark, float):
            assert isinstance(mark, float)
            return mark + self._offset_s
        origin, host_s = self._origin
        since_origin_ms: float = origin.elapsed_time(mark)
        return host_s + since_origin_ms / 1e3 + self._offset_s


def clock_offset_s(team: Team) -> float:
    """What to add to this rank's ``time.perf_counter`` to get rank 0's. Collective.

    The clock is common to the processes of one boot of a host, so the offset is 0 there.
    """
    if len(set(team.collect("its host", _host()))) == 1:
        return 0.0
    return clock_offset(team, time.perf_counter).seconds


def _host() -> str:
    """What the processes of one boot of one host have in common: its name is not enough, two may have the same."""
    boot = Path("/proc/sys/kernel/random/boot_id")
    return boot.read_text() if boot.is_file() else socket.gethostname()


def by_time(events: Iterable[Event]) -> tuple[Event, ...]:
    """The events of all ranks in one order."""
    return tuple(sorted(events, key=lambda event: (event.start_s, event.rank)))
