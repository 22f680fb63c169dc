"""One optimiser per local module, and the learning rate of an epoch."""

from __future__ import annotations

import math

import torch
from torch import nn

from pipeline.base.config import OptimConfig


def build_optimiser(parameters: list[nn.Parameter], config: OptimConfig) -> torch.optim.Optimizer:
    """SGD with (Nesterov) momentum, or AdamW. A module without parameters gets an optimiser that does nothing."""
    trained = [p for p in parameters if p.requires_grad] or [nn.Parameter(torch.zeros(0))]
    if config.name == "adamw":
        return torch.optim.AdamW(trained, lr=config.lr, weight_decay=config.weight_decay)
    return torch.optim.SGD(
        trained,
        lr=config.lr,
        momentum=config.momentum,
        nesterov=config.nesterov,
        weight_decay=config.weight_decay,
    )


def set_learning_rate(optimiser: torch.optim.Optimizer, lr: float) -> None:
    """Use ``lr`` in every parameter group."""
    for group in optimiser.param_groups:
        group["lr"] = lr


def learning_rate(config: OptimConfig, epoch: int, epochs: int) -> float:
    """The learning rate of ``epoch`` (1-based) of ``epochs`` (released code of InfoPro, HPFF, AugLocal).

    c(e) = lr/2 (1 + cos(pi e / E)); for e <= w: c(e) (e-1)/w + warmup_lr (w+1-e)/w; so lr(1) = warmup_lr, lr(E) = 0.
    """
    if config.schedule == "cosine":
        base = 0.5 * config.lr * (1.0 + math.cos(math.pi * epoch / epochs))
    elif config.schedule == "step":
        base = config.lr * 0.1 ** sum(epoch > epochs * mark for mark in (0.5, 0.75))
    else:
        base = config.lr
    warmup = config.warmup_epochs
    if epoch > warmup:
        return base
    return base * (epoch - 1) / warmup + config.warmup_lr * (warmup + 1 - epoch) / warmup
