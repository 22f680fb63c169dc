"""Backbones are ordered named blocks; the un-cut model is the same network; initial weights follow block and seed."""

from __future__ import annotations

from collections import OrderedDict

import pytest
import torch
from helpers_shapes import boundary_shapes
from torch import nn

from pipeline import UncutModel, build_blocks, load_config, load_model, register_backbone
from pipeline.base.errors import ConfigError
from pipeline.base.numerics import Numerics, resolve_numerics
from pipeline.local.task import Classification
from pipeline.local.weights import model_state, module_weights
from pipeline.models.backbones import blocks_of, initialise
from pipeline.plan.assembly import build_modules, make_plan

CPU = Numerics(torch.device("cpu"), torch.float32, False)


@pytest.mark.parametrize(("depth", "parameters"), [(20, 272_474), (32, 466_906), (110, 1_730_714)])
def test_cifar_resnets_have_the_known_size(depth: int, parameters: int) -> None:
    blocks = build_blocks(f"resnet{depth}", 3, 10)
    assert len(blocks) == (depth - 2) // 2 + 2
    assert sum(p.numel() for block in blocks.values() for p in block.parameters()) == parameters
    shapes = boundary_shapes(blocks, (3, 32, 32))
    assert shapes["stem"] == (16, 32, 32) and shapes["layer2.0"] == (32, 16, 16) and shapes["classifier"] == (10,)


def test_the_uncut_model_names_parameters_by_block() -> None:
    blocks = build_blocks("resnet20", 3, 10)
    model = UncutModel(blocks).eval()
    assert {"stem.conv1.weight", "layer2.0.downsample.0.weight", "classifier.fc.bias"} <= set(model.state_dict())
    x = torch.randn(2, 3, 32, 32)
    expected = x
    for block in blocks.values():
        expected = block(expected)
    assert torch.equal(model(x), expected)


def test_initial_convolutions_have_the_published_spread() -> None:
    torch.manual_seed(0)
    layer = nn.Conv2d(64, 128, 3)
    initialise(layer)
    assert float(layer.weight.detach().std()) == pytest.approx((2 / (9 * 128)) ** 0.5, rel=0.02)


def test_initial_weights_depend_on_seed_and_block_only() -> None:
    """Neither the number of modules nor the number of ranks changes them."""
    found = []
    for modules, ranks in ((1, 1), (4, 1), (4, 4)):
        config = load_config(assignments=[f"model.modules={modules}", "model.name=resnet20", "model.cuts=even"])
        state = {}
        for rank in range(ranks):
            blocks = build_blocks("resnet20", 3, 10)
            plan = make_plan(config, blocks, Classification(10, (3, 32, 32)), ranks)
            for module in build_modules(plan, rank, blocks, CPU, fresh=True):
                state.update(model_state([module_weights(module)]))
        found.append(state)
    for other in found[1:]:
        assert other.keys() == found[0].keys()
        assert all(torch.equal(other[name], value) for name, value in found[0].items())


def test_a_backbone_is_one_function() -> None:
    def build(in_channels: int, classes: int) -> OrderedDict[str, nn.Module]:
        return OrderedDict(
            body=nn.Sequential(nn.Conv2d(in_channels, 8, 3), nn.ReLU()),
            end=nn.Sequential(nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(8, classes)),
        )

    register_backbone("one-function", build)
    config = load_config(assignments=["model.name=one-function", "model.modules=2", "model.cuts=even"])
    assert load_model(config, classes=5)(torch.zeros(1, 3, 8, 8)).shape == (1, 5)
    with pytest.raises(ConfigError, match="registered twice"):
        register_backbone("one-function", build)
    with pytest.raises(ConfigError, match="did you mean 'resnet32'"):
        build_blocks("resnet132", 3, 10)


def test_a_block_that_does_not_fit_is_named() -> None:
    network = nn.Sequential(OrderedDict(first=nn.Conv2d(3, 4, 3), second=nn.Linear(7, 2)))
    with pytest.raises(ConfigError, match="block 'second' fails on an input of shape"):
        boundary_shapes(blocks_of(network), (3, 8, 8))
    with pytest.raises(ConfigError, match="nn.Sequential"):
        blocks_of(nn.Linear(1, 1))  # type: ignore[arg-type]


def test_a_module_that_changes_its_input_in_place_is_refused() -> None:
    blocks = blocks_of(nn.Sequential(OrderedDict(conv=nn.Conv2d(3, 4, 3), relu=nn.ReLU(inplace=True))))
    assert boundary_shapes(blocks, (3, 8, 8), entrances=["conv"])["relu"] == (4, 6, 6)
    with pytest.raises(ConfigError, match="begins with block 'relu', which changes its input in place"):
        boundary_shapes(blocks, (3, 8, 8), entrances=["relu"])


def test_channels_last_is_avoided_where_the_kernel_writes_out_of_bounds() -> None:
    """oneDNN issue 6035: strided 1x1 convolutions with few input channels corrupt memory in NHWC on a CPU."""
    narrow, safe = nn.Conv2d(8, 16, 1, stride=2), nn.Conv2d(16, 32, 1, stride=2)
    precision = load_config(assignments=["precision.compute=fp32"]).precision
    assert resolve_numerics(precision, CPU.device, [safe]).channels_last
    assert not resolve_numerics(precision, CPU.device, [safe, narrow]).channels_last
    insisted = load_config(assignments=["precision.channels_last=on"]).precision
    with pytest.raises(ConfigError, match="8 input channels would corrupt memory"):
        resolve_numerics(insisted, CPU.device, [narrow])
