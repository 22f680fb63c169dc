"""The cut by memory, ``model.cuts = "memory"``: the local module that needs most, on a rank of its own, needs least.

    needs =  graphs of its blocks    all alive from its forward to its backward
           + the larger of           what the backward of a block, or one of its heads, has beside them at most
           + gradients               of its output, of its input where one goes back
           + slots of its queues     of depth 1: two for what it receives, three where a gradient goes back; one for
                                     what it sends, three where a gradient comes back
           + weights                 with gradients and the state of the optimiser

All from shapes, for a micro-batch of the configured size, in fp32. So the cut depends on the batch, as memory does; the
cut by cost does not (:mod:`pipeline.plan.cost_cut`). Neither depends on devices, placement or the kind of schedule.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Sequence

from torch import nn

from pipeline.base.config import Config
from pipeline.base.flow import MAIN, Specs
from pipeline.local.at_once import ROWS, bytes_of_modules, work_bytes
from pipeline.local.methods import levels_of, looks_ahead
from pipeline.local.optimiser import Optimiser
from pipeline.local.roles import plan_hierarchy
from pipeline.local.task import Task
from pipeline.models.backbones import Blocks
from pipeline.models.boundaries import boundary_specs
from pipeline.models.later import later_blocks
from pipeline.models.unbuilt import without_memory
from pipeline.plan.module_flops import Uncountable

Need = Callable[[int, int, int], float]
"""(module, first piece, end) -> bytes that this local module made of these pieces needs."""


def memory_of_modules(config: Config, blocks: Blocks, task: Task, inputs: Specs, beginnings: Sequence[str]) -> Need:
    """What a local module made of some pieces needs, in bytes; ``beginnings``: the first block of every piece.

    Raises:
        Uncountable: a piece that does not run without values.
    """
    names, specs = list(blocks), boundary_specs(blocks, inputs)
    edges = [*map(names.index, beginnings), len(names)]
    pieces = [names[start:end] for start, end in itertools.pairwise(edges)]
    given = [inputs, *(specs[piece[-1]] for piece in pieces)]
    networks = [[blocks[name] for name in piece] for piece in pieces]
    found = bytes_of_modules(zip(networks, given, strict=False))
    for piece, needs in zip(pieces, found, strict=True):
        if not needs.backward:
            raise Uncountable(f"what {piece[0]} has alive cannot be counted without values")
    rows = config.data.batch_size / config.schedule.micro_batches
    graphs = [0.0, *itertools.accumulate(needs.graph / ROWS * rows for needs in found)]
    weights = [0.0, *itertools.accumulate(_bytes(own, config) for own in networks)]
    beside = [(needs.backward - needs.graph) / ROWS * rows for needs in found]
    roles = plan_hierarchy(config.model.modules, config.hierarchy)
    ahead = later_blocks(blocks, inputs, specs) if looks_ahead(config.method) else ()
    heads: dict[tuple[bool, bool, int], float] = {}

    def of_heads(module: int, piece: int) -> float:
        """Forward and backward of the largest head on the output of ``piece``."""
        role = roles[module]
        kind = (role.independent, role.cascade, piece)
        if kind not in heads:
            shape = given[piece + 1][MAIN].feature
            levels = levels_of(role, config.model.modules, shape, task, config, ahead[edges[piece + 1] :])
            made = [without_memory(build) for build in levels.values()]
            shapes = [shape if level.front is None else level.front.shape for level in made]
            works = [
                work_bytes(head, stands_on, task, 1)
                for level, stands_on in zip(made, shapes, strict=True) for _, head in level.heads()
            ]  # fmt: skip
            heads[kind] = max(works, default=0) / ROWS * rows
        return heads[kind]

    def message(boundary: int) -> float:
        return sum(math.prod(spec.shape) * spec.dtype.itemsize for spec in given[boundary].values()) * rows

    def need(module: int, start: int, end: int) -> float:
        """Of each message one more than there are slots, for its gradient."""
        last = module == len(roles) - 1
        if end == len(pieces) and not last:  # nothing is left for those behind it
            return math.inf
        received = 0.0 if module == 0 else (2 + 2 * roles[module].needs_input_gradient) * message(start)
        sent = 0.0 if last else (2 + 2 * roles[module + 1].needs_input_gradient) * message(end)
        work = max(*beside[start:end], 0.0 if last else of_heads(module, end - 1))
        return graphs[end] - graphs[start] + work + received + sent + weights[end] - weights[start]

    return need


def _bytes(networks: Sequence[nn.Module], config: Config) -> int:
    """Weights, their gradients, and what the optimiser keeps."""
    parameters = [parameter for network in networks for parameter in network.parameters()]
    return 2 * sum(parameter.nbytes for parameter in parameters) + Optimiser(parameters, config.optim).kept_bytes()
