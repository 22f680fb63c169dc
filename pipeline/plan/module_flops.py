"""FLOPs of a step by local module, heads included: what a placement by cost and a cut by cost go by.

    module      0    1    2    3    4    5        every kind of module is counted once, by itself, without values
    kind        a    b    b    c    d    e        (see pipeline.plan.blank)

Two modules are of one kind if they have the same role, the same shapes around them, and blocks and heads of the same
classes, sizes and settings. A deep network has a few kinds, however many modules.
"""

from __future__ import annotations

import dataclasses
from collections import OrderedDict, defaultdict
from collections.abc import Callable, Hashable, Mapping
from typing import TypeVar

import torch
from torch import nn

from pipeline.base.config import ScheduleConfig
from pipeline.base.flow import Specs
from pipeline.base.numerics import Numerics
from pipeline.local.roles import ModulePlan
from pipeline.models.backbones import Blocks
from pipeline.models.layers import PairedConv2d
from pipeline.models.tuned import use_plain
from pipeline.models.unbuilt import no_values, without_memory
from pipeline.plan.alone import random_batch, random_gradients, stage_alone
from pipeline.plan.assembly import Plan
from pipeline.plan.blank import blank_modules
from pipeline.plan.counting import Tally
from pipeline.stage.schedule import Kind

IMAGES = 2
"""In a step that is counted; BatchNorm needs two."""
Flops = Mapping[Kind, float]
"""Of one module by kind of action, 0 for those that it does not do."""

T = TypeVar("T")


class Uncountable(Exception):
    """A step that cannot be done without values; the text says which module and why, on one line."""


def counted_step(plan: Plan) -> Plan:
    """The plan of a step that is counted: synchronous, of ``IMAGES`` images, nothing compiled, all on one rank."""
    config = plan.config
    config = dataclasses.replace(
        config,
        schedule=ScheduleConfig(),
        data=dataclasses.replace(config.data, batch_size=IMAGES),
        precision=dataclasses.replace(config.precision, compile=False),
    )
    return dataclasses.replace(plan, config=config, stages=(), replicas=1).placed((range(len(plan.modules)),))


def module_flops(plan: Plan, blocks: Blocks, numerics: Numerics) -> list[float]:
    """FLOPs of a step of ``IMAGES`` images by local module: those of :func:`pipeline.plan.cost.planned_cost`.

    Args:
        plan: its placement, its schedule and its batch size do not matter.
        blocks: the network, which needs no weights and stays as it is. Nothing of it is computed.
        numerics: of the run.

    Raises:
        Uncountable: whatever a module does without values fails; it may well train.
    """
    return [sum(flops.values()) for flops in flops_by_kind(plan, blocks, numerics)]


def flops_by_kind(plan: Plan, blocks: Blocks, numerics: Numerics) -> list[Flops]:
    """The same, by kind of action."""
    plan = dataclasses.replace(counted_step(plan), head_memory=None)  # as many patches at once as there are
    return by_kind(plan, blocks, numerics, lambda index: _alone(plan, blocks, numerics, index))


def by_kind(plan: Plan, blocks: Blocks, numerics: Numerics, count: Callable[[int], T]) -> list[T]:
    """``count(index)`` of every local module of :func:`counted_step`, asked once for each kind of module.

    Raises:
        Uncountable: it fails for one of them.
    """
    counted: dict[Hashable, T] = {}
    found = []
    cuda = [numerics.device.index or 0] if numerics.device.type == "cuda" else []
    with torch.random.fork_rng(devices=cuda):
        for index in range(len(plan.modules)):
            try:
                kind = _kind(plan, blocks, index)
                if kind not in counted:
                    counted[kind] = count(index)
            except Exception as error:  # whatever it is: no count is worth a run
                cause = (str(error).splitlines() or [""])[0]
                raise Uncountable(
                    f"local module {index} ({plan.cut.label(index)}) cannot be counted without values "
                    f"({type(error).__name__}: {cause[:120]})"
                ) from error
            found.append(counted[kind])
    return found


def _alone(plan: Plan, blocks: Blocks, numerics: Numerics, index: int) -> Flops:
    """The actions of one module, on which its neighbours have no influence."""
    plan = plan.placed((range(index, index + 1),))
    own = OrderedDict((name, blocks[name]) for name in plan.cut.modules[index])
    tally = Tally()
    with no_values():
        (module,) = blank_modules(plan, own, numerics)
        for level in module.levels.values():
            use_plain(level, (PairedConv2d.tuned,))  # products with its zeros are no FLOPs of the method
        batch, gradients = random_batch(plan, [module], numerics), random_gradients(plan, module, numerics)
        stage_alone(plan, module, batch, gradients, tally).train_step(1, 0)
    return defaultdict(float, {kind: flops for (_, kind), flops in tally.flops.items()})


# --- kinds of modules -------------------------------------------------------------------------------------------------


def _kind(plan: Plan, blocks: Blocks, index: int) -> Hashable:
    role = plan.modules[index]
    levels = plan.level_builders(index)
    return (
        _relative(role),
        role.needs_input_gradient,
        *map(_shapes, (plan.given(index), plan.boundaries[index])),
        tuple(_looks(blocks[name]) for name in plan.cut.modules[index]),
        tuple((name, _looks(without_memory(build))) for name, build in levels.items()),
    )


def _relative(role: ModulePlan) -> ModulePlan:
    """The role with other modules by their distance."""
    here = role.index
    return dataclasses.replace(
        role,
        index=0,
        own_key=role.own_key if role.own_key is None else here - role.own_key,
        incoming=tuple(here - key for key in role.incoming),
        outgoing=tuple(here - key for key in role.outgoing),
    )


def _shapes(specs: Specs) -> Hashable:
    return tuple(specs.items())


def _looks(module: nn.Module) -> Hashable:
    """Classes, settings and shapes of a module and all below it. A setting is any plain value among its attributes,
    whoever has written the class."""
    return tuple(
        (
            name,
            type(part),
            tuple((key, value) for key, value in vars(part).items() if _is_plain(value)),
            tuple((key, *_form(weight)) for key, weight in part.named_parameters(recurse=False)),
            tuple((key, *_form(buffer)) for key, buffer in part.named_buffers(recurse=False)),
        )
        for name, part in module.named_modules()
    )


def _is_plain(value: object) -> bool:
    return all(map(_is_plain, value)) if isinstance(value, tuple) else isinstance(value, int | float | str | None)


def _form(tensor: torch.Tensor) -> tuple[Hashable, ...]:
    return tuple(tensor.shape), tensor.dtype, tensor.requires_grad
