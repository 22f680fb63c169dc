"""The other ranks of a run as the store tells of them: who they are, and whether one is gone without a word.

    rank r sets     process/<r>    pid, machine, local modules       every other rank of its machine: is it still there?
                    left/<r>       it goes in order                  gone without this key: dead

Rank 0 serves the store, or the launcher does. Where the store is gone, so is who served it.
"""

from __future__ import annotations

import json
import os
from dataclasses import asdict

import torch.distributed as dist

from pipeline.ranks.keys import Key
from pipeline.ranks.process import Process

WATCH_S = 0.5
"""Seconds between two looks at the store and at the processes of the others."""


class Peers:
    """Until ``join`` there is no store, and nothing is known of anybody. From any thread.

    Attributes:
        rank, size: which of how many this one is.
        me: its process.
        known: the processes of other ranks that have been read from the store, by rank.
        store_gone: whether the store has failed. It is not asked again: each try prints a C++ traceback.
        store_host: the rank whose process serves the store, None if the launcher does.
        launcher: the process that has started this one.
    """

    def __init__(self, rank: int, size: int) -> None:
        self.rank = rank
        self.size = size
        self.me = Process.current("starting")
        self.known: dict[int, Process] = {}
        self.store: dist.Store | None = None
        self.store_gone = False
        self.store_host: int | None = None
        self.launcher = os.getppid()

    def join(self, store: dist.Store, store_host: int | None) -> None:
        """Let the others know this process, by a connection of its own."""
        self.store = store
        self.store_host = store_host
        self.describe("starting")

    def describe(self, modules: str) -> None:
        """Say what this rank runs."""
        self.me = Process.current(modules)
        self.set(Key.PROCESS(rank=self.rank), json.dumps(asdict(self.me)))

    def leave(self) -> None:
        """Say that this rank's process may go from here on."""
        self.set(Key.LEFT(rank=self.rank), "1")

    def left(self, rank: int) -> bool:
        """Whether a rank has said so."""
        return self.has(Key.LEFT(rank=rank))

    def set(self, key: str, value: str) -> None:
        """Put a value in the store, if there is one."""
        if self.store is not None:
            self.store.set(key, value)

    def has(self, key: str) -> bool:
        """Whether ``key`` is in the store; False if the store is gone."""
        if self.store is not None and not self.store_gone:
            try:
                return self.store.check([key])
            except RuntimeError:
                self.store_gone = True
        return False

    def get(self, key: str) -> str:
        """The value of a key that the store has."""
        assert self.store is not None
        return self.store.get(key).decode()

    def dead(self) -> list[int]:
        """Ranks of this machine whose process is gone although they neither failed aloud nor left in order."""
        found = []
        for rank in range(self.size):
            if rank == self.rank:
                continue
            if rank not in self.known and self.has(Key.PROCESS(rank=rank)):
                self.known[rank] = self._read(rank)
            peer = self.known.get(rank)
            ended = peer is not None and peer.host == self.me.host and peer.gone()
            if ended and not self.left(rank):
                found.append(rank)
        return found

    def modules(self, rank: int) -> str:
        """What a rank runs, as it has last said."""
        if self.has(Key.PROCESS(rank=rank)):  # read again: described since
            self.known[rank] = self._read(rank)
        return self.known[rank].modules if rank in self.known else "unknown modules"

    def elsewhere(self) -> list[int]:
        """Ranks that are known to be on other machines."""
        return [rank for rank, peer in self.known.items() if peer.host != self.me.host]

    def orphaned(self) -> bool:
        """Whether the launcher has ended."""
        return os.getppid() != self.launcher

    def _read(self, rank: int) -> Process:
        return Process(**json.loads(self.get(Key.PROCESS(rank=rank))))
