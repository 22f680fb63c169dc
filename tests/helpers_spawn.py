"""Run a function in real processes that see what ``torchrun`` would show them.

Processes come from a fork server that has imported torch once, before any thread or tensor exists: a rank
starts in a fraction of a second where ``spawn`` takes three seconds on a small machine. They are real
processes all the same: they can be killed, stopped, and have an exit code.
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
from collections.abc import Callable
from dataclasses import dataclass
from multiprocessing.connection import Connection, wait
from pathlib import Path
from typing import Any

PRELOAD = ["torch", "torch.distributed", "torch._dynamo", "pipeline"]


@dataclass
class RankResult:
    """How one rank ended. ``value``: what the function returned, None if it did not return."""

    rank: int
    value: Any
    exit_code: int
    """negative: ended by that signal, as in ``multiprocessing.Process.exitcode``"""
    stderr: str
    ended_s: float
    """seconds from the start of the call to the end of the process"""


def free_port() -> int:
    """A TCP port that was free a moment ago."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


def run_ranks(
    function: Callable[..., Any], world_size: int, *args: Any, timeout_s: float = 60.0
) -> list[RankResult]:
    """Call ``function(rank, *args)`` in ``world_size`` processes and return how each ended, by rank.

    ``function`` must be at module level and its result picklable. An exception is printed to the rank's
    stderr, exit code 1. After ``timeout_s`` all processes are killed and TimeoutError carries their stderr.
    """
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(PRELOAD)
    port = free_port()
    start = time.monotonic()
    with tempfile.TemporaryDirectory() as folder:
        pipes = [context.Pipe(duplex=False) for _ in range(world_size)]
        ranks = []
        for rank, (_, child_end) in enumerate(pipes):
            arguments = (function, rank, world_size, port, folder, child_end, args)
            ranks.append(context.Process(target=_enter, args=arguments, name=f"rank{rank}"))
        try:
            for process in ranks:
                process.start()
            for _, child_end in pipes:
                child_end.close()  # so that a dead rank reads as end of file
            values, ended = _collect(ranks, [parent_end for parent_end, _ in pipes], start, timeout_s)
        finally:
            for process in ranks:
                process.kill()
                process.join()
        stderr = [(Path(folder) / f"stderr{rank}").read_text() for rank in range(world_size)]
    if len(ended) < world_size:
        raise TimeoutError(f"ranks still running after {timeout_s} s; stderr: {stderr}")
    return [
        RankResult(rank, values.get(rank), ranks[rank].exitcode, stderr[rank], ended[rank])
        for rank in range(world_size)
    ]


def _collect(
    ranks: list[Any], results: list[Connection], start: float, timeout_s: float
) -> tuple[dict[int, Any], dict[int, float]]:
    """Values and end times by rank. Values are read at once: a large one blocks its sender in the pipe."""
    values: dict[int, Any] = {}
    ended: dict[int, float] = {}
    open_ends = dict(enumerate(results))
    while len(ended) < len(ranks) and time.monotonic() - start < timeout_s:
        wait([*open_ends.values(), *(p.sentinel for r, p in enumerate(ranks) if r not in ended)], timeout=1.0)
        for rank, process in enumerate(ranks):
            if rank in open_ends and open_ends[rank].poll():
                with contextlib.suppress(EOFError):  # ended without a value
                    values[rank] = open_ends[rank].recv()
                del open_ends[rank]
            if rank not in ended and process.exitcode is not None:
                ended[rank] = time.monotonic() - start
    return values, ended


def _enter(
    function: Callable[..., Any],
    rank: int,
    world_size: int,
    port: int,
    folder: str,
    result: Connection,
    args: tuple[Any, ...],
) -> None:
    log = os.open(f"{folder}/stderr{rank}", os.O_WRONLY | os.O_CREAT | os.O_APPEND)
    os.dup2(log, 2)
    os.environ.update(
        RANK=str(rank),
        WORLD_SIZE=str(world_size),
        LOCAL_RANK=str(rank),
        LOCAL_WORLD_SIZE=str(world_size),
        MASTER_ADDR="127.0.0.1",
        MASTER_PORT=str(port),
        TORCHELASTIC_RESTART_COUNT="0",
        OMP_NUM_THREADS="1",
    )
    import torch

    torch.set_num_threads(1)
    try:
        result.send(function(rank, *args))
    except Exception:
        traceback.print_exc()
        sys.exit(1)
