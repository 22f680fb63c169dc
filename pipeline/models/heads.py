"""Auxiliary heads: small networks that turn the output of a local module into a local loss.

Every head answers three questions: its loss on a feature, its logits (if it does what the network is to do), and what
it asks for besides. :mod:`pipeline.models.patches` runs a head patch by patch (HPFF's patch feature fusion).
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from pipeline.base.config import XCYF
from pipeline.base.errors import ConfigError
from pipeline.base.flow import Tensors
from pipeline.models import grouped, losses
from pipeline.models.layers import PairedConv2d, PointwiseConv2d, PoolTo2d, RowBatchNorm2d
from pipeline.models.upsampling import FactorisedConv2d

FeatureShape = tuple[int, ...]
"""Without the batch: (C, H, W) of a map, (T, D) of a sequence, (D,) of a vector."""
Loss = Callable[[Tensor, Tensor], Tensor]
"""Of an output (B, ...) and its target (B, ...): a scalar, the mean over the batch."""
IMAGE, INPUTS = "image", "inputs"
EMBEDDING = "embedding"
"""Among the inputs that a head sees: of the first local module, where its first block makes features of another shape
than it is given (of ids, of an image), these."""


@dataclass(frozen=True)
class Given:
    """What a head may see besides the feature that it stands on.

    Attributes:
        target: (B, ...), of the task; int64 (B,) for classes.
        image: (B, ...), the raw input of the network, uint8 (B, C, H, W) for images; only for heads that ask for it.
        inputs: of the local module, detached, (B, ...) each, "x" among them, and EMBEDDING where there is one; only for
            heads that ask for it.
        step: of the batch, from 0 on.
    """

    target: Tensor
    image: Tensor | None = None
    inputs: Tensors | None = None
    step: int = 0


@dataclass(frozen=True)
class Patches:
    """Patches of a feature, all of one shape, that a head gets at once, as groups of channels side by side.

    Attributes:
        feature: (B, G C, h, w) of G patches of a map, (B, t, G D) of a sequence.
        groups: G.
        targets: of every patch.
        image: (B, G C, h, w), where the head asks for it and the feature is a map.
        pooled: the feature holds the means of the head's windows (:meth:`AuxiliaryHead.window`).
    """

    feature: Tensor
    groups: int
    targets: Sequence[Tensor]
    image: Tensor | None = None
    pooled: bool = False


class AuxiliaryHead(nn.Module):
    """Base of all heads. ``feature`` is a map (B, C, H, W), a sequence (B, T, D) or a vector (B, D).

    Attributes:
        asks: fields of :class:`Given` that it needs, of "image" and "inputs"; others may be None.
    """

    asks: frozenset[str] = frozenset()

    def loss(self, feature: Tensor, given: Given) -> Tensor:
        """The scalar local loss, mean over the batch."""
        raise NotImplementedError

    def logits(self, feature: Tensor) -> Tensor | None:
        """An output (B, ...) of the form that the network itself ends in, for the task's metrics; None where the head
        has none."""
        return None

    def receive_weights(self, weights: Tensors, step: int) -> None:
        """Take the parameters of the next module's first block, by their names in it, as they were after its update of
        batch ``step``. Copy what is to be kept: their memory is used again. Called before the heads of a step, under
        no_grad, where the method declares weights upstream (:class:`pipeline.Upstream`); most heads have no use for
        them."""

    def window(self, height: int, width: int) -> tuple[int, int]:
        """Sides of the windows that the head averages, before anything else, on a feature of this size; (1, 1): none.

        The caller may then pool a whole map at once and pass the means of each patch to :meth:`loss_of_means`.
        """
        return 1, 1

    def loss_of_means(self, means: Tensor, given: Given) -> Tensor:
        """The loss on a feature that is already averaged over its windows."""
        raise NotImplementedError

    def takes_patches(self, dims: int) -> bool:
        """Whether :meth:`losses_of_patches` gives what :meth:`loss` or :meth:`loss_of_means` give one patch after
        another, on features of ``dims`` dimensions with the batch; also the same running statistics. False where
        random numbers are drawn."""
        return False

    def losses_of_patches(self, patches: Patches, heads: Sequence[AuxiliaryHead]) -> Tensor:
        """The losses of all patches at once, (G,). ``heads`` are W heads of one structure, this one first: patch g goes
        through head g mod W."""
        raise NotImplementedError


class TaskHead(AuxiliaryHead):
    """A network that does what the whole network is to do, trained by the same loss: class scores by cross-entropy,
    say."""

    def __init__(self, head: nn.Module, loss: Loss = losses.cross_entropy) -> None:
        super().__init__()
        self.head = head
        self._loss = loss

    def loss(self, feature: Tensor, given: Given) -> Tensor:
        return self._loss(self.head(feature), given.target)

    def window(self, height: int, width: int) -> tuple[int, int]:
        first = self.head[0] if isinstance(self.head, nn.Sequential) else None
        if isinstance(first, PoolTo2d):
            sides = height // first.sides[0], width // first.sides[1]
            even = (height, width) == (sides[0] * first.sides[0], sides[1] * first.sides[1])
        elif isinstance(first, nn.AvgPool2d):
            assert isinstance(first.kernel_size, tuple)
            sides = first.kernel_size
            even = height % sides[0] == 0 and width % sides[1] == 0
        else:
            return 1, 1
        return sides if even and min(sides) > 0 else (1, 1)

    def loss_of_means(self, means: Tensor, given: Given) -> Tensor:
        assert isinstance(self.head, nn.Sequential)
        _, *layers = self.head
        for layer in layers:
            means = layer(means)
        return self._loss(means, given.target)

    def takes_patches(self, dims: int) -> bool:
        return type(self) is TaskHead and grouped.can_group(self.head, dims)

    def losses_of_patches(self, patches: Patches, heads: Sequence[AuxiliaryHead]) -> Tensor:
        outputs = grouped.run(_networks(heads, skip=int(patches.pooled)), patches.feature, patches.groups)
        target = patches.targets[0]
        if self._loss is losses.cross_entropy and outputs.dim() == 2 and target.dim() == 1:
            return losses.grouped_cross_entropy(outputs, target, patches.groups)
        each = outputs.chunk(patches.groups, dim=2 if outputs.dim() == 3 else 1)
        return torch.stack([self._loss(output, target) for output, target in zip(each, patches.targets, strict=True)])

    def logits(self, feature: Tensor) -> Tensor:
        logits: Tensor = self.head(feature)
        return logits


class ContrastHead(AuxiliaryHead):
    """A network that ends in an embedding, trained by supervised contrast (InfoPro `contrast`)."""

    def __init__(self, head: nn.Module, temperature: float) -> None:
        super().__init__()
        self.head = head
        self.temperature = temperature

    def loss(self, feature: Tensor, given: Given) -> Tensor:
        return losses.supervised_contrast(self.head(feature), given.target, self.temperature)

    def takes_patches(self, dims: int) -> bool:
        return type(self) is ContrastHead and grouped.can_group(self.head, dims)

    def losses_of_patches(self, patches: Patches, heads: Sequence[AuxiliaryHead]) -> Tensor:
        embedding = grouped.run(_networks(heads), patches.feature, patches.groups)
        each = embedding.view(len(embedding), patches.groups, -1).transpose(0, 1)
        return losses.supervised_contrast(each, patches.targets[0], self.temperature)


class DecoderHead(AuxiliaryHead):
    """InfoPro's reconstruction: upsample to the image, conv-BN-ReLU-conv, binary cross-entropy against the image."""

    asks = frozenset({IMAGE})

    def __init__(self, channels: int, image_channels: int, widen: int) -> None:
        super().__init__()
        width = 12 * widen
        self.decoder = nn.Sequential(
            FactorisedConv2d(channels, width),
            RowBatchNorm2d(width),
            nn.ReLU(inplace=True),
            PairedConv2d(width, image_channels),
        )

    def loss(self, feature: Tensor, given: Given) -> Tensor:
        image = given.image
        assert image is not None
        upsampled_convolution, *layers = self.decoder
        x = upsampled_convolution(feature, (image.size(2), image.size(3)))
        for layer in layers:
            x = layer(x)
        return losses.reconstruction(x, image)

    def takes_patches(self, dims: int) -> bool:
        return type(self) is DecoderHead and dims == 4

    def losses_of_patches(self, patches: Patches, heads: Sequence[AuxiliaryHead]) -> Tensor:
        image, groups = patches.image, patches.groups
        assert image is not None
        networks = [list(head.decoder) for head in heads if isinstance(head, DecoderHead)]
        x = grouped.run(networks, patches.feature, groups, size=(image.size(2), image.size(3)))
        return losses.reconstruction(x, image, groups)


