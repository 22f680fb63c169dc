"""The cut by cost, ``model.cuts = "cost"``: the local module with the most FLOPs, heads included, has fewest.

    blocks    stem  layer1.0  layer1.1  layer2.0  layer2.1  classifier
    may cut       |         |         |         |         |              where heads can stand
    modules   stem  layer1.0  layer1.1 | layer2.0  layer2.1  classifier   K = 2

No module is counted in all its lengths: two networks are, cut wherever they may be, one with heads everywhere and one
with the gradient of backpropagation. What a module of several blocks costs is a sum of theirs:

    forward   of every block                       heads    of the last block, those that the module's role has
    relays    of every block, for every message    backward of every block, of the first one only as far as its weights

The cut decides what is trained. So it depends on the network, the method, K and the size of the images, and on nothing
else: neither on devices, placement, schedule and precision nor on the batch. A run keeps it as names of blocks.
"""

from __future__ import annotations

import dataclasses
import itertools
import math
import operator
from collections.abc import Callable, Sequence

import torch

from pipeline.base.config import Config, HierarchyConfig, ModelConfig, PrecisionConfig
from pipeline.base.errors import ConfigError
from pipeline.base.flow import MAIN, Specs
from pipeline.base.numerics import Numerics
from pipeline.base.units import mebibytes
from pipeline.local.methods import levels_of, looks_ahead
from pipeline.local.roles import ModulePlan, plan_hierarchy
from pipeline.local.task import Task
from pipeline.models.backbones import Blocks
from pipeline.models.boundaries import boundary_specs
from pipeline.models.later import later_blocks
from pipeline.models.unbuilt import without_memory
from pipeline.plan.assembly import Plan, make_plan
from pipeline.plan.cut import BY_MEMORY, COUNTED, make_cut
from pipeline.plan.memory_cut import memory_of_modules
from pipeline.plan.module_flops import Flops, Uncountable, flops_by_kind
from pipeline.stage.schedule import Kind, stage_schedule

Cost = Callable[[int, int, int], float]
"""(module, first piece, end) -> cost of this local module made of these pieces."""
NUMERICS = Numerics(torch.device("cpu"), torch.float32, channels_last=False)


def cut_by_cost(config: Config, blocks: Blocks, task: Task, inputs: Specs | None = None) -> tuple[Config, str]:
    """The configuration with names of blocks in place of ``model.cuts = "cost"`` or ``"memory"``
    (:mod:`pipeline.plan.memory_cut`), and what to tell people (else "").

    A network that cannot be counted is cut as with ``model.cuts = "auto"``. With one module there is nothing to cut.

    Args:
        config: of the run.
        blocks: the network, which needs no weights and stays as it is.
        task: what it is for.
        inputs: of the network, as the data give them; None: as the task says.

    Raises:
        ConfigError: more local modules than blocks.
    """
    model = config.model
    if model.cuts not in COUNTED or model.modules == 1:
        return config, ""
    names, by_memory = list(blocks), model.cuts == BY_MEMORY
    count = _needed if by_memory else _counted
    try:
        beginnings, cost = count(config, blocks, task, task.inputs if inputs is None else inputs)
        ends = smallest_largest(len(beginnings), model.modules, cost, alone=model.stem == "own")
    except (Uncountable, ConfigError) as reason:
        cut = make_cut(names, dataclasses.replace(model, cuts="auto"))
        chosen = tuple(own[0] for own in cut.modules[1:])
        words = f"cut as with model.cuts = 'auto': {reason}"
    else:
        chosen = tuple(beginnings[end] for end in ends[:-1])
        shares = [cost(module, *piece) for module, piece in enumerate(itertools.pairwise((0, *ends)))]
        words = f"cut by FLOPs: {' | '.join(f'{100 * share / sum(shares):.0f}' for share in shares)} % of a step"
        if by_memory:
            words = f"cut by memory: {' | '.join(mebibytes(int(share)) for share in shares)} MiB on a rank for each"
    return dataclasses.replace(config, model=dataclasses.replace(model, cuts=chosen)), words


