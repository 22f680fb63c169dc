"""What the tests of edges share: a message, a header, a process group."""

from __future__ import annotations

import os
from datetime import timedelta

import torch
import torch.distributed as dist

from pipeline.edges.wire import FieldSpec, Header, MessageKind, MessageSpec
from pipeline.ranks.team import Team

CPU = torch.device("cpu")
SMALL = MessageSpec((FieldSpec("activation", torch.float32, (3,)),), max_rows=4)


def train(step: int, rows: int = 4) -> Header:
    return Header(MessageKind.TRAIN, 0, step, 0, key=0, rows=rows, batch_rows=100)


def start_group(rank: int, world_size: int) -> dist.Store:
    """The store of the default process group of all ranks, which this makes."""
    store = dist.TCPStore(
        "127.0.0.1", int(os.environ["MASTER_PORT"]), is_master=rank == 0, wait_for_workers=False
    )
    timeout = timedelta(seconds=30)
    dist.init_process_group("gloo", store=store, rank=rank, world_size=world_size, timeout=timeout)
    return store


def team_of(name: str, store: dist.Store, rank: int, size: int, deadline_s: float) -> Team:
    """A team without a runtime, with keys of its own."""
    return Team(rank, size, dist.PrefixStore(name, store), deadline_s=deadline_s)
