"""How well a linear classifier reads the classes off features: a logistic regression, solved to the end."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional

DECAY = 1e-4


def pooled(features: Tensor, side: int) -> Tensor:
    """(n, d) from maps (n, C, H, W), averaged to at most ``side`` x ``side`` positions, or from other features."""
    if features.ndim == 4:
        height, width = features.shape[2:]
        features = functional.adaptive_avg_pool2d(features, (min(side, height), min(side, width)))
    return features.flatten(1)


def probe_error(train: tuple[Tensor, Tensor], test: tuple[Tensor, Tensor], decay: float = DECAY) -> float:
    """Error in % on ``test`` of the linear classifier that fits ``train`` best, both features (n, d) and classes (n,).

    Features are standardised by those of ``train``; the loss is cross-entropy, plus ``decay`` / 2 times the squared
    weights; L-BFGS goes on until it gains nothing. It is convex: no seed, no learning rate to choose.
    """
    (x, y), (x_test, y_test) = train, test
    mean, std = x.double().mean(0), x.double().std(0).clamp(min=1e-6)
    x, x_test = (x.double() - mean) / std, (x_test.double() - mean) / std
    classes = int(y.max()) + 1
    weight = torch.zeros(x.shape[1], classes, dtype=torch.float64, requires_grad=True)
    bias = torch.zeros(classes, dtype=torch.float64, requires_grad=True)
    optimiser = torch.optim.LBFGS([weight, bias], max_iter=200, line_search_fn="strong_wolfe")

    def loss() -> Tensor:
        optimiser.zero_grad()
        value = functional.cross_entropy(x @ weight + bias, y) + decay / 2 * weight.square().sum()
        value.backward()
        return value

    optimiser.step(loss)
    with torch.no_grad():
        wrong = (x_test @ weight + bias).argmax(1) != y_test
    return 100 * wrong.double().mean().item()
