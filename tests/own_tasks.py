"""Tasks of one's own beside classification, each with a small network, data, and what a user would write for it."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from pipeline import AuxiliaryHead, Metric, Task, TaskHead, TensorSpec

# --- a class for every pixel ------------------------------------------------------------------------------------------


def confusion(logits: Tensor, target: Tensor) -> Tensor:
    classes = logits.size(1)
    return torch.bincount((target * classes + logits.argmax(dim=1)).flatten(), minlength=classes**2)


def mean_iou(counts: Tensor, _rows: int) -> float:
    table = counts.view(math.isqrt(len(counts)), -1).double()
    both = table.diagonal()
    return float((both / (table.sum(0) + table.sum(1) - both).clamp(min=1)).mean())


class Segmentation(Task):
    """Images (C, H, W) -> logits (classes, H, W), a class for every pixel."""

    metrics = (Metric("mean_iou", "mean IoU", confusion, mean_iou, digits=3, better="higher"),)

    @property
    def target(self) -> TensorSpec:
        return TensorSpec(self.image_shape[1:], torch.int64)

    @property
    def output_shape(self) -> tuple[int, ...]:
        return (self.classes, *self.image_shape[1:])

    def loss(self, output: Tensor, target: Tensor) -> Tensor:
        return F.cross_entropy(output, target)

    def head(self, shape: tuple[int, ...], pooled: Callable[..., nn.Sequential] | None = None) -> AuxiliaryHead:
        return TaskHead(nn.Conv2d(shape[0], self.classes, 1), self.loss)


# --- the next token ---------------------------------------------------------------------------------------------------


def entropy(logits: Tensor, target: Tensor) -> Tensor:
    sums = F.cross_entropy(logits.flatten(0, 1).double(), target.flatten(), reduction="sum")
    return torch.stack([sums, sums.new_tensor(target.numel())])


class NextToken(Task):
    """Ids (T,) -> logits (T, classes) of the id that follows each."""

    metrics = (Metric("perplexity", "perplexity", entropy, lambda s, _rows: math.exp(float(s[0] / s[1]))),)

    @property
    def inputs(self) -> dict[str, TensorSpec]:
        return {"x": self.target}

    @property
    def target(self) -> TensorSpec:
        return TensorSpec(self.image_shape, torch.int64)

    @property
    def output_shape(self) -> tuple[int, ...]:
        return (*self.image_shape, self.classes)

    def loss(self, output: Tensor, target: Tensor) -> Tensor:
        return F.cross_entropy(output.flatten(0, 1), target.flatten())

    def head(self, shape: tuple[int, ...], pooled: Callable[..., nn.Sequential] | None = None) -> AuxiliaryHead:
        return TaskHead(nn.Sequential(nn.LayerNorm(shape[-1]), nn.Linear(shape[-1], self.classes)), self.loss)


# --- networks and data ------------------------------------------------------------------------------------------------

SEGMENTATION = Segmentation(3, (3, 8, 8))
NEXT_TOKEN = NextToken(11, (6,))


class Causal(nn.Module):
    """(B, T, D) -> (B, T, D): every position sees itself and the one before it."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.mix = nn.Linear(2 * width, width)

    def forward(self, x: Tensor) -> Tensor:
        before = F.pad(x, (0, 0, 1, 0))[:, :-1]
        return x + torch.tanh(self.mix(torch.cat([x, before], dim=-1)))


def network(task: Task) -> nn.Sequential:
    torch.manual_seed(3)
    if task is SEGMENTATION:
        blocks = [nn.Sequential(nn.Conv2d(i, 8, 3, padding=1), nn.ReLU()) for i in (3, 8, 8)]
        return nn.Sequential(*blocks, nn.Conv2d(8, task.classes, 1))
    return nn.Sequential(nn.Embedding(task.classes, 12), Causal(12), Causal(12), nn.Linear(12, task.classes))


class Batches:
    """Six batches: pixels to be told by their brightest channel, ids that count upwards by one or two."""

    batch_size = 8

    def __init__(self, task: Task) -> None:
        self._task = task

    def __len__(self) -> int:
        return 6

    def __iter__(self) -> Any:
        for step in range(len(self)):
            yield batch(self._task, step)


def batch(task: Task, step: int) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(step)
    if task is SEGMENTATION:
        image = torch.randn(8, 3, 8, 8, generator=generator)
        return image, image.argmax(dim=1)
    start, stride = torch.randint(11, (8, 1), generator=generator), torch.randint(1, 3, (8, 1), generator=generator)
    ids = (start + stride * torch.arange(7)) % 11
    return ids[:, :-1], ids[:, 1:]
