"""Every method in every window k = 1 ... K, and windows of local modules that are one (``model.group``): gradients are
those of the literal definition, the loss of a level differentiated through the modules that it reaches."""

from __future__ import annotations

import copy
from collections import OrderedDict
from typing import Any

import pytest
import torch
from oracle.literal import literal_backward
from tiny import CLASSES, IMAGE, gradients, tiny_batch, tiny_blocks, tiny_config, tiny_stage, train_on, without_updates
from tiny_features import DEPTH, LENGTH, configured, features, transformer
from torch import Tensor, nn

from pipeline import ConfigError, from_dict
from pipeline.base.config import METHODS, ModelConfig
from pipeline.base.numerics import Numerics
from pipeline.base.validation import validate
from pipeline.edges.connect import Edges
from pipeline.local.local_module import LocalModule
from pipeline.local.task import Classification
from pipeline.models.heads import Given
from pipeline.plan.assembly import build_modules, make_plan
from pipeline.plan.cut import make_cut
from pipeline.stage.inlet import Batch, BatchInlet
from pipeline.stage.stage import Stage

K = 4
NAMES = ["auglocal", "deinforeg", "dgl", "greedy", "infopro", "infopro-contrast", "lopt", "predsim"]
assert METHODS[: len(NAMES)] == NAMES  # those that tests register come behind
SMALL = {"infopro", "infopro-contrast", "deinforeg"}
CASES: dict[str, dict[str, Any]] = {
    **{name: {"name": name, **({"feature_dim": 8} if name in SMALL else {})} for name in NAMES},
    "man": {"name": "greedy", "front": "man"},
    "man++": {"name": "greedy", "front": "man++"},
    "sgr": {"name": "greedy", "reconciliation": 0.01},
}


def stage_and_batch(case: str, span: int) -> tuple[Stage, list[LocalModule], Batch]:
    """All modules in float64 in one stage, and a batch; of LoPT a transformer on features."""
    config = validate(configured(span, CASES[case]))
    blocks, image = tiny_blocks(), IMAGE
    batch = tiny_batch(dtype=torch.float64)
    if case == "lopt":
        blocks = OrderedDict(transformer().named_children())
        image, batch = (LENGTH, DEPTH), Batch(*features(0, torch.float64), None)
    plan = make_plan(config, blocks, Classification(CLASSES, image), 1)
    modules = build_modules(plan, 0, blocks, Numerics(torch.device("cpu"), torch.float64, False), fresh=case != "lopt")
    return Stage(modules, plan.schedules[0], BatchInlet(), Edges()), modules, batch


def literal(modules: list[LocalModule], batch: Batch, span: int) -> None:
    inputs = [batch.x]
    for module in modules:
        for part in (*module.blocks.values(), *module.levels.values()):
            part.train()
        inputs.append(run(module, inputs[-1]).detach())
    for index, module in enumerate(modules[:-1]):
        given = Given(batch.labels, batch.image, {"x": inputs[index]}, 0)
        for level, reach in (("independent", 1), ("cascade", span)):
            if level in module.levels:
                h = chain(modules, inputs, max(0, index - reach + 1), index)
                module.levels[level].loss(h, given)[0].backward()
    last = len(modules) - 1
    scores = chain(modules, inputs, 0 if span == len(modules) else last, last)
    nn.functional.cross_entropy(scores, batch.labels).backward()


def run(module: LocalModule, h: Tensor) -> Tensor:
    for block in module.blocks.values():
        h = block(h)
    return h


def chain(modules: list[LocalModule], inputs: list[Tensor], low: int, high: int) -> Tensor:
    h = inputs[low].detach()
    for module in modules[low : high + 1]:
        h = run(module, h)
    return h


