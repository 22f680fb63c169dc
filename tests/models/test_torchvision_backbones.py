"""torchvision's ResNets, cut: the same network bit for bit, names that lead back, and local learning on it."""

from __future__ import annotations

import subprocess
import sys
from typing import Any

import pytest
import torch
from helpers_shapes import boundary_shapes
from tiny import train_on
from torch import nn
from torchvision import models

from pipeline import UncutModel, backbone_names, build_blocks
from pipeline.base.numerics import resolve_numerics
from pipeline.base.validation import from_dict, validate
from pipeline.edges.connect import Edges
from pipeline.local.task import Classification
from pipeline.local.weights import model_state, module_weights
from pipeline.models.torchvision import NAMES, torchvision_name
from pipeline.plan.assembly import build_modules, make_plan
from pipeline.stage.inlet import Batch, BatchInlet
from pipeline.stage.stage import Stage

BLOCKS = {
    "resnet18": (2, 2, 2, 2),
    "resnet34": (3, 4, 6, 3),
    "resnet50": (3, 4, 6, 3),
    "resnet101": (3, 4, 23, 3),
    "resnet152": (3, 8, 36, 3),
    "resnext101_32x8d": (3, 4, 23, 3),
}
METHODS: dict[str, dict[str, Any]] = {"dgl": {"name": "dgl"}, "infopro": {"name": "infopro", "head": "1c2f"}}


@pytest.mark.parametrize("name", NAMES)
def test_every_residual_block_is_a_block_and_none_changes_its_input(name: str) -> None:
    with torch.device("meta"):  # shapes need no numbers
        blocks = build_blocks(name, 3, 1000)
        residual = [f"layer{stage}.{index}" for stage, n in enumerate(BLOCKS[name], 1) for index in range(n)]
        assert list(blocks) == ["stem", *residual, "classifier"]
        shapes = boundary_shapes(blocks, (3, 224, 224), entrances=list(blocks))
    assert name in backbone_names()
    width = 64 if name in ("resnet18", "resnet34") else 256
    assert shapes["stem"] == (64, 56, 56) and shapes["layer1.0"] == (width, 56, 56)
    assert shapes[residual[-1]] == (8 * width, 7, 7) and shapes["classifier"] == (1000,)


def reference(name: str, classes: int = 10) -> nn.Module:
    torch.manual_seed(1)
    return models.get_model(name, weights=None, num_classes=classes)


@pytest.mark.parametrize("name", ["resnet18", "resnet50"])
@pytest.mark.parametrize("training", [True, False])
def test_the_uncut_model_computes_what_torchvision_computes(name: str, training: bool) -> None:
    theirs, ours = reference(name).train(training), UncutModel(build_blocks(name, 3, 10)).train(training)
    weights = theirs.state_dict()
    ours.load_state_dict({key: weights[torchvision_name(name, key)] for key in ours.state_dict()})
    x = torch.randn(2, 3, 64, 64)
    assert torch.equal(ours(x), theirs(x))
    after = theirs.state_dict()  # BatchNorm has moved in training
    assert all(torch.equal(value, after[torchvision_name(name, key)]) for key, value in ours.state_dict().items())


def test_every_name_leads_back_to_torchvision() -> None:
    ours = UncutModel(build_blocks("resnet18", 3, 10)).state_dict()
    assert {torchvision_name("resnet18", key) for key in ours} == reference("resnet18").state_dict().keys()
    assert torchvision_name("resnet18", "stem.conv1.weight") == "conv1.weight"
    assert torchvision_name("resnet18", "layer1.0.conv1.weight") == "layer1.0.conv1.weight"
    assert torchvision_name("resnet32", "stem.conv1.weight") == "stem.conv1.weight"


def test_images_may_have_another_number_of_channels() -> None:
    blocks = build_blocks("resnet18", 1, 10)
    assert boundary_shapes(blocks, (1, 64, 64))["classifier"] == (10,)
    ours, theirs = UncutModel(blocks).state_dict(), reference("resnet18").state_dict()
    assert ours["stem.conv1.weight"].shape == (64, 1, 7, 7) and theirs["conv1.weight"].shape == (64, 3, 7, 7)


@pytest.mark.parametrize("method", METHODS)
def test_two_local_modules_train_on_larger_images(method: str) -> None:
    config = validate(
        from_dict(
            {
                "model": {"name": "resnet18", "modules": 2, "cuts": "even"},
                "method": METHODS[method],
                "data": {"batch_size": 4},
                "optim": {"schedule": "constant", "warmup_epochs": 0},
                "precision": {"compute": "fp32"},
            }
        )
    )
    blocks, task = build_blocks("resnet18", 3, 4), Classification(4, (3, 64, 64))
    plan = make_plan(config, blocks, task, ranks=1)
    assert [len(names) for names in plan.cut.modules] == [5, 5]
    numerics = resolve_numerics(config.precision, torch.device("cpu"), blocks.values())
    modules = build_modules(plan, 0, blocks, numerics, fresh=True)
    before = [model_state([module_weights(module)]) for module in modules]
    before = [{key: value.clone() for key, value in state.items()} for state in before]
    stage = Stage(modules, plan.schedules[0], BatchInlet(), Edges())
    image = torch.randint(0, 256, (4, 3, 64, 64), dtype=torch.uint8)
    train_on(stage, 1, 0, Batch(numerics.boundary(image / 127.5 - 1.0), torch.arange(4), image))
    for module, old in zip(modules, before, strict=True):
        same = [key for key, value in model_state([module_weights(module)]).items() if torch.equal(value, old[key])]
        assert same == [], f"module {module.plan.index} did not train {same}"
        assert all(torch.isfinite(total) for total in module.losses.sums.values())
    assert set(modules[1].losses.sums) == {"final"}


def test_the_networks_are_there_whatever_is_imported_first() -> None:
    code = "from pipeline.models.backbones import backbone_names; assert 'resnet18' in backbone_names()"
    subprocess.run([sys.executable, "-c", code], check=True, timeout=60)
