"""A rank that runs out of memory: what it holds, and the settings that make that smaller.

    weights, heads, gradients, optimiser, copies of weights, messages     counted: the same all the time
    activations, and the work of one operation                            the rest: grows with the micro-batch
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Sequence

import torch
from torch import Tensor, nn

from pipeline.base.errors import MemoryExhausted
from pipeline.base.numerics import Numerics
from pipeline.base.units import mebibytes
from pipeline.local.local_module import LocalModule
from pipeline.plan.assembly import Plan
from pipeline.plan.rank_memory import rank_memory
from pipeline.plan.simulate import ModuleCost
from pipeline.ranks.resources import peak_memory_bytes
from pipeline.stage.schedule import lags

CPU_MARKS = ("DefaultCPUAllocator", "can't allocate memory")
UNITS = {"bytes": 1, "KiB": 2**10, "MiB": 2**20, "GiB": 2**30, "TiB": 2**40}


def explain_out_of_memory(
    error: BaseException, plan: Plan, rank: int, numerics: Numerics, modules: Sequence[LocalModule]
) -> MemoryExhausted | None:
    """The error to report instead of ``error`` if that is a failed allocation of host or GPU memory, else None.

    Args:
        error: as it was caught; it becomes the cause, its traceback is kept.
        plan: of the whole run.
        rank: where it happened.
        numerics: of that rank.
        modules: the local modules of that rank.
    """
    if not _is_out_of_memory(error):
        return None
    asked = _asked_bytes(str(error))
    wanted = f", which was asked for {mebibytes(asked)} MiB more" if asked else ""
    held = {what: count for what, count in _held_bytes(plan, rank, numerics, modules).items() if count}
    static = ", ".join(f"{what} {mebibytes(count)}" for what, count in held.items())
    peak = peak_memory_bytes(numerics.device)
    rest = f"activations of {plan.micro_batch_rows} images at a time"
    if numerics.device.type != "cuda":
        rest += ", code and libraries"
    explained = MemoryExhausted(
        f"out of memory on {numerics.device}{wanted}. What {plan.stage_label(rank)} needs, in MiB: {static}; the rest "
        f"of the peak of {mebibytes(peak)} is {rest}. Use {', '.join(_knobs(plan))}"
    )
    explained.__cause__ = error
    return explained.with_traceback(error.__traceback__)


def _is_out_of_memory(error: BaseException) -> bool:
    if isinstance(error, torch.OutOfMemoryError | MemoryError):
        return True
    return isinstance(error, RuntimeError) and any(mark in str(error) for mark in CPU_MARKS)


def _asked_bytes(text: str) -> int:
    """Bytes of the allocation that failed, 0 if the text does not tell."""
    found = re.search(r"(?:tried|unable) to allocate ([\d.]+) (\w+)", text, re.IGNORECASE)
    return int(float(found[1]) * UNITS.get(found[2], 0)) if found else 0


def _held_bytes(plan: Plan, rank: int, numerics: Numerics, modules: Sequence[LocalModule]) -> dict[str, int]:
    """Bytes that the rank needs at any time, by what they are for."""
    config = plan.config
    weights = {module.plan.index: _bytes_of(module.blocks.values()) for module in modules}
    heads = sum(_bytes_of(module.levels.values()) for module in modules)
    parameters = [p for module in modules for p in _parameters((*module.blocks.values(), *module.levels.values()))]
    gradients = sum(p.nbytes for p in parameters if p.requires_grad)
    delay = config.schedule.delay if config.schedule.kind == "async" else 0
    late = lags(plan.modules, delay).backward
    copies = sum((late[index] + 1) * count for index, count in weights.items() if late[index])
    nothing = [ModuleCost()] * len(plan.modules)
    return {
        "weights": sum(weights.values()),
        "heads": heads,
        "gradients": gradients,
        "optimiser": sum(module.optimiser.kept_bytes() for module in modules),
        "sums of gradients": gradients * (config.train.accumulate > 1),
        "averages of weights": (sum(weights.values()) + heads) * bool(config.train.ema),
        "late copies of weights": copies,
        "messages": rank_memory(plan, nothing, numerics)[rank],
    }


def _bytes_of(networks: Iterable[nn.Module]) -> int:
    """Of parameters and buffers."""
    return sum(tensor.nbytes for network in networks for tensor in (*network.parameters(), *network.buffers()))


def _parameters(networks: Iterable[nn.Module]) -> list[Tensor]:
    return [parameter for network in networks for parameter in network.parameters()]


def _knobs(plan: Plan) -> list[str]:
    """What can be turned in this plan, the most effective first."""
    schedule, batch, ranks = plan.config.schedule, plan.config.data.batch_size, len(plan.stages)
    knobs = [f"a smaller data.batch_size (now {batch})"]
    if schedule.kind != "free" and batch >= 4 * schedule.micro_batches:  # BatchNorm needs two images
        knobs.append(f"more schedule.micro_batches (now {schedule.micro_batches})")
    if ranks < len(plan.modules):
        knobs.append(f"more processes (now {ranks})")
        if ranks > 1 and plan.config.partition.kind != "measured":
            knobs.append("partition.kind=measured")
    if schedule.kind == "async":
        knobs.append("schedule.kind=exact")
    if schedule.kind == "free":
        knobs.append(f"a smaller schedule.ring (now {schedule.ring})")
    return knobs
