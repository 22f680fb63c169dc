"""How long a GPU worked and had nothing to do, by events on the stream of the stage; the host never waits for them.

    host      reached | message is there: started, kernels queued, ended | reached | ...    microseconds each
    stream    ... R ................ S kernel kernel | blocked, resumed | kernel E  R ...   events
                   wait: R to S        work: S to E, without what lies between a pair of blocked and resumed

Where the stream is behind the host, R and S lie together and nothing is a wait, however long the host has waited
for the message: the device had work. Events are read when they have passed, and used again.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field

import torch


@dataclass
class Span:
    """Work on one or several modules.

    Attributes:
        reached, started, ended: events, see above.
        modules: each has an equal part.
        blocked: pairs of events, between which the host has waited for room in the queue of a message.
    """

    reached: torch.cuda.Event
    started: torch.cuda.Event
    modules: Sequence[int]
    blocked: list[tuple[torch.cuda.Event, torch.cuda.Event]] = field(default_factory=list)
    ended: torch.cuda.Event | None = None


class DeviceTime:
    """Times of the current stream, in order."""

    def __init__(self) -> None:
        self._open: deque[Span] = deque()
        self._spare: list[torch.cuda.Event] = []

    def mark(self) -> torch.cuda.Event:
        """An event behind what is queued."""
        event = self._spare.pop() if self._spare else torch.cuda.Event(enable_timing=True)
        event.record()
        return event

    def unused(self, mark: torch.cuda.Event) -> None:
        """Nobody will read it."""
        self._spare.append(mark)

    def ended(self, span: Span) -> None:
        """All of its work is queued."""
        span.ended = self.mark()
        self._open.append(span)

    def passed(self) -> Iterator[tuple[Sequence[int], float, float]]:
        """(modules, seconds of work, seconds of waiting) of every span that the device is through with; once each."""
        while self._open and (last := self._open[0].ended) is not None and last.query():
            span = self._open.popleft()
            blocked_s = sum(_seconds(*pair) for pair in span.blocked)
            idle_s = _seconds(span.reached, span.started) + blocked_s
            yield span.modules, _seconds(span.started, last) - blocked_s, idle_s
            self._spare += [span.reached, span.started, last, *(event for pair in span.blocked for event in pair)]


def _seconds(first: torch.cuda.Event, second: torch.cuda.Event) -> float:
    milliseconds: float = first.elapsed_time(second)
    return milliseconds / 1e3