class SimilarityHead(AuxiliaryHead):
    """PredSim's similarity matching behind its own 3x3 convolution."""

    def __init__(self, channels: int, classes: int) -> None:
        super().__init__()
        self.conv = nn.Conv2d(channels, channels, 3, padding=1, bias=False)
        self.classes = classes

    def loss(self, feature: Tensor, given: Given) -> Tensor:
        return losses.similarity_matching(self.conv(feature), given.target, self.classes)

    def takes_patches(self, dims: int) -> bool:
        return type(self) is SimilarityHead and dims == 4

    def losses_of_patches(self, patches: Patches, heads: Sequence[AuxiliaryHead]) -> Tensor:
        networks = [[head.conv] for head in heads if isinstance(head, SimilarityHead)]
        x = grouped.run(networks, patches.feature, patches.groups)
        return losses.similarity_matching(x, patches.targets[0], self.classes, patches.groups)


def _networks(heads: Sequence[AuxiliaryHead], skip: int = 0) -> list[list[nn.Module]]:
    """The layers of every head's network, without the first ``skip``."""
    networks = [head.head for head in heads if isinstance(head, TaskHead | ContrastHead)]
    return [list(grouped.flat(network))[skip:] for network in networks]


def xcyf(shape: FeatureShape, out: int, config: str, feature_dim: int, widen: int) -> nn.Sequential:
    """InfoPro's head "XcYf": X convolutions, global pool, Y linear layers (docs/methods.md, Heads and losses).

    The first convolution halves the map and doubles the width, except at 64 channels and more, which it keeps.

    Raises:
        ConfigError: ``config`` is not of the form XcYf with X in 0..2 and Y in 1..3, or is 0c3f.
    """
    match = XCYF.fullmatch(config)
    if match is None or config == "0c3f":
        raise ConfigError(f"method.head = '{config}' is no XcYf head; use 0c1f, 0c2f, 1c1f ... 2c3f, or imagenet")
    convolutions, linears = int(match[1]), int(match[2])
    channels = shape[0]
    layers: list[nn.Module] = []
    for index in range(convolutions):
        if index == 0:
            width, stride = (2 * channels * widen, 2) if channels < 64 else (channels * widen, 1)
        else:
            width, stride = channels, 1
        layers += [
            nn.Conv2d(channels, width, 3, stride, 1, bias=False),
            nn.BatchNorm2d(width),
            nn.ReLU(inplace=True),
        ]
        channels = width
    layers += [PoolTo2d(1), nn.Flatten()]
    for _ in range(linears - 1):
        layers += [nn.Linear(channels, feature_dim * widen), nn.ReLU(inplace=True)]
        channels = feature_dim * widen
    layers.append(nn.Linear(channels, out))
    return nn.Sequential(*layers)


