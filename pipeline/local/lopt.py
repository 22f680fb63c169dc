"""LoPT: a local module of a transformer learns to keep what it was given (Shi et al. 2026, arXiv 2605.04913).

    x (B, T, d) --> module --> h (B, T, d) --> LayerNorm --> Linear d/4 --> GELU --> Linear d --> mean square of (. - x)
         |                                                                                                         ^
         +------ as it came in, detached --------------------------------------------------------------------------+

The first module of a network that is given ids or images has no such x: it holds the embedding, its first block, and
learns to keep what comes out of that.

The loss is that of the paper's released code. Its scripts weigh the mean over the modules with a head by 10; here the
weight is that of the level, ``hierarchy.independent_weight``.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from pipeline.base.config import MethodConfig
from pipeline.base.errors import ConfigError
from pipeline.base.flow import MAIN
from pipeline.local.task import Task
from pipeline.local.term import Term, refuse_head
from pipeline.models.heads import EMBEDDING, INPUTS, AuxiliaryHead, FeatureShape, Given
from pipeline.models.losses import full

GAIN = 0.1
"""Of the Xavier initialisation: the first reconstructions are small, so that a pretrained module is not torn away."""


class _SmallLinear(nn.Linear):
    """A linear layer drawn from Xavier's uniform distribution times GAIN, its bias 0."""

    def reset_parameters(self) -> None:
        nn.init.xavier_uniform_(self.weight, gain=GAIN)
        nn.init.zeros_(self.bias)


class InputReconstructionHead(AuxiliaryHead):
    """Features (B, T, d) -> the "x" that the local module took, or its embedding, (B, T, d), by mean squared error over
    all entries."""

    asks = frozenset({INPUTS})

    def __init__(self, width: int) -> None:
        super().__init__()
        narrow = max(width // 4, 1)
        self.decoder = nn.Sequential(
            nn.LayerNorm(width), _SmallLinear(width, narrow), nn.GELU(), _SmallLinear(narrow, width)
        )

    def loss(self, feature: Tensor, given: Given) -> Tensor:
        assert given.inputs is not None
        x = given.inputs.get(EMBEDDING, given.inputs[MAIN])
        if x.shape != feature.shape:
            raise ConfigError(
                "method.name = 'lopt' reconstructs what a local module takes from what it gives, but one takes rows of "
                f"{tuple(x.shape[1:])} and gives {tuple(feature.shape[1:])}; give the network features (T, D) of the "
                "width of its blocks or begin it with a block that makes them, or use dgl or greedy"
            )
        found = self.decoder(feature)
        with torch.autocast(feature.device.type, enabled=False):
            return F.mse_loss(full(found), full(x))


def terms(config: MethodConfig, task: Task, position: float) -> list[Term]:
    """The one term of the local loss.

    Raises:
        ConfigError: another head is asked for, or a module ends in something else than features (T, d).
    """
    refuse_head(config)
    return [Term("reconstruction", 1.0, _head)]


def _head(shape: FeatureShape) -> AuxiliaryHead:
    if len(shape) != 2:
        raise ConfigError(
            f"method.name = 'lopt' is for transformers, but a local module ends in {shape}, not in features (T, d); "
            "use infopro, dgl or greedy there"
        )
    return InputReconstructionHead(shape[-1])
