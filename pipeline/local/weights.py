"""The trained weights: their digest, and one state dict for the un-cut network."""

from __future__ import annotations

import hashlib

import torch
from torch import Tensor, nn

from pipeline.base.config import Config
from pipeline.models.backbones import UncutModel, build_blocks


def weights_sha256(states: list[dict[str, dict[str, Tensor]]]) -> str:
    """SHA-256 over names, dtypes, shapes and bytes of all parameters and buffers, in module order."""
    digest = hashlib.sha256()
    for state in states:
        for part in ("blocks", "heads"):
            for name, value in state[part].items():
                digest.update(f"{name} {value.dtype} {tuple(value.shape)};".encode())
                digest.update(value.contiguous().reshape(-1).view(torch.uint8).numpy().tobytes())
    return digest.hexdigest()


def merged_state(states: list[dict[str, dict[str, Tensor]]], part: str) -> dict[str, Tensor]:
    """One state dict of all modules' ``part`` ("blocks" or "heads"), in module order."""
    return {name: value.contiguous() for state in states for name, value in state[part].items()}


def load_model(config: Config, classes: int, in_channels: int = 3) -> nn.Module:
    """The un-cut network of ``config.model.name``, into which a run's ``model.pt`` loads."""
    return UncutModel(build_blocks(config.model.name, in_channels, classes))
