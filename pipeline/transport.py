"""One directed edge between two ranks: a 2-rank process group, one FIFO, checked messages. Knows no model.

    rank r                                                      rank r + 1
    send() -> [slot][slot] == isend, 2-rank group ==> [slot][slot][slot] -> thread: header ok? -> take()
              ^ a thread frees the slot once taken    ^ release() posts the slot again: back-pressure

A message is ONE flat uint8 buffer, always sent in full so that both ends agree on the count (short messages
pass silently, long ones abort the receiver):

    | header: 16 int64 words, 128 B | field 0: max_rows rows | pad to 64 B | field 1 | ...

Why threads: a gloo ``Work`` completes only inside ``wait()``, and a ``wait()`` that times out closes the pair
for ever. So daemon threads wait in C++ without limit, and the main thread waits on a Python queue with a
deadline: it stays interruptible, and a late peer costs an error message and not the connection. Receives are
posted ahead, so the two directions cannot dead-lock. gloo does not notice a peer killed in mid-transfer; the
deadline covers that.

Where the bytes live: CPU or NCCL - the buffer the fields are views of is the buffer on the wire. CUDA over
gloo (ranks sharing a GPU) - the wire buffer is pinned host memory and each slot has a twin on the device.
"""

from __future__ import annotations

import hashlib
import json
import queue
import re
import threading
import time
from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass, replace
from datetime import timedelta
from enum import IntEnum

import torch
import torch.distributed as dist

from pipeline.errors import ConfigError, DeadlineExceeded, PeerLost, WireError

MAGIC = 0x6C6F63616C706970  # "localpip"
WORDS = 16
HEADER_BYTES = 8 * WORDS
ALIGN = 64
FOREVER = timedelta(days=7)
"""For waits in daemon threads: the deadline of the main thread governs, not the group's."""


class Kind(IntEnum):
    """What a message carries."""

    TRAIN = 1
    EVAL = 2
    GRADIENT = 3
    DONE = 4


@dataclass(frozen=True)
class Header:
    """Which message this is.

    ``rows``: how many rows of each field are filled. ``key`` and ``batch_rows`` (rows of the whole batch that
    this micro-batch is a part of) are carried for the caller.
    """

    kind: Kind
    epoch: int
    step: int
    micro_batch: int
    key: int = 0
    rows: int = 0
    batch_rows: int = 0

    def __str__(self) -> str:
        return f"epoch {self.epoch} step {self.step} micro-batch {self.micro_batch}"


@dataclass(frozen=True)
class FieldSpec:
    """One tensor of a message, (rows, *shape_per_row); ``channels_last`` (4-D only) travels as NHWC bytes."""

    name: str
    dtype: torch.dtype
    shape_per_row: tuple[int, ...]
    channels_last: bool = False

    def __post_init__(self) -> None:
        if self.channels_last and len(self.shape_per_row) != 3:
            raise WireError(
                f"field {self.name!r}: channels_last needs (C, H, W) per row, got {self.shape_per_row}"
            )

    def nbytes(self, rows: int) -> int:
        """Bytes of ``rows`` rows."""
        return rows * self.dtype.itemsize * torch.Size(self.shape_per_row).numel()

    def __str__(self) -> str:
        layout = " channels_last" if self.channels_last else ""
        return f"{self.name} {str(self.dtype).removeprefix('torch.')} {self.shape_per_row}{layout}"


@dataclass(frozen=True)
class MessageSpec:
    """The fields of every message on one edge, and the most rows one message can carry."""

    fields: tuple[FieldSpec, ...]
    max_rows: int

    @property
    def nbytes(self) -> int:
        """Size of every message on the wire, header included."""
        return HEADER_BYTES + sum(_aligned(field.nbytes(self.max_rows)) for field in self.fields)

    def fingerprint(self) -> int:
        """63-bit number, the same on every machine, that any other name, dtype or shape changes."""
        return int.from_bytes(hashlib.sha256(self.describe().encode()).digest()[:8], "big") >> 1

    def describe(self) -> str:
        """One line, e.g. ``64 rows of activation bfloat16 (16, 32, 32) channels_last + labels int64 ()``."""
        return f"{self.max_rows} rows of " + " + ".join(map(str, self.fields))

    def views(self, buffer: torch.Tensor) -> dict[str, torch.Tensor]:
        """Views (max_rows, *shape_per_row) of each field into ``buffer``, uint8 (nbytes,).

        Channels-last views have the strides of ``torch.empty(shape, memory_format=torch.channels_last)``.
        """
        views = {}
        offset = HEADER_BYTES
        for field in self.fields:
            flat = buffer[offset : offset + field.nbytes(self.max_rows)].view(field.dtype)
            if field.channels_last:
                c, h, w = field.shape_per_row
                views[field.name] = flat.view(self.max_rows, h, w, c).permute(0, 3, 1, 2)
            else:
                views[field.name] = flat.view(self.max_rows, *field.shape_per_row)
            offset += _aligned(field.nbytes(self.max_rows))
        return views


