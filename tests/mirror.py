"""The trivial user of weights upstream: a head that runs a moving average of the next module's first block."""

from __future__ import annotations

from tiny import CLASSES
from tiny import METHODS as TINY_METHODS
from torch import Tensor, nn

from pipeline import AuxiliaryHead, Given, Task, Term, Upstream, register_method
from pipeline.base.config import METHODS, MethodConfig
from pipeline.models.backbones import BasicBlock

KEEP = 0.5
"""Share of the old average."""


class MirrorHead(AuxiliaryHead):
    """The copy, average pooling and a linear layer, trained by cross-entropy; only the linear layer is trained."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.copy = BasicBlock(channels, 6, 2 if channels == 4 else 1).requires_grad_(False)
        self.linear = nn.Linear(6, CLASSES)
        self.steps: list[int] = []

    def loss(self, feature: Tensor, given: Given) -> Tensor:
        return nn.functional.cross_entropy(self.logits(feature), given.target)

    def logits(self, feature: Tensor) -> Tensor:
        return self.linear(self.copy(feature).mean(dim=(2, 3)))

    def receive_weights(self, weights: dict[str, Tensor], step: int) -> None:
        self.steps.append(step)
        for name, mine in self.copy.named_parameters():
            mine.lerp_(weights[name], 1.0 - KEEP)


def _terms(config: MethodConfig, task: Task, position: float) -> list[Term]:
    return [Term("task", 1.0, lambda shape: MirrorHead(shape[0]))]


def mirror(every: int, lag: int) -> str:
    """The name of the method that declares these weights upstream."""
    name = f"mirror-{every}-{lag}"
    if name not in METHODS:
        register_method(name, _terms, Upstream(every, lag))
        TINY_METHODS[name] = {"name": name}
    return name


def heads(level: nn.Module) -> list[MirrorHead]:
    """The heads of this kind in a level."""
    return [head for head in level.modules() if isinstance(head, MirrorHead)]
