"""The one wait loop: not given up before the deadline, and then only if nobody who knows more objects.

    wait ... deadline ... ask: hung or stopped?  -> DeadlineExceeded
                               slow, but moves?  -> go on, ask again a quarter of the deadline later

Only the main thread of a rank tells others what it waits for: they follow such waits from rank to rank (heartbeat.py).
"""

from __future__ import annotations

import contextlib
import threading
import time
from collections.abc import Callable
from queue import Empty, SimpleQueue
from typing import Protocol, TypeVar

T = TypeVar("T")

ASK_AGAIN = 4
"""A wait that outlasts the deadline and goes on is looked at again so many times per deadline."""
SHORTEST_S = 0.001
"""For one look, even if the deadline is over when the wait begins."""


class Patience(Protocol):
    """Told of the waits of this rank, and asked about those that outlast the deadline."""

    def begin(self, peer: int, what: str) -> None:
        """This rank waits for rank ``peer``; ``what``: ``"for the activation of ... from rank 1"``."""

    def end(self) -> None:
        """It does not wait any longer."""

    def verdict(self, peer: int) -> str | None:
        """Why to give up; None: go on waiting. From any thread."""


class NoPatience:
    """Knows nothing of the peer."""

    def begin(self, peer: int, what: str) -> None: ...

    def end(self) -> None: ...

    def verdict(self, peer: int) -> str | None:
        return f"rank {peer} is slow, hung or stopped - raise runtime.deadline_s if the step really takes that long"


NO_PATIENCE = NoPatience()


class Aside:
    """The patience of a thread beside the main one: it may ask, but its waits are not what the rank does."""

    def __init__(self, patience: Patience) -> None:
        self.verdict = patience.verdict

    def begin(self, peer: int, what: str) -> None: ...

    def end(self) -> None: ...


Awaited = tuple[int, str] | None
"""For which rank, and for what; None: for work of this rank's own, of which no other rank knows anything."""


def wait(
    look: Callable[[float], T],
    awaited: Callable[[], Awaited],
    late: Callable[[float, str], Exception],
    patience: Patience,
    deadline_s: float,
    left_s: float | None = None,
) -> T:
    """Wait until a look succeeds.

    Args:
        look: blocks for so many seconds or less, and returns what it found, or raises queue.Empty.
        awaited: asked after every look; may change while the wait goes on.
        late: the error for a wait of so many seconds, and why it is given up ("" if nobody was asked).
        left_s: of the deadline, if this is not the first wait under it.

    Raises:
        what ``late`` gave, once the deadline is over and so is patience.
    """
    left_s = max(deadline_s if left_s is None else left_s, SHORTEST_S)
    waited_s = deadline_s
    told: Awaited = None
    try:
        while True:
            if (now := awaited()) is not None and now != told:
                patience.begin(*now)
            told = now
            if left_s <= 0:
                verdict = "" if told is None else patience.verdict(told[0])
                if verdict is not None:
                    raise late(waited_s, verdict)
                left_s = deadline_s / ASK_AGAIN
                waited_s += left_s
            began = time.monotonic()
            with contextlib.suppress(Empty):
                return look(left_s)
            # No more than the look was given: in the meantime this process may have been suspended.
            left_s -= min(time.monotonic() - began, left_s)
    finally:
        patience.end()


def within(seconds: float, ask: Callable[[], T]) -> T:
    """What ``ask`` returns or raises; it goes on in a thread of its own where it takes longer, since nobody can end it.

    Raises:
        TimeoutError: the seconds are over.
    """
    outcome: SimpleQueue[tuple[list[T], BaseException | None]] = SimpleQueue()

    def run() -> None:
        try:
            outcome.put(([ask()], None))
        except BaseException as error:
            outcome.put(([], error))

    threading.Thread(target=run, name="within", daemon=True).start()
    try:
        value, error = outcome.get(timeout=seconds)
    except Empty:
        raise TimeoutError("no answer") from None
    if error is not None:
        raise error
    return value[0]
