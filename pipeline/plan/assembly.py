"""Assembly: cut, roles, schedules and shapes together are the plan of a run; of it, one rank's modules are built."""

from __future__ import annotations

import dataclasses
import functools
import itertools
import json
from collections import OrderedDict
from collections.abc import Callable, Collection
from dataclasses import dataclass
from pathlib import Path
from typing import TypeVar

import torch
import torch.distributed as dist
from torch import nn

from pipeline.base.config import Config
from pipeline.base.errors import ConfigError
from pipeline.base.flow import MAIN, Specs, TensorSpec
from pipeline.base.numerics import Numerics, stable_hash
from pipeline.edges.wire import FieldSpec, MessageSpec
from pipeline.local.at_once import HeadMemory, bytes_of_modules
from pipeline.local.entrance import Maps
from pipeline.local.graphs import Capture
from pipeline.local.local_module import LocalModule
from pipeline.local.methods import Level, levels_of, looks_ahead
from pipeline.local.roles import ModulePlan, plan_hierarchy
from pipeline.local.task import Classification, Task, task_name
from pipeline.models.backbones import Blocks
from pipeline.models.boundaries import boundary_specs
from pipeline.models.later import LaterBlock, later_blocks
from pipeline.models.pretrained import PretrainedWeights
from pipeline.models.unbuilt import drawn_blocks, real_blocks, without_memory
from pipeline.plan.cut import Cut, make_cut
from pipeline.plan.placement import place
from pipeline.plan.upstream import UpstreamPlan, plan_upstream
from pipeline.ranks.grid import Grid
from pipeline.stage.capacity import activations_held, gradients_held, gradients_sent
from pipeline.stage.gradients import GRADIENT
from pipeline.stage.inlet import ACTIVATION, IMAGE, LABELS, LOCAL_GRADIENT, payload
from pipeline.stage.schedule import Action, Message, lags, stage_schedules

T = TypeVar("T")


