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
import socket
import sys
import tempfile
import threading
import time
import traceback
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from datetime import timedelta
from multiprocessing.connection import Connection, wait
from multiprocessing.synchronize import Barrier
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

PRELOAD = ["torch", "torch.distributed", "torch.distributed.pipelining", "pipeline"]
GRACE_S = 5.0


class RanksFailed(Exception):
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

    @contextlib.contextmanager
    def threads(self, count: int) -> Iterator[None]:
        """``count`` threads on as many cores, from this rank's own core on; afterwards one thread on its core."""
        with contextlib.suppress(AttributeError):  # macOS cannot pin
            os.sched_setaffinity(0, {self.cores[(self.index + other) % len(self.cores)] for other in range(count)})
        torch.set_num_threads(count)
        try:
            yield
        finally:
            self.pin()

    def pin(self) -> None:
        """One thread, on this rank's core."""
        with contextlib.suppress(AttributeError):
            os.sched_setaffinity(0, {self.cores[self.index % len(self.cores)]})
        torch.set_num_threads(1)


def run_ranks(work: Callable[..., Any], count: int, *args: Any, deadline_s: float) -> list[Any]:
    """``work(rank, *args)`` in ``count`` processes; returns their values by rank.

    Args:
        work: at the top level of a module; its arguments and its value can be pickled.
        deadline_s: of the whole job, in seconds.

    Raises:
        RanksFailed: see there.
    """
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(PRELOAD)
    cores = available_cores()
    barrier = context.Barrier(count)
    ports = _free_ports(2)
    pipes = [context.Pipe(duplex=False) for _ in range(count)]
    alive, keep = context.Pipe(duplex=False)
    with tempfile.TemporaryDirectory() as folder:
        ranks = []
        for index, (_, result) in enumerate(pipes):
            rank = (index, count, cores, folder, deadline_s, barrier)
            ranks.append(context.Process(target=_enter, args=(work, rank, ports, result, alive, args), daemon=True))
        try:
            for process in ranks:
                process.start()
            for _, result in pipes:
                result.close()  # so that a dead rank reads as end of file
            alive.close()
            return _collect(ranks, [pipe for pipe, _ in pipes], Path(folder), deadline_s)
        finally:
            keep.close()
            for process in ranks:
                process.kill()
                process.join()


def available_cores() -> tuple[int, ...]:
    """Numbers of the cores that this process may use."""
    if hasattr(os, "sched_getaffinity"):
        return tuple(sorted(os.sched_getaffinity(0)))
    return tuple(range(os.cpu_count() or 1))


def _free_ports(count: int) -> list[int]:
    """TCP ports that were free a moment ago."""
    with contextlib.ExitStack() as stack:
        probes = [stack.enter_context(socket.socket()) for _ in range(count)]
        for probe in probes:
            probe.bind(("127.0.0.1", 0))
        return [probe.getsockname()[1] for probe in probes]


def _collect(ranks: Sequence[Any], pipes: Sequence[Connection], folder: Path, deadline_s: float) -> list[Any]:
    """Values by rank, read as they come; the first rank that ends badly gives the others a moment, then all end."""
    end = time.monotonic() + deadline_s
    values: dict[int, Any] = {}
    waiting = dict(enumerate(pipes))
    while waiting:
        left = end - time.monotonic()
        if left <= 0:
            raise RanksFailed(f"ranks {sorted(waiting)} are not done after {deadline_s:g} s; use fewer rounds or steps")
        ready = wait(list(waiting.values()), timeout=left)
        for index in [i for i, pipe in waiting.items() if pipe in ready]:
            try:
                values[index] = waiting.pop(index).recv()
            except EOFError:
                ranks[index].join(GRACE_S)
                raise RanksFailed(_reason(folder, index, ranks[index].exitcode)) from None
    return [values[index] for index in range(len(ranks))]


def _reason(folder: Path, index: int, code: int | None) -> str:
    """Why the ranks ended: the last line of the first rank that wrote any; ``index`` was seen to end first."""
    for log in sorted(folder.glob("stderr*"), key=lambda path: path.stat().st_mtime_ns):
        if lines := log.read_text(errors="replace").strip().splitlines():
            return f"rank {log.name.removeprefix('stderr')}: {lines[-1]}"
    return f"rank {index} ended with code {code} and wrote nothing"


def _enter(
    work: Callable[..., Any],
    rank: tuple[int, int, tuple[int, ...], str, float, Barrier],
    ports: Sequence[int],
    result: Connection,
    alive: Connection,
    args: tuple[Any, ...],
) -> None:
    index, count, cores, folder, deadline_s, barrier = rank
    log = os.open(f"{folder}/stderr{index}", os.O_WRONLY | os.O_CREAT | os.O_APPEND)
    os.dup2(log, 2)
    threading.Thread(target=_end_with_caller, args=(alive,), daemon=True).start()
    os.environ.update(
        RANK=str(index),
        WORLD_SIZE=str(count),
        LOCAL_RANK=str(index),
        LOCAL_WORLD_SIZE=str(count),
        MASTER_ADDR="127.0.0.1",
        MASTER_PORT=str(ports[0]),
    )
    mine = Rank(index, count, cores, Path(folder), deadline_s, barrier, ports[1])
    mine.pin()
    try:
        result.send(work(mine, *args))
        mine.meet()  # rank 0 serves the stores: it leaves when nobody needs them any more
    except threading.BrokenBarrierError:
        time.sleep(GRACE_S)  # the rank that failed says why
        sys.exit(1)
    except Exception as error:
        traceback.print_exc()
        print(f"{type(error).__name__}: {error}".replace("\n", " "), file=sys.stderr)
        result.close()
        barrier.abort()
        sys.exit(1)


def _end_with_caller(alive: Connection) -> None:
    """The caller never writes: when it ends, in whatever way, its end of the pipe closes."""
    with contextlib.suppress(EOFError, OSError):
        alive.recv()
    os._exit(1)
