"""One directed edge between two ranks: a 2-rank process group, one FIFO, checked messages. Knows no model.

    rank r                                                      rank r + 1
    send() -> [slot][slot] == isend, 2-rank group ==> [slot][slot][slot] -> thread: header ok? -> take()
              ^ a thread frees the slot once taken    ^ release() posts the slot again: back-pressure

Why threads: a gloo ``Work`` completes only inside ``wait()``, and a ``wait()`` that times out closes the pair
for ever. So daemon threads wait in C++ without limit, and the main thread waits on a Python queue with a
deadline: it stays interruptible, and a late peer costs an error message and not the connection. Receives are
posted ahead, so the two directions cannot dead-lock. gloo does not notice a peer killed in mid-transfer; the
deadline covers that. What is different where NCCL carries the fields: :mod:`pipeline.edges.credit`.

All waits are those of the team: what outlasts the deadline goes on while the peer is just slow. A message that is
already here costs nothing.
"""

from __future__ import annotations

import queue
import time
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass, replace

import torch
import torch.distributed as dist

from pipeline.base.errors import PeerLost, WireError
from pipeline.edges.end import Edge, End
from pipeline.edges.wire import FOREVER, MAGIC, Directive, Header, MessageKind, Slot


class Sender(End):
    """Sending end of an edge.

    ``depth`` messages can be on their way; ``send`` then blocks until the peer takes the oldest, and adds the
    time to ``wait_s``. ``peer_slots`` is the ``slots`` of the receiving end: that many receives are posted
    there, so that many DONE messages end the stream. Counters: ``wait_s``, ``bytes_sent`` of training. ``on_taken``,
    if set, is told (header, posted, taken) of every message, seconds of ``time.perf_counter``, from a thread of this
    class.
    """

    def __init__(self, edge: Edge, depth: int, peer_slots: int) -> None:
        super().__init__(edge)
        self.bytes_sent = 0
        self._sequence = 0
        self._peer_slots = peer_slots
        self._free: queue.SimpleQueue[Slot | None] = queue.SimpleQueue()
        self._in_flight: queue.SimpleQueue[tuple[dist.Work, Slot, float] | None] = queue.SimpleQueue()
        self.on_taken: Callable[[Header, float, float], None] | None = None
        self._untaken: deque[Header] = deque()
        self._failure: Exception | None = None
        self._finished = False
        self._depth = depth
        for _ in range(depth):
            self._free.put(self._new_slot())
        self._start()

    def send(self, header: Header, **tensors: torch.Tensor) -> None:
        """Copy ``tensors``, (header.rows, *shape_per_row) by field name, into a free slot; start sending it.

        A field may be left out: the message is as long, but arrives without it.
        The tensors may be changed as soon as this returns. A float tensor is cast to the field's float dtype.
        Raises WireError (wrong fields, shape or dtype), DeadlineExceeded, PeerLost.
        """
        self._check(header, tensors)
        start = time.monotonic()
        try:
            slot = self._take_free()
        finally:
            self.wait_s += time.monotonic() - start
        slot.pack(self._words(header, tensors), header.rows, tensors)
        self._queue(slot, header)
        self._sequence += 1

    def flush(self) -> None:
        """Wait until the peer has taken every message. Raises DeadlineExceeded, PeerLost."""
        end = time.monotonic() + self._team.deadline_s
        for slot in [self._take_free(end - time.monotonic()) for _ in range(self._depth)]:
            self._free.put(slot)

    def finish(self) -> None:
        """Announce the end of the stream: one DONE per receive of the peer; does not wait for it."""
        self.flush()
        header = Header(MessageKind.DONE, 0, 0, 0)
        slot = self._new_slot()
        slot.pack(self._words(header, {}), 0, {})
        for _ in range(self._peer_slots):
            self._queue(slot, header)
        self._after(slot.leave, lambda: self._in_flight.put(None))
        self._finished = True

    def close(self) -> None:
        """``finish`` unless done, then wait until the peer has taken it all and end the thread."""
        if not self._finished:
            self.finish()
        self._join(f"for rank {self._peer} to close the {self._label} edge")
        if self._failure is not None:
            raise self._failure

    def _check(self, header: Header, tensors: dict[str, torch.Tensor]) -> None:
        if (
            not tensors.keys() <= {field.name for field in self.spec.fields}
            or header.rows > self.spec.max_rows
        ):
            raise WireError(
                f"rank {self._team.rank}: {header.rows} rows of {sorted(tensors)} do not fit the edge to rank "
                f"{self._peer}: {self.spec.describe()}"
            )
        for field in self.spec.fields:
            tensor = tensors.get(field.name)
            if tensor is None:
                continue
            castable = tensor.dtype == field.dtype or (
                tensor.is_floating_point() and field.dtype.is_floating_point
            )
            if tensor.shape[:1] != (header.rows,) or not field.fits(tuple(tensor.shape[1:])) or not castable:
                raise WireError(
                    f"rank {self._team.rank}: {field.name} {tensor.dtype} {tuple(tensor.shape)} does not fit "
                    f"{header.rows} rows of {field} on the edge to rank {self._peer}"
                )

    def _words(self, header: Header, tensors: dict[str, torch.Tensor]) -> list[int]:
        present = sum(1 << bit for bit, field in enumerate(self.spec.fields) if field.name in tensors)
        return [MAGIC, self._fingerprint, self._sequence, present, *vars(header).values()]

    def _queue(self, slot: Slot, header: Header) -> None:
        self._untaken.append(header)
        self._after(slot.leave, lambda: self._post(slot, header))
        if header.kind in (MessageKind.TRAIN, MessageKind.GRADIENT, MessageKind.WEIGHTS):
            self.bytes_sent += self.spec.nbytes

    def _post(self, slot: Slot, header: Header) -> None:
        try:
            work = dist.isend(slot.wire, self._peer, group=self._group)
        except RuntimeError as exc:
            raise self._lost(f"sending the {self._label} of {header} to rank {self._peer}", exc) from exc
        assert work is not None  # this rank is in the group
        # The queue keeps the Work alive: a Work that is garbage-collected is never delivered.
        self._in_flight.put((work, slot, time.perf_counter()))

    def _take_free(self, left_s: float | None = None) -> Slot:
        try:
            slot = self._free.get_nowait()
        except queue.Empty:
            oldest = next(iter(self._untaken.copy()), "the last step")  # the thread may take it at this moment
            what = f"for rank {self._peer} to take the {self._label} of {oldest}"
            slot = self._wait(lambda seconds: self._free.get(timeout=seconds), what, left_s)
        if self._failure is not None or slot is None:
            self._free.put(None)  # every later call fails as well
            raise self._failure or PeerLost(
                self._peer, f"the {self._label} edge to rank {self._peer} is closed"
            )
        return slot

    def _broken(self, error: Exception) -> None:
        self._failure = error
        self._free.put(None)

    def _loop(self) -> None:
        while (item := self._in_flight.get()) is not None:
            work, slot, posted_s = item
            try:
                work.wait(FOREVER)
                if self._payload is not None and slot.has_fields():
                    self._payload.send(slot.payload)
            except RuntimeError as exc:
                what = f"waiting for rank {self._peer} to take the {self._label} of {self._untaken[0]}"
                self._broken(self._lost(what, exc))
                return
            header = self._untaken.popleft()
            if self.on_taken is not None:
                self.on_taken(header, posted_s, time.perf_counter())
            if header.kind is not MessageKind.DONE:
                self._free.put(slot)


