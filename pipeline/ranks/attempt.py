"""Which attempt of its job a process belongs to: the ranks that are alive agree on a fresh name for it.

torchrun restarts all workers after a failure and keeps its store, with every key that the dead ones have left; its
count of restarts is kept per machine and differs between machines. So the living find each other anew:

    every rank r   hello/r       <- a random id of its own          takes the place of what a dead rank r has left
    rank 0         roll          <- a fresh name, the ids it read   again whenever a hello changes
    every rank r   here/<name>/r <- 1                               if its id is in the roll: none answers for the dead
    rank 0         go/<name>     <- 1                               once all are here; everybody leaves with this name

What earlier attempts have left is harmless, because ids and names are random, and rank 0 removes it.
"""

from __future__ import annotations

import itertools
import json
import os
import secrets
import time
from datetime import timedelta

import torch.distributed as dist

from pipeline.base.errors import ConfigError, DeadlineExceeded, InUseError
from pipeline.ranks import launcher
from pipeline.ranks.keys import Key
from pipeline.ranks.patience import within
from pipeline.ranks.team import Team

POLL_S = 0.02
LOOK_S = 0.5
"""Between two looks at the processes that are not here yet."""
GRACE_S = 1.0
"""By which torch's own deadline comes first, where it has one."""


class Job:
    """The job that a process belongs to, for all of its runs: a script may train several times. The store is opened
    once: where rank 0 serves it, a second run could otherwise reach the server of the first."""

    def __init__(self, rank: int, world_size: int) -> None:
        self._rank = rank
        self._world_size = world_size
        self._store: dist.Store | None = None
        self._attempt = ""
        self._runs = itertools.count()

    def next_run(self, deadline_s: float) -> tuple[dist.Store, dist.Store]:
        """The store of this attempt, and one that later attempts of the job see as well, both for the next run: every
        run has keys of its own, in the same order on all ranks.

        A single process needs no other for its own work, and outlives a launcher that has been killed; what later
        attempts are to see is with the launcher all the same, if there is one that serves a store.

        Raises:
            ConfigError: rank 0 cannot serve the store.
            DeadlineExceeded: there is no store, or a rank is missing.
        """
        if self._world_size == 1 and not launcher_serves():
            return dist.HashStore(), dist.HashStore()
        if self._store is None:
            job = os.environ.get("TORCHELASTIC_RUN_ID", "none")
            self._store = dist.PrefixStore(f"/localpipe/{job}", open_store(self._rank, deadline_s))
        if self._world_size > 1 and not self._attempt:
            team = Team(self._rank, self._world_size, self._store, deadline_s=deadline_s)
            self._attempt = agree_on_attempt(team)
        run = next(self._runs)
        own = dist.PrefixStore(Key.ATTEMPT(attempt=self._attempt, run=run), self._store)
        return own if self._world_size > 1 else dist.HashStore(), dist.PrefixStore(Key.JOB(run=run), self._store)


def launcher_serves() -> bool:
    """Whether the launcher serves the store (torchrun), and not rank 0."""
    return os.environ.get("TORCHELASTIC_USE_AGENT_STORE") == "True"


def open_store(rank: int, deadline_s: float) -> dist.Store:
    """Connect to the store at MASTER_ADDR:MASTER_PORT; without a launcher that serves it, rank 0 does.

    Raises:
        ConfigError: the variables are missing, or the port is taken.
        DeadlineExceeded: there is no store at this address.
    """
    try:
        host, port = os.environ["MASTER_ADDR"], int(os.environ["MASTER_PORT"])
    except (KeyError, ValueError) as exc:
        raise ConfigError(
            f"WORLD_SIZE is set, but not MASTER_ADDR and MASTER_PORT, where the ranks are to meet ({exc}): start with "
            "torchrun, or set both"
        ) from exc
    serves = rank == 0 and not launcher_serves()

    def connect() -> dist.Store:
        return dist.TCPStore(
            host,
            port,
            is_master=serves,
            timeout=timedelta(seconds=deadline_s),
            wait_for_workers=False,  # the server would wait in C++, and could not name who is missing
            multi_tenant=serves,
        )

    try:
        # TCPStore waits without limit for the greeting of a server that is none.
        return within(deadline_s + GRACE_S, connect)
    except dist.DistNetworkError as exc:
        if "EADDRINUSE" in str(exc):
            raise InUseError(
                f"MASTER_PORT = {port}: the port is taken on this machine, and rank 0 is to serve the store there; "
                "does another job use it? choose another port"
            ) from exc
        cause: Exception = exc
    except TimeoutError as exc:
        cause = exc
    raise DeadlineExceeded(
        f"rank {rank} has waited {deadline_s:g} s for a store at {host}:{port}: has "
        f"{'the launcher' if launcher_serves() else 'rank 0'} started there, and can the port be reached?"
    ) from cause


def agree_on_attempt(team: Team) -> str:
    """The name of this attempt, the same on all ranks, used by no other attempt. Collective, once per process.

    Args:
        team: with the store that all attempts of the job share.

    Raises:
        DeadlineExceeded: not all ranks have come.
    """
    store, rank, world_size, deadline_s = team.store, team.rank, team.size, team.deadline_s
    ranks = range(world_size)
    hellos = [Key.HELLO(rank=r) for r in ranks]
    me, name = secrets.token_hex(8), ""
    present: list[str] = []
    store.set(hellos[rank], me)
    look, end = 0.0, time.monotonic() + deadline_s
    while True:
        if rank == 0:
            ids = [text.decode() for text in store.multi_get(hellos)] if store.check(hellos) else []
            if ids != present:
                present, name = ids, secrets.token_hex(8)
                store.set(Key.ROLL(), json.dumps([name, *ids]))
            if ids and not _absent(store, name, hellos):
                _forget_others(store, name)
                store.set(Key.GO(attempt=name), "1")
        elif store.check([Key.ROLL()]):
            latest, *ids = json.loads(store.get(Key.ROLL()))
            if latest != name and ids[rank : rank + 1] == [me]:
                name = latest
                store.set(Key.HERE(attempt=name, rank=rank), "1")
        if name and store.check([Key.GO(attempt=name)]):
            return name
        if time.monotonic() > look:
            look = time.monotonic() + LOOK_S
            launcher.check_siblings()
        if time.monotonic() > end:
            absent = _absent(store, name, hellos) or [0]
            raise DeadlineExceeded(
                f"rank {rank} has waited {deadline_s:g} s for rank {', '.join(map(str, absent))} to start; are all "
                f"{world_size} processes running? raise runtime.deadline_s if they need longer"
            )
        time.sleep(POLL_S)


def _absent(store: dist.Store, name: str, hellos: list[str]) -> list[int]:
    """Ranks that have not answered to the roll called ``name``; without one, those that have not said hello."""
    keys = dict(enumerate(hellos))
    if name:
        keys = {rank: Key.HERE(attempt=name, rank=rank) for rank in keys if rank > 0}
    return [rank for rank, key in keys.items() if not store.check([key])]


def _forget_others(store: dist.Store, name: str) -> None:
    """Remove what attempts other than ``name`` have left. Their processes are dead: all ranks of this one are alive."""
    if not hasattr(store, "list_keys"):  # an older torch
        return
    kinds = {key.value.partition("/")[0] for key in (Key.ATTEMPT, Key.HERE, Key.GO)}
    for key in store.list_keys():
        kind, _, rest = key.partition("/")
        if kind in kinds and rest.partition("/")[0] != name:
            store.delete_key(key)
