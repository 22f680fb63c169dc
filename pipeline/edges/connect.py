"""Before step 0: the ranks compare what they are to send each other; then edges are built in one order."""

from __future__ import annotations

import json
from dataclasses import dataclass
from datetime import timedelta

import torch
import torch.distributed as dist

from pipeline.base.errors import PeerLost, WireError
from pipeline.edges.credit import Payload
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
    replicas: int = 1,
) -> Edges:
    """Agree on all messages, then create one group per directed edge. Collective: every rank calls it, once.

    Before any group exists each edge's two descriptions are compared; WireError names both sides. Groups are
    made and warmed up in one order on all ranks: down 0->1, up 1->0 (gradients, then weights), down 1->2, ... With
    another ``backend`` than gloo an edge has two, see :mod:`pipeline.edges.credit`. With
    ``ring`` > 0 activations are received into a replay ring (see :class:`ReplayReceiver`). ``activation_slots``,
    ``gradient_slots`` and ``weights_slots`` are receives that this rank posts at a time; it tells those who send to it.
    Of several ``replicas`` (:mod:`pipeline.ranks.grid`) each has edges of its own, in order of the replicas.
    Raises DeadlineExceeded, PeerLost.
    """
    rank = team.rank
    slots = {"activation": activation_slots, "gradient": gradient_slots, "weights": weights_slots}
    texts = {name: spec and spec.describe() for name, spec in vars(specs).items()} | {"slots": slots}
    everyone = [json.loads(text) for text in team.collect("edges", json.dumps(texts))]
    edges = Edges()
    pairs = [upper for upper in range(team.size - 1) if (upper + 1) % (team.size // replicas)]
    for upper in pairs:
        for label, source, target in _edges_between(upper):
            sent, expected = everyone[source][f"{label}_out"], everyone[target][f"{label}_in"]
            if sent != expected:
                raise WireError(
                    f"rank {target} expects {expected or f'no {label}'} from rank {source}, "
                    f"rank {source} sends {sent or f'no {label}'}"
                )
    for upper in pairs:
        for label, source, target in _edges_between(upper):
            if everyone[source][f"{label}_out"] is None:
                continue
            # The deadline bounds the connection only, waits pass FOREVER. NCCL: of a transfer whose peer has stopped
            # the watchdog would end the process before our line, or while the peer is only slow.
            group = dist.new_group([source, target], timedelta(seconds=team.deadline_s), "gloo")
            payloads = dist.new_group([source, target], FOREVER, backend) if backend != "gloo" else None
            if rank not in (source, target):
                continue
            assert isinstance(group, dist.ProcessGroup)
            peer = target if rank == source else source
            payload = Payload(payloads, peer, device) if isinstance(payloads, dist.ProcessGroup) else None
            _warm_up(group, payload, rank, peer, rank == source, device)
            if rank == source:
                edge = Edge(team, group, peer, getattr(specs, f"{label}_out"), device, label, payload)
                setattr(edges, f"{label}_out", Sender(edge, depth, everyone[peer]["slots"][label]))
            else:
                edge = Edge(team, group, peer, getattr(specs, f"{label}_in"), device, label, payload)
                posted = slots[label]
                end = ReplayReceiver(edge, posted, ring, max_uses) if ring else Receiver(edge, posted)
                setattr(edges, f"{label}_in", end)
    return edges


def _edges_between(upper: int) -> tuple[tuple[str, int, int], ...]:
    """(label, source, target) of the edges that ranks ``upper`` and ``upper`` + 1 may have, in their order."""
    return ("activation", upper, upper + 1), ("gradient", upper + 1, upper), ("weights", upper + 1, upper)


def _warm_up(
    group: dist.ProcessGroup, payload: Payload | None, rank: int, peer: int, sends: bool, device: torch.device
) -> None:
    """One element over the edge: a lazily built communicator is built now, in the common order."""
    try:
        transfer = dist.send if sends else dist.recv
        transfer(torch.zeros(1), peer, group=group)
        if payload is not None:
            (payload.send if sends else payload.receive)(torch.empty(1, dtype=torch.uint8, device=device))
    except RuntimeError as exc:
        raise PeerLost(peer, f"rank {rank} was connecting to rank {peer} when it failed ({exc})") from exc
