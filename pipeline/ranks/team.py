"""The ranks of a run as one of them sees them: who there is, the store that they share, one rule for every wait.

    rank 0   collect("edges", mine) --+                           +--> everyone's, by rank
    rank 1   ................ late ---+--> store --> all are here +--> ...
                  |
                  wait: while rank 1 is only slow; else DeadlineExceeded: "rank 0 has waited 60 s for rank 1 to ..."

A single process is a team of one, with a store of its own: nobody has to ask how many there are.
"""

from __future__ import annotations

import contextlib
import threading
import time
from collections.abc import Callable, Iterable, Iterator, Mapping
from queue import Empty
from typing import Any, TypeVar

import torch.distributed as dist

from pipeline.base.errors import ConfigError, DeadlineExceeded, PeerLost
from pipeline.ranks.keys import Key
from pipeline.ranks.patience import NO_PATIENCE, Aside, Awaited, Patience, wait

T = TypeVar("T")

POLL_S = 0.02
"""Between two looks at the store, less at the beginning of a wait. The store's own ``wait`` would block in C++, and
print warnings when it times out."""
LOOK_S = 0.5
"""Between two looks at who is missing."""


class Team:
    """See the drawing above. Its collective methods must be called by all ranks, in the same order.

    Args:
        rank, size: which of how many.
        store: shared by the ranks of this run in this attempt.
        memory: shared by this run's attempts as well, see :meth:`remember`.
        deadline_s: longest time that a wait takes, unless the rank at the root of it is just slow.
        patience: knows that. It is told of the waits of the thread that has made the team; others only ask.

    Attributes:
        store: for those who need a connection or groups of their own; all others use the methods.
        group: gloo group of all ranks, for objects of any size; None until there is one, and in a team of one.
    """

    def __init__(
        self,
        rank: int = 0,
        size: int = 1,
        store: dist.Store | None = None,
        memory: dist.Store | None = None,
        deadline_s: float = 60.0,
        patience: Patience = NO_PATIENCE,
    ) -> None:
        self.rank = rank
        self.size = size
        self.deadline_s = deadline_s
        self.store = dist.HashStore() if store is None else store
        self.group: dist.ProcessGroup | None = None
        self._memory = dist.HashStore() if memory is None else memory
        self._patience = patience
        self._aside = Aside(patience)
        self._thread = threading.get_ident()
        self._objects = 0

    @property
    def leads(self) -> bool:
        """Whether this is rank 0, which writes the screen and the files of the run."""
        return self.rank == 0

    def each(self, key: Key, **parts: object) -> dict[int, str]:
        """The keys of all ranks, by rank."""
        return {rank: key(rank=rank, **parts) for rank in range(self.size)}

    # -- the store -----------------------------------------------------------------------------------------------------

    def set(self, key: str, value: str = "1") -> None:
        """Put a value in the store."""
        self.store.set(key, value)

    def count(self, key: str) -> None:
        """Add one to the number at ``key``."""
        self.store.add(key, 1)

    def has(self, *keys: str) -> bool:
        """Whether all of the keys have been set."""
        return self.store.check(list(keys))

    def get(self, keys: Iterable[str]) -> list[str]:
        """The values of keys that have been set."""
        return [value.decode() for value in self.store.multi_get(list(keys))]

    def take(self, keys: Iterable[str]) -> list[str]:
        """The values of keys that have been set; they are removed."""
        keys = list(keys)
        values = self.get(keys)
        self.forget(keys)
        return values

    def forget(self, keys: Iterable[str]) -> None:
        """Remove keys."""
        for key in keys:
            self.store.delete_key(key)

    def remember(self, key: str, value: str) -> None:
        """Leave a value for this run's later attempts: for the workers that torchrun starts again after a failure."""
        self._memory.set(key, value)

    def recall(self, key: str) -> str | None:
        """What an earlier attempt, or this one, has left."""
        return self._memory.get(key).decode() if self._memory.check([key]) else None

    # -- waits ---------------------------------------------------------------------------------------------------------

    @property
    def patience(self) -> Patience:
        """Of this thread: what the rank waits for is what its main thread waits for."""
        return self._patience if threading.get_ident() == self._thread else self._aside

    def wait(
        self,
        look: Callable[[float], T],
        awaited: Callable[[], Awaited],
        late: Callable[[float, str], Exception],
        deadline_s: float | None = None,
        left_s: float | None = None,
    ) -> T:
        """Wait until a look succeeds, see :func:`pipeline.ranks.patience.wait`. From any thread."""
        deadline_s = self.deadline_s if deadline_s is None else deadline_s
        return wait(look, awaited, late, self.patience, deadline_s, left_s)

    def wait_for(self, keys: Mapping[int, str], what: str) -> None:
        """Wait until every key has been set. From any thread.

        Args:
            keys: by the rank that sets it.
            what: those ranks are to do, as ``"publish the configuration"``.

        Raises:
            DeadlineExceeded: naming the ranks that are missing.
            RuntimeError: the store is gone.
        """
        if self.has(*keys.values()):
            return
        absent = list(keys)
        began = time.monotonic()

        def look(seconds: float) -> None:
            end = time.monotonic() + min(seconds, LOOK_S)
            while (now := time.monotonic()) <= end:
                if self.has(*keys.values()):
                    return
                time.sleep(min(POLL_S, 0.001 + (now - began) / 4))
            absent[:] = [rank for rank, key in keys.items() if not self.has(key)] or absent
            raise Empty

        def late(waited_s: float, verdict: str) -> DeadlineExceeded:
            return DeadlineExceeded(
                f"rank {self.rank} has waited {waited_s:g} s for {ranks(absent)} to {what}; {verdict}"
            )

        absent = [rank for rank, key in keys.items() if not self.has(key)] or absent
        self.wait(look, lambda: (absent[0], f"for rank {absent[0]} to {what}"), late)

    # -- all ranks together --------------------------------------------------------------------------------------------

    def meet(self, place: str, what: str) -> None:
        """Wait until all ranks are here; ``what`` they do then, as ``"finish"``. Each ``place`` once. Collective."""
        keys = self.each(Key.MEET, place=place)
        self.set(keys[self.rank])
        self.wait_for(keys, what)

    def collect(self, name: str, value: str) -> list[str]:
        """Everyone's ``value``, by rank, on every rank; each ``name`` once. Collective, through the store: for little.

        Raises:
            DeadlineExceeded: naming the ranks that did not answer.
        """
        keys = self.each(Key.VALUE, name=name)
        self.set(keys[self.rank], value)
        self.wait_for(keys, f"publish {name}")
        return self.get(keys.values())

    def agree(self, name: str, value: str) -> None:
        """Refuse to go on unless every rank passes the same ``value``; each ``name`` once. Collective.

        Raises:
            ConfigError: naming the ranks that differ.
            DeadlineExceeded: naming the ranks that did not answer.
        """
        values = self.collect(name, value)
        if len(set(values)) > 1:
            quoted = [f"'{value}'" for value in values]
            raise ConfigError(f"ranks disagree about {name}: {holders(quoted)}")

    def gather(self, value: Any) -> list[Any] | None:
        """Every rank's ``value`` (picklable), by rank, on rank 0; None elsewhere. Collective.

        Raises DeadlineExceeded naming the ranks that did not come, PeerLost. So does ``broadcast``.
        """
        if self.size == 1:
            return [value]
        values: list[Any] | None = [None] * self.size if self.leads else None
        with self._objects_of("gather"):
            dist.gather_object(value, values, dst=0, group=self.group)
        return values

    def broadcast(self, value: T) -> T:
        """Rank 0's ``value`` (picklable) on every rank, once all are here. Collective."""
        if self.size == 1:
            return value
        box = [value]
        with self._objects_of("broadcast"):
            dist.broadcast_object_list(box, src=0, group=self.group)
        return box[0]

    @contextlib.contextmanager
    def _objects_of(self, name: str) -> Iterator[None]:
        """Meet in the store first: gloo's own deadline knows neither who is missing nor who is slow."""
        self._objects += 1
        self.meet(f"{name} {self._objects}", f"come to a {name}")
        try:
            yield
        except RuntimeError as exc:
            raise PeerLost(-1, f"rank {self.rank} was in a {name} when it lost a peer") from exc


def ranks(numbers: Iterable[int]) -> str:
    """``rank 1``, or ``ranks 0, 2``."""
    numbers = list(numbers)
    return ("rank " if len(numbers) == 1 else "ranks ") + ", ".join(map(str, numbers))


def holders(values: list[str]) -> str:
    """Who has which value, of values by rank: ``ranks 0, 2 have 0.1; rank 1 has 0.2``."""
    found: dict[str, list[int]] = {}
    for rank, value in enumerate(values):
        found.setdefault(value, []).append(rank)
    return "; ".join(f"{ranks(who)} {'has' if len(who) == 1 else 'have'} {value}" for value, who in found.items())
