"""One process per rank on this machine, in lockstep: started together, pinned to cores, ended together.

    values = run_ranks(work, 2, settings, deadline_s=600)      calls work(rank, settings) in two processes

Every rank runs the same list of measurements; ``rank.meet()`` separates them, and ranks that have nothing to do wait
there without using a core. Nobody is left behind: a rank that fails, a deadline, or the end of the caller ends all.
"""

from __future__ import annotations

import contextlib
import multiprocessing
import os
import pickle
import sys
import tempfile
import threading
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from datetime import timedelta
from multiprocessing.connection import Connection
from multiprocessing.synchronize import Barrier
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from processes import free_port, run_processes

from pipeline import LocalpipeError

GRACE_S = 5.0


class RanksFailed(LocalpipeError):
    """A rank raised, died or was too slow; the message holds the last line of what it wrote."""


@dataclass
class Rank:
    """One rank's view of the job.

    Attributes:
        index, count: this rank of how many.
        cores: the core of every rank; ranks share cores where there are fewer.
        folder: scratch directory of the job, for all ranks.
        deadline_s: longest wait for a peer, in seconds.
    """

    index: int
    count: int
    cores: tuple[int, ...]
    folder: Path
    deadline_s: float
    _barrier: Barrier
    _port: int
    _store: dist.Store | None = None
    _names: int = 0

    @property
    def leader(self) -> bool:
        """Whether this is rank 0."""
        return self.index == 0

    def meet(self) -> None:
        """Wait for all ranks.

        Raises:
            threading.BrokenBarrierError: a rank has failed or is too late.
        """
        self._barrier.wait(self.deadline_s)

    def share(self, value: Any) -> Any:
        """Rank 0's ``value`` (picklable) on every rank."""
        self._names += 1
        path = self.folder / f"shared{self._names}"
        if self.leader:
            path.write_bytes(pickle.dumps(value))
        self.meet()
        return pickle.loads(path.read_bytes())

    @contextlib.contextmanager
    def group(self, backend: str) -> Iterator[None]:
        """A fresh default process group of all ranks, destroyed at the end."""
        timeout = timedelta(seconds=self.deadline_s)
        if self._store is None:
            self._store = dist.TCPStore("127.0.0.1", self._port, self.count, self.leader, timeout)
        self._names += 1
        store = dist.PrefixStore(f"group{self._names}", self._store)
        dist.init_process_group(backend, store=store, rank=self.index, world_size=self.count, timeout=timeout)
        yield
        self.meet()
        dist.destroy_process_group()

    def pin(self, threads: int = 1) -> None:
        """From now on ``threads`` threads on as many cores, from this rank's own core on."""
        if hasattr(os, "sched_setaffinity"):  # macOS cannot pin
            os.sched_setaffinity(0, {self.cores[(self.index + other) % len(self.cores)] for other in range(threads)})
        torch.set_num_threads(threads)


def run_ranks(work: Callable[..., Any], count: int, *args: Any, deadline_s: float) -> list[Any]:
    """``work(rank, *args)`` in ``count`` processes; returns their values by rank.

    Args:
        work: at the top level of a module; its arguments and its value can be pickled.
        deadline_s: of the whole job, in seconds.

    Raises:
        RanksFailed: see there.
    """
    context = multiprocessing.get_context("forkserver")
    alive, keep = context.Pipe(duplex=False)
    with tempfile.TemporaryDirectory() as folder, alive, keep:
        rank = Rank(-1, count, available_cores(), Path(folder), deadline_s, context.Barrier(count), free_port())
        try:
            results = run_processes(_enter, count, rank, alive, work, args, timeout_s=deadline_s, grace_s=GRACE_S)
        except TimeoutError:
            raise RanksFailed(f"the ranks are not done after {deadline_s:g} s; use fewer rounds or steps") from None
        failure = Path(folder, "failure")
        if failure.exists():
            raise RanksFailed(failure.read_text())
    for result in sorted(results, key=lambda result: result.ended_s):
        if result.exit_code:
            *_, line = ["it wrote nothing", *result.stderr.strip().splitlines()]
            raise RanksFailed(f"rank {result.rank} ended with code {result.exit_code}: {line}")
    return [result.value for result in results]


def available_cores() -> tuple[int, ...]:
    """Numbers of the cores that this process may use."""
    if hasattr(os, "sched_getaffinity"):
        return tuple(sorted(os.sched_getaffinity(0)))
    return tuple(range(os.cpu_count() or 1))


def _enter(index: int, rank: Rank, alive: Connection, work: Callable[..., Any], args: tuple[Any, ...]) -> Any:
    threading.Thread(target=_end_with_caller, args=(alive,), daemon=True).start()
    rank = replace(rank, index=index)
    rank.pin()
    try:
        value = work(rank, *args)
        rank.meet()  # rank 0 serves the stores: it leaves when nobody needs them any more
        return value
    except threading.BrokenBarrierError:
        sys.exit(1)  # the rank that failed says why
    except Exception as error:
        with contextlib.suppress(FileExistsError), (rank.folder / "failure").open("x") as file:  # the first one counts
            file.write(f"rank {index}: {type(error).__name__}: {error}".replace("\n", " "))
        rank._barrier.abort()
        raise


def _end_with_caller(alive: Connection) -> None:
    """The caller never writes: when it ends, in whatever way, its end of the pipe closes."""
    with contextlib.suppress(EOFError, OSError):
        alive.recv()
    os._exit(1)
