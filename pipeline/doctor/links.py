"""How fast neighbouring ranks reach each other, through the edges that training uses.

    first   0 <-> 1   2 <-> 3          each rank is in one pair at a time, so a slow one slows no other
    then        1 <-> 2   3 <-> 4

    latency      small message down, small answer up, over and over
    bandwidth    large messages down for a while, then up, as many on their way as training has

Whoever sends first says which message is the last: no clock is compared.
"""

from __future__ import annotations

import contextlib
import itertools
import statistics
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

import torch
import torch.distributed as dist

from pipeline.base.errors import DeadlineExceeded, PeerLost
from pipeline.doctor.finding import PairTimes
from pipeline.edges.connect import Edges, EdgeSpecs, connect
from pipeline.edges.wire import HEADER_BYTES, FieldSpec, Header, MessageKind, MessageSpec
from pipeline.ranks.runtime import Runtime
from pipeline.ranks.team import Team

LATENCY, DOWN, UP = "latency", "bandwidth down", "bandwidth up"
SMALL_BYTES = 192
LARGE_BYTES = 16 * 1024 * 1024
"""Of a message, where no recipe says it."""
DEPTH = 2
WARM_UP = 3
"""Round trips, or messages, that do not count: threads wake, buffers are touched for the first time."""
LEAST = 4
"""Round trips, or messages, that count, however long they take."""


@dataclass(frozen=True)
class Part:
    """What one rank has measured of a pair."""

    upper: int
    what: str
    value: float


def check_pairs(
    runtime: Runtime, sizes: Sequence[tuple[int, int]], seconds: float, nodes: Sequence[str]
) -> tuple[PairTimes, ...]:
    """Latency and bandwidth of all pairs, on rank 0; nothing elsewhere. Collective.

    Args:
        sizes: of a message down and of one up, in bytes, by the upper rank of a pair.
        seconds: for all of it.
        nodes: of every rank, by rank.

    Raises:
        DeadlineExceeded, PeerLost: naming the pair and what was measured.
    """
    slice_s = seconds / 6  # two turns, three measurements each
    parts: list[Part] = []
    with _wire(runtime, "small", [(SMALL_BYTES, SMALL_BYTES)] * len(sizes)) as wire:
        for turn in range(2):
            parts += wire.measure(turn, LATENCY, lambda above: wire.latency(above, slice_s))
    with _wire(runtime, "large", sizes) as wire:
        for turn in range(2):
            parts += wire.measure(turn, DOWN, lambda above: wire.stream(MessageKind.TRAIN, above, slice_s))
            parts += wire.measure(turn, UP, lambda above: wire.stream(MessageKind.GRADIENT, not above, slice_s))
    gathered = runtime.team.gather(parts)
    if gathered is None:
        return ()
    found = {(part.upper, part.what): part.value for of_rank in gathered for part in of_rank}
    return tuple(
        PairTimes(
            upper=upper,
            crosses=nodes[upper] != nodes[upper + 1],
            latency_s=found[upper, LATENCY],
            down_bytes=down,
            up_bytes=up,
            down_bytes_per_s=found[upper, DOWN],
            up_bytes_per_s=found[upper, UP],
        )
        for upper, (down, up) in enumerate(sizes)
    )


@contextlib.contextmanager
def _wire(runtime: Runtime, name: str, sizes: Sequence[tuple[int, int]]) -> Iterator[_Wire]:
    """Edges between all neighbours for messages of ``sizes``, with keys of their own in the store."""
    outer = runtime.team
    store = dist.PrefixStore(name, outer.store)
    team = Team(outer.rank, outer.size, store, deadline_s=outer.deadline_s, patience=outer.patience)
    rank, last = team.rank, team.size - 1
    above, below = sizes[rank - 1] if rank > 0 else None, sizes[rank] if rank < last else None
    specs = EdgeSpecs(
        activation_in=above and _spec("activation", above[0]),
        activation_out=below and _spec("activation", below[0]),
        gradient_in=below and _spec("gradient", below[1]),
        gradient_out=above and _spec("gradient", above[1]),
    )
    # Before the edges: on a GPU, memory is not asked for while receives are posted.
    contents = {
        kind: _contents(spec, runtime.device)
        for kind, spec in ((MessageKind.TRAIN, specs.activation_out), (MessageKind.GRADIENT, specs.gradient_out))
        if spec is not None
    }
    edges = connect(
        team,
        specs,
        activation_slots=DEPTH,
        gradient_slots=DEPTH,
        depth=DEPTH,
        device=runtime.device,
        backend=runtime.backend,
    )
    yield _Wire(runtime, team, edges, contents)
    edges.close()


