"""The recipes of CIFAR-10, SVHN, STL-10, digits and text: cut where the papers cut, planned, two steps on two ranks.

The last two in ``pytest -m slow``; the default recipe runs in the tests of README.md, a large one in another file.
"""

from __future__ import annotations

import functools
from pathlib import Path

import pytest
from recipe_steps import PLAIN, two_steps_of_all

from pipeline import load_config, recipe_names
from pipeline.models.unbuilt import planned_blocks
from pipeline.plan.cost_profile import Profile
from pipeline.plan.cut import make_cut
from pipeline.plan.explain import explain
from pipeline.plan.simulate import ModuleCost

pytestmark = pytest.mark.long

SMALL = [name for name in recipe_names() if not name.startswith(("imagenet", "cityscapes"))]
KINDS = sorted({name.partition("-k")[0].removesuffix("-bp") for name in SMALL})
"""Data and network: these are trained in one go."""

BLOCKS = {
    ("resnet32", 1): [15],
    ("resnet32", 2): [7, 8],
    ("resnet32", 4): [3, 4, 4, 4],
    ("resnet32", 8): [1, *[2] * 7],
    ("resnet32", 16): [1] * 15,  # of InfoPro behind the stem, of HPFF with it
    ("resnet110", 1): [54],
    ("resnet110", 2): [27, 27],
    ("resnet110", 4): [12, 14, 14, 14],
    ("resnet110", 8): [5, *[7] * 7],
    ("resnet110", 16): [2, *[3] * 8, *[4] * 7],
    ("resnet110", 32): [*[2, 1, 2, 1, 2, 2, 2, 2, 1, 2, 1] * 2, 2, 2, 1, 2, 1, 2, 2, 2, 2, 2],
    ("resnet110", 55): [1] * 54,
}
"""Residual blocks of every local module, from the tables of InfoPro and HPFF."""


@functools.cache
def blocks_of(name: str) -> list[str]:
    return list(planned_blocks(name, 3, 10))


def test_recipes_cut_where_the_papers_cut() -> None:
    seen = set()
    for recipe in SMALL:
        model = load_config(recipe, say=pytest.fail).model
        if (model.name, model.modules) not in BLOCKS or recipe.startswith("digits"):
            continue  # not of a paper
        cut = make_cut(blocks_of(model.name), model)
        found = [sum(block.startswith("layer") for block in names) for names in cut.modules]
        own_stem = recipe == "cifar10-resnet32-k16-infopro-contrast"
        assert found == [0] * own_stem + BLOCKS[model.name, model.modules], recipe
        seen.add((model.name, model.modules))
    assert seen == BLOCKS.keys()


@pytest.mark.slow
@pytest.mark.every
@pytest.mark.parametrize("name", SMALL)
def test_a_recipe_is_planned_without_data(name: str) -> None:
    data = [] if name.startswith("text") else ["data.name=digits", "model.cuts=even"][: 1 + name.startswith("digits")]
    config = load_config(name, assignments=[*PLAIN, *data], say=pytest.fail)
    blocks = 128 if config.model.name == "decoder" else 3
    modules = len(make_cut(list(planned_blocks(config.model.name, blocks, 10)), config.model))
    costs = (ModuleCost(forward_s=1.0, backward_s=2.0),) * modules
    report = explain(config, min(2, modules), Profile(costs, config.data.batch_size, config.data.batch_size))
    assert len(report.modules) == modules and report.step_s > 0


@pytest.mark.slow
@pytest.mark.every
@pytest.mark.parametrize("kind", KINDS)
def test_recipes_train_two_steps_on_two_ranks(kind: str, tmp_path: Path) -> None:
    names = [name for name in SMALL if name.startswith((f"{kind}-k", f"{kind}-bp"))]
    assert two_steps_of_all(names, 32, tmp_path) == [2] * len(names)
