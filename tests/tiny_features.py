"""A tiny transformer on features (B, T, D), and batches for it: what a method for transformers is tried on."""

from __future__ import annotations

import dataclasses
from collections import OrderedDict
from typing import Any

import torch
from tiny import CLASSES, ROWS, tiny_config
from torch import Tensor, nn

from pipeline.base.config import Config, MethodConfig

LENGTH, DEPTH, BATCHES = 6, 8, 3


class MeanOfTokens(nn.Module):
    """(B, T, D) -> class scores of the mean over T."""

    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(DEPTH, CLASSES)

    def forward(self, x: Tensor) -> Tensor:
        return self.linear(x.mean(dim=1))


def transformer() -> nn.Sequential:
    """Three encoder layers and a classifier."""
    torch.manual_seed(5)
    layers = [nn.TransformerEncoderLayer(DEPTH, 2, 16, dropout=0.0, batch_first=True) for _ in range(3)]
    named = [(f"layer{index}", layer) for index, layer in enumerate(layers)]
    return nn.Sequential(OrderedDict([*named, ("mean", MeanOfTokens())]))


def features(step: int, dtype: torch.dtype = torch.float32) -> tuple[Tensor, Tensor]:
    """A batch of features and labels."""
    generator = torch.Generator().manual_seed(step)
    x = torch.randn(ROWS, LENGTH, DEPTH, generator=generator, dtype=dtype)
    return x, torch.randint(CLASSES, (ROWS,), generator=generator)


def feature_batches() -> list[tuple[Tensor, Tensor]]:
    """A loader with a length."""
    return [features(step) for step in range(BATCHES)]


def configured(span: int, method: dict[str, Any], **sections: dict[str, Any]) -> Config:
    """Four modules trained by a method that not every test of methods is run on."""
    return dataclasses.replace(tiny_config("dgl", "plain", span, 4, **sections), method=MethodConfig(**method))
