"""The plan of a named network, for images of a shape: what can be said without data and without a device."""

from __future__ import annotations

import torch

from pipeline.base.config import Config
from pipeline.base.numerics import Numerics, resolve_numerics
from pipeline.local.task import classification
from pipeline.models.backbones import Blocks
from pipeline.models.unbuilt import planned_blocks
from pipeline.plan.assembly import Plan, make_plan
from pipeline.plan.cost_cut import cut_by_cost


def plan_of_name(
    config: Config, image_shape: tuple[int, ...], classes: int, ranks: int
) -> tuple[Plan, Blocks, Numerics]:
    """The plan, placed by count; its network, without weights; and how a rank on a CPU computes.

    Args:
        config: whose data set does not matter.
        image_shape: (C, H, W).
        classes: that are told apart.
        ranks: number of processes.

    Raises:
        ConfigError: the plan does not exist (see :func:`pipeline.plan.assembly.make_plan`).
    """
    task = classification(config, classes, image_shape)
    blocks = planned_blocks(config.model.name, image_shape[0], classes, sides=image_shape[1:])
    numerics = resolve_numerics(config.precision, torch.device("cpu"), blocks.values())
    config, _ = cut_by_cost(config, blocks, task)
    return make_plan(config, blocks, task, ranks), blocks, numerics
