"""Weights upstream in the plan: what is shared of every module, the messages of an edge, the buffers of its ends."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch

from pipeline.base.config import Config
from pipeline.base.errors import ConfigError
from pipeline.base.numerics import Numerics
from pipeline.edges.wire import FieldSpec, MessageSpec
from pipeline.local.methods import upstream_of
from pipeline.local.roles import ModulePlan
from pipeline.local.upstream import Mailbox, Shapes, Upstream, adopts, shapes_of
from pipeline.models.backbones import Blocks
from pipeline.stage.weights_upstream import WEIGHTS


@dataclass(frozen=True)
class UpstreamPlan:
    """
    Attributes:
        declared: by the method.
        shapes: of the weights that a module gets from the next one, by module.
    """

    declared: Upstream
    shapes: dict[int, Shapes]

    def spec(self, module: int, dtype: torch.dtype) -> MessageSpec | None:
        """The message that brings ``module`` its weights, of parameters of ``dtype``; None: it gets none."""
        if module not in self.shapes:
            return None
        elements = sum(torch.Size(shape).numel() for shape in self.shapes[module].values())
        return MessageSpec((FieldSpec(WEIGHTS, dtype, (elements,)),), max_rows=1)

    def memory_bytes(self, stage: range, dtype: torch.dtype, depth: int) -> int:
        """Of the mailboxes of the modules of a stage, and of both its edges, which send from ``depth`` buffers."""
        sizes = {module: spec.nbytes for module in self.shapes if (spec := self.spec(module, dtype)) is not None}
        held = sum(sizes.get(module, 0) for module in stage) + sizes.get(stage[-1], 0)
        return self.declared.copies * held + depth * sizes.get(stage[0] - 1, 0)

    def mailbox(self, module: int, numerics: Numerics) -> Mailbox | None:
        """Where ``module`` gets its weights; None: it gets none."""
        if module not in self.shapes:
            return None
        return Mailbox(self.declared, self.shapes[module], numerics.weight_dtype, numerics.device)


def plan_upstream(
    config: Config, blocks: Blocks, modules: Sequence[ModulePlan], names: Sequence[Sequence[str]]
) -> UpstreamPlan | None:
    """None where the method does not declare any.

    Args:
        config: of the run.
        blocks: of the network, which may be planned ones.
        modules: role of every local module.
        names: of the blocks of every local module.

    Raises:
        ConfigError: schedule `free`, whose stages are at no common step.
    """
    declared = upstream_of(config.method)
    if declared is None:
        return None
    if config.schedule.kind == "free":
        raise ConfigError(
            f"schedule.kind = 'free': method '{config.method.name}' uses weights upstream of a declared step, and "
            "there the stages are at no common one; use exact or async"
        )
    shapes = {m.index: shapes_of(blocks[names[m.index + 1][0]]) for m in modules if adopts(m)}
    return UpstreamPlan(declared, shapes)
