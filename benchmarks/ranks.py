"""One process per rank on this machine, which sees what ``torchrun`` would show it.

    results = run_processes(function, 4, *args, timeout_s=60)      function(rank, *args); each ends in its own way
    values = run_ranks(work, 2, settings, deadline_s=600)          work(rank, settings), in lockstep

Processes come from a fork server that has imported torch once, before any thread or tensor exists: a rank starts in a
fraction of a second where ``spawn`` takes three seconds on a small machine. They are real processes all the same: they
can be killed, stopped, and have an exit code.

Ranks in lockstep have a core each and run the same list of measurements, separated by ``rank.meet()``; who has nothing
to do waits there without using its core. A rank that fails, a deadline, or the end of the caller ends all.
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
from dataclasses import dataclass, replace
from datetime import timedelta
from multiprocessing.connection import Connection, wait
from multiprocessing.synchronize import Barrier
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

from pipeline import LocalpipeError

PRELOAD = ["torch", "torch.distributed", "torch._dynamo", "torch.distributed.pipelining", "pipeline.run.train"]
GRACE_S = 5.0


@dataclass(frozen=True)
class RankResult:
    """How one rank ended."""

    rank: int
    value: Any  # what the function returned, None if it did not return
    exit_code: int  # negative: ended by that signal, as in multiprocessing.Process.exitcode
    stderr: str
    ended_s: float  # seconds from the start of the call to the end of the process


def free_port() -> int:
    """A TCP port that was free a moment ago."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


def run_processes(
    function: Callable[..., Any], count: int, *args: Any, timeout_s: float, grace_s: float | None = None
) -> list[RankResult]:
    """Call ``function(rank, *args)`` in ``count`` processes and return how each ended, by rank.

    Args:
        function: at the top level of a module; its arguments and its value can be pickled. An exception is printed to
            the rank's stderr, exit code 1.
        timeout_s: for all together; whoever runs then is killed.
        grace_s: how long the others may go on when one has ended badly, before they are killed; None: till timeout_s.

    Raises:
        TimeoutError: not all had ended after ``timeout_s``; the message holds their stderr.
    """
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(PRELOAD)
    port, start = free_port(), time.monotonic()
    with tempfile.TemporaryDirectory() as folder:
        logs = [Path(folder) / f"stderr{rank}" for rank in range(count)]
        for log in logs:
            log.touch()  # a rank may be killed before it has begun
        pipes = [context.Pipe(duplex=False) for _ in range(count)]
        processes = []
        for rank, (_, result) in enumerate(pipes):
            arguments = (function, rank, count, port, folder, result, args)
            processes.append(context.Process(target=_enter, args=arguments, name=f"rank{rank}"))
        try:
            for process in processes:
                process.start()
            for _, result in pipes:
                result.close()  # so that a dead rank reads as end of file
            values, ended = _collect(processes, [pipe for pipe, _ in pipes], start + timeout_s, grace_s)
        finally:
            for process in processes:
                process.kill()
                process.join()
        stderr = [log.read_text(errors="replace") for log in logs]
    if len(ended) < count and (grace_s is None or not any(processes[rank].exitcode for rank in ended)):
        raise TimeoutError(f"ranks still running after {timeout_s} s; stderr: {stderr}")
    results = []
    for rank, process in enumerate(processes):
        ended_s = ended.get(rank, time.monotonic()) - start
        assert process.exitcode is not None  # it has been joined
        results.append(RankResult(rank, values.get(rank), process.exitcode, stderr[rank], ended_s))
    return results


