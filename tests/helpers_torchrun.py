"""Agents of torchrun in processes of the fork server, and their workers as forks of them: what the command ``torchrun``
does, without its seconds of imports in every process and in every attempt."""

from __future__ import annotations

import os
from collections.abc import Callable
from typing import Any

from helpers_spawn import RankResult, free_port, run_ranks


def run_agents(
    function: Callable[..., Any],
    processes: list[int],
    *args: Any,
    restarts: int = 0,
    timeout_s: float = 120.0,
    least: int = 0,
) -> list[RankResult]:
    """Call ``function(rank, *args)`` in the workers of one agent per node, with so many processes each; returns how the
    agents ended. What an agent or its workers print is its ``stderr``. With ``least`` nodes a restart goes on where the
    others are gone."""
    nodes = f"{least}:{len(processes)}" if least else str(len(processes))
    arguments = ["--rdzv-backend=c10d", f"--rdzv-endpoint=127.0.0.1:{free_port()}", "--local-addr=127.0.0.1"]
    arguments += ["--rdzv-id=job", f"--nnodes={nodes}", f"--max-restarts={restarts}", "--monitor-interval=0.1"]
    return run_ranks(_agent, len(processes), arguments, processes, function, args, timeout_s=timeout_s)


def _agent(
    node: int, arguments: list[str], processes: list[int], function: Callable[..., Any], args: tuple[Any, ...]
) -> None:
    from torch.distributed.launcher.api import elastic_launch
    from torch.distributed.run import config_from_args, parse_args

    os.dup2(2, 1)
    # Seconds until a node counts as gone, and until a start does without the nodes that may still come.
    conf = f"is_host={int(node == 0)},keep_alive_interval=1,keep_alive_max_attempt=3,last_call_timeout=5"
    here = [f"--nproc_per_node={processes[node]}", f"--rdzv-conf={conf}"]
    config, _, _ = config_from_args(parse_args([*arguments, *here, "a script"]))
    config.start_method = "fork"
    elastic_launch(config, _worker)(function, args)


def _worker(function: Callable[..., Any], args: tuple[Any, ...]) -> None:
    function(int(os.environ["RANK"]), *args)
