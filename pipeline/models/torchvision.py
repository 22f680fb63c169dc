"""torchvision's ResNets as blocks, for images of ImageNet's size (the experiments of InfoPro and HPFF there).

    stem -> layer1.0 -> ... -> layer4.n -> classifier
    conv1, bn1, relu, maxpool              avgpool, flatten, fc

The modules are torchvision's own, so the cut network computes what theirs does, and an exported file loads into theirs
under the names of :func:`torchvision_name`. No block changes its input in place: the in-place ReLUs work on what a
BatchNorm or an addition has just made.
"""

from __future__ import annotations

from collections import OrderedDict

from torch import nn

from pipeline.models.backbones import BackboneFunction, Blocks, register_backbone

NAMES = ("resnet18", "resnet34", "resnet50", "resnet101", "resnet152", "resnext101_32x8d")
_PARTS_OF_THEIR_OWN = ("stem.", "classifier.")  # torchvision has no names for these two blocks


def torchvision_resnet(name: str) -> BackboneFunction:
    """The function that builds ``torchvision.models.<name>``, without trained weights, as blocks.

    ``in_channels`` other than 3 gets a first convolution of its own.
    """

    def build(in_channels: int, classes: int) -> Blocks:
        from torchvision import models  # a second, which others do without

        network = models.get_model(name, weights=None, num_classes=classes)
        first = network.conv1
        if in_channels != first.in_channels:
            first = nn.Conv2d(in_channels, first.out_channels, 7, 2, 3, bias=False)
        blocks: Blocks = OrderedDict()
        blocks["stem"] = nn.Sequential(
            OrderedDict(conv1=first, bn1=network.bn1, relu=network.relu, maxpool=network.maxpool)
        )
        for stage in ("layer1", "layer2", "layer3", "layer4"):
            for index, block in network.get_submodule(stage).named_children():
                blocks[f"{stage}.{index}"] = block
        blocks["classifier"] = nn.Sequential(
            OrderedDict(avgpool=network.avgpool, flatten=nn.Flatten(), fc=network.fc)
        )
        return blocks

    return build


def torchvision_name(backbone: str, key: str) -> str:
    """The state-dict key of torchvision's own network for a key of :class:`pipeline.UncutModel`.

    ``stem.conv1.weight`` is ``conv1.weight`` there. Keys of other backbones stay as they are.
    """
    if backbone in NAMES:
        for part in _PARTS_OF_THEIR_OWN:
            key = key.removeprefix(part)
    return key


for _name in NAMES:
    register_backbone(_name, torchvision_resnet(_name))
