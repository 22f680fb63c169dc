"""Auxiliary heads: small networks that turn the output of a local module into a local loss.

Every head answers three questions: its loss on a feature, its logits (if it classifies), and whether it needs the
image. :class:`PatchedHead` runs a head patch by patch (HPFF's patch feature fusion).
"""

from __future__ import annotations

import contextlib
import math
from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from pipeline.base.config import XCYF
from pipeline.base.errors import ConfigError
from pipeline.base.flow import Tensors
from pipeline.models import losses
from pipeline.models.layers import PairedConv2d, PointwiseConv2d, PoolTo2d, RowBatchNorm2d
from pipeline.models.upsampling import UpsampledConv2d

FeatureShape = tuple[int, ...]  # (C, H, W) of a feature map
Autocast = Callable[[], contextlib.AbstractContextManager[None]]


class AuxiliaryHead(nn.Module):
    """Base of all heads. ``feature`` is (B, C, H, W), ``labels`` int64 (B,), ``image`` uint8 (B, 3, S, S) or None."""

    needs_image = False

    def loss(self, feature: Tensor, labels: Tensor, image: Tensor | None) -> Tensor:
        """The scalar local loss, mean over the batch."""
        raise NotImplementedError

    def logits(self, feature: Tensor) -> Tensor | None:
        """Class scores (B, classes), or None where the head does not classify."""
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

    def loss_of_means(self, means: Tensor, labels: Tensor) -> Tensor:
        """The loss on a feature that is already averaged over its windows."""
        raise NotImplementedError


class ClassifierHead(AuxiliaryHead):
    """A network that ends in class scores, trained by cross-entropy."""

    def __init__(self, head: nn.Module) -> None:
        super().__init__()
        self.head = head

    def loss(self, feature: Tensor, labels: Tensor, image: Tensor | None) -> Tensor:
        return losses.cross_entropy(self.head(feature), labels)

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

    def loss_of_means(self, means: Tensor, labels: Tensor) -> Tensor:
        assert isinstance(self.head, nn.Sequential)
        _, *layers = self.head
        for layer in layers:
            means = layer(means)
        return losses.cross_entropy(means, labels)

    def logits(self, feature: Tensor) -> Tensor:
        logits: Tensor = self.head(feature)
        return logits


class ContrastHead(AuxiliaryHead):
    """A network that ends in an embedding, trained by supervised contrast (InfoPro `contrast`)."""

    def __init__(self, head: nn.Module, temperature: float) -> None:
        super().__init__()
        self.head = head
        self.temperature = temperature

    def loss(self, feature: Tensor, labels: Tensor, image: Tensor | None) -> Tensor:
        return losses.supervised_contrast(self.head(feature), labels, self.temperature)


class DecoderHead(AuxiliaryHead):
    """InfoPro's reconstruction: upsample to the image, conv-BN-ReLU-conv, binary cross-entropy against the image."""

    needs_image = True

    def __init__(self, channels: int, image_channels: int, widen: int) -> None:
        super().__init__()
        width = 12 * widen
        self.decoder = nn.Sequential(
            UpsampledConv2d(channels, width),
            RowBatchNorm2d(width),
            nn.ReLU(inplace=True),
            PairedConv2d(width, image_channels),
        )

    def loss(self, feature: Tensor, labels: Tensor, image: Tensor | None) -> Tensor:
        assert image is not None
        upsampled_convolution, *layers = self.decoder
        x = upsampled_convolution(feature, (image.size(2), image.size(3)))
        for layer in layers:
            x = layer(x)
        return losses.reconstruction(x, image)


class SimilarityHead(AuxiliaryHead):
    """PredSim's similarity matching behind its own 3x3 convolution."""

    def __init__(self, channels: int, classes: int) -> None:
        super().__init__()
        self.conv = nn.Conv2d(channels, channels, 3, padding=1, bias=False)
        self.classes = classes

    def loss(self, feature: Tensor, labels: Tensor, image: Tensor | None) -> Tensor:
        return losses.similarity_matching(self.conv(feature), labels, self.classes)


def xcyf(shape: FeatureShape, out: int, config: str, feature_dim: int, widen: int) -> nn.Sequential:
    """InfoPro's head "XcYf": X convolutions, global pool, Y linear layers (docs/methods.md, Heads and losses).

    The first convolution halves the map and doubles the width, except at 64 channels and more, which it keeps.

    Raises:
        ConfigError: ``config`` is not of the form XcYf with X in 0..2 and Y in 1..3, or is 0c3f.
    """
    match = XCYF.fullmatch(config)
    if match is None or config == "0c3f":
        raise ConfigError(f"method.head = '{config}' is no XcYf head; use 0c1f, 0c2f, 1c1f ... 2c3f")
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