def _collect(
    processes: Sequence[Any], pipes: Sequence[Connection], end: float, grace_s: float | None
) -> tuple[dict[int, Any], dict[int, float]]:
    """Values and end times by rank. Values are read at once: a large one blocks its sender in the pipe."""
    values: dict[int, Any] = {}
    ended: dict[int, float] = {}
    unread = dict(enumerate(pipes))
    while len(ended) < len(processes) and (left := end - time.monotonic()) > 0:
        running = [process.sentinel for rank, process in enumerate(processes) if rank not in ended]
        wait([*unread.values(), *running], timeout=min(left, 1.0))
        for rank, process in enumerate(processes):
            if rank in unread and unread[rank].poll():
                with contextlib.suppress(EOFError):  # ended without a value
                    values[rank] = unread[rank].recv()
                del unread[rank]
            if rank not in ended and process.exitcode is not None:
                ended[rank] = time.monotonic()
                if process.exitcode and grace_s is not None:
                    end = min(end, ended[rank] + grace_s)
    return values, ended


def _enter(
    function: Callable[..., Any], rank: int, count: int, port: int, folder: str, result: Connection, args: Sequence[Any]
) -> None:
    log = os.open(f"{folder}/stderr{rank}", os.O_WRONLY | os.O_CREAT | os.O_APPEND)
    os.dup2(log, 2)
    os.environ |= {"RANK": str(rank), "WORLD_SIZE": str(count), "LOCAL_RANK": str(rank), "LOCAL_WORLD_SIZE": str(count)}
    os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
    os.environ |= {"TORCHELASTIC_RESTART_COUNT": "0", "OMP_NUM_THREADS": "1"}
    torch.set_num_threads(1)
    try:
        result.send(function(rank, *args))
    except Exception:
        traceback.print_exc()
        sys.exit(1)


class RanksFailed(LocalpipeError):
    """A rank raised, died or was too slow; the message holds the last line of what it wrote."""


@dataclass
class Rank:
    """One rank's view of the job."""

    index: int  # of ``count``
    count: int
    cores: tuple[int, ...]  # of every rank; ranks share cores where there are fewer
    folder: Path  # scratch directory of the job, for all ranks
    deadline_s: float  # longest wait for a peer
    _barrier: Barrier
    _store: dist.Store | None = None
    _names: int = 0

    @property
    def leader(self) -> bool:
        """Whether this is rank 0."""
        return self.index == 0

    def meet(self) -> None:
        """Wait for all ranks; threading.BrokenBarrierError if one has failed or is too late."""
        self._barrier.wait(self.deadline_s)

    def share(self, value: Any) -> Any:
        """Rank 0's ``value`` (picklable) on every rank."""
        store = self._next_store()
        if self.leader:
            store.set("value", pickle.dumps(value))  # type: ignore[arg-type]  # torch declares str, takes bytes
        return pickle.loads(store.get("value"))

    def _next_store(self) -> dist.Store:
        assert self._store is not None
        self._names += 1
        return dist.PrefixStore(str(self._names), self._store)

    @contextlib.contextmanager
    def group(self, device: torch.device) -> Iterator[None]:
        """A fresh default process group of all ranks for tensors on ``device``, destroyed at the end."""
        backend, timeout = "nccl" if device.type == "cuda" else "gloo", timedelta(seconds=self.deadline_s)
        store = self._next_store()
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
    """``work(rank, *args)`` in ``count`` processes (see :func:`run_processes`); returns their values by rank.

    Raises:
        RanksFailed: a rank has failed, or not all are done after ``deadline_s``.
    """
    context = multiprocessing.get_context("forkserver")
    alive, keep = context.Pipe(duplex=False)
    with tempfile.TemporaryDirectory() as folder, alive, keep:
        rank = Rank(-1, count, available_cores(), Path(folder), deadline_s, context.Barrier(count))
        what = (rank, free_port(), alive, work, args)
        try:
            results = run_processes(_in_lockstep, count, *what, timeout_s=deadline_s, grace_s=GRACE_S)
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


def _in_lockstep(
    index: int, rank: Rank, port: int, alive: Connection, work: Callable[..., Any], args: Sequence[Any]
) -> Any:
    threading.Thread(target=_end_with_caller, args=(alive,), daemon=True).start()
    store = dist.TCPStore("127.0.0.1", port, rank.count, index == 0, timedelta(seconds=rank.deadline_s))
    rank = replace(rank, index=index, _store=store)
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
