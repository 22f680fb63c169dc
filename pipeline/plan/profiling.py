"""Measures what every local module costs on this device, before training.

    module 0  [build] warm-up | F I B U | F I B U | F I B U  -> median time of every action, peak memory  [drop]
    module 1                                                    [build] ...        one module in memory at a time

Modules and heads are throwaway copies on random data: neither a user's network nor any random state is changed.
"""

from __future__ import annotations

import copy
import dataclasses
import datetime
import platform
import statistics
from collections import OrderedDict, defaultdict
from collections.abc import Callable
from typing import Any

import torch

from pipeline.base.numerics import Numerics
from pipeline.base.validation import with_values
from pipeline.base.version import VERSION
from pipeline.local.local_module import LocalModule
from pipeline.models.backbones import Blocks
from pipeline.models.unbuilt import is_planned
from pipeline.plan.alone import random_batch, random_gradients, stage_alone
from pipeline.plan.assembly import Plan, build_modules
from pipeline.plan.cost_profile import Profile
from pipeline.plan.level_choice import joinable
from pipeline.plan.rank_memory import device_memory
from pipeline.plan.simulate import ModuleCost
from pipeline.plan.watches import MemoryWatch, Stopwatch
from pipeline.stage.schedule import Kind


def profile_modules(
    plan: Plan,
    blocks: Blocks,
    numerics: Numerics,
    warmup: int,
    steps: int,
    sharing: int = 1,
    after_module: Callable[[], None] | None = None,
) -> Profile:
    """Measure every local module of ``plan`` with its heads on ``numerics.device``, one after another.

    Args:
        plan: of any placement; every module is measured by itself.
        blocks: the network; it is copied, and planned blocks get weights in the copy.
        numerics: device, dtype, layout.
        warmup: steps of one micro-batch before those that count; the first one, always done, measures memory.
        steps: steps that count; times are their medians.
        sharing: ranks that share the memory of the device: all of a machine share its CPU's.
        after_module: called when a module has been measured.

    With ``hierarchy.levels = "auto"`` a module whose levels may go together is measured in both forms. Bytes are those
    of :class:`pipeline.plan.watches.MemoryWatch`.
    """
    cuda = [numerics.device.index or 0] if numerics.device.type == "cuda" else []
    costs = []
    both = joinable(plan) if plan.config.hierarchy.levels == "auto" else frozenset()
    with torch.random.fork_rng(devices=cuda):
        for index in range(len(plan.modules)):
            cost = _profile_one(plan, index, blocks, numerics, warmup, steps)
            if index in both:
                together = _profile_one(plan.with_levels_together({index}), index, blocks, numerics, warmup, steps)
                cost = with_both_forms(cost, together)
            costs.append(cost)
            if after_module is not None:
                after_module()
    return Profile(
        tuple(costs),
        plan.rows,
        plan.micro_batch_rows,
        device_name(numerics.device),
        device_memory(numerics.device, sharing),
        str(numerics.dtype).removeprefix("torch."),
        {"localpipe": VERSION, "torch": torch.__version__, "python": platform.python_version()},
        datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
        work_of(plan),
    )


def module_alone(plan: Plan, index: int, blocks: Blocks, numerics: Numerics) -> LocalModule:
    """A throwaway local module of a plan, whatever its placement; planned blocks get weights in a copy."""
    copies = OrderedDict((name, copy.deepcopy(blocks[name])) for name in plan.cut.modules[index])
    fresh = any(map(is_planned, copies.values()))
    (module,) = build_modules(one_module_a_rank(plan), index, copies, numerics, fresh)
    return module


def one_module_a_rank(plan: Plan) -> Plan:
    """The same plan on as many ranks as there are modules, with an update in every step."""
    config = with_values(plan.config, {"train.accumulate": 1})
    return dataclasses.replace(plan, config=config, stages=tuple(range(m, m + 1) for m in range(len(plan.modules))))