@dataclass(frozen=True)
class Plan:
    """What all ranks must agree on before step 0.

    Attributes:
        config: resolved configuration.
        task: what the network is for.
        cut: blocks of every local module.
        modules: role of every local module.
        stages: consecutive local modules of every rank.
        schedules: actions of every rank for one step.
        inputs: what the first local module gets.
        boundaries: what every local module gives.
        reconstructing: local modules with a head that asks for the image.
        later: blocks behind every local module, where the method's heads are made of copies of them; else empty.
        upstream: weights that the heads get from the next module, where the method declares them.
        head_memory: with ``patches.at_once = "auto"``, how many patches a head works on together; it remembers what it
            has counted, so plans made of this one share it.
        replicas: number of pipelines.
        untrained: local modules that no loss reaches.
    """

    config: Config
    task: Task
    cut: Cut
    modules: tuple[ModulePlan, ...]
    stages: tuple[range, ...]
    schedules: tuple[tuple[Action, ...], ...]
    inputs: Specs
    boundaries: tuple[Specs, ...]
    reconstructing: frozenset[int]
    later: tuple[tuple[LaterBlock, ...], ...]
    upstream: UpstreamPlan | None = None
    head_memory: HeadMemory | None = None
    replicas: int = 1
    untrained: tuple[int, ...] = ()

    def placed(self, stages: tuple[range, ...]) -> Plan:
        """The same plan with other consecutive local modules on the ranks."""
        if stages == self.stages:
            return self
        schedules = _schedules(self.config, self.modules, stages, self.upstream)
        return dataclasses.replace(self, stages=stages, schedules=schedules)

    def with_levels_together(self, modules: Collection[int]) -> Plan:
        """The same plan with both levels of these local modules in one action, and of no others."""
        roles = tuple(dataclasses.replace(role, together=role.index in modules) for role in self.modules)
        if roles == self.modules:
            return self
        schedules = _schedules(self.config, roles, self.stages, self.upstream)
        return dataclasses.replace(self, modules=roles, schedules=schedules)

    def with_patches_at_once(self, at_once: int | str, blocks: Blocks) -> Plan:
        """The same plan with ``patches.at_once`` of this value; ``blocks``: the network, which stays as it is."""
        memory = None
        if at_once == "auto" and self.config.patches.grid > 1 and not self.modules[0].reconciles:
            parts = [[blocks[name] for name in names] for names in self.cut.modules]
            modules = bytes_of_modules(zip(parts, (self.inputs, *self.boundaries), strict=False))
            memory = HeadMemory(modules, self.task)
        config = dataclasses.replace(self.config, patches=dataclasses.replace(self.config.patches, at_once=at_once))
        return dataclasses.replace(self, config=config, head_memory=memory)

    @property
    def levels_together(self) -> tuple[int, ...]:
        """The local modules with both levels in one action."""
        return tuple(role.index for role in self.modules if role.together)

    def given(self, module: int) -> Specs:
        """What a local module gets."""
        return self.boundaries[module - 1] if module > 0 else self.inputs

    def feature(self, module: int) -> tuple[int, ...]:
        """Shape, without the batch, of what the heads of a local module stand on: (C, H, W) of a map."""
        return self.boundaries[module][MAIN].feature

    def level_builders(self, module: int) -> dict[str, Callable[[], Level]]:
        """Of the head levels of a local module, by name: :func:`pipeline.local.methods.levels_of`."""
        shape, later = self.feature(module), self.later[module]
        return levels_of(self.modules[module], len(self.modules), shape, self.task, self.config, later)

    @property
    def rows(self) -> int:
        """Images of a step in one replica; the most of any, where they do not divide a batch."""
        return -(-self.config.data.batch_size // self.replicas)

    @property
    def micro_batch_rows(self) -> int:
        """Largest number of images in one micro-batch."""
        return -(-self.rows // self.config.schedule.micro_batches)

    def labels(self) -> list[str]:
        """First and last block of every local module."""
        return [self.cut.label(index) for index in range(len(self.modules))]

    def stage_label(self, rank: int) -> str:
        """``modules 2-3 (layer2.2-classifier)``, for messages."""
        stage = self.stages[rank]
        first, last = self.cut.modules[stage[0]][0], self.cut.modules[stage[-1]][-1]
        numbers = f"module {stage[0]}" if len(stage) == 1 else f"modules {stage[0]}-{stage[-1]}"
        return f"{numbers} ({first if first == last else f'{first}-{last}'})"

    def image_crosses(self, rank: int) -> bool:
        """Whether rank must send the image on to rank + 1: a later module reconstructs it."""
        return any(module > self.stages[rank][-1] for module in self.reconstructing)

    def gradient_order(self, rank: int) -> tuple[tuple[int, Message], ...]:
        """(lag, gradient message) from rank to rank - 1 during one step, in the order of sending."""
        return gradients_sent(self.schedules[rank]) if rank > 0 else ()

    def activation_slots(self, rank: int) -> int:
        """Receives that rank keeps posted for activations: those on their way, and one of every micro-batch that is
        open; with `free` the replay ring and the batch at work. 0 on the first rank."""
        if rank == 0:
            return 0
        free = self.config.schedule.kind == "free"
        held = self.config.schedule.ring + 1 if free else activations_held(self.schedules[rank])
        return self.config.runtime.queue_depth + held

    def gradient_slots(self, rank: int) -> int:
        """Receives that rank keeps posted for gradients: those on their way, and all that it holds at a time. 0 where
        no gradient comes from rank + 1."""
        if rank + 1 == len(self.stages) or not self.gradient_order(rank + 1):
            return 0
        held = gradients_held(self.schedules[rank], self.modules, self.schedules[rank + 1])
        return self.config.runtime.queue_depth + held

    def activation_spec(self, rank: int, dtype: torch.dtype, channels_last: bool) -> MessageSpec:
        """What travels from rank to rank + 1 for each micro-batch."""
        outputs = self.boundaries[self.stages[rank][-1]]
        fields = [_field(name, spec, dtype, channels_last) for name, spec in payload(outputs, ACTIVATION).items()]
        if self.modules[0].reconciles:
            fields.append(_field(LOCAL_GRADIENT, outputs[MAIN], dtype, channels_last))
        target = self.task.target
        fields.append(FieldSpec(LABELS, target.dtype, target.shape, varies=target.varies))
        if self.image_crosses(rank):
            image = self.task.image
            fields.append(FieldSpec(IMAGE, image.dtype, image.shape, varies=image.varies))
        return MessageSpec(tuple(fields), self.micro_batch_rows)

    def gradient_spec(self, rank: int, dtype: torch.dtype, channels_last: bool) -> MessageSpec:
        """What travels from rank to rank - 1 for each gradient message."""
        inputs = {name: spec for name, spec in self.given(self.stages[rank][0]).items() if spec.dtype.is_floating_point}
        fields = (_field(name, spec, dtype, channels_last) for name, spec in payload(inputs, GRADIENT).items())
        return MessageSpec(tuple(fields), self.micro_batch_rows)


def _field(name: str, spec: TensorSpec, dtype: torch.dtype, channels_last: bool) -> FieldSpec:
    dtype = dtype if spec.dtype.is_floating_point else spec.dtype
    return FieldSpec(name, dtype, spec.shape, channels_last and len(spec.shape) == 3, spec.varies)


def make_plan(
    config: Config, blocks: Blocks, task: Task, ranks: int, inputs: Specs | None = None, replicas: int = 1
) -> Plan:
    """Cut, plan and place by count; every check that needs no process group happens here. It needs no weights:
    ``blocks`` may be planned ones (see :mod:`pipeline.models.unbuilt`), heads are only planned.

    Args:
        ranks: of one pipeline.
        inputs: of the network, as the data give them; None: as the task says.
        replicas: number of pipelines.

    Raises:
        ConfigError: K > blocks, P > K, a head or patch grid that does not fit, a network that does not end in classes,
            a block that gives something else than named tensors, a local module that ends in integers.
    """
    inputs = task.inputs if inputs is None else inputs
    cut = make_cut(list(blocks), config.model)
    count = len(cut)
    reconciles = config.method.reconciliation > 0
    modules = tuple(dataclasses.replace(m, reconciles=reconciles) for m in plan_hierarchy(count, config.hierarchy))
    stages = place(count, ranks)
    by_block = boundary_specs(blocks, inputs, [names[0] for names in cut.modules[1:]])
    boundaries = tuple(by_block[names[-1]] for names in cut.modules)
    ends = [boundary[MAIN] for boundary in boundaries]
    if ends[-1].shape != task.output_shape:
        wanted = f"the data has {task.classes} classes; the last block must give class scores"
        if not isinstance(task, Classification):
            wanted = f"{type(task).__name__} needs {task.output_shape}; let the last block give that"
        raise ConfigError(f"the network ends in {ends[-1].shape}, {wanted}")
    for names, end in zip(cut.modules, ends, strict=True):
        if not end.dtype.is_floating_point:
            raise ConfigError(
                f"a local module ends with block '{names[-1]}', which gives "
                f"{str(end.dtype).removeprefix('torch.')} as 'x'; no loss can stand on that: cut elsewhere"
            )
    network = later_blocks(blocks, inputs, by_block) if looks_ahead(config.method) else ()
    later = tuple(network[end:] for end in itertools.accumulate(map(len, cut.modules)))
    reconstructing, untrained = set(), []
    for plan, end, behind in zip(modules, ends, later, strict=True):
        levels = [without_memory(build) for build in levels_of(plan, count, end.feature, task, config, behind).values()]
        if any(IMAGE in level.asks for level in levels):
            reconstructing.add(plan.index)
        if not (plan.final or plan.incoming or plan.reconciles or any(level.counts for level in levels)):
            untrained.append(plan.index)
    upstream = plan_upstream(config, blocks, modules, cut.modules)
    schedules = _schedules(config, modules, stages, upstream)
    asking = frozenset(reconstructing)
    whole = Plan(
        config, task, cut, modules, stages, schedules, inputs, boundaries, asking, later, upstream, replicas=replicas,
        untrained=tuple(untrained),
    )
    return whole.with_patches_at_once(config.patches.at_once, blocks)


def _schedules(
    config: Config, modules: tuple[ModulePlan, ...], stages: tuple[range, ...], upstream: UpstreamPlan | None
) -> tuple[tuple[Action, ...], ...]:
    declared = upstream.declared if upstream is not None else None
    return stage_schedules(modules, stages, config.schedule.micro_batches, _delay(config), declared)


def _delay(config: Config) -> int:
    return config.schedule.delay if config.schedule.kind == "async" else 0


def build_modules(
    plan: Plan,
    rank: int,
    blocks: Blocks,
    numerics: Numerics,
    fresh: bool,
    pretrained: PretrainedWeights | None = None,
    replica: int = 0,
    twins: dist.ProcessGroup | None = None,
) -> list[LocalModule]:
    """The local modules of stage ``rank`` of a pipeline. With ``fresh``, blocks are drawn from per-block seeds, planned
    ones made real; a user's own network keeps its weights. Heads are always drawn from a seed of their own, so that no
    weight depends on the placement, and blocks of other ranks are never made real. ``pretrained``: what the blocks get
    afterwards. ``replica``: which pipeline; ``twins``: of this stage, where BatchNorm is to see the rows of all."""
    seed = plan.config.train.seed
    late = lags(plan.modules, _delay(plan.config)).backward
    whole = functools.cache(
        lambda: real_blocks(
            plan.config.model.name, plan.task.image_shape[0], plan.task.classes, seed, plan.task.image_shape[1:]
        )
    )
    on_gpu = numerics.device.type == "cuda"
    capture = Capture(numerics.device) if plan.config.precision.cuda_graphs and on_gpu else None
    built = []
    for index in plan.stages[rank]:
        names = plan.cut.modules[index]
        if fresh:
            mine = drawn_blocks(blocks, names, lambda name: stable_hash(seed, "block", name), whole)
        else:
            mine = OrderedDict((name, blocks[name]) for name in names)
        if pretrained is not None:
            pretrained.load_into(mine)
        levels: OrderedDict[str, Level] = OrderedDict()
        builders = plan.level_builders(index)
        with torch.random.fork_rng(devices=[]):
            for name, build in builders.items():
                levels[name] = _seeded(build, seed, "head", index, name)
        if plan.config.parallel.sync_batch_norm:
            assert twins is not None  # there are several replicas
            convert = functools.partial(nn.SyncBatchNorm.convert_sync_batchnorm, process_group=twins)
            mine = OrderedDict((name, convert(block)) for name, block in mine.items())
            levels = OrderedDict((name, convert(level)) for name, level in levels.items())
        if plan.head_memory is not None:
            plan.head_memory.fit(index, levels.values(), plan.feature(index), plan.modules[index].together)
        role, mailbox = plan.modules[index], None
        if plan.upstream is not None:
            mailbox = plan.upstream.mailbox(index, numerics)
        maps = Maps.of(plan.given(index), plan.boundaries[index])
        settings = (plan.task, plan.config, numerics, late[index], mailbox, maps, replica, capture)
        built.append(LocalModule(role, mine, levels, *settings))
    return built


def _seeded(build: Callable[[], T], *parts: object) -> T:
    torch.manual_seed(stable_hash(*parts))
    return build()


def _schedule_name(plan: Plan) -> str:
    """``exact``, ``async (gradients up to 1 step(s) late)``, ``free (ring of 4 batches)``."""
    schedule = plan.config.schedule
    if schedule.kind == "async":
        late = max(lags(plan.modules, schedule.delay).backward)
        return f"async (gradients up to {late} step(s) late)" if late else "async (no gradient to wait for)"
    return f"free (ring of {schedule.ring} batches)" if schedule.kind == "free" else schedule.kind


def describe(plan: Plan, numerics: Numerics, devices: list[str]) -> list[str]:
    """The plan in a few lines for people: what trains, how it is cut, who owns what."""
    config = plan.config
    hierarchy, grid = config.hierarchy, config.patches.grid
    parts = [config.method.name]
    if len(plan.modules) == 1:
        parts = ["backpropagation (one module)"]
    else:
        if hierarchy.variant == "deepsup":
            parts.append("every loss through the whole network (deepsup)")
        elif hierarchy.cascade_span > 1:
            parts.append(f"cascade span {hierarchy.cascade_span} ({hierarchy.variant})")
        if config.method.reconciliation > 0:
            parts.append(f"gradient reconciliation {config.method.reconciliation:g}")
        if grid > 1:
            parts.append(f"{grid}x{grid} patches")
    cut_note = f" of {plan.cut.requested} asked for" if len(plan.modules) != plan.cut.requested else ""
    dtype = {torch.float32: "fp32", torch.bfloat16: "bf16", torch.float64: "fp64"}[numerics.dtype]
    lines = [
        f"{config.model.name} on {config.data.name}: {' + '.join(parts)}, "
        f"K = {len(plan.modules)} local modules{cut_note} on {_ranks_of(plan)}",
        f"schedule {_schedule_name(plan)}, {config.schedule.micro_batches} micro-batch(es) of "
        f"{plan.micro_batch_rows} images, {dtype}{', channels last' if numerics.channels_last else ''}"
        f"{f', an update every {config.train.accumulate} batches' if config.train.accumulate > 1 else ''}",
    ]
    if plan.upstream is not None:
        lines.append(f"heads see the weights of the next module's first block: {plan.upstream.declared}")
    if type(plan.task) is not Classification:
        metric = plan.task.metrics[0].form
        lines.append(f"{task_name(plan.task)}: {metric.heading} of the test set, {metric.direction}")
    lines += untrained_lines(plan)
    for rank, device in enumerate(devices):
        where = Grid(rank, plan.replicas, len(plan.stages))
        lines.append(f"rank {rank} ({device}): {where.named(plan.stage_label(where.stage))}")
    return lines


def untrained_lines(plan: Plan) -> list[str]:
    """What to say of local modules that no loss reaches."""
    return [
        f"module {index} ({plan.cut.label(index)}) IS NOT TRAINED: its heads have no weight and no gradient comes from "
        "behind; raise the last values of method.reconstruction and method.task, or hierarchy.*_weight, or with "
        "cascades set hierarchy.final_loss=cascade"
        for index in plan.untrained
    ]


def _ranks_of(plan: Plan) -> str:
    stages = len(plan.stages)
    return f"{plan.replicas} replicas x {stages} stage(s)" if plan.replicas > 1 else f"{stages} rank(s)"


def write_plan(plan: Plan, path: Path) -> None:
    """Store who owns what as JSON; ``partition.kind=given partition.stages=[...]`` repeats it."""
    document = {
        "partition": plan.config.partition.kind,
        "replicas": plan.replicas,
        "stages": [len(stage) for stage in plan.stages],
        "modules": [list(names) for names in plan.cut.modules],
        "levels_together": list(plan.levels_together),
        "schedules": [" ".join(map(str, schedule)) for schedule in plan.schedules],
    }
    path.write_text(json.dumps(document, indent=1) + "\n", encoding="utf-8")
