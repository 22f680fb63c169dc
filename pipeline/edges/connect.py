"""Before step 0: the ranks compare what they are to send each other; then edges are built in one order."""

from __future__ import annotations

import json
from dataclasses import dataclass
from datetime import timedelta

import torch
import torch.distributed as dist

from pipeline.base.errors import PeerLost, WireError
from pipeline.edges.end import Edge
from pipeline.edges.replay import ReplayReceiver
from pipeline.edges.transport import Receiver, Sender
from pipeline.edges.wire import FOREVER, MessageSpec
from pipeline.ranks.team import Team


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
    weights_in: MessageSpec | None = None
    """from rank + 1"""
    weights_out: MessageSpec | None = None
    """to rank - 1"""


@dataclass
class Edges:
    """The ends of the edges of one rank, named as in EdgeSpecs."""

    activation_in: Receiver | None = None
    activation_out: Sender | None = None
    gradient_in: Receiver | None = None
    gradient_out: Sender | None = None
    weights_in: Receiver | None = None
    weights_out: Sender | None = None

    def bytes_sent(self) -> int:
        """Bytes of training sent so far, both ways."""
        return sum(sender.bytes_sent for sender in self._senders())

    def close(self) -> int:
        """End all streams in an order that cannot dead-lock; return how many arrived messages nobody took."""
        receivers = [end for end in (self.activation_in, self.gradient_in, self.weights_in) if end is not None]
        for sender in self._senders():
            sender.finish()
        unread = sum(receiver.close() for receiver in receivers)
        for sender in self._senders():
            sender.close()
        return unread

    def _senders(self) -> list[Sender]:
        return [end for end in (self.activation_out, self.gradient_out, self.weights_out) if end is not None]


def connect(
    team: Team,
    specs: EdgeSpecs,
    *,
    activation_slots: int,
    gradient_slots: int,
    weights_slots: int = 0,
    depth: int,
    device: torch.device,
    backend: str,
    ring: int = 0,
    max_uses: int = 0,
) -> Edges:
    """Agree on all messages, then create one group per directed edge. Collective: every rank calls it, once.

    Before any group exists each edge's two descriptions are compared; WireError names both sides. Groups are
    made and warmed up in one order on all ranks: down 0->1, up 1->0 (gradients, then weights), down 1->2, ... With
    ``ring`` > 0 activations are received into a replay ring (see :class:`ReplayReceiver`). ``activation_slots``,
    ``gradient_slots`` and ``weights_slots`` are receives that this rank posts at a time; it tells those who send to it.
    Raises DeadlineExceeded, PeerLost.
    """
    rank = team.rank
    slots = {"activation": activation_slots, "gradient": gradient_slots, "weights": weights_slots}
    texts = {name: spec and spec.describe() for name, spec in vars(specs).items()} | {"slots": slots}
    everyone = [json.loads(text) for text in team.collect("edges", json.dumps(texts))]
    edges = Edges()
    for upper in range(team.size - 1):
        for label, source, target in _edges_between(upper):
            sent, expected = everyone[source][f"{label}_out"], everyone[target][f"{label}_in"]
            if sent != expected:
                raise WireError(
                    f"rank {target} expects {expected or f'no {label}'} from rank {source}, "
                    f"rank {source} sends {sent or f'no {label}'}"
                )
    for upper in range(team.size - 1):
        for label, source, target in _edges_between(upper):
            if everyone[source][f"{label}_out"] is None:
                continue
            # gloo: bounds the connection only, waits pass FOREVER. NCCL: the watchdog would kill a
            # posted-ahead receive.
            timeout = timedelta(seconds=team.deadline_s) if backend == "gloo" else FOREVER
            group = dist.new_group([source, target], timeout=timeout, backend=backend)
            if rank not in (source, target):
                continue
            assert isinstance(group, dist.ProcessGroup)
            _warm_up(group, rank, source, target, device if backend != "gloo" else torch.device("cpu"))
            if rank == source:
                edge = Edge(team, group, target, getattr(specs, f"{label}_out"), device, label)
                setattr(edges, f"{label}_out", Sender(edge, depth, everyone[target]["slots"][label]))
            else:
                edge = Edge(team, group, source, getattr(specs, f"{label}_in"), device, label)
                posted = slots[label]
                end = ReplayReceiver(edge, posted, ring, max_uses) if ring else Receiver(edge, posted)
                setattr(edges, f"{label}_in", end)
    return edges


def _edges_between(upper: int) -> tuple[tuple[str, int, int], ...]:
    """(label, source, target) of the edges that ranks ``upper`` and ``upper`` + 1 may have, in their order."""
    return ("activation", upper, upper + 1), ("gradient", upper + 1, upper), ("weights", upper + 1, upper)


def _warm_up(group: dist.ProcessGroup, rank: int, source: int, target: int, device: torch.device) -> None:
    """One element each way of the edge: a lazily built communicator is built now, in the common order."""
    one = torch.zeros(1, device=device)
    peer = target if rank == source else source
    try:
        if rank == source:
            dist.send(one, target, group=group)
        else:
            dist.recv(one, source, group=group)
    except RuntimeError as exc:
        raise PeerLost(peer, f"rank {rank} was connecting to rank {peer} when it failed ({exc})") from exc