def smallest_largest(pieces: int, modules: int, cost: Cost, alone: bool = False) -> tuple[int, ...]:
    """The end of every module, so that the most expensive one is as cheap as possible. Of all such cuts the one nearest
    to equal numbers of pieces (the smallest sum of their squares); of these the one with the longest modules first.

        costs of the pieces 3 1 1 1 2, three modules:   3 | 1 1 | 1 2      (3 | 1 1 1 | 2 is as cheap and as even)

    Args:
        pieces: that are distributed, in their order.
        modules: at most ``pieces``.
        cost: of a module; more pieces never cost less than some of them.
        alone: the first module has one piece.

    Raises:
        ConfigError: more modules than pieces.
    """
    if modules > pieces:
        raise ConfigError(f"the network can be cut into {pieces} local modules, not into model.modules = {modules}")

    def best(score: Callable[[int, int, int], float], joined: Callable[[float, float], float]) -> list[list[float]]:
        """[m][start]: of modules m ... made of the pieces start ..., the smallest possible score."""
        rows = [[math.inf] * pieces + [0.0]]
        for module in reversed(range(modules)):
            after, row = rows[0], [math.inf] * (pieces + 1)
            for start in range(pieces):
                row[start] = min(
                    (joined(score(module, start, end), after[end]) for end in ends_of(module, start)), default=math.inf
                )
            rows.insert(0, row)
        return rows

    def ends_of(module: int, start: int) -> range:
        return range(1, 2) if alone and module == 0 else range(start + 1, pieces + 1)

    limit = best(cost, max)[0][0]

    def unevenness(module: int, start: int, end: int) -> float:
        return (end - start) ** 2 if cost(module, start, end) <= limit else math.inf

    left = best(unevenness, operator.add)
    ends: list[int] = []
    for module in range(modules):
        start = ends[-1] if ends else 0
        fitting = [
            end
            for end in ends_of(module, start)
            if unevenness(module, start, end) + left[module + 1][end] == left[module][start]
        ]
        ends.append(max(fitting))
    return tuple(ends)


# --- what the pieces cost ---------------------------------------------------------------------------------------------


def _counted(config: Config, blocks: Blocks, task: Task, inputs: Specs) -> tuple[list[str], Cost]:
    """The first block of every piece of a network that is cut wherever it may be; the cost of any module of pieces."""
    with_heads = _with_heads(config.hierarchy)
    beginnings = _beginnings(config, blocks, task, inputs, with_heads)
    count = len(beginnings)
    backpropagation = HierarchyConfig(count, "paper", 0.0, 0.0, final_loss="cascade")

    def plan(hierarchy: HierarchyConfig) -> Plan:
        cut = ModelConfig(config.model.name, count, tuple(beginnings[1:]))
        everywhere = dataclasses.replace(
            config,
            model=cut,
            hierarchy=hierarchy,
            method=dataclasses.replace(config.method, reconciliation=0.0),  # see _reconciled
            patches=dataclasses.replace(config.patches, at_once=config.patches.grid**2),  # whatever memory allows
            precision=PrecisionConfig(compute="fp32"),
        )
        return make_plan(everywhere, blocks, task, 1, inputs)

    local, whole = plan(with_heads), plan(backpropagation)
    own = flops_by_kind(local, blocks, NUMERICS)
    through = [flops[Kind.BACKWARD] for flops in flops_by_kind(whole, blocks, NUMERICS)]
    cost = _cost_of(plan_hierarchy(config.model.modules, config.hierarchy), local.modules, own, through)
    if config.method.reconciliation > 0:
        cost = _reconciled(cost, _relayed(local.modules, own), own, through)
    return beginnings, cost


def _needed(config: Config, blocks: Blocks, task: Task, inputs: Specs) -> tuple[list[str], Cost]:
    """The same with bytes for cost."""
    beginnings = _beginnings(config, blocks, task, inputs, _with_heads(config.hierarchy))
    return beginnings, memory_of_modules(config, blocks, task, inputs, beginnings)