@pytest.mark.parametrize("span", range(1, K + 1))
@pytest.mark.parametrize("case", CASES)
def test_every_method_in_every_window(case: str, span: int) -> None:
    if case == "sgr" and span > 1:
        with pytest.raises(ConfigError, match="= 0.01 with hierarchy.cascade_span = .: it is for modules"):
            stage_and_batch(case, span)
        return
    stage, modules, batch = stage_and_batch(case, span)
    reference = copy.deepcopy(modules)
    assert [list(module.levels) for module in modules[1:-1]] == [["cascade", "independent"][span == 1 :]] * (K - 2)
    train_on(without_updates(stage), 0, 0, batch)
    if case == "sgr":  # its definition is in test_sgr
        assert all(gradient is not None for gradient in gradients(modules).values())
        return
    literal(reference, batch, span)
    check_same(gradients(modules), gradients(reference))


def check_same(mine: dict[str, Tensor | None], theirs: dict[str, Tensor | None]) -> None:
    scale = max(float(g.norm()) for g in theirs.values() if g is not None)
    for name, expected in theirs.items():
        found = mine[name]
        assert (found is None) == (expected is None), name
        if found is not None and expected is not None:
            assert float((found - expected).norm()) <= 1e-9 * max(float(expected.norm()), 1e-2 * scale), name


# --- windows of local modules that are one ----------------------------------------------------------------------------

BLOCKS = list(tiny_blocks())


def cut(group: int | tuple[int, ...], **model: Any) -> list[str]:
    modules = make_cut(BLOCKS, ModelConfig("tiny", **{"modules": 6, "cuts": "even", **model}, group=group)).modules
    assert [name for names in modules for name in names] == BLOCKS
    return ["-".join(names) for names in modules]


def test_modules_of_a_cut_are_joined_so_many_at_a_time_or_as_listed() -> None:
    assert cut(1) == BLOCKS
    assert cut(2) == ["stem-a", "b-c", "d-classifier"]
    assert cut(4) == ["stem-a-b-c", "d-classifier"] and cut(9) == ["-".join(BLOCKS)]
    assert cut((1, 3, 2)) == ["stem", "a-b-c", "d-classifier"]
    assert cut(2, modules=3, cuts=("b", "d")) == ["stem-a-b-c", "d-classifier"]


@pytest.mark.parametrize("span", [1, 2, 3])
def test_a_group_is_one_local_module_of_the_literal_definition(span: int) -> None:
    """Also to the bit that of a cut at the same blocks by name."""
    found = []
    for model in ({"modules": 6, "cuts": "even", "group": 2}, {"modules": 3, "cuts": ["b", "d"]}):
        config = tiny_config("infopro", "plain", span, 6, model=model)
        assert config.local_modules == 3
        stage, modules, _ = tiny_stage(config, torch.float64)
        reference = copy.deepcopy(modules)
        batch = tiny_batch(dtype=torch.float64)
        train_on(without_updates(stage), 0, 0, batch)
        found.append(gradients(modules))
    assert batch.image is not None
    literal_backward(reference, config, batch.x, batch.labels, batch.image)
    check_same(found[0], gradients(reference))
    for name, gradient in found[0].items():
        other = found[1][name]
        assert (gradient is None) == (other is None) and (gradient is None or torch.equal(gradient, other)), name


@pytest.mark.parametrize(
    ("model", "hierarchy", "words"),
    [
        ({"group": [2, 3]}, {}, r"group = \[2, 3\] joins 5 local modules, but .* makes 6; let the list add up to 6"),
        ({"group": 3}, {"cascade_span": 3}, "group = 3 makes 2 local modules of 6, .* the largest span is 2"),
        ({"group": 2}, {"variant": "released"}, "group = 2 with hierarchy.variant = 'released', whose weights go by"),
        ({"group": 0}, {}, "model.group = 0 must be at least 1"),
    ],
)
def test_groups_that_do_not_fit_are_refused(model: dict[str, Any], hierarchy: dict[str, Any], words: str) -> None:
    with pytest.raises(ConfigError, match=words):
        validate(from_dict({"model": {"modules": 6, "cuts": "even", **model}, "hierarchy": hierarchy}))