@dataclass(frozen=True)
class Received:
    """A received message. ``fields``: tensors (header.rows, *shape_per_row), valid until ``release``."""

    header: Header
    fields: dict[str, torch.Tensor]
    _receiver: Receiver
    _slot: Slot

    def release(self) -> None:
        """Give the slot back to the wire. On CUDA: reads on other streams must be ordered before this one."""
        self._receiver._give_back(self._slot)


class Receiver(End):
    """Receiving end of an edge: ``slots`` receives are posted ahead, each again once its message is released.

    Counters: ``messages`` taken, ``wait_s`` seconds ``take`` has blocked.
    """

    def __init__(self, edge: Edge, slots: int) -> None:
        super().__init__(edge)
        self.messages = 0
        self._slots = slots
        self._posted: queue.SimpleQueue[tuple[dist.Work, Slot]] = queue.SimpleQueue()
        self._ready: queue.SimpleQueue[tuple[Header, Slot] | Exception | None] = queue.SimpleQueue()
        self._held: set[Slot] = set()
        self._last = "no message yet"
        self._last_time = 0.0
        self._ended: Exception | None = None
        for _ in range(slots):
            self._grant(self._new_slot())
        self._start()

    def take(self, expected_kind: MessageKind, epoch: int, step: int, micro_batch: int, key: int = 0) -> Received:
        """Return the next message, which must be the one named here.

        Raises WireError (another message, or the stream has ended), DeadlineExceeded, PeerLost.
        """
        wanted = Header(expected_kind, epoch, step, micro_batch, key)
        start = time.monotonic()
        try:
            item = self._next(lambda: f"for the {self._label} of {wanted} from rank {self._peer}")
        finally:
            self.wait_s += time.monotonic() - start
        if item is None:
            self._ended = WireError(
                f"rank {self._team.rank} expected the {self._label} of {wanted}, "
                f"but rank {self._peer} has ended its stream"
            )
            raise self._ended
        header, slot = item
        self._held.add(slot)
        if replace(header, rows=0, batch_rows=0, directive=Directive.GO) != wanted:
            raise WireError(
                f"rank {self._team.rank} expected {expected_kind.name} {wanted} key {key} from rank {self._peer}, "
                f"got {header.kind.name} {header} key {header.key}"
            )
        self.messages += 1
        self._last, self._last_time = f"step {step}", time.monotonic()
        return Received(header, slot.unpack(header.rows), self, slot)

    def queue_depth(self) -> int:
        """Messages that have arrived and are not taken yet."""
        return self._ready.qsize()

    def close(self) -> int:
        """Drain the stream, release all slots and end the thread; return how many messages nobody took."""
        unread = 0
        for slot in list(self._held):
            self._give_back(slot)
        end = time.monotonic() + self._team.deadline_s
        doing = f"for rank {self._peer} to end its {self._label} stream"
        while self._ended is None:
            item = self._next(lambda: doing, end - time.monotonic())
            if item is None:
                break
            unread += 1
            self._grant(item[1])
        self._join(doing, end - time.monotonic())
        return unread

    def _next(self, doing: Callable[[], str], left_s: float | None = None) -> tuple[Header, Slot] | None:
        if self._ended is not None:
            raise self._ended
        try:
            item = self._ready.get_nowait()
        except queue.Empty:
            item = self._wait(lambda seconds: self._ready.get(timeout=seconds), doing(), left_s)
        if isinstance(item, BaseException):
            self._ended = self._lost(f"waiting {doing()}", item) if isinstance(item, RuntimeError) else item
            raise self._ended
        return item

    def _history(self) -> str:
        age = f", {time.monotonic() - self._last_time:.1f} s ago" if self.messages else ""
        return f"; last message: {self._last}{age}"

    def _grant(self, slot: Slot) -> None:
        """Let the peer send one more message, into ``slot``. From any thread."""
        self._after(slot.settle, lambda: self._post(slot))

    def _post(self, slot: Slot) -> None:
        try:
            work = dist.irecv(slot.wire, self._peer, group=self._group)
        except RuntimeError as exc:
            raise self._lost(f"waiting for the {self._label} from rank {self._peer}", exc) from exc
        assert work is not None  # this rank is in the group
        self._posted.put((work, slot))

    def _give_back(self, slot: Slot) -> None:
        """Whatever reads ``slot`` is queued on the current stream: it may be filled again after that."""
        slot.queued()
        self._release(slot)

    def _release(self, slot: Slot) -> None:
        self._held.remove(slot)  # KeyError: released twice
        self._grant(slot)

    def _loop(self) -> None:
        arrived = goodbyes = 0
        try:
            while goodbyes < self._slots:
                work, slot = self._posted.get()
                work.wait(FOREVER)
                header = self._validate(slot.words.tolist(), arrived)
                if header.kind is MessageKind.DONE:
                    goodbyes += 1
                    if goodbyes == 1:
                        self._ready.put(None)
                    continue
                arrived += 1
                if self._payload is not None and slot.has_fields():
                    self._payload.receive(slot.payload)
                slot.arrive()
                self._arrived(header, slot)
        except (RuntimeError, WireError, PeerLost) as exc:
            self._broken(exc)

    def _arrived(self, header: Header, slot: Slot) -> None:
        """A message has arrived (listening thread)."""
        self._ready.put((header, slot))

    def _broken(self, error: Exception) -> None:
        self._ready.put(error)

    def _validate(self, words: list[int], sequence: int) -> Header:
        expected = {"magic": MAGIC, "spec fingerprint": self._fingerprint, "sequence number": sequence}
        for (name, value), got in zip(expected.items(), words, strict=False):
            if got != value:
                raise WireError(
                    f"rank {self._team.rank} expected {name} {value} in the {self._label} from rank {self._peer}, "
                    f"but rank {self._peer} sent {got}"
                )
        kind, epoch, step, micro_batch, key, rows, batch_rows, directive = words[4:12]
        return Header(MessageKind(kind), epoch, step, micro_batch, key, rows, batch_rows, Directive(directive))
