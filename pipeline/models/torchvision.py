"""torchvision's networks as blocks, for images of ImageNet's size (the experiments of InfoPro, HPFF and DGL there).

    resnet   stem -> layer1.0 -> ... -> layer4.n -> classifier
             conv1, bn1, relu, maxpool              avgpool, flatten, fc
    vgg      features.0 -> features.3 -> features.6 -> features.10 -> ... -> features.34
             conv bn relu  conv bn relu  maxpool conv bn relu                maxpool, avgpool, classifier
    vit      conv_proj -> encoder.layers.encoder_layer_0 -> ... -> heads.head
    swin     features.0.0 -> features.1.0 -> ... -> features.2.reduction -> features.3.0 -> ... -> head
    deeplab  stem -> layer1.0 -> ... -> layer4.2 -> classifier          see :mod:`pipeline.models.deeplab`
             as of ResNet-101                       class scores (B, classes, H, W)

The modules are torchvision's own, so the cut network computes what theirs does, and an exported file loads into theirs:
under the names of :func:`torchvision_name` for ResNets and DeepLabV3, whose two ends we name; the others are cut by
their traced forward, and keep all names and the weights that torchvision draws. No block changes its input in place:
the in-place ReLUs work on what a BatchNorm or an addition has just made.

VGGs are in DGL's layout: every convolution is a block, and a pooling begins the next one, so that a boundary has the
map before it; there is no dropout.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Iterator
from typing import Any

from torch import nn

from pipeline.base.errors import ConfigError
from pipeline.models.backbones import (
    BackboneFunction,
    Blocks,
    Sides,
    SizedFunction,
    register_backbone,
    register_sized,
)
from pipeline.models.custom import network_blocks

VGGS = ("vgg13_bn", "vgg19_bn")
TRANSFORMERS = ("vit_b_16", "swin_t")
RESNETS = ("resnet18", "resnet34", "resnet50", "resnet101", "resnet152", "resnext101_32x8d")
DEEPLAB, DEEPLAB_C = "deeplabv3_resnet101", "deeplabv3_resnet101c"
DEEPLABS = (DEEPLAB, DEEPLAB_C)
"""torchvision's, and InfoPro's, which has its names where both have the same."""
_PARTS_OF_THEIR_OWN = ("stem.", "classifier.")  # torchvision has no names for these two blocks


def torchvision_resnet(name: str) -> BackboneFunction:
    """The function that builds ``torchvision.models.<name>``, without trained weights, as blocks.

    ``in_channels`` other than 3 gets a first convolution of its own.
    """

    def build(in_channels: int, classes: int) -> Blocks:
        from torchvision import models  # a second, which others do without

        network = models.get_model(name, weights=None, num_classes=classes)
        _take_channels(network, in_channels)
        blocks = _residual_blocks(network)
        blocks["classifier"] = nn.Sequential(
            OrderedDict(avgpool=network.avgpool, flatten=nn.Flatten(), fc=network.fc)
        )
        return blocks

    return build


def _residual_blocks(network: nn.Module) -> Blocks:
    """Stem and stages of a ResNet."""
    parts = {name: network.get_submodule(name) for name in ("conv1", "bn1", "relu", "maxpool")}
    blocks: Blocks = OrderedDict(stem=nn.Sequential(OrderedDict(parts)))
    for stage in ("layer1", "layer2", "layer3", "layer4"):
        for index, block in network.get_submodule(stage).named_children():
            blocks[f"{stage}.{index}"] = block
    return blocks


def torchvision_deeplab(name: str) -> BackboneFunction:
    """The function that builds a DeepLabV3."""

    def build(in_channels: int, classes: int) -> Blocks:
        from pipeline.models.deeplab import deeplab  # imports torchvision

        return deeplab(in_channels, classes, like_infopro=name == DEEPLAB_C)

    return build


def torchvision_vgg(name: str) -> BackboneFunction:
    """The function that builds ``torchvision.models.<name>`` in DGL's layout, without dropout."""

    def build(in_channels: int, classes: int) -> Blocks:
        from torchvision import models

        network = models.get_model(name, weights=None, num_classes=classes, dropout=0.0)
        _take_channels(network, in_channels)
        return network_blocks(network, tuple(_vgg_cuts(network.features)))

    return build


def _vgg_cuts(features: nn.Sequential) -> Iterator[str]:
    """Every convolution but the first begins a block, with the pooling before it; so does the last pooling."""
    before: nn.Module | None = None
    for name, layer in features.named_children():
        if isinstance(layer, nn.MaxPool2d) or (isinstance(layer, nn.Conv2d) and isinstance(before, nn.ReLU)):
            yield f"features.{name}"
        before = layer


def torchvision_transformer(name: str) -> SizedFunction:
    """The function that builds ``torchvision.models.<name>``, cut at its encoder blocks; a ViT for the images it
    gets."""

    def build(in_channels: int, classes: int, sides: Sides | None) -> Blocks:
        from torchvision import models

        options: dict[str, Any] = {}
        if sides is not None and name.startswith("vit"):
            if sides[0] != sides[1]:
                raise ConfigError(f"{name} takes square images, not {sides[0]} x {sides[1]}; crop them, or use swin_t")
            options["image_size"] = sides[0]
        try:
            network = models.get_model(name, weights=None, num_classes=classes, **options)
        except AssertionError as error:
            size = " x ".join(map(str, sides or ()))
            raise ConfigError(f"{name} takes no images of {size} ({error}); use another size, or swin_t") from error
        _take_channels(network, in_channels)
        return network_blocks(network)

    return build


def _take_channels(network: nn.Module, channels: int) -> None:
    """Give a network of RGB images a first convolution for others."""
    path, first = next((path, m) for path, m in network.named_modules() if isinstance(m, nn.Conv2d))
    if channels != first.in_channels:
        options: dict[str, Any] = {name: getattr(first, name) for name in ("kernel_size", "stride", "padding")}
        options["bias"] = first.bias is not None
        network.set_submodule(path, nn.Conv2d(channels, first.out_channels, **options))


def torchvision_name(backbone: str, key: str) -> str:
    """The state-dict key of torchvision's own network for a key of :class:`pipeline.UncutModel`.

    ``stem.conv1.weight`` is ``conv1.weight`` there. Keys of others than ResNets and DeepLabV3 stay.
    """
    if backbone in RESNETS:
        for part in _PARTS_OF_THEIR_OWN:
            key = key.removeprefix(part)
    if backbone in DEEPLABS:
        for ours, theirs in (("classifier.head.", "classifier."), ("classifier.aux.", "aux_classifier.")):
            if key.startswith(ours):
                return theirs + key.removeprefix(ours)
        return f"backbone.{key.removeprefix('stem.')}"
    return key


def name_in_backbone_file(backbone: str, key: str) -> str | None:
    """Its key in a file of the ResNet that a DeepLabV3 stands on; None: it is not of that."""
    before, _, name = torchvision_name(backbone, key).partition("backbone.")
    return None if before else name


for _name in RESNETS:
    register_backbone(_name, torchvision_resnet(_name))
for _name in VGGS:
    register_backbone(_name, torchvision_vgg(_name))
for _name in TRANSFORMERS:
    register_sized(_name, torchvision_transformer(_name))
for _name in DEEPLABS:
    register_backbone(_name, torchvision_deeplab(_name))
