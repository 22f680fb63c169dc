"""torchvision's networks, cut: the same network bit for bit, names that lead back, and local learning on it."""

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

from pipeline import ConfigError, UncutModel, backbone_names, build_blocks
from pipeline.base.numerics import resolve_numerics
from pipeline.base.validation import from_dict, validate
from pipeline.edges.connect import Edges
from pipeline.local.task import Classification
from pipeline.local.weights import model_state, module_weights
from pipeline.models.torchvision import DEEPLAB, DEEPLAB_C, RESNETS, TRANSFORMERS, VGGS, torchvision_name
from pipeline.models.unbuilt import planned_blocks
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


@pytest.mark.parametrize("name", RESNETS)
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


@pytest.mark.parametrize("name", [*RESNETS, *VGGS, *TRANSFORMERS, DEEPLAB])
def test_a_network_has_the_parameters_that_torchvision_publishes(name: str) -> None:
    weights = models.get_model_weights(name).DEFAULT  # type: ignore[attr-defined]
    blocks = planned_blocks(name, 3, len(weights.meta["categories"]))
    published = weights.meta["num_params"]
    assert sum(parameter.numel() for block in blocks.values() for parameter in block.parameters()) == published
    if name in (*RESNETS, DEEPLAB):  # their names are tested above and below
        return
    with torch.device("meta"):
        theirs = models.get_model(name, weights=None)
    ours = UncutModel(blocks).state_dict()
    assert {torchvision_name(name, key): value.shape for key, value in ours.items()} == {
        key: value.shape for key, value in theirs.state_dict().items()
    }


def test_a_vgg_has_the_layout_of_dgl() -> None:
    """A block per convolution, which begins with the pooling before it: boundaries carry maps before the pooling."""
    blocks = planned_blocks("vgg13_bn", 3, 1000)
    shapes = list(boundary_shapes(blocks, (3, 224, 224), entrances=list(blocks)[1:]).values())
    sides = {64: 224, 128: 112, 256: 56, 512: 28}
    boundaries = [(width, side, side) for width, side in sides.items() for _ in (0, 1)] + [(512, 14, 14)] * 2
    assert shapes == [*boundaries, (1000,)]
    assert not any(isinstance(m, nn.Dropout) and m.p > 0 for block in blocks.values() for m in block.modules())


def test_transformers_are_cut_at_their_encoder_blocks() -> None:
    layers = [f"encoder.layers.encoder_layer_{index}" for index in range(12)]
    assert list(planned_blocks("vit_b_16", 3, 10)) == ["conv_proj", *layers, "heads.head"]
    inside = [f"features.{stage}.{index}" for stage, n in {1: 2, 3: 2, 5: 6, 7: 2}.items() for index in range(n)]
    found = list(planned_blocks("swin_t", 3, 10))
    assert [name for name in found if name in inside] == inside
    assert len(found) == len(inside) + 5  # the first, three mergings of patches, the classifier


def test_a_vision_transformer_is_built_for_the_images_it_gets() -> None:
    blocks = planned_blocks("vit_b_16", 1, 10, sides=(32, 32))
    assert boundary_shapes(blocks, (1, 32, 32))["conv_proj"] == (5, 768)  # 4 patches and the class token
    assert boundary_shapes(planned_blocks("swin_t", 1, 10, sides=(32, 48)), (1, 32, 48))["head"] == (10,)
    with pytest.raises(ConfigError, match=r"vit_b_16 takes no images of 40 x 40 \(Input shape indivisible by patch"):
        planned_blocks("vit_b_16", 3, 10, sides=(40, 40))
    with pytest.raises(ConfigError, match="vit_b_16 takes square images, not 32 x 48; crop them, or use swin_t"):
        planned_blocks("vit_b_16", 3, 10, sides=(32, 48))


@pytest.mark.parametrize("name", TRANSFORMERS)
def test_a_transformer_computes_what_torchvision_computes(name: str) -> None:
    torch.manual_seed(1)
    ours = UncutModel(build_blocks(name, 3, 10, (32, 32))).eval()
    nn.init.normal_([*ours.parameters()][-2])  # a ViT's classifier begins with zeros
    with torch.device("meta"):
        theirs = models.get_model(name, weights=None, num_classes=10, **({"image_size": 32} if "vit" in name else {}))
    theirs = theirs.to_empty(device="cpu").eval()
    theirs.load_state_dict(ours.state_dict(), strict=True)
    x = torch.randn(2, 3, 32, 32)
    with torch.no_grad():
        found = ours(x)
        assert torch.equal(found, theirs(x)) and found.std() > 0.1