def patch_slices(size: int, grid: int) -> list[slice]:
    """Cut ``size`` positions into ``grid`` consecutive ranges that differ by at most one."""
    edges = [index * size // grid for index in range(grid + 1)]
    return [slice(low, high) for low, high in zip(edges, edges[1:], strict=False)]


class PatchedHead(nn.Module):
    """Patch feature fusion: a head on each of ``grid`` x ``grid`` patches, one patch after another (HPFF, eq. 6-7).

    +----+----+   each patch: loss, backward, graph freed; so only one patch's graph is alive
    | 0  | 1  |   and BatchNorm inside the head sees one patch at a time.
    +----+----+
    | 2  | 3  |   shared: one head for all patches, average of losses  (paper)
    +----+----+   separate: a head per patch, sum of losses            (released code, decoder only)

    Args:
        make: builds one head for a patch.
        grid: patches along each side; 1 is the plain head.
        separate: one head per patch and the sum of losses instead of a shared head and their average.
    """

    def __init__(self, make: Callable[[], AuxiliaryHead], grid: int, separate: bool = False) -> None:
        super().__init__()
        self.grid = grid
        self.separate = separate
        self.heads = nn.ModuleList(make() for _ in range(grid * grid if separate else 1))

    @property
    def needs_image(self) -> bool:
        return self._head(0).needs_image

    def _head(self, patch: int) -> AuxiliaryHead:
        head = self.heads[patch if self.separate else 0]
        assert isinstance(head, AuxiliaryHead)
        return head

    def _patches(self, x: Tensor) -> list[tuple[slice, slice]]:
        if self.grid == 1 or x.dim() != 4:
            return [(slice(None), slice(None))]
        rows, columns = patch_slices(x.size(2), self.grid), patch_slices(x.size(3), self.grid)
        return [(row, column) for row in rows for column in columns]

    def backward(
        self,
        feature: Tensor,
        labels: Tensor,
        image: Tensor | None,
        weight: float,
        gradient: Tensor | None = None,
        autocast: Autocast = contextlib.nullcontext,
    ) -> tuple[Tensor, Tensor]:
        """Run the head and its backward pass on a feature (B, C, H, W) or (B, D) that does not require grad.

        ``autocast`` makes the context of the forward pass; a backward pass chooses its dtypes from the forward's and
        runs outside. The heads' own gradients are added to their ``.grad``.

        Returns:
            ``weight * d loss / d feature``, added to ``gradient`` in place where one is given, and the un-weighted
            loss (float64 scalar, detached).
        """
        window = self._window(feature)
        if window == (1, 1):
            return self._by_patches(feature, labels, image, weight, gradient, autocast, pooled=False)
        means = F.avg_pool2d(feature, window)
        means_gradient, total = self._by_patches(means, labels, None, weight, None, autocast, pooled=True)
        spread = _spread(means_gradient, window)
        if not feature.is_contiguous(memory_format=torch.channels_last):
            spread = spread.contiguous()
        return spread if gradient is None else gradient.add_(spread), total

    def _window(self, feature: Tensor) -> tuple[int, int]:
        """Windows by which the whole map may be pooled before it is cut; (1, 1) where patches do not allow it."""
        if feature.dim() != 4 or feature.size(2) % self.grid or feature.size(3) % self.grid:
            return 1, 1
        return self._head(0).window(feature.size(2) // self.grid, feature.size(3) // self.grid)

    def _by_patches(
        self,
        feature: Tensor,
        labels: Tensor,
        image: Tensor | None,
        weight: float,
        gradient: Tensor | None,
        autocast: Autocast,
        pooled: bool,
    ) -> tuple[Tensor, Tensor]:
        """The work of :meth:`backward`; ``pooled``: the feature holds the means of the head's windows."""
        patches = self._patches(feature)
        images = [image] * len(patches) if image is None else [
            image[:, :, rows, columns] for rows, columns in self._patches(image)
        ]
        share = 1.0 if self.separate else 1.0 / len(patches)
        total = feature.new_zeros((), dtype=torch.float64)
        whole = len(patches) == 1
        result = gradient if gradient is not None or whole else torch.empty_like(feature)
        for index, ((rows, columns), patch_image) in enumerate(zip(patches, images, strict=True)):
            leaf = feature.detach() if whole else _dense(feature[:, :, rows, columns])
            leaf.requires_grad_()
            head = self._head(index)
            with torch.enable_grad(), autocast():
                loss = head.loss_of_means(leaf, labels) if pooled else head.loss(leaf, labels, patch_image)
            (loss * (weight * share)).backward()
            total += loss.detach() * share
            assert leaf.grad is not None
            if result is None:
                result = leaf.grad
            elif gradient is not None:
                (result if whole else result[:, :, rows, columns]).add_(leaf.grad)
            else:  # the patches cover the map once, so nothing needs to be zeroed first
                result[:, :, rows, columns].copy_(leaf.grad)
        assert result is not None
        return result, total

    def logits(self, feature: Tensor) -> Tensor | None:
        """Mean over patches of the head's class scores, or None where it does not classify."""
        scores = []
        for index, (rows, columns) in enumerate(self._patches(feature)):
            patch = feature[:, :, rows, columns] if feature.dim() == 4 else feature
            score = self._head(index).logits(patch)
            if score is None:
                return None
            scores.append(score)
        return torch.stack(scores).mean(dim=0)


def _dense(patch: Tensor) -> Tensor:
    """A copy of a slice (B, C, h, w) of a map without gaps, in the map's layout."""
    nhwc = patch.stride(1) == 1
    return patch.clone(memory_format=torch.channels_last if nhwc else torch.contiguous_format)


def _spread(means_gradient: Tensor, window: tuple[int, int]) -> Tensor:
    """The gradient of a map (B, C, H, W), channels last, from that of its means over windows (B, C, h, w)."""
    batch, channels, h, w = means_gradient.shape
    share = (means_gradient / (window[0] * window[1])).permute(0, 2, 3, 1)
    lines = share[:, :, :, None].expand(-1, -1, -1, window[1], -1).reshape(batch, h, 1, -1)
    full = lines.expand(-1, -1, window[0], -1).reshape(batch, h * window[0], w * window[1], channels)
    return full.permute(0, 3, 1, 2)


class VectorInput(nn.Module):
    """Views a vector feature (B, D) as a map (B, D, 1, 1), so that heads for maps serve flat modules too."""

    def forward(self, x: Tensor) -> Tensor:
        return x[:, :, None, None] if x.dim() == 2 else x