def _with_heads(hierarchy: HierarchyConfig) -> HierarchyConfig:
    """All heads that a module may have."""
    return dataclasses.replace(
        hierarchy, cascade_span=2, independent_weight=1.0, cascade_weight=1.0, levels="separate", final_loss="local"
    )


def _cost_of(
    roles: Sequence[ModulePlan], piece_roles: Sequence[ModulePlan], own: Sequence[Flops], through: Sequence[float]
) -> Cost:
    """
    Args:
        roles: of the K local modules.
        piece_roles, own: of every piece as a module with heads.
        through: backward pass of every piece, for its weights and for its input.
    """
    relay = _relayed(piece_roles, own)
    forward_to, relay_to, through_to = (
        [0.0, *itertools.accumulate(costs)]
        for costs in ([flops[Kind.FORWARD] for flops in own], relay, through)
    )
    relays = [_relays(roles, module) for module in range(len(roles))]

    def cost(module: int, start: int, end: int) -> float:
        role, last = roles[module], own[end - 1]
        backward = through_to[end] - through_to[start]
        if not role.merged:  # nobody asks for the gradient of its input
            backward += own[start][Kind.BACKWARD] - through[start]
        heads = role.independent * last[Kind.INDEPENDENT] + role.cascade * last[Kind.CASCADE]
        relayed = relays[module] * (relay_to[end] - relay_to[start])
        return forward_to[end] - forward_to[start] + relayed + backward + heads

    return cost


def _reconciled(cost: Cost, relay: Sequence[float], own: Sequence[Flops], through: Sequence[float]) -> Cost:
    """With the passes that SGR adds, about. Every head's backward is differentiated; every module but the first has a
    backward of activations, which is gone through backwards for two of them, and its forward's backward once more.

    Args:
        relay: backward pass of activations alone, of every piece.
    """
    again = [0.0, *itertools.accumulate(3 * one + both for one, both in zip(relay, through, strict=True))]

    def reconciled(module: int, start: int, end: int) -> float:
        heads = own[end - 1][Kind.INDEPENDENT] if end < len(own) else 0.0
        if module == 0:
            return cost(module, start, end) + heads / 3
        return cost(module, start, end) + again[end] - again[start] + heads

    return reconciled


def _relayed(piece_roles: Sequence[ModulePlan], own: Sequence[Flops]) -> list[float]:
    """Backward pass of activations alone, of every piece that does one."""
    return [flops[Kind.RELAY] / max(_relays(piece_roles, piece), 1) for piece, flops in enumerate(own)]


def _relays(roles: Sequence[ModulePlan], module: int) -> int:
    """Backward passes of activations alone that a module does for messages upstream."""
    schedule = stage_schedule(roles, range(module, module + 1), 1)
    return sum(action.kind is Kind.RELAY for action in schedule)


def _beginnings(
    config: Config, blocks: Blocks, task: Task, inputs: Specs, hierarchy: HierarchyConfig
) -> list[str]:
    """The first block, and every block that may begin a local module: heads can stand before it, and it leaves its
    input as it was."""
    names = list(blocks)
    specs = boundary_specs(blocks, inputs)
    network = later_blocks(blocks, inputs, specs) if looks_ahead(config.method) else ()
    role = plan_hierarchy(3, hierarchy)[1]  # one in the middle has all heads
    config = dataclasses.replace(config, hierarchy=hierarchy)

    def stands(before: str) -> bool:
        end = specs[before][MAIN]
        if not end.dtype.is_floating_point:
            return False
        try:
            behind = network[names.index(before) + 1 :]
            for build in levels_of(role, 3, end.feature, task, config, behind).values():
                without_memory(build)
        except ConfigError:
            return False
        return True

    def leaves(*beginning: str) -> bool:
        try:
            boundary_specs(blocks, inputs, beginning)
        except ConfigError:
            return False
        return True

    first = 2 if config.model.stem == "merged" else 1
    possible = [name for before, name in itertools.pairwise(names[first - 1 :]) if stands(before)]
    if not leaves(*possible):
        possible = [name for name in possible if leaves(name)]
    return [names[0], *possible]
