"""Before step 0: all ranks agree on version, configuration and messages; then edges are built in one order."""

from __future__ import annotations

import json
import tomllib
from dataclasses import dataclass
from datetime import timedelta

import torch
import torch.distributed as dist

from pipeline.base.config import Config
from pipeline.base.errors import ConfigError, PeerLost, WireError
from pipeline.base.toml import to_toml
from pipeline.edges.replay import ReplayReceiver
from pipeline.edges.transport import Receiver, Sender
from pipeline.edges.wire import FOREVER, MessageSpec
from pipeline.ranks.patience import NO_PATIENCE, Patience, wait_for_ranks

OWN_KEYS = ("runtime.device", "runtime.threads")
"""Keys that may differ between ranks: the machines of a job need not be alike."""
NAMED_KEYS = 3
"""Differing keys that a message names; it counts the others."""


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
    activation_slots: int,
    gradient_slots: int,
    depth: int,
    deadline_s: float,
    device: torch.device,
    backend: str,
    ring: int = 0,
    max_uses: int = 0,
    patience: Patience = NO_PATIENCE,
) -> Edges:
    """Agree on all messages, then create one group per directed edge. Collective: every rank calls it.

    Before any group exists each edge's two descriptions are compared; WireError names both sides. Groups are
    made and warmed up in one order on all ranks: down 0->1, up 1->0, down 1->2, ... With ``ring`` > 0 activations are
    received into a replay ring (see :class:`ReplayReceiver`). ``activation_slots`` and ``gradient_slots`` are receives
    that this rank posts at a time; it tells those who send to it. ``patience`` is asked here and by all ends.
    Raises DeadlineExceeded, PeerLost.
    """
    slots = {"activation": activation_slots, "gradient": gradient_slots}
    texts = {name: spec and spec.describe() for name, spec in vars(specs).items()} | {"slots": slots}
    everyone = [
        json.loads(t) for t in _collect(store, rank, world_size, "edges", json.dumps(texts), deadline_s, patience)
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
                theirs = everyone[target]["slots"][label]
                end = Sender(group, target, spec, depth, theirs, deadline_s, device, label)
                setattr(edges, f"{label}_out", end)
            else:
                spec = getattr(specs, f"{label}_in")
                common = (group, source, spec, slots[label], deadline_s, device, label)
                end = ReplayReceiver(*common, ring, max_uses) if ring else Receiver(*common)
                setattr(edges, f"{label}_in", end)
            end.patience = patience
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
    store: dist.Store | None,
    rank: int,
    world_size: int,
    name: str,
    value: str,
    deadline_s: float,
    patience: Patience = NO_PATIENCE,
) -> None:
    """Refuse to start unless every rank passes the same ``value``; use each ``name`` once per run.

    Raises ConfigError naming the ranks that differ, DeadlineExceeded naming the ranks that did not answer.
    """
    if store is None:
        return
    values = _collect(store, rank, world_size, name, value, deadline_s, patience)
    if len(set(values)) > 1:
        quoted = [f"'{value}'" for value in values]
        raise ConfigError(f"ranks disagree about {name}: {_holders(quoted)}")


def agree_on_config(
    store: dist.Store | None,
    rank: int,
    world_size: int,
    config: Config,
    deadline_s: float,
    patience: Patience = NO_PATIENCE,
) -> None:
    """Refuse to start unless the configuration of every rank has the same values, but for OWN_KEYS; once per run.

    Raises ConfigError naming the differing keys and who has which value, DeadlineExceeded as ``agree`` does.
    """
    if store is None:
        return
    texts = _collect(store, rank, world_size, "the configuration", to_toml(config), deadline_s, patience)
    everyone = [
        {
            f"{section}.{name}": json.dumps(value)
            for section, entries in tomllib.loads(text).items()
            for name, value in entries.items()
        }
        for text in texts
    ]
    parts = []
    for key in dict.fromkeys(key for values in everyone for key in values):
        held = [values.get(key, "no such key") for values in everyone]
        if len(set(held)) > 1 and key not in OWN_KEYS:
            parts.append(f"{key}: {_holders(held)}")
    if parts:
        more = [f"{len(parts) - NAMED_KEYS} more"] if len(parts) > NAMED_KEYS else []
        raise ConfigError("ranks disagree about " + ", and about ".join(parts[:NAMED_KEYS] + more))


def _holders(values: list[str]) -> str:
    """``ranks 0, 2 have 0.1; rank 1 has 0.2``."""
    holders: dict[str, list[int]] = {}
    for rank, value in enumerate(values):
        holders.setdefault(value, []).append(rank)
    return "; ".join(
        f"{_ranks(ranks)} {'has' if len(ranks) == 1 else 'have'} {value}" for value, ranks in holders.items()
    )


def _collect(
    store: dist.Store, rank: int, world_size: int, name: str, value: str, deadline_s: float, patience: Patience
) -> list[str]:
    """Publish ``value`` and return everyone's, by rank."""
    keys = {r: f"agree/{name}/{r}" for r in range(world_size)}
    store.set(keys[rank], value)
    wait_for_ranks(store, rank, keys, f"publish {name}", deadline_s, patience)
    return [text.decode() for text in store.multi_get(list(keys.values()))]


def _ranks(ranks: list[int]) -> str:
    return ("rank " if len(ranks) == 1 else "ranks ") + ", ".join(map(str, ranks))
