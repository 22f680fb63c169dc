"""Call a function in real processes that see what ``torchrun`` would show them.

    results = run_processes(function, 4, *args, timeout_s=60)      function(rank, *args) on ranks 0 to 3

Processes come from a fork server that has imported torch once, before any thread or tensor exists: a rank starts in a
fraction of a second where ``spawn`` takes three seconds on a small machine. They are real processes all the same: they
can be killed, stopped, and have an exit code.
"""

from __future__ import annotations

import contextlib
import multiprocessing
import os
import socket
import sys
import tempfile
import time
import traceback
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from multiprocessing.connection import Connection, wait
from pathlib import Path
from typing import Any

import torch

PRELOAD = ["torch", "torch.distributed", "torch._dynamo", "torch.distributed.pipelining", "pipeline.run.train"]


@dataclass(frozen=True)
class RankResult:
    """How one rank ended.

    Attributes:
        value: what the function returned, None if it did not return.
        exit_code: negative: ended by that signal, as in ``multiprocessing.Process.exitcode``.
        ended_s: seconds from the start of the call to the end of the process.
    """

    rank: int
    value: Any
    exit_code: int
    stderr: str
    ended_s: float


def free_port() -> int:
    """A TCP port that was free a moment ago."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


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
        stderr = [(Path(folder) / f"stderr{rank}").read_text(errors="replace") for rank in range(count)]
    if len(ended) < count and (grace_s is None or not any(processes[rank].exitcode for rank in ended)):
        raise TimeoutError(f"ranks still running after {timeout_s} s; stderr: {stderr}")
    now = time.monotonic()
    return [
        RankResult(rank, values.get(rank), processes[rank].exitcode, stderr[rank], ended.get(rank, now) - start)
        for rank in range(count)
    ]


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
    function: Callable[..., Any],
    rank: int,
    count: int,
    port: int,
    folder: str,
    result: Connection,
    args: tuple[Any, ...],
) -> None:
    log = os.open(f"{folder}/stderr{rank}", os.O_WRONLY | os.O_CREAT | os.O_APPEND)
    os.dup2(log, 2)
    os.environ.update(
        RANK=str(rank),
        WORLD_SIZE=str(count),
        LOCAL_RANK=str(rank),
        LOCAL_WORLD_SIZE=str(count),
        MASTER_ADDR="127.0.0.1",
        MASTER_PORT=str(port),
        TORCHELASTIC_RESTART_COUNT="0",
        OMP_NUM_THREADS="1",
    )
    torch.set_num_threads(1)
    try:
        result.send(function(rank, *args))
    except Exception:
        traceback.print_exc()
        sys.exit(1)
