"""The next token: what a decoder is trained for, and what its local modules are, each by a head of its own.

    ids       t0  t1  t2  t3             logits (T, vocabulary) at every place, of the id behind it
    target    t1  t2  t3  t4
"""

from __future__ import annotations

import math
from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from pipeline.base.errors import ConfigError
from pipeline.base.flow import MAIN, Specs, TensorSpec
from pipeline.local.task import Metric, Task
from pipeline.models import losses
from pipeline.models.heads import AuxiliaryHead, FeatureShape, TaskHead


def _entropy(logits: Tensor, target: Tensor) -> Tensor:
    """(2,): the cross-entropy summed over all places, and their number."""
    each = F.cross_entropy(logits.flatten(0, 1).float(), target.flatten(), reduction="none")
    return torch.stack([each.sum(dtype=torch.float64), each.new_tensor(len(each), dtype=torch.float64)])


PERPLEXITY = Metric(
    "perplexity", "perplexity", _entropy, lambda sums, _rows: math.exp(float(sums[0]) / float(sums[1]))
)
"""exp of the mean cross-entropy of a token: so many equally likely ones would be as hard to tell."""


class NextToken(Task):
    """Ids int64 (B, T) -> logits (B, T, classes) against the ids int64 (B, T) that follow, by cross-entropy, mean over
    all places. ``classes`` is the vocabulary, ``image_shape`` is (T,).

    Local modules that end in features (T, D) get LayerNorm and a linear layer as their head.
    """

    @property
    def vocabulary(self) -> int:
        return self.classes

    @property
    def inputs(self) -> Specs:
        return {MAIN: self.target}

    @property
    def target(self) -> TensorSpec:
        return TensorSpec(self.image_shape, torch.int64)

    @property
    def output_shape(self) -> tuple[int, ...]:
        return (*self.image_shape, self.classes)

    @property
    def metrics(self) -> tuple[Metric, ...]:
        return (PERPLEXITY,)

    def loss(self, output: Tensor, target: Tensor) -> Tensor:
        return losses.cross_entropy(output.flatten(0, 1), target.flatten())

    def head(self, shape: FeatureShape, pooled: Callable[[FeatureShape], nn.Sequential] | None = None) -> AuxiliaryHead:
        if len(shape) != 2:
            raise ConfigError(
                f"the next token is told at every place of a sequence, but a local module ends in {shape}, not in "
                "features (T, D); cut elsewhere"
            )
        return TaskHead(nn.Sequential(nn.LayerNorm(shape[-1]), nn.Linear(shape[-1], self.classes)), self.loss)
