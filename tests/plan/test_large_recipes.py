"""The recipes of ImageNet and Cityscapes: cut where the papers cut, planned without data, and two steps on two ranks.

Every one in ``pytest -m slow``; of planning and training, a representative of each kind otherwise.
"""

from __future__ import annotations

import functools
from pathlib import Path

import pytest
from recipe_steps import two_steps_of_all

from pipeline import load_config, recipe_names
from pipeline.base.config import Config
from pipeline.models.unbuilt import planned_blocks
from pipeline.plan.cost_profile import Profile
from pipeline.plan.cut import make_cut
from pipeline.plan.explain import explain
from pipeline.plan.simulate import ModuleCost

pytestmark = pytest.mark.long

LARGE = [name for name in recipe_names() if name.startswith(("imagenet", "cityscapes"))]
REPRESENTATIVE = ("imagenet-resnet101-k4-infopro-hpff", "cityscapes-deeplabv3-resnet101-k2-infopro")
OTHERS = [name for name in LARGE if name not in REPRESENTATIVE]
LEFT_OUT = (pytest.mark.slow, pytest.mark.every)
LARGE_TRAINED = [*REPRESENTATIVE, *OTHERS]  # the first one in every run

LAST_BLOCKS = {
    ("resnet101", 2): ["layer2.0"],
    ("resnet152", 2): ["layer2.5"],
    ("resnext101_32x8d", 2): ["layer2.2"],
    ("resnet101", 4): ["layer3.0", "layer3.9", "layer3.17"],
    ("resnet152", 4): ["layer3.0", "layer3.9", "layer3.17"],
    ("resnext101_32x8d", 4): ["layer3.0", "layer3.9", "layer3.17"],
    ("deeplabv3_resnet101c", 2): ["layer3.12"],
}
"""Of every local module but the last, by network and K, from the tables of InfoPro and HPFF."""
PARAMETERS = {
    "resnet101": 44_549_160, "resnet152": 60_192_808, "resnext101_32x8d": 88_791_336, "vgg13_bn": 133_053_736,
    "deeplabv3_resnet101c": 87_105_158,
}  # fmt: skip


network_of = functools.cache(lambda name, classes: planned_blocks(name, 3, classes))


def test_there_is_a_recipe_for_every_row_of_the_tables() -> None:
    assert len([name for name in LARGE if name.startswith("imagenet")]) == 18
    assert len([name for name in LARGE if name.startswith("cityscapes")]) == 6


@pytest.mark.parametrize("name", LARGE)
def test_a_recipe_cuts_where_the_paper_cuts(name: str) -> None:
    config = load_config(name, say=pytest.fail)
    blocks = network_of(config.model.name, 19 if "cityscapes" in name else 1000)
    assert sum(p.numel() for block in blocks.values() for p in block.parameters()) == PARAMETERS[config.model.name]
    cut = make_cut(list(blocks), config.model)
    if config.model.modules == 1:
        assert len(cut) == 1
    elif config.model.name == "vgg13_bn":  # every convolution by itself
        assert len(cut) == 10 and [len(names) for names in cut.modules] == [1] * 9 + [2]
    else:
        assert [names[-1] for names in cut.modules[:-1]] == LAST_BLOCKS[config.model.name, config.model.modules]


def test_settings_are_the_published_ones() -> None:
    def of(name: str) -> Config:
        return load_config(name)

    infopro, hpff = of("imagenet-resnet101-k2-infopro"), of("imagenet-resnet101-k4-infopro-hpff")
    released = of("imagenet-resnet101-k4-infopro-hpff-released")
    assert (infopro.data.batch_size, infopro.optim.lr, infopro.train.epochs) == (1024, 0.4, 90)
    assert (hpff.data.batch_size, hpff.optim.lr, hpff.train.epochs) == (128, 0.05, 90)
    for config in (infopro, hpff):
        assert config.optim.schedule == "cosine-peak" and config.optim.warmup_epochs == 0 and config.optim.nesterov
        assert (config.method.reconstruction, config.method.task) == ((5.0, 5.0), (0.75, 0.75))
    assert of("imagenet-resnet152-k2-infopro").method.task == (1.0, 1.0)
    assert (hpff.hierarchy.independent_weight, hpff.hierarchy.cascade_span, hpff.patches.grid) == (1.0, 2, 2)
    assert (released.hierarchy.independent_weight, released.hierarchy.cascade_weight) == (0.0, 1.0)
    assert released.patches.grid == 1 and released.method.reconstruction == (20.0, 20.0)
    runs = [of(f"cityscapes-deeplabv3-resnet101-k2-infopro{run}") for run in ("", "-batch12", "-640x1280")]
    assert [(run.data.batch_size, run.optim.lr, tuple(run.data.crop)) for run in runs] == [
        (8, 0.01, (512, 1024)), (12, 0.015, (512, 1024)), (8, 0.015, (640, 1280))
    ]  # fmt: skip
    assert [(run.method.reconstruction[0], run.method.task[0]) for run in runs] == [(1.5, 1.0), (1.0, 0.1), (2.0, 1.0)]
    for run in runs:
        assert (run.optim.schedule, run.optim.min_lr, run.optim.weight_decay) == ("poly", 1e-4, 5e-4)
        assert not run.optim.nesterov and run.train.max_steps == 40_000 and run.model.aux_weight == 0.4


@pytest.mark.parametrize("name", [*REPRESENTATIVE, *(pytest.param(name, marks=LEFT_OUT) for name in OTHERS)])
def test_a_recipe_is_planned_without_data(name: str) -> None:
    """Of a profile, as measuring takes a minute; memory of a step is counted elsewhere."""
    config = load_config(name, assignments=["patches.at_once=1", "partition.kind=count", "runtime.device=cpu"])
    modules = config.model.modules
    costs = (ModuleCost(forward_s=1.0, backward_s=2.0),) * modules
    report = explain(config, min(4, modules), Profile(costs, config.data.batch_size, config.data.batch_size))
    assert len(report.modules) == modules and report.step_s > 0
    heads = [module.head_parameters > 0 for module in report.modules]
    first = config.hierarchy.variant == "paper"
    assert heads == ([first] + [True] * (modules - 2) + [False] if modules > 1 else [False])


# --- two steps on two ranks -------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "name",
    [LARGE_TRAINED[0], *(pytest.param(name, marks=LEFT_OUT) for name in LARGE_TRAINED[1:])],
)
def test_recipes_train_two_steps_on_two_ranks(name: str, tmp_path: Path) -> None:
    assert two_steps_of_all([name], 64, tmp_path) == [2]
