"""The receiving end of an edge for schedule `free`: a replay ring in place of a queue. Knows no model.

    rank r -- isend --> [slot][slot] -> thread: ring of the newest batches -> read(): least used, then newest
                         ^ the oldest batch makes room; its slot is posted again

The thread takes every batch as it comes, so the sender never waits for this rank; ``read`` gives a batch again where no
new one has come, so this rank never waits for the sender, except for the very first batch, and for new ones where
``max_uses`` forbids another use. What is no training batch (tests, the mark at the end of an epoch) stays a queue, in
order. Source: Belilovsky et al. 2020, asynchronous DGL
(docs/methods.md, Asynchronous DGL).
"""

from __future__ import annotations

import queue
import threading
import time
from collections import deque
from dataclasses import dataclass

from pipeline.base.errors import WireError
from pipeline.edges.end import Edge
from pipeline.edges.transport import Received, Receiver
from pipeline.edges.wire import Header, MessageKind, Slot


@dataclass
class _Entry:
    """One batch in the ring."""

    header: Header
    slot: Slot
    uses: int = 0
    at_work: bool = False


@dataclass
class ReplayCounts:
    """``reused``: reads of a batch that had been read before. ``skipped``: batches that made room without ever having
    been read. ``held_back``: times that the reader had to wait because every batch had been used ``max_uses`` times."""

    reused: int = 0
    skipped: int = 0
    held_back: int = 0


class ReplayReceiver(Receiver):
    """Receiving end with a ring of the ``ring`` newest batches, each read at most ``max_uses`` times (0: no limit).

    ``slots`` must be larger than ``ring`` + 1: the rest is posted ahead.
    """

    def __init__(self, edge: Edge, slots: int, ring: int, max_uses: int) -> None:
        assert slots > ring + 1, (slots, ring)
        self.counts = ReplayCounts()
        self._size = ring
        self._max_uses = max_uses
        self._ring: deque[_Entry] = deque()
        self._changed = threading.Condition()
        self._epoch_marks = 0
        self._failed: Exception | None = None
        self._last_arrival = time.monotonic()
        super().__init__(edge, slots)

    def ready(self, epoch: int, started: bool) -> bool:
        """Whether there is a batch to train on in ``epoch``; False: the epoch is over.

        It is over when the sender's mark has come, behind every batch of the epoch; a stage that has not ``started``
        it still gets one. Waits where there is no batch, or none that may be used again.

        Raises:
            DeadlineExceeded: nothing has come for the deadline, and patience is over. The sender may be gone, and
                without this a stage would train on its last batches for ever.
            PeerLost, WireError: the edge is broken.
        """
        start = time.monotonic()
        what = f"for a new {self._label} from rank {self._peer}"

        def look(seconds: float) -> tuple[bool, bool]:
            self._changed.wait(seconds)
            if (found := self._state(epoch, started)) is None:
                raise queue.Empty
            return found

        with self._changed:
            found = self._state(epoch, started)
            if found is None:
                self.counts.held_back += bool(self._ring)
                found = self._wait(look, what)
            over, usable = found
            silent_s = time.monotonic() - self._last_arrival
            if usable and not over and silent_s > self._team.deadline_s:
                verdict = self._team.patience.verdict(self._peer)
                if verdict is not None:
                    raise self._late(what, round(silent_s, 1), verdict)
        self.wait_s += time.monotonic() - start
        return not over or (usable and not started)

    def _state(self, epoch: int, started: bool) -> tuple[bool, bool] | None:
        """Whether the epoch is over, and whether there is a batch to train on; None: it depends on what comes next."""
        over, usable = self._epoch_marks >= epoch, self._choose() is not None
        if not over or (usable and not started):
            self._raise_failure("waiting for a batch")
        return (over, usable) if over or usable else None

    def read(self) -> Received:
        """A batch to train on: among the least used the newest. It stays in place until ``release``. Only where
        :meth:`ready` has said that there is one: what comes later only makes room by dropping older ones."""
        with self._changed:
            entry = self._choose()
            assert entry is not None
            self.counts.reused += entry.uses > 0
            entry.uses += 1
            entry.at_work = True
        self.messages += 1
        return Received(entry.header, entry.slot.unpack(entry.header.rows), self, entry.slot)

    def take_mark(self, epoch: int) -> Header:
        """The mark at the end of ``epoch``, which has come when :meth:`ready` says that the epoch is over.

        Raises:
            WireError: another message is here, or the stream has ended.
        """
        item = self._next(lambda: f"for the end of epoch {epoch} from rank {self._peer}")
        if item is None or item[0].kind is not MessageKind.EPOCH or item[0].epoch != epoch:
            got = "the end of the stream" if item is None else f"{item[0].kind.name} {item[0]}"
            raise WireError(
                f"rank {self._team.rank} expected the end of epoch {epoch} from rank {self._peer}, got {got}"
            )
        header, slot = item
        self._grant(slot)
        self.messages += 1
        return header

    def take_counts(self) -> ReplayCounts:
        """The counts since the last call."""
        with self._changed:
            taken, self.counts = self.counts, ReplayCounts()
        return taken

    def queue_depth(self) -> int:
        """Batches that have arrived and have not been read."""
        with self._changed:
            return sum(entry.uses == 0 for entry in self._ring)

    def close(self) -> int:
        """As of :class:`Receiver`; the ring's slots go back to the wire, so that the end of the stream can arrive."""
        with self._changed:
            while self._ring:
                slot = self._ring.popleft().slot
                slot.queued()  # one may be at work still
                self._grant(slot)
        return super().close()

    def _history(self) -> str:
        return f"; last message: {time.monotonic() - self._last_arrival:.1f} s ago"

    def _raise_failure(self, doing: str) -> None:
        if self._failed is not None:
            raise self._lost(doing, self._failed) if isinstance(self._failed, RuntimeError) else self._failed

    def _choose(self) -> _Entry | None:
        usable = [e for e in self._ring if not self._max_uses or e.uses < self._max_uses]
        if not usable:
            return None
        fewest = min(entry.uses for entry in usable)
        return next(entry for entry in reversed(usable) if entry.uses == fewest)

    def _arrived(self, header: Header, slot: Slot) -> None:
        """Called by the listening thread."""
        with self._changed:
            self._last_arrival = time.monotonic()
            if header.kind is MessageKind.TRAIN:
                self._ring.append(_Entry(header, slot))
                self._make_room()
            else:
                if header.kind is MessageKind.EPOCH:
                    self._epoch_marks = header.epoch
                super()._arrived(header, slot)
            self._changed.notify()

    def _broken(self, error: Exception) -> None:
        with self._changed:
            self._failed = error
            self._changed.notify()
        super()._broken(error)

    def _release(self, slot: Slot) -> None:
        with self._changed:
            for entry in self._ring:
                if entry.slot is slot:
                    entry.at_work = False
                    self._make_room()
                    return
            super()._release(slot)

    def _make_room(self) -> None:
        """Drop the oldest until ``ring`` are left, not counting the one at work."""
        idle = [entry for entry in self._ring if not entry.at_work]
        for entry in idle[: max(len(idle) - self._size, 0)]:
            self._ring.remove(entry)
            self.counts.skipped += entry.uses == 0
            self._grant(entry.slot)
