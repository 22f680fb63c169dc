"""How fast neighbouring ranks reach each other, through the edges that training uses.

    first   0 <-> 1   2 <-> 3          each rank is in one pair at a time, so a slow one slows no other
    then        1 <-> 2   3 <-> 4

    latency      small message down, small answer up, over and over
    bandwidth    large messages down for a while, then up, as many on their way as training has

The upper rank of a pair begins and says which message is the last: no clock is compared.
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
from pipeline.edges.transport import Receiver, Sender
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
    runtime: Runtime, sizes: Sequence[tuple[int, int]], seconds: float, hosts: Sequence[str]
) -> tuple[PairTimes, ...]:
    """Latency and bandwidth of all pairs, on rank 0; nothing elsewhere. Collective.

    Args:
        sizes: of a message down and of one up, in bytes, by the upper rank of a pair.
        seconds: for all of it.
        hosts: of every rank, by rank.

    Raises:
        DeadlineExceeded, PeerLost: naming the pair and what was measured.
    """
    slice_s = seconds / 6  # two pairs, three measurements each
    device, parts = runtime.device, list[Part]()
    with _edges(runtime, "small", [(SMALL_BYTES, SMALL_BYTES)] * len(sizes)) as (team, edges):
        for turn in range(2):
            parts += _turn(runtime, team, turn, LATENCY, lambda above: _latency(edges, device, above, slice_s))
    with _edges(runtime, "large", sizes) as (team, edges):
        down = (edges.activation_out, edges.activation_in, MessageKind.TRAIN)
        up = (edges.gradient_out, edges.gradient_in, MessageKind.GRADIENT)
        for turn in range(2):
            parts += _turn(runtime, team, turn, DOWN, lambda above: _bandwidth(*down, device, above, slice_s))
            parts += _turn(runtime, team, turn, UP, lambda above: _bandwidth(*up, device, not above, slice_s))
    gathered = runtime.team.gather(parts)
    if gathered is None:
        return ()
    found = {(part.upper, part.what): part.value for of_rank in gathered for part in of_rank}
    return tuple(
        PairTimes(
            upper,
            hosts[upper] != hosts[upper + 1],
            found[upper, LATENCY],
            *sizes[upper],
            found[upper, DOWN],
            found[upper, UP],
        )
        for upper in range(len(sizes))
    )


@contextlib.contextmanager
def _edges(runtime: Runtime, name: str, sizes: Sequence[tuple[int, int]]) -> Iterator[tuple[Team, Edges]]:
    """Edges of their own, with keys of their own in the store, for messages of ``sizes``."""
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
    edges = connect(
        team,
        specs,
        activation_slots=DEPTH,
        gradient_slots=DEPTH,
        depth=DEPTH,
        device=runtime.device,
        backend=runtime.backend,
    )
    yield team, edges
    edges.close()


def _spec(name: str, nbytes: int) -> MessageSpec:
    """Of a message of so many bytes, or of the smallest one: header and one byte."""
    return MessageSpec((FieldSpec(name, torch.uint8, (max(nbytes - HEADER_BYTES, 1),)),), max_rows=1)


def _turn(
    runtime: Runtime, team: Team, turn: int, what: str, measure: Callable[[bool], float | None]
) -> list[Part]:
    """Every second pair at the same time; ``measure`` is told whether this rank is the upper one."""
    rank = team.rank
    upper = rank if rank % 2 == turn else rank - 1
    parts = []
    if 0 <= upper < team.size - 1:
        pair = f"rank {upper} <-> rank {upper + 1}"
        runtime.failures.progress(0, 0, f"the check of {pair}")
        with _named(f"{pair} failed the check of its {what}"):
            value = measure(rank == upper)
        if value is not None:
            parts.append(Part(upper, what, value))
    runtime.failures.progress(0, 0, "waiting for the other pairs")
    team.meet(f"{what} {turn}", f"end the check of their {what}")
    return parts


@contextlib.contextmanager
def _named(what: str) -> Iterator[None]:
    """Inside, the line about a neighbour that is lost or late begins with the pair."""
    try:
        yield
    except DeadlineExceeded as error:
        raise DeadlineExceeded(f"{what}: {error}") from error
    except PeerLost as error:
        raise PeerLost(error.peer, f"{what}: {error}") from error


def _latency(edges: Edges, device: torch.device, above: bool, slice_s: float) -> float | None:
    """Half of the median round trip, for the upper rank."""
    if not above:
        assert edges.activation_in is not None and edges.gradient_out is not None
        answer = _message(edges.gradient_out, device)
        for step in itertools.count():
            last = _take(edges.activation_in, MessageKind.TRAIN, step)
            _send(edges.gradient_out, MessageKind.GRADIENT, step, last, answer)
            if last:
                return None
    assert edges.activation_out is not None and edges.gradient_in is not None
    message, times = _message(edges.activation_out, device), []
    end = time.monotonic() + slice_s
    for step in itertools.count():
        last = step + 1 >= WARM_UP + LEAST and time.monotonic() >= end
        began = time.perf_counter()
        _send(edges.activation_out, MessageKind.TRAIN, step, last, message)
        _take(edges.gradient_in, MessageKind.GRADIENT, step)
        times.append(time.perf_counter() - began)
        if last:
            break
    return statistics.median(times[WARM_UP:]) / 2


def _bandwidth(
    sender: Sender | None,
    receiver: Receiver | None,
    kind: MessageKind,
    device: torch.device,
    sends: bool,
    slice_s: float,
) -> float | None:
    """Bytes per second, for the receiving rank."""
    if sends:
        assert sender is not None
        message = _message(sender, device)
        end = time.monotonic() + slice_s
        for step in itertools.count():
            last = step + 1 >= WARM_UP + LEAST and time.monotonic() >= end
            _send(sender, kind, step, last, message)
            if last:
                return None
    assert receiver is not None
    arrived = []
    for step in itertools.count():
        last = _take(receiver, kind, step)
        arrived.append(time.perf_counter())
        if last:
            break
    counted = arrived[WARM_UP - 1 :]
    return (len(counted) - 1) * receiver.spec.nbytes / (counted[-1] - counted[0])


def _message(sender: Sender, device: torch.device) -> dict[str, torch.Tensor]:
    (field,) = sender.spec.fields
    return {field.name: torch.zeros(1, *field.shape_per_row, dtype=field.dtype, device=device)}


def _send(sender: Sender, kind: MessageKind, step: int, last: bool, message: dict[str, torch.Tensor]) -> None:
    sender.send(Header(kind, 0, step, 0, rows=1, batch_rows=int(last)), **message)


def _take(receiver: Receiver, kind: MessageKind, step: int) -> bool:
    """Whether the message is the last one."""
    received = receiver.take(kind, 0, step, 0)
    received.release()
    return bool(received.header.batch_rows)