def test_deeplab_has_output_stride_8_and_the_names_of_torchvision() -> None:
    blocks = planned_blocks(DEEPLAB, 3, 19)
    assert len(blocks) == 1 + 3 + 4 + 23 + 3 + 1
    shapes = boundary_shapes(blocks, (3, 128, 256), entrances=list(blocks)[1:])
    assert shapes["layer2.3"] == (512, 16, 32) and shapes["layer3.12"] == (1024, 16, 32)
    assert shapes["layer4.2"] == (2048, 16, 32) and shapes["classifier"] == (19, 128, 256)
    dilations = [m.dilation[0] for m in blocks["layer4.0"].modules() if isinstance(m, nn.Conv2d) and m.groups == 1]
    assert sorted(set(dilations)) == [1, 2]  # the first of a stage as the stage before
    with torch.device("meta"):
        theirs = models.segmentation.deeplabv3_resnet101(
            weights=None, weights_backbone=None, num_classes=19, aux_loss=True
        )
    ours = UncutModel(blocks).state_dict()
    assert {torchvision_name(DEEPLAB, key): value.shape for key, value in ours.items()} == {
        key: value.shape for key, value in theirs.state_dict().items()
    }


def test_deeplab_computes_what_torchvision_computes_in_training_too() -> None:
    """There the second head gives "aux", and BatchNorm moves alike."""
    torch.manual_seed(1)
    ours = UncutModel(build_blocks(DEEPLAB, 3, 5)).eval()
    with torch.device("meta"):
        theirs = models.segmentation.deeplabv3_resnet101(
            weights=None, weights_backbone=None, num_classes=5, aux_loss=True
        )
    theirs = theirs.to_empty(device="cpu").eval()
    weights = {torchvision_name(DEEPLAB, key): value for key, value in ours.state_dict().items()}
    theirs.load_state_dict(weights, strict=True)
    x = torch.randn(2, 3, 32, 48)
    with torch.no_grad():
        assert torch.equal(ours(x), theirs(x)["out"])
        for network in (ours.train(), theirs.train()):
            for layer in network.modules():
                if isinstance(layer, nn.Dropout):
                    layer.p = 0.0
        found, expected = ours(x), theirs(x)
    assert torch.equal(found["x"], expected["out"]) and torch.equal(found["aux"], expected["aux"])
    after = theirs.state_dict()
    assert all(torch.equal(value, after[torchvision_name(DEEPLAB, key)]) for key, value in ours.state_dict().items())


def test_the_deeplab_of_infopro_has_a_deep_stem_and_a_wide_pyramid() -> None:
    blocks = planned_blocks(DEEPLAB_C, 3, 19)
    shapes = boundary_shapes(blocks, (3, 64, 128), entrances=list(blocks)[1:])
    assert shapes["layer3.12"] == (1024, 8, 16) and shapes["classifier"] == (19, 64, 128)
    stem = [layer for layer in blocks["stem"].modules() if isinstance(layer, nn.Conv2d)]
    assert [(layer.out_channels, layer.kernel_size, layer.stride) for layer in stem] == [
        (32, (3, 3), (2, 2)), (32, (3, 3), (1, 1)), (64, (3, 3), (1, 1))
    ]  # fmt: skip
    head = [layer for layer in blocks["classifier"].get_submodule("head").modules() if isinstance(layer, nn.Conv2d)]
    assert [layer.dilation[0] for layer in head[:4]] == [1, 12, 24, 36]
    assert {layer.out_channels for layer in head[:-1]} == {512} and head[-1].out_channels == 19
    drops = [layer for layer in blocks["classifier"].modules() if isinstance(layer, (nn.Dropout, nn.Dropout2d))]
    assert [(type(layer), layer.p) for layer in drops] == [(nn.Dropout2d, 0.1)] * 2
    names = {torchvision_name(DEEPLAB_C, f"layer3.0.{key}") for key in blocks["layer3.0"].state_dict()}
    assert all(name.startswith("backbone.layer3.0.") for name in names)
