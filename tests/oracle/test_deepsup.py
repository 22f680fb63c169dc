"""DeepSup-BP is plain backpropagation of the sum of all losses, the local ones and the last one (float64, 1e-12)."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from tiny import gradients, tiny_batch, tiny_config, tiny_stage, train_on, without_updates
from torch import Tensor, nn

from pipeline import ConfigError
from pipeline.base.config import Config
from pipeline.local.local_module import LocalModule
from pipeline.models.heads import Given

MODULES = 5
WEIGHTS = {  # of InfoPro's reconstruction, from 5 to 0.5 over the modules with a head
    "infopro": [{"reconstruction": 5.0 - 1.5 * m, "task": 0.5 + 0.5 * m / 3} for m in range(MODULES - 1)],
    "dgl": [{"task": 1.0}] * (MODULES - 1),
}


def deep(method: str, variant: str = "plain", modules: int = MODULES, **sections: dict[str, Any]) -> Config:
    hierarchy = {"variant": "deepsup", "cascade_weight": 0.3}
    return tiny_config(method, variant, 1, modules, hierarchy=hierarchy, **sections)


def backpropagation(modules: list[LocalModule], method: str, config: Config, step: int) -> None:
    """One graph, one loss, one backward."""
    batch, grid = tiny_batch(step, dtype=torch.float64), config.patches.grid
    h, total = batch.x, torch.zeros((), dtype=torch.float64)
    for module in modules:
        for block in module.blocks.values():
            h = block.train()(h)
        if module is modules[-1]:
            break
        for name, weight in WEIGHTS[method][module.plan.index].items():
            (head,) = module.levels["cascade"].train().terms[name].heads
            size, full = h.shape[-1] // grid, batch.image.shape[-1] // grid
            for i in range(grid):
                for j in range(grid):
                    patch, crop = (
                        x[:, :, i * side : (i + 1) * side, j * side : (j + 1) * side]
                        for x, side in ((h, size), (batch.image, full))
                    )
                    loss: Tensor = head.loss(patch, Given(batch.labels, crop))
                    total = total + 0.3 * weight * loss / grid**2
    (total + nn.functional.cross_entropy(h, batch.labels)).backward()


@pytest.mark.parametrize(("method", "variant"), [("infopro", "plain"), ("infopro", "hpff"), ("dgl", "plain")])
def test_gradients_are_those_of_one_backward_of_the_sum_of_all_losses(method: str, variant: str) -> None:
    config = deep(method, variant)
    stage, modules, _ = tiny_stage(config, torch.float64)
    reference = copy.deepcopy(modules)
    assert [list(module.levels) for module in modules] == [["cascade"]] * (MODULES - 1) + [[]]
    train_on(without_updates(stage), 0, 0, tiny_batch(dtype=torch.float64))
    backpropagation(reference, method, config, 0)

    mine, theirs = gradients(modules), gradients(reference)
    scale = max(float(g.norm()) for g in theirs.values() if g is not None)
    for name, expected in theirs.items():
        found = mine[name]
        assert found is not None and expected is not None, name
        # a bias before a BatchNorm has an exact gradient of 0: noise is judged on the scale of all gradients
        assert float((found - expected).norm()) <= 1e-12 * max(float(expected.norm()), 1e-2 * scale), name


def test_one_module_is_plain_backpropagation() -> None:
    stage, modules, _ = tiny_stage(deep("dgl", modules=1), torch.float64)
    assert not modules[0].levels and [str(action) for action in stage.schedule] == ["F0.0", "L0.0", "B0.0", "U0"]


@pytest.mark.parametrize(
    ("key", "value"), [("independent_weight", 0.5), ("cascade_span", 2), ("final_loss", "local")]
)
def test_what_reaches_only_a_part_of_the_network_is_refused(key: str, value: Any) -> None:
    with pytest.raises(ConfigError, match=f"hierarchy.{key} = .* with hierarchy.variant = 'deepsup', where every loss"):
        span = value if key == "cascade_span" else 1
        tiny_config("dgl", "plain", span, MODULES, hierarchy={"variant": "deepsup"} | {key: value})


def test_schedule_free_is_refused() -> None:
    with pytest.raises(ConfigError, match="'deepsup' with schedule.kind = 'free': .* use schedule.kind=exact"):
        deep("dgl", schedule={"kind": "free"})
