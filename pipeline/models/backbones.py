"""Backbones as ordered, named blocks that can be cut anywhere.

A backbone is one function ``(in_channels, classes) -> OrderedDict[name, block]``; register it with
:func:`register_backbone`. A block is the smallest unit a network can be cut at; the last block ends in logits. Some of
other libraries are made for images of one size: their functions are told it as well.

    stem -> layer1.0 -> ... -> layer3.n -> classifier           (CIFAR ResNets, He et al. 2016, sec. 4.2)
    |________________________________|     |
        widths 16 / 32 / 64                global average pool + linear
"""

from __future__ import annotations

import math
from collections import OrderedDict
from collections.abc import Callable
from typing import Any

from torch import Tensor, nn

from pipeline.base.errors import ConfigError, suggest
from pipeline.base.flow import Flow, passed
from pipeline.models.part import uncut_name

Blocks = OrderedDict[str, nn.Module]
BackboneFunction = Callable[[int, int], Blocks]
Sides = tuple[int, ...]
"""(H, W) of the images."""
SizedFunction = Callable[[int, int, Sides | None], Blocks]
"""``(in_channels, classes, sides) -> blocks``; None: the size that the network was published for."""

_BACKBONES: dict[str, SizedFunction] = {}
_LIBRARIES: dict[str, Callable[[str], SizedFunction]] = {}


def register_backbone(name: str, build: BackboneFunction) -> None:
    """Make ``build(in_channels, classes) -> OrderedDict[name, block]`` available as ``model.name = name``."""
    register_sized(name, lambda in_channels, classes, sides: build(in_channels, classes))


def register_sized(name: str, build: SizedFunction) -> None:
    """:func:`register_backbone` of a network that is made for images of one size."""
    if name in _BACKBONES:
        raise ConfigError(f"backbone '{name}' is registered twice; choose another name")
    _BACKBONES[name] = build


def register_library(library: str, find: Callable[[str], SizedFunction]) -> None:
    """Make ``find("NAME")`` available as ``model.name = "library/NAME"``; it raises ConfigError for an unknown name."""
    _LIBRARIES[library] = find


def backbone_names() -> tuple[str, ...]:
    """Names accepted as ``model.name``, besides those of libraries ("timm/...")."""
    return tuple(sorted(_BACKBONES))


def build_blocks(name: str, in_channels: int, classes: int, sides: Sides | None = None) -> Blocks:
    """Build the named backbone.

    Args:
        in_channels: of an image; the length of a sequence of ids.
        sides: (H, W) of the images; matters to networks that take one size only, vision transformers among them. None:
            the size that such a network was published for; (): of sequences.

    Raises:
        ConfigError: unknown name; a network that cannot take such images.
    """
    sides = sides or None
    library, slash, member = name.partition("/")
    if slash and library in _LIBRARIES:
        return _LIBRARIES[library](member)(in_channels, classes, sides)
    if name not in _BACKBONES:
        raise ConfigError(f"model.name = '{name}' is no known backbone; {suggest(name, _BACKBONES)}")
    return _BACKBONES[name](in_channels, classes, sides)


class BasicBlock(nn.Module):
    """Two 3x3 convolutions and a shortcut: ``(B, in, H, W) -> (B, out, H/stride, W/stride)``.

    A change of width or stride uses a projection shortcut (1x1 convolution + BatchNorm).
    """

    def __init__(self, in_channels: int, out_channels: int, stride: int) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(in_channels, out_channels, 3, stride, 1, bias=False)
        self.bn1 = nn.BatchNorm2d(out_channels)
        self.conv2 = nn.Conv2d(out_channels, out_channels, 3, 1, 1, bias=False)
        self.bn2 = nn.BatchNorm2d(out_channels)
        self.relu = nn.ReLU(inplace=True)
        self.downsample: nn.Module | None = None
        if stride != 1 or in_channels != out_channels:
            self.downsample = nn.Sequential(
                nn.Conv2d(in_channels, out_channels, 1, stride, bias=False), nn.BatchNorm2d(out_channels)
            )

    def forward(self, x: Tensor) -> Tensor:
        out = self.relu(self.bn1(self.conv1(x)))
        out = self.bn2(self.conv2(out))
        shortcut = x if self.downsample is None else self.downsample(x)
        total: Tensor = self.relu(out + shortcut)
        return total


