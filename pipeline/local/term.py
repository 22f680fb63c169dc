"""What a method's local loss is made of, for files that each hold one method (:mod:`pipeline.local.methods`)."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from pipeline.base.config import MethodConfig
from pipeline.base.errors import ConfigError
from pipeline.local.task import Task
from pipeline.models.heads import AuxiliaryHead, FeatureShape


@dataclass(frozen=True)
class Term:
    """One summand of a local loss: ``weight * head.loss``. ``make(shape)`` builds the head for a feature shape.

    Attributes:
        as_map: its head is made for maps (C, H, W), and gets the tokens (B, T, D) of an image as one
            (:mod:`pipeline.models.tokens`); otherwise as a sequence.
    """

    name: str
    weight: float
    make: Callable[[FeatureShape], AuxiliaryHead]
    as_map: bool = False


Terms = Callable[[MethodConfig, Task, float], list[Term]]
"""(settings, task, position of the module between the first and the last one with a head, in [0, 1]) -> terms."""


def refuse_head(config: MethodConfig) -> None:
    """Of a method whose head is fixed.

    Raises:
        ConfigError: one was asked for.
    """
    if config.head:
        raise ConfigError(
            f"method.head = '{config.head}': {config.name} has one fixed head; remove method.head"
        )
