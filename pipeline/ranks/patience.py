"""When to give up a wait for another rank: not before the deadline, and then only if nobody who knows more objects.

    wait ... deadline ... ask: hung or stopped?  -> DeadlineExceeded
                               slow, but moves?  -> go on, ask again a quarter of the deadline later
"""

from __future__ import annotations

import time
from collections.abc import Mapping
from typing import Protocol

import torch.distributed as dist

from pipeline.base.errors import DeadlineExceeded

ASK_AGAIN = 4
"""A wait that outlasts the deadline and goes on is looked at again so many times per deadline."""
POLL_S = 0.02
"""Between two looks at the store, less at the beginning of a wait. The store's own ``wait`` would block in C++, and
print warnings when it times out."""


class Patience(Protocol):
    """Told of the waits of this rank, and asked about those that outlast the deadline."""

    def begin(self, peer: int, what: str) -> None:
        """This rank waits for rank ``peer``; ``what``: ``"for the activation of ... from rank 1"``."""

    def end(self) -> None:
        """It does not wait any longer."""

    def verdict(self, peer: int) -> str | None:
        """Why to give up; None: go on waiting."""


class NoPatience:
    """Knows nothing of the peer."""

    def begin(self, peer: int, what: str) -> None: ...

    def end(self) -> None: ...

    def verdict(self, peer: int) -> str | None:
        return f"rank {peer} is slow, hung or stopped - raise runtime.deadline_s if the step really takes that long"


NO_PATIENCE = NoPatience()


def wait_for_ranks(
    store: dist.Store, rank: int, keys: Mapping[int, str], what: str, deadline_s: float, patience: Patience
) -> None:
    """Wait until every rank's key is in the store.

    Args:
        rank: who waits.
        keys: by the rank that sets it.
        what: those ranks are to do, as ``"publish the configuration"``.
        deadline_s: after this the wait goes on as long as ``patience`` lasts.

    Raises:
        DeadlineExceeded: naming the ranks that are missing.
        RuntimeError: the store is gone.
    """
    wanted = list(keys.values())
    if store.check(wanted):
        return
    asked_s = deadline_s
    began, first = time.monotonic(), -1
    try:
        while absent := [r for r, key in keys.items() if not store.check([key])]:
            if absent[0] != first:
                first = absent[0]
                patience.begin(first, f"for rank {first} to {what}")
            if time.monotonic() - began > asked_s:
                verdict = patience.verdict(first)
                if verdict is not None:
                    who = ("rank " if len(absent) == 1 else "ranks ") + ", ".join(map(str, absent))
                    raise DeadlineExceeded(f"rank {rank} has waited {asked_s:g} s for {who} to {what}; {verdict}")
                asked_s += deadline_s / ASK_AGAIN
            end = min(began + asked_s, time.monotonic() + 0.5)
            while (now := time.monotonic()) <= end and not store.check(wanted):
                time.sleep(min(POLL_S, 0.001 + (now - began) / 4))
    finally:
        patience.end()