def cifar_resnet(depth: int) -> BackboneFunction:
    """The CIFAR ResNet of ``depth = 6 n + 2`` layers: 3 stages of n basic blocks, widths 16, 32, 64."""
    blocks_per_stage = (depth - 2) // 6

    def build(in_channels: int, classes: int) -> Blocks:
        blocks: Blocks = OrderedDict()
        blocks["stem"] = nn.Sequential(
            OrderedDict(
                conv1=nn.Conv2d(in_channels, 16, 3, 1, 1, bias=False),
                bn1=nn.BatchNorm2d(16),
                relu=nn.ReLU(inplace=True),
            )
        )
        channels = 16
        for stage, width in enumerate((16, 32, 64), start=1):
            for index in range(blocks_per_stage):
                stride = 2 if stage > 1 and index == 0 else 1
                blocks[f"layer{stage}.{index}"] = BasicBlock(channels, width, stride)
                channels = width
        blocks["classifier"] = nn.Sequential(
            OrderedDict(pool=nn.AdaptiveAvgPool2d(1), flatten=nn.Flatten(), fc=nn.Linear(channels, classes))
        )
        return blocks

    return build


def cifar_fcn(depth: int) -> BackboneFunction:
    """The CIFAR ResNet of ``depth`` with class scores for every pixel in place of its pooling: a 1x1 convolution, then
    upsampling by 4 (a fully convolutional network, Long et al. 2015). Sides are multiples of 4."""

    def build(in_channels: int, classes: int) -> Blocks:
        blocks = cifar_resnet(depth)(in_channels, classes)
        upsample = nn.Upsample(scale_factor=4, mode="bilinear", align_corners=False)
        blocks["classifier"] = nn.Sequential(OrderedDict(scores=nn.Conv2d(64, classes, 1), upsample=upsample))
        return blocks

    return build


for _depth in (20, 32, 44, 56, 110):
    register_backbone(f"resnet{_depth}", cifar_resnet(_depth))
for _depth in (20, 32):
    register_backbone(f"fcn_resnet{_depth}", cifar_fcn(_depth))


def blocks_of(network: nn.Sequential) -> Blocks:
    """The children of a user's ``nn.Sequential`` as named blocks (the modules themselves, not copies)."""
    if not isinstance(network, nn.Sequential) or len(network) == 0:
        raise ConfigError(
            f"the network is a {type(network).__name__}; pass a non-empty nn.Sequential whose children are its blocks"
        )
    return OrderedDict(network.named_children())


class UncutModel(nn.Module):
    """The whole network in one process. Its state-dict keys are ``<block>.<parameter>``, as a run saves them; those of
    the network itself where it was cut by its traced forward."""

    def __init__(self, blocks: Blocks) -> None:
        super().__init__()
        self._order = tuple(blocks)
        # torch has not annotated them
        self.register_state_dict_post_hook(_name_as_uncut)  # type: ignore[no-untyped-call]
        self.register_load_state_dict_pre_hook(_name_as_cut)  # type: ignore[no-untyped-call]
        for name, block in blocks.items():
            parent: nn.Module = self
            *path, leaf = name.split(".")
            for part in path:
                if part not in dict(parent.named_children()):
                    parent.add_module(part, nn.Module())
                parent = parent.get_submodule(part)
            parent.add_module(leaf, block)

    def forward(self, x: Flow) -> Flow:
        for name in self._order:
            x = passed(self.get_submodule(name)(x))
        return x


def _name_as_uncut(model: nn.Module, state: dict[str, Any], prefix: str, metadata: Any) -> None:
    for key in [key for key in state if key.startswith(prefix)]:
        state[prefix + uncut_name(key.removeprefix(prefix))] = state.pop(key)


def _name_as_cut(model: nn.Module, state: dict[str, Any], prefix: str, *others: Any) -> None:
    for name in [name for name, _ in (*model.named_parameters(), *model.named_buffers())]:
        if (key := prefix + uncut_name(name)) in state:
            state[prefix + name] = state.pop(key)


def initialise(module: nn.Module) -> None:
    """Re-draw every parameter from the default RNG: Conv2d ~ N(0, sqrt(2 / (k k C_out))), the rest PyTorch's default.

    Source: the released CIFAR code of InfoPro and HPFF (He et al. 2015, fan-out form).
    """
    for child in module.modules():
        reset = getattr(child, "reset_parameters", None)
        if callable(reset):
            reset()
        if isinstance(child, nn.Conv2d) and not child.weight.is_meta:  # a planned one has no values to draw
            fan_out = child.kernel_size[0] * child.kernel_size[1] * child.out_channels
            nn.init.normal_(child.weight, 0.0, math.sqrt(2.0 / fan_out))
