"""What a rank of a plan needs for tensors, what its device has, and the refusal where that is less.

    weights, gradients, optimiser | graphs open at a time | the action at work | messages of all edges
"""

from __future__ import annotations

import os
from collections.abc import Sequence
from pathlib import Path

import torch

from pipeline.base.errors import ConfigError
from pipeline.base.numerics import Numerics
from pipeline.plan.assembly import Plan
from pipeline.plan.simulate import ModuleCost
from pipeline.plan.watches import HEADS
from pipeline.stage.schedule import Kind

GIB = 2**30


def rank_memory(plan: Plan, costs: Sequence[ModuleCost], numerics: Numerics) -> tuple[int, ...]:
    """Bytes that every rank of ``plan`` needs for tensors: weights, graphs open at a time, one action, its queues."""
    depth = plan.config.runtime.queue_depth
    wire = (numerics.dtype, numerics.channels_last)
    last = len(plan.stages) - 1
    needed = []
    for rank, stage in enumerate(plan.stages):
        total = sum(costs[m].state_bytes for m in stage) + _peak_of_graphs(plan, rank, costs)
        if rank > 0:
            total += plan.activation_slots(rank) * plan.activation_spec(rank - 1, *wire).nbytes
            total += depth * plan.gradient_spec(rank, *wire).nbytes if plan.gradient_order(rank) else 0
        if rank < last:
            total += depth * plan.activation_spec(rank, *wire).nbytes
            total += plan.gradient_slots(rank) * plan.gradient_spec(rank + 1, *wire).nbytes
        total += plan.upstream.memory_bytes(stage, numerics.weight_dtype, depth) if plan.upstream is not None else 0
        needed.append(total)
    return tuple(needed)


def device_memory(device: torch.device, sharing: int = 1) -> int:
    """Bytes that each of ``sharing`` ranks on ``device`` can use: of a GPU what is free, of a CPU the machine's memory
    or the limit of its control group."""
    if device.type == "cuda":
        free, _ = torch.cuda.mem_get_info(device)
        return (free + torch.cuda.memory_reserved(device)) // sharing
    total = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    limit = Path("/sys/fs/cgroup/memory.max")
    if limit.is_file() and (text := limit.read_text().strip()).isdigit():
        total = min(total, int(text))
    return total // sharing


def refuse_too_large(needed: Sequence[int], available: int) -> None:
    """Refuse a placement in which a rank needs more than ``available`` bytes.

    Raises:
        ConfigError: names the rank that needs most, what it needs and what there is.
    """
    rank = max(range(len(needed)), key=lambda r: needed[r])
    if needed[rank] > available:
        raise ConfigError(
            f"rank {rank} needs {needed[rank] / GIB:.2f} GiB, its device has {available / GIB:.2f} GiB for it; "
            "start more processes, use a smaller data.batch_size, or more schedule.micro_batches"
        )


def _peak_of_graphs(plan: Plan, rank: int, costs: Sequence[ModuleCost]) -> int:
    """Most bytes of graphs that are open together, with the action at work on top."""
    schedule = plan.schedules[rank]
    steps = 2 + 2 * max(action.lag for action in schedule)
    open_now = most = 0
    for step in range(steps):
        for action in schedule:
            if step < action.lag:
                continue
            cost = costs[action.module]
            if action.kind is Kind.FORWARD:
                open_now += cost.graph_bytes
            most = max(most, open_now + (cost.head_bytes if action.kind in HEADS else cost.work_bytes))
            if action.kind is Kind.BACKWARD:
                open_now -= cost.graph_bytes
    return most