def dgl_head(shape: FeatureShape, classes: int, kind: str) -> nn.Sequential:
    """DGL's auxiliary networks `mlp-sr`, `mlp`, `cnn` and AugLocal's ResNet setting `auglocal`.

    `auglocal` is mlp-sr with two hidden linear layers without bias. All are listed in docs/methods.md.
    """
    channels, height, width = shape
    layers: list[nn.Module] = []
    if kind == "cnn":
        for _ in range(2):
            layers += [
                nn.Conv2d(channels, channels, 3, padding=1, bias=False),
                nn.BatchNorm2d(channels),
                nn.ReLU(inplace=True),
            ]
        layers += [PoolTo2d(2), nn.BatchNorm2d(channels), nn.Flatten(), nn.Linear(4 * channels, classes)]
        return nn.Sequential(*layers)
    layers.append(PoolTo2d((math.ceil(height / 4), math.ceil(width / 4))))
    if kind != "mlp":
        for _ in range(3):
            layers += [
                PointwiseConv2d(channels, channels),
                nn.BatchNorm2d(channels),
                nn.ReLU(inplace=True),
            ]
    layers += [PoolTo2d(2), nn.Flatten()]
    hidden, bias = (2, False) if kind == "auglocal" else (3, True)
    for _ in range(hidden):
        layers += [
            nn.Linear(4 * channels, 4 * channels, bias=bias),
            nn.BatchNorm1d(4 * channels),
            nn.ReLU(inplace=True),
        ]
    layers.append(nn.Linear(4 * channels, classes))
    return nn.Sequential(*layers)


def pooled_linear(shape: FeatureShape, classes: int, max_features: int) -> nn.Sequential:
    """PredSim's prediction: average pooling until at most ``max_features`` inputs are left, then one linear layer.

    The pooling kernel doubles its height, then its width, in turn (PredSim's released code; docs/methods.md).
    """
    channels, height, width = shape
    kernel = [1, 1]
    axis = 0
    while channels * (height // kernel[0]) * (width // kernel[1]) > max_features and kernel < [height, width]:
        kernel[axis] *= 2
        axis = 1 - axis
    features = channels * (height // kernel[0]) * (width // kernel[1])
    return nn.Sequential(
        nn.AvgPool2d((kernel[0], kernel[1])), nn.Flatten(), nn.Linear(features, classes)
    )
