"""DeInfoReg: variance, covariance and label-invariance of a projection of a local module's output (Huang et al. 2025,
arXiv 2506.18193).

    h --> flatten --> projector --> z (B, D) --> unit length --> V / B + C + S
                                    |
                                    +--> BatchNorm, ReLU, Linear --> 0.001 x cross-entropy

    V   mean over the D values of max(0, 1 - their standard deviation over the batch)
    C   sum of the squared covariances of two different values, / D
    S   mean square of the difference between the similarities of rows and those of their labels (PredSim's matrices)

Signs, divisors and constants are those of the released code.
"""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from pipeline.base.config import MethodConfig
from pipeline.base.errors import ConfigError
from pipeline.base.flow import LABEL
from pipeline.local.task import Task
from pipeline.local.term import Term, refuse_head
from pipeline.models import losses
from pipeline.models.heads import AuxiliaryHead, FeatureShape, Given, Loss
from pipeline.models.layers import VectorInput

CLASSIFIER_WEIGHT = 0.001
SPREAD = 1.0  # the standard deviation below which V counts
FLOOR = 1e-7  # added to a variance, whose root has no slope at 0


class InformationHead(AuxiliaryHead):
    """A projection of a map (B, C, H, W), of the mean over the tokens of (B, T, D), or of a vector (B, D).

    Args:
        shape: of the feature.
        width: D, of all layers of the projector.
        classes: of the classifier on it.
        loss: of the classifier's scores (B, classes) and the classes (B,); the task's, which may smooth them.
    """

    def __init__(self, shape: FeatureShape, width: int, classes: int, loss: Loss) -> None:
        super().__init__()
        self._loss = loss
        values = math.prod(shape) if len(shape) == 3 else shape[-1]
        self.classes = classes
        self.projector = nn.Sequential(
            VectorInput(),
            nn.Flatten(),
            *(nn.Linear(values, width), nn.BatchNorm1d(width), nn.ReLU()),
            *(nn.Linear(width, width), nn.BatchNorm1d(width), nn.ReLU()),
            nn.Linear(width, width),
        )
        self.classifier = nn.Sequential(nn.BatchNorm1d(width), nn.ReLU(), nn.Linear(width, classes))

    def loss(self, feature: Tensor, given: Given) -> Tensor:
        z = self.projector(feature)
        entropy = self._loss(self.classifier(z), given.target)
        with torch.autocast(feature.device.type, enabled=False):
            unit = F.normalize(losses.full(z))
            similarity = losses.similarity_matching(unit, given.target, self.classes)
            return variance(unit) / len(unit) + covariance(unit) + similarity + CLASSIFIER_WEIGHT * entropy

    def logits(self, feature: Tensor) -> Tensor:
        scores: Tensor = self.classifier(self.projector(feature))
        return scores


def variance(z: Tensor) -> Tensor:
    """(B, D) -> the mean over D of what its standard deviation over the batch (unbiased) lacks to SPREAD."""
    return F.relu(SPREAD - torch.sqrt(z.var(dim=0) + FLOOR)).mean()


def covariance(z: Tensor) -> Tensor:
    """(B, D) -> the squared covariances (biased) of two different values, summed, / D."""
    centred = z - z.mean(dim=0)
    matrix = centred.T @ centred / len(z)
    return (matrix.square().sum() - matrix.diagonal().square().sum()) / z.size(1)


def terms(config: MethodConfig, task: Task, position: float) -> list[Term]:
    """The one term of the local loss: its parts share a projector.

    Raises:
        ConfigError: another head is asked for, or the task has no class for every row.
    """
    refuse_head(config)
    if task.target != LABEL:
        raise ConfigError(
            f"method.name = 'deinforeg' compares the classes of whole rows, but the target of {type(task).__name__} is "
            f"{task.target.shape} per row; use dgl or greedy, register a method, or remove data.mixup and data.cutmix"
        )
    return [Term("information", 1.0, lambda shape: InformationHead(shape, config.feature_dim, task.classes, task.loss))]