def _aligned(nbytes: int) -> int:
    return -(-nbytes // ALIGN) * ALIGN


class _Slot:
    """One preallocated message: bytes on the wire, fields on the compute device, header words on the host."""

    def __init__(self, spec: MessageSpec, device: torch.device, gloo: bool) -> None:
        cuda = device.type == "cuda"
        self.staged = cuda and gloo
        self.on_device = cuda and not gloo  # NCCL: the wire buffer itself is on the device
        wire_device = torch.device("cpu") if gloo else device
        self.wire = torch.zeros(spec.nbytes, dtype=torch.uint8, device=wire_device, pin_memory=self.staged)
        self.local = torch.zeros_like(self.wire, device=device) if self.staged else self.wire
        self.views = spec.views(self.local)
        self.words = self.wire[:HEADER_BYTES].view(torch.int64)
        self.host_words = (
            torch.zeros(WORDS, dtype=torch.int64, pin_memory=True) if self.on_device else self.words
        )
        self.copied = torch.cuda.Event() if self.staged else None
        self.side = torch.cuda.Stream(device) if self.on_device else None

    @torch.no_grad()
    def pack(self, words: Sequence[int], rows: int, tensors: dict[str, torch.Tensor]) -> None:
        """Fill header and fields. Returns once a following isend reads the right bytes."""
        for name, tensor in tensors.items():
            self.views[name][:rows].copy_(tensor)
        if self.copied is not None:
            self.wire[HEADER_BYTES:].copy_(self.local[HEADER_BYTES:], non_blocking=True)
            self.copied.record()
            self.copied.synchronize()  # gloo's thread reads host memory and knows no CUDA stream
        self.host_words.copy_(torch.tensor([*words, *[0] * (WORDS - len(words))]))
        if self.on_device:
            self.words.copy_(self.host_words, non_blocking=True)  # isend waits for this stream: no host wait

    def finish(self, work: dist.Work) -> list[int]:
        """Block this (daemon) thread until the transfer is over; return the header words.

        NCCL: ``work.wait()`` only orders this thread's side stream after the transfer, so that stream is
        synchronised here; afterwards the main thread may use the buffer on any stream.
        """
        if self.side is None:
            work.wait(FOREVER)
        else:
            with torch.cuda.stream(self.side):
                work.wait()
                self.host_words.copy_(self.words, non_blocking=True)
                self.side.synchronize()
        return self.host_words.tolist()

    def unpack(self, rows: int) -> dict[str, torch.Tensor]:
        """Views of the first ``rows`` rows of the fields present, on the compute device's current stream."""
        present = int(self.host_words[3])
        if self.copied is not None:
            self.local[HEADER_BYTES:].copy_(self.wire[HEADER_BYTES:], non_blocking=True)
            self.copied.record()
        return {
            name: view[:rows] for bit, (name, view) in enumerate(self.views.items()) if present >> bit & 1
        }

    def before_reuse(self) -> None:
        """The next transfer may overwrite the wire buffer. NCCL: irecv waits for the current stream."""
        if self.copied is not None:
            self.copied.synchronize()


class _End:
    """What both ends of an edge share: who they are, how they word a failure."""

    def __init__(
        self,
        group: dist.ProcessGroup,
        peer_rank: int,
        spec: MessageSpec,
        deadline_s: float,
        device: torch.device,
        label: str,
    ) -> None:
        self.wait_s = 0.0
        self.spec = spec
        self._group = group
        self._peer = peer_rank
        self._rank = dist.get_rank()
        self._deadline_s = deadline_s
        self._device = device
        self._label = label
        self._gloo = dist.get_backend(group) == "gloo"
        self._fingerprint = spec.fingerprint()

    def _start(self, loop: str) -> threading.Thread:
        thread = threading.Thread(target=getattr(self, loop), name=f"{self._label}-{self._peer}", daemon=True)
        thread.start()
        return thread

    def _bind_device(self) -> None:
        if self._device.type == "cuda":
            torch.cuda.set_device(self._device)  # the current device is per thread

    def _late(self, doing: str, more: str = "") -> DeadlineExceeded:
        return DeadlineExceeded(
            f"rank {self._rank} has waited {self._deadline_s:g} s {doing}{more}; rank {self._peer} is slow, "
            "hung or stopped - raise runtime.deadline_s if the step really takes that long"
        )

    def _lost(self, doing: str, cause: BaseException) -> PeerLost:
        # gloo: "[<path of its build>] Connection closed by peer [127.0.0.1]:37112. This is typically ..."
        text = re.sub(r"^\[[^]]*\] ", "", str(cause)).split(". ")[0].splitlines()[:1]
        reason = "".join(text) or type(cause).__name__
        return PeerLost(self._peer, f"rank {self._rank} was {doing} when the connection was lost ({reason})")


class Sender(_End):
    """Sending end of an edge.

    ``depth`` messages can be on their way; ``send`` then blocks until the peer takes the oldest, and adds the
    time to ``wait_s``. ``peer_slots`` is the ``slots`` of the receiving end: that many receives are posted
    there, so that many DONE messages end the stream. Counters: ``wait_s``, ``bytes_sent``.
    """

    def __init__(
        self,
        group: dist.ProcessGroup,
        peer_rank: int,
        spec: MessageSpec,
        depth: int,
        peer_slots: int,
        deadline_s: float,
        device: torch.device,
        label: str,
    ) -> None:
        super().__init__(group, peer_rank, spec, deadline_s, device, label)
        self.bytes_sent = 0
        self._sequence = 0
        self._peer_slots = peer_slots
        self._free: queue.SimpleQueue[_Slot | None] = queue.SimpleQueue()
        self._in_flight: queue.SimpleQueue[tuple[dist.Work, _Slot] | None] = queue.SimpleQueue()
        self._untaken: deque[Header] = deque()
        self._failure: PeerLost | None = None
        self._finished = False
        self._depth = depth
        for _ in range(depth):
            self._free.put(_Slot(spec, device, self._gloo))
        self._thread = self._start("_drain")

    def send(self, header: Header, **tensors: torch.Tensor) -> None:
        """Copy ``tensors``, (header.rows, *shape_per_row) by field name, into a free slot; start sending it.

        A field may be left out: the message is as long, but arrives without it.
        The tensors may be changed as soon as this returns. A float tensor is cast to the field's float dtype.
        Raises WireError (wrong fields, shape or dtype), DeadlineExceeded, PeerLost.
        """
        self._check(header, tensors)
        start = time.monotonic()
        try:
            slot = self._take_free(self._deadline_s)
        finally:
            self.wait_s += time.monotonic() - start
        slot.pack(self._words(header, tensors), header.rows, tensors)
        self._post(slot, header)
        self._sequence += 1

    def flush(self) -> None:
        """Wait until the peer has taken every message. Raises DeadlineExceeded, PeerLost."""
        end = time.monotonic() + self._deadline_s
        for slot in [self._take_free(end - time.monotonic()) for _ in range(self._depth)]:
            self._free.put(slot)

    def finish(self) -> None:
        """Announce the end of the stream: one DONE per receive of the peer; does not wait for it."""
        self.flush()
        header = Header(Kind.DONE, 0, 0, 0)
        slot = _Slot(self.spec, self._device, self._gloo)
        slot.pack(self._words(header, {}), 0, {})
        for _ in range(self._peer_slots):
            self._post(slot, header)
        self._in_flight.put(None)
        self._finished = True

    def close(self) -> None:
        """``finish`` unless done, then wait until the peer has taken it all and end the thread."""
        if not self._finished:
            self.finish()
        self._thread.join(self._deadline_s)
        if self._failure is not None:
            raise self._failure
        if self._thread.is_alive():
            raise self._late(f"for rank {self._peer} to close the {self._label} edge")

    def _check(self, header: Header, tensors: dict[str, torch.Tensor]) -> None:
        if (
            not tensors.keys() <= {field.name for field in self.spec.fields}
            or header.rows > self.spec.max_rows
        ):
            raise WireError(
                f"rank {self._rank}: {header.rows} rows of {sorted(tensors)} do not fit the edge to rank "
                f"{self._peer}: {self.spec.describe()}"
            )
        for field in self.spec.fields:
            tensor = tensors.get(field.name)
            if tensor is None:
                continue
            castable = tensor.dtype == field.dtype or (
                tensor.is_floating_point() and field.dtype.is_floating_point
            )
            if tuple(tensor.shape) != (header.rows, *field.shape_per_row) or not castable:
                raise WireError(
                    f"rank {self._rank}: {field.name} {tensor.dtype} {tuple(tensor.shape)} does not fit "
                    f"{header.rows} rows of {field} on the edge to rank {self._peer}"
                )

    def _words(self, header: Header, tensors: dict[str, torch.Tensor]) -> list[int]:
        present = sum(1 << bit for bit, field in enumerate(self.spec.fields) if field.name in tensors)
        return [MAGIC, self._fingerprint, self._sequence, present, *vars(header).values()]

    def _post(self, slot: _Slot, header: Header) -> None:
        self._untaken.append(header)
        try:
            work = dist.isend(slot.wire, self._peer, group=self._group)
        except RuntimeError as exc:
            raise self._lost(f"sending the {self._label} of {header} to rank {self._peer}", exc) from exc
        # The queue keeps the Work alive: a Work that is garbage-collected is never delivered.
        self._in_flight.put((work, slot))
        self.bytes_sent += self.spec.nbytes

    def _take_free(self, timeout_s: float) -> _Slot:
        try:
            slot = self._free.get(timeout=max(timeout_s, 0.001))
        except queue.Empty:
            oldest = self._untaken[0] if self._untaken else "the last step"
            raise self._late(f"for rank {self._peer} to take the {self._label} of {oldest}") from None
        if self._failure is not None or slot is None:
            self._free.put(None)  # every later call fails as well
            raise self._failure or PeerLost(
                self._peer, f"the {self._label} edge to rank {self._peer} is closed"
            )
        return slot

    def _drain(self) -> None:
        self._bind_device()
        while (item := self._in_flight.get()) is not None:
            work, slot = item
            try:
                slot.finish(work)
            except RuntimeError as exc:
                self._failure = self._lost(
                    f"waiting for rank {self._peer} to take the {self._label} of {self._untaken[0]}", exc
                )
                self._free.put(None)
                return
            if self._untaken.popleft().kind is not Kind.DONE:
                self._free.put(slot)


@dataclass(frozen=True)
class Message:
    """A received message. ``fields``: tensors (header.rows, *shape_per_row), valid until ``release``."""

    header: Header
    fields: dict[str, torch.Tensor]
    _receiver: Receiver
    _slot: _Slot

    def release(self) -> None:
        """Give the slot back to the wire. On CUDA: reads on other streams must be ordered before this one."""
        self._receiver._release(self._slot)


class Receiver(_End):
    """Receiving end of an edge: ``slots`` receives are posted ahead, each again once its message is released.

    Counters: ``messages`` taken, ``wait_s`` seconds ``take`` has blocked.
    """

    def __init__(
        self,
        group: dist.ProcessGroup,
        peer_rank: int,
        spec: MessageSpec,
        slots: int,
        deadline_s: float,
        device: torch.device,
        label: str,
    ) -> None:
        super().__init__(group, peer_rank, spec, deadline_s, device, label)
        self.messages = 0
        self._slots = slots
        self._posted: queue.SimpleQueue[tuple[dist.Work, _Slot]] = queue.SimpleQueue()
        self._ready: queue.SimpleQueue[tuple[Header, _Slot] | Exception | None] = queue.SimpleQueue()
        self._held: set[_Slot] = set()
        self._last = "no message yet"
        self._last_time = 0.0
        self._ended: Exception | None = None
        for _ in range(slots):
            self._post(_Slot(spec, device, self._gloo))
        self._thread = self._start("_listen")

    def take(self, expected_kind: Kind, epoch: int, step: int, micro_batch: int, key: int = 0) -> Message:
        """Return the next message, which must be the one named here.

        Raises WireError (another message, or the stream has ended), DeadlineExceeded, PeerLost.
        """
        wanted = Header(expected_kind, epoch, step, micro_batch, key)
        start = time.monotonic()
        try:
            item = self._next(f"for the {self._label} of {wanted} from rank {self._peer}", self._deadline_s)
        finally:
            self.wait_s += time.monotonic() - start
        if item is None:
            self._ended = WireError(
                f"rank {self._rank} expected the {self._label} of {wanted}, "
                f"but rank {self._peer} has ended its stream"
            )
            raise self._ended
        header, slot = item
        self._held.add(slot)
        if replace(header, rows=0, batch_rows=0) != wanted:
            raise WireError(
                f"rank {self._rank} expected {expected_kind.name} {wanted} key {key} from rank {self._peer}, "
                f"got {header.kind.name} {header} key {header.key}"
            )
        self.messages += 1
        self._last, self._last_time = f"step {step}", time.monotonic()
        return Message(header, slot.unpack(header.rows), self, slot)

    def queue_depth(self) -> int:
        """Messages that have arrived and are not taken yet."""
        return self._ready.qsize()

    def close(self) -> int:
        """Drain the stream, release all slots and end the thread; return how many messages nobody took."""
        unread = 0
        for slot in list(self._held):
            self._release(slot)
        end = time.monotonic() + self._deadline_s
        doing = f"for rank {self._peer} to end its {self._label} stream"
        while self._ended is None:
            item = self._next(doing, end - time.monotonic())
            if item is None:
                break
            unread += 1
            self._post(item[1])
        self._thread.join(max(end - time.monotonic(), 0.001))
        if self._thread.is_alive():
            raise self._late(doing)
        return unread

    def _next(self, doing: str, timeout_s: float) -> tuple[Header, _Slot] | None:
        if self._ended is not None:
            raise self._ended
        try:
            item = self._ready.get(timeout=max(timeout_s, 0.001))
        except queue.Empty:
            age = f", {time.monotonic() - self._last_time:.1f} s ago" if self.messages else ""
            raise self._late(
                f"(deadline {self._deadline_s:g} s) {doing}", f"; last message: {self._last}{age}"
            ) from None
        if isinstance(item, BaseException):
            self._ended = self._lost(f"waiting {doing}", item) if isinstance(item, RuntimeError) else item
            raise self._ended
        return item

    def _post(self, slot: _Slot) -> None:
        slot.before_reuse()
        try:
            work = dist.irecv(slot.wire, self._peer, group=self._group)
        except RuntimeError as exc:
            raise self._lost(f"waiting for the {self._label} from rank {self._peer}", exc) from exc
        self._posted.put((work, slot))

    def _release(self, slot: _Slot) -> None:
        self._held.remove(slot)  # KeyError: released twice
        self._post(slot)

    def _listen(self) -> None:
        self._bind_device()
        arrived = goodbyes = 0
        try:
            while goodbyes < self._slots:
                work, slot = self._posted.get()
                header = self._validate(slot.finish(work), arrived)
                if header.kind is Kind.DONE:
                    goodbyes += 1
                    if goodbyes == 1:
                        self._ready.put(None)
                else:
                    arrived += 1
                    self._ready.put((header, slot))
        except (RuntimeError, WireError) as exc:
            self._ready.put(exc)

    def _validate(self, words: list[int], sequence: int) -> Header:
        expected = {"magic": MAGIC, "spec fingerprint": self._fingerprint, "sequence number": sequence}
        for (name, value), got in zip(expected.items(), words, strict=False):
            if got != value:
                raise WireError(
                    f"rank {self._rank} expected {name} {value} in the {self._label} from rank {self._peer}, "
                    f"but rank {self._peer} sent {got}"
                )
        kind, *rest = words[4:11]
        return Header(Kind(kind), *rest)


@dataclass(frozen=True)
class EdgeSpecs:
    """What one rank receives and sends; None where there is no such edge (ends of the chain, no cascade)."""

    activation_in: MessageSpec | None = None
    """from rank - 1"""
    activation_out: MessageSpec | None = None
    """to rank + 1"""
    gradient_in: MessageSpec | None = None
    """from rank + 1"""
    gradient_out: MessageSpec | None = None
    """to rank - 1"""


@dataclass
class Edges:
    """The ends of the edges of one rank, named as in EdgeSpecs."""

    activation_in: Receiver | None = None
    activation_out: Sender | None = None
    gradient_in: Receiver | None = None
    gradient_out: Sender | None = None

    def close(self) -> int:
        """End all streams in an order that cannot dead-lock; return how many arrived messages nobody took."""
        senders = [end for end in (self.activation_out, self.gradient_out) if end is not None]
        receivers = [end for end in (self.activation_in, self.gradient_in) if end is not None]
        for sender in senders:
            sender.finish()
        unread = sum(receiver.close() for receiver in receivers)
        for sender in senders:
            sender.close()
        return unread


def connect(
    store: dist.Store,
    rank: int,
    world_size: int,
    specs: EdgeSpecs,
    *,
    slots: int,
    depth: int,
    deadline_s: float,
    device: torch.device,
    backend: str,
) -> Edges:
    """Agree on all messages, then create one group per directed edge. Collective: every rank calls it.

    Before any group exists each edge's two descriptions are compared; WireError names both sides. Groups are
    made and warmed up in one order on all ranks: down 0->1, up 1->0, down 1->2, ... Raises DeadlineExceeded,
    PeerLost.
    """
    texts = {name: spec and f"{spec.describe()}, {slots} slots" for name, spec in vars(specs).items()}
    everyone = [
        json.loads(t) for t in _collect(store, rank, world_size, "edges", json.dumps(texts), deadline_s)
    ]
    edges = Edges()
    for upper in range(world_size - 1):
        for label, source, target in (("activation", upper, upper + 1), ("gradient", upper + 1, upper)):
            sent, expected = everyone[source][f"{label}_out"], everyone[target][f"{label}_in"]
            if sent != expected:
                raise WireError(
                    f"rank {target} expects {expected or f'no {label}'} from rank {source}, "
                    f"rank {source} sends {sent or f'no {label}'}"
                )
    for upper in range(world_size - 1):
        for label, source, target in (("activation", upper, upper + 1), ("gradient", upper + 1, upper)):
            if everyone[source][f"{label}_out"] is None:
                continue
            # gloo: bounds the connection only, waits pass FOREVER. NCCL: the watchdog would kill a
            # posted-ahead receive.
            timeout = timedelta(seconds=deadline_s) if backend == "gloo" else FOREVER
            group = dist.new_group([source, target], timeout=timeout, backend=backend)
            if rank not in (source, target):
                continue
            _warm_up(group, source, target, device if backend != "gloo" else torch.device("cpu"))
            if rank == source:
                spec = getattr(specs, f"{label}_out")
                end = Sender(group, target, spec, depth, slots, deadline_s, device, label)
                setattr(edges, f"{label}_out", end)
            else:
                spec = getattr(specs, f"{label}_in")
                setattr(edges, f"{label}_in", Receiver(group, source, spec, slots, deadline_s, device, label))
    return edges


def _warm_up(group: dist.ProcessGroup, source: int, target: int, device: torch.device) -> None:
    """One element each way of the edge: a lazily built communicator is built now, in the common order."""
    one = torch.zeros(1, device=device)
    rank = dist.get_rank()
    peer = target if rank == source else source
    try:
        if rank == source:
            dist.send(one, target, group=group)
        else:
            dist.recv(one, source, group=group)
    except RuntimeError as exc:
        raise PeerLost(peer, f"rank {rank} was connecting to rank {peer} when it failed ({exc})") from exc


def agree(
    store: dist.Store | None, rank: int, world_size: int, name: str, value: str, deadline_s: float
) -> None:
    """Refuse to start unless every rank passes the same ``value``; use each ``name`` once per run.

    Raises ConfigError naming the ranks that differ, DeadlineExceeded naming the ranks that did not answer.
    """
    if store is None:
        return
    values = _collect(store, rank, world_size, name, value, deadline_s)
    holders: dict[str, list[int]] = {}
    for r, v in enumerate(values):
        holders.setdefault(v, []).append(r)
    if len(holders) > 1:
        parts = [
            f"{_ranks(ranks)} {'has' if len(ranks) == 1 else 'have'} '{v}'" for v, ranks in holders.items()
        ]
        raise ConfigError(f"ranks disagree about {name}: " + "; ".join(parts))


def _collect(
    store: dist.Store, rank: int, world_size: int, name: str, value: str, deadline_s: float
) -> list[str]:
    """Publish ``value`` and return everyone's, by rank."""
    keys = [f"agree/{name}/{r}" for r in range(world_size)]
    store.set(keys[rank], value)
    end = time.monotonic() + deadline_s
    while not store.check(keys):  # store.wait would block in C++, and print warnings when it times out
        if time.monotonic() > end:
            missing = _ranks([r for r, key in enumerate(keys) if not store.check([key])])
            raise DeadlineExceeded(f"rank {rank} has waited {deadline_s:g} s for {missing} to publish {name}")
        time.sleep(0.02)
    return [text.decode() for text in store.multi_get(keys)]


def _ranks(ranks: list[int]) -> str:
    return ("rank " if len(ranks) == 1 else "ranks ") + ", ".join(map(str, ranks))
