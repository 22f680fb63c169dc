"""A tiny transformer on features (B, T, D), a tiny vision transformer, and batches for them: what methods are tried on
that stand on tokens."""

from __future__ import annotations

import dataclasses
from collections import OrderedDict
from typing import Any

import torch
from tiny import CLASSES, ROWS, tiny_config
from torch import Tensor, nn
from torchvision.models import VisionTransformer

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


def vision_transformer() -> nn.Module:
    """Four encoder layers on a class token and 4 x 4 patches of an image."""
    torch.manual_seed(6)
    sizes = {"num_layers": 4, "num_heads": 2, "hidden_dim": DEPTH, "mlp_dim": 16}
    network = VisionTransformer(image_size=16, patch_size=4, num_classes=CLASSES, **sizes)
    nn.init.normal_(network.heads.head.weight)  # torchvision begins with zeros
    return network


def image_batches() -> list[tuple[Tensor, Tensor]]:
    """A loader with a length, of images (3, 16, 16)."""
    generator = torch.Generator().manual_seed(7)
    return [
        (
            torch.randint(0, 256, (ROWS, 3, 16, 16), generator=generator, dtype=torch.uint8),
            torch.randint(CLASSES, (ROWS,), generator=generator),
        )
        for _ in range(BATCHES)
    ]


def configured(span: int, method: dict[str, Any], **sections: dict[str, Any]) -> Config:
    """Four modules trained by a method that not every test of methods is run on."""
    return dataclasses.replace(tiny_config("dgl", "plain", span, 4, **sections), method=MethodConfig(**method))