def work_of(plan: Plan) -> tuple[str, ...]:
    """What a profile of ``plan`` is a profile of, besides its device and precision, for people to read."""
    config = plan.config
    parts = (config.model, config.method, config.hierarchy, config.patches, plan.task)
    return (*map(str, parts), f"{plan.micro_batch_rows} images at a time")


def device_name(device: torch.device) -> str:
    """For people: name of the GPU, or processor architecture and number of threads."""
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    threads = torch.get_num_threads()
    return f"CPU ({platform.machine()}, {threads} thread{'s' if threads > 1 else ''})"


# --- one module -------------------------------------------------------------------------------------------------------


def _profile_one(
    plan: Plan, index: int, blocks: Blocks, numerics: Numerics, warmup: int, steps: int
) -> ModuleCost:
    alone = one_module_a_rank(plan)
    module = module_alone(alone, index, blocks, numerics)
    module.set_learning_rate(0.0)  # random labels must not drive the weights to where arithmetic is slow
    batch, gradients = random_batch(alone, [module], numerics), random_gradients(alone, module, numerics)
    memory = MemoryWatch(numerics.device, module)
    stage = stage_alone(alone, module, batch, gradients, memory)
    with torch.compiler.set_stance("force_eager"):  # what watches the tensors must not be compiled into the code
        stage.train_step(0, 0)
    if alone.config.precision.compile:
        warmup += 1  # nothing is compiled yet
    times: dict[Kind, list[float]] = defaultdict(list)
    first = max(warmup, 1)
    for step in range(1, first + steps):
        watch = stage.watch = Stopwatch(numerics.device)
        stage.train_step(0, step)
        for kind, lap_s in watch.seconds().items() if step >= first else ():
            times[kind].append(lap_s)
    parts = alone.config.schedule.micro_batches
    median = {kind: statistics.median(values) for kind, values in times.items()}
    seconds: dict[str, Any] = {f"{kind.name.lower()}_s": value * parts for kind, value in median.items()}
    seconds["update_s"] = median[Kind.UPDATE]
    if module.plan.together:
        seconds["together_s"] = seconds.pop("cascade_s")
    return dataclasses.replace(bytes_of(plan, module, memory, numerics), **seconds)


def bytes_of(plan: Plan, module: LocalModule, memory: MemoryWatch, numerics: Numerics) -> ModuleCost:
    """The bytes of a module that has done a step with an update, without its seconds."""
    alone = one_module_a_rank(plan)
    index, parts, last = module.plan.index, alone.config.schedule.micro_batches, len(alone.modules) - 1
    wire = (numerics.dtype, numerics.channels_last)
    return ModuleCost(
        state_bytes=_state_bytes(module, sums=plan.config.train.accumulate > 1),
        graph_bytes=memory.graph_bytes,
        work_bytes=memory.work_bytes,
        head_bytes=memory.head_bytes,
        activation_bytes=parts * alone.activation_spec(index, *wire).nbytes if index < last else 0,
        gradient_bytes=parts * alone.gradient_spec(index, *wire).nbytes if module.plan.outgoing else 0,
    )


def with_both_forms(separate: ModuleCost, together: ModuleCost) -> ModuleCost:
    """The cost of a module whose form is chosen later: there is memory for either."""
    return dataclasses.replace(
        separate,
        together_s=together.together_s,
        graph_bytes=max(separate.graph_bytes, together.graph_bytes),
        work_bytes=max(separate.work_bytes, together.work_bytes),
        head_bytes=max(separate.head_bytes, together.head_bytes),
    )


def _state_bytes(module: LocalModule, sums: bool) -> int:
    """Parameters, their gradients, buffers and what the updates keep; ``sums``: those of the gradients of batches
    before, of which a module that updates in every step has none."""
    parts = (*module.blocks.values(), *module.levels.values())
    parameters = [p for part in parts for p in part.parameters()]
    buffers = [b for part in parts for b in part.buffers()]
    gradients = sum(p.nbytes for p in parameters if p.requires_grad)
    gradients *= 1 + sums
    return gradients + sum(tensor.nbytes for tensor in (*parameters, *buffers, *module.kept_tensors()))
