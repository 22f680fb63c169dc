"""Measures what every local module costs on this device, before training.

    module 0  [build] warm-up | F I B U | F I B U | F I B U  -> median time of every action, peak memory  [drop]
    module 1                                                    [build] ...        one module in memory at a time

Modules and heads are throwaway copies on random data: neither a user's network nor any random state is changed.
"""

from __future__ import annotations

import copy
import dataclasses
import datetime
import os
import platform
import statistics
import time
from collections import OrderedDict, defaultdict
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from pipeline.base.errors import ConfigError
from pipeline.base.numerics import Numerics
from pipeline.base.version import VERSION
from pipeline.local.local_module import LocalModule
from pipeline.models.backbones import Blocks
from pipeline.models.unbuilt import is_planned
from pipeline.plan.assembly import Plan, build_modules
from pipeline.plan.cost_profile import Profile
from pipeline.plan.simulate import ModuleCost
from pipeline.stage.schedule import Kind

GIB = 2**30


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

    On the CPU ``graph_bytes`` and ``work_bytes`` count the tensors that autograd keeps; what a kernel allocates and
    frees inside one operation is not seen there.
    """
    alone = dataclasses.replace(plan, stages=tuple(range(m, m + 1) for m in range(len(plan.modules))))
    cuda = [numerics.device.index or 0] if numerics.device.type == "cuda" else []
    costs = []
    with torch.random.fork_rng(devices=cuda):
        for index in range(len(plan.modules)):
            costs.append(_profile_one(alone, index, blocks, numerics, warmup, steps))
            if after_module is not None:
                after_module()
    return Profile(
        tuple(costs),
        plan.config.data.batch_size,
        plan.micro_batch_rows,
        device_name(numerics.device),
        device_memory(numerics.device, sharing),
        str(numerics.dtype).removeprefix("torch."),
        {"localpipe": VERSION, "torch": torch.__version__, "python": platform.python_version()},
        datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
        work_of(plan),
    )


def work_of(plan: Plan) -> tuple[str, ...]:
    """What a profile of ``plan`` is a profile of, besides its device and precision, for people to read."""
    config = plan.config
    parts = (config.model, config.method, config.hierarchy, config.patches, plan.task)
    return (*map(str, parts), f"{plan.micro_batch_rows} images at a time")


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


def device_name(device: torch.device) -> str:
    """For people: name of the GPU, or processor architecture and number of threads."""
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    threads = torch.get_num_threads()
    return f"CPU ({platform.machine()}, {threads} thread{'s' if threads > 1 else ''})"


# --- one module -------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class _RandomInput:
    """A micro-batch for one module, and the gradient that would come back to its output."""

    x: Tensor
    labels: Tensor
    image: Tensor | None
    gradient: Tensor


def _profile_one(
    alone: Plan, index: int, blocks: Blocks, numerics: Numerics, warmup: int, steps: int
) -> ModuleCost:
    copies = OrderedDict((name, copy.deepcopy(blocks[name])) for name in alone.cut.modules[index])
    (module,) = build_modules(alone, index, copies, numerics, fresh=any(map(is_planned, copies.values())))
    module.set_learning_rate(0.0)  # random labels must not drive the weights to where arithmetic is slow
    item = _random_input(alone, index, numerics, module.needs_image)
    scale = 1.0 / alone.config.schedule.micro_batches
    memory = _Memory(numerics.device, module, outside=(item.x, item.gradient))
    with torch.compiler.set_stance("force_eager"):  # what watches the tensors must not be compiled into the code
        _run_step(module, item, scale, 0, memory)
    if alone.config.precision.compile:
        warmup += 1  # nothing is compiled yet
    for step in range(1, warmup):
        _run_step(module, item, scale, step, _Stopwatch(numerics.device))
    times: dict[Kind, list[float]] = defaultdict(list)
    for step in range(steps):
        watch = _Stopwatch(numerics.device)
        _run_step(module, item, scale, max(warmup, 1) + step, watch)
        for kind, seconds in watch.seconds().items():
            times[kind].append(seconds)
    parts = alone.config.schedule.micro_batches
    median = {kind: statistics.median(values) for kind, values in times.items()}
    seconds = {f"{kind.name.lower()}_s": value * parts for kind, value in median.items()}
    seconds["update_s"] = median[Kind.UPDATE]
    wire = (numerics.dtype, numerics.channels_last)
    last = len(alone.modules) - 1
    return ModuleCost(
        **seconds,
        state_bytes=_state_bytes(module),
        graph_bytes=memory.graph_bytes(item.gradient, len(module.levels) + module.plan.final),
        work_bytes=memory.work_bytes(),
        activation_bytes=parts * alone.activation_spec(index, *wire).nbytes if index < last else 0,
        gradient_bytes=parts * alone.gradient_spec(index, *wire).nbytes if module.plan.outgoing else 0,
    )


def _random_input(alone: Plan, index: int, numerics: Numerics, needs_image: bool) -> _RandomInput:
    generator = torch.Generator().manual_seed(index)
    rows, task = alone.micro_batch_rows, alone.task
    shape = alone.shapes[index - 1] if index > 0 else task.image_shape

    def normal(shape: tuple[int, ...]) -> Tensor:
        return numerics.boundary(torch.randn(rows, *shape, generator=generator).to(numerics.device))

    labels = torch.randint(task.classes, (rows,), generator=generator).to(numerics.device)
    image = None
    if needs_image:
        image = torch.randint(256, (rows, *task.image_shape), generator=generator, dtype=torch.uint8)
        image = image.to(numerics.device)
    return _RandomInput(normal(shape), labels, image, normal(alone.shapes[index]) / rows)


def _run_step(
    module: LocalModule, item: _RandomInput, scale: float, step: int, watch: _Stopwatch | _Memory
) -> None:
    """One step of one micro-batch, every action under ``watch``."""
    plan, key = module.plan, (step, 0)
    with watch.action(Kind.FORWARD):
        module.forward(key, item.x, item.labels, item.image, scale)
    if plan.final:
        with watch.action(Kind.FINAL):
            module.final(key)
    if plan.cascade:
        with watch.action(Kind.CASCADE):
            module.cascade(key)
    for message_key in plan.incoming:
        module.receive(key, message_key, item.gradient)
    for message_key in () if plan.merged else plan.outgoing:
        with watch.action(Kind.RELAY):
            module.relay(key, message_key)
    if plan.independent:
        with watch.action(Kind.INDEPENDENT):
            module.independent(key)
    with watch.action(Kind.BACKWARD):
        module.backward(key)
    with watch.action(Kind.UPDATE):
        module.update(step)


class _Stopwatch:
    """Times actions: host time on a CPU, CUDA events (read at the end, so that nothing waits) on a GPU."""

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._laps: list[tuple[Kind, Any, Any]] = []

    @contextmanager
    def action(self, kind: Kind) -> Iterator[None]:
        start = self._mark()
        yield
        self._laps.append((kind, start, self._mark()))

    def seconds(self) -> dict[Kind, float]:
        """By kind; where a kind ran several times (relays of several messages), the mean."""
        if self._device.type == "cuda":
            torch.cuda.synchronize(self._device)
        found: dict[Kind, list[float]] = defaultdict(list)
        for kind, start, end in self._laps:
            found[kind].append(end - start if isinstance(start, float) else start.elapsed_time(end) / 1e3)
        return {kind: statistics.fmean(values) for kind, values in found.items()}

    def _mark(self) -> Any:
        if self._device.type != "cuda":
            return time.perf_counter()
        event = torch.cuda.Event(enable_timing=True)
        event.record(torch.cuda.current_stream(self._device))
        return event


class _Memory:
    """Watches the memory of one step: what stays after the forward, and the most that any action adds to it.

    On a GPU the allocator counts. On a CPU it counts the distinct storages that autograd holds, without the weights and
    without the tensors in ``outside``, which belong to the queues.
    """

    def __init__(self, device: torch.device, module: LocalModule, outside: Sequence[Tensor]) -> None:
        self._device = device
        owned = [p for part in (*module.blocks.values(), *module.levels.values()) for p in part.parameters()]
        self._known = {tensor.untyped_storage().data_ptr() for tensor in (*owned, *outside)}
        self._held: dict[int, int] = defaultdict(int)
        self._now = self._peak = 0
        self._after_forward = self._most = 0
        self._base = torch.cuda.memory_allocated(device) if device.type == "cuda" else 0

    @contextmanager
    def action(self, kind: Kind) -> Iterator[None]:
        if self._device.type == "cuda":
            torch.cuda.reset_peak_memory_stats(self._device)
            yield
            peak = torch.cuda.max_memory_allocated(self._device) - self._base
            after = torch.cuda.memory_allocated(self._device) - self._base
        else:
            self._peak = self._now
            with torch.autograd.graph.saved_tensors_hooks(self._pack, lambda kept: kept.tensor):
                yield
            peak, after = self._peak, self._now
        if kind is Kind.FORWARD:
            self._after_forward = after
        if kind is not Kind.UPDATE:
            self._most = max(self._most, peak)

    def graph_bytes(self, output: Tensor, levels: int) -> int:
        """What stays from the forward to the backward: the graph, and the gradient of the output from every level."""
        return self._after_forward + levels * output.nbytes

    def work_bytes(self) -> int:
        """The most that an action adds."""
        return max(0, self._most - self._after_forward)

    def _pack(self, tensor: Tensor) -> _Kept:
        storage = tensor.untyped_storage()
        pointer, size = storage.data_ptr(), storage.nbytes()
        if pointer not in self._known:
            self._held[pointer] += 1
            if self._held[pointer] == 1:
                self._now += size
                self._peak = max(self._peak, self._now)
        return _Kept(tensor, self)

    def free(self, tensor: Tensor) -> None:
        """Autograd has dropped a tensor that it held."""
        storage = tensor.untyped_storage()
        pointer = storage.data_ptr()
        if pointer not in self._known:
            self._held[pointer] -= 1
            if self._held[pointer] == 0:
                self._now -= storage.nbytes()


class _Kept:
    """A tensor that autograd holds; it tells when autograd drops it."""

    def __init__(self, tensor: Tensor, memory: _Memory) -> None:
        self.tensor = tensor
        self._memory = memory

    def __del__(self) -> None:
        self._memory.free(self.tensor)


def _state_bytes(module: LocalModule) -> int:
    """Parameters, their gradients, buffers and optimiser state."""
    parts = (*module.blocks.values(), *module.levels.values())
    parameters = [p for part in parts for p in part.parameters()]
    buffers = [b for part in parts for b in part.buffers()]
    optimiser = [v for state in module.optimiser.state.values() for v in state.values() if isinstance(v, Tensor)]
    gradients = sum(p.nbytes for p in parameters if p.requires_grad)
    return gradients + sum(tensor.nbytes for tensor in (*parameters, *buffers, *optimiser))


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
            most = max(most, open_now + cost.work_bytes)
            if action.kind is Kind.BACKWARD:
                open_now -= cost.graph_bytes
    return most