def _spec(name: str, nbytes: int) -> MessageSpec:
    """Of a message of so many bytes, or of the smallest one: header and one byte."""
    return MessageSpec((FieldSpec(name, torch.uint8, (max(nbytes - HEADER_BYTES, 1),)),), max_rows=1)


def _contents(spec: MessageSpec, device: torch.device) -> dict[str, torch.Tensor]:
    return {
        field.name: torch.zeros(1, *field.shape_per_row, dtype=field.dtype, device=device) for field in spec.fields
    }


@dataclass(frozen=True)
class _Wire:
    """The edges of one rank, and what it sends on them: activations down, gradients up."""

    runtime: Runtime
    team: Team
    edges: Edges
    contents: dict[MessageKind, dict[str, torch.Tensor]]

    def measure(self, turn: int, what: str, measure: Callable[[bool], float | None]) -> list[Part]:
        """Every second pair at the same time; ``measure`` is told whether this rank is the upper one."""
        rank = self.team.rank
        upper = rank if rank % 2 == turn else rank - 1
        parts = []
        if 0 <= upper < self.team.size - 1:
            pair = f"rank {upper} <-> rank {upper + 1}"
            self.runtime.failures.describe(f"in the check of {pair}")  # whoever finds this rank dead says so
            self.runtime.failures.progress(0, 0, f"the check of {pair}")
            with _named(f"{pair} failed the check of its {what}"):
                value = measure(rank == upper)
            if value is not None:
                parts.append(Part(upper, what, value))
        self.runtime.failures.progress(0, 0, "waiting for the other pairs")
        self.team.meet(f"{what} {turn}", f"end the check of their {what}")
        return parts

    def latency(self, above: bool, slice_s: float) -> float | None:
        """Half of the median round trip, for the upper rank."""
        if not above:
            for step in itertools.count():
                last = self._take(MessageKind.TRAIN, step)
                self._send(MessageKind.GRADIENT, step, last)
                if last:
                    return None
        times = []
        for step, last in _for_a_while(slice_s):
            began = time.perf_counter()
            self._send(MessageKind.TRAIN, step, last)
            self._take(MessageKind.GRADIENT, step)
            times.append(time.perf_counter() - began)
        return statistics.median(times[WARM_UP:]) / 2

    def stream(self, kind: MessageKind, sends: bool, slice_s: float) -> float | None:
        """Bytes per second of messages that follow each other, for the receiving rank."""
        if sends:
            for step, last in _for_a_while(slice_s):
                self._send(kind, step, last)
            return None
        arrived = []
        for step in itertools.count():
            last = self._take(kind, step)
            arrived.append(time.perf_counter())
            if last:
                break
        receiver = self.edges.activation_in if kind is MessageKind.TRAIN else self.edges.gradient_in
        assert receiver is not None
        counted = arrived[WARM_UP - 1 :]
        return (len(counted) - 1) * receiver.spec.nbytes / (counted[-1] - counted[0])

    def _send(self, kind: MessageKind, step: int, last: bool) -> None:
        sender = self.edges.activation_out if kind is MessageKind.TRAIN else self.edges.gradient_out
        assert sender is not None
        sender.send(Header(kind, 0, step, 0, rows=1, batch_rows=int(last)), **self.contents[kind])

    def _take(self, kind: MessageKind, step: int) -> bool:
        """Whether the message is the last one."""
        receiver = self.edges.activation_in if kind is MessageKind.TRAIN else self.edges.gradient_in
        assert receiver is not None
        received = receiver.take(kind, 0, step, 0)
        received.release()
        return bool(received.header.batch_rows)


def _for_a_while(slice_s: float) -> Iterator[tuple[int, bool]]:
    """Steps, and whether this one is the last: when the time is over, and enough of them count."""
    end = time.monotonic() + slice_s
    for step in itertools.count():
        last = step + 1 >= WARM_UP + LEAST and time.monotonic() >= end
        yield step, last
        if last:
            return


@contextlib.contextmanager
def _named(what: str) -> Iterator[None]:
    """Inside, the line about a neighbour that is lost or late begins with the pair."""
    try:
        yield
    except DeadlineExceeded as error:
        raise DeadlineExceeded(f"{what}: {error}") from error
    except PeerLost as error:
        raise PeerLost(error.peer, f"{what}: {error}") from error
