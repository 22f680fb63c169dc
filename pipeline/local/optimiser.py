"""SGD and AdamW of local modules, one call for all that are updated together, and the learning rate of an epoch.

    module 0   weights, state --+
    module 1   weights, state --+--> step_together: as many operations as for one weight
    module 2   weights, state --+    (torch._foreach_*: the operations of torch.optim's own loop, over lists)

Each module keeps the state of its own weights, as its checkpoint needs it; the arithmetic is that of
:class:`torch.optim.SGD` and :class:`torch.optim.AdamW`, on a CPU to the bit.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor, nn

from pipeline.base.config import OptimConfig

MOMENTUM, MEAN, SQUARE, STEP = "momentum_buffer", "exp_avg", "exp_avg_sq", "step"
"""Names of states, those of torch.optim."""
BETAS, EPS = (0.9, 0.999), 1e-8
"""Of AdamW (Loshchilov and Hutter 2019, algorithm 2)."""
POLY_POWER = 0.9


@dataclass(eq=False, slots=True)
class Weight:
    """A parameter and what its optimiser keeps: tensors like it, by name, and the number of its updates (AdamW)."""

    parameter: nn.Parameter
    state: dict[str, Tensor] = field(default_factory=dict)
    steps: int = 0


class Optimiser:
    """What updates of one local module need besides gradients.

    Args:
        parameters: of the module and its heads; those that require no gradient are left out.
        config: which optimiser.

    Attributes:
        weights: in the order of ``parameters``.
        lr: the learning rate of the next update.
    """

    def __init__(self, parameters: Iterable[nn.Parameter], config: OptimConfig) -> None:
        self.config = config
        self.weights = [Weight(parameter) for parameter in parameters if parameter.requires_grad]
        self.lr = config.lr

    def gradients(self) -> list[Tensor]:
        """Of the weights that have one, in their order."""
        return [gradient for weight in self.weights if (gradient := weight.parameter.grad) is not None]

    def clear(self) -> None:
        """Drop all gradients."""
        for weight in self.weights:
            weight.parameter.grad = None

    def state(self) -> Iterator[tuple[str, Tensor]]:
        """``<index of the weight>.<name>`` and value, not copied: shaped like the weight, but for "step", ()."""
        for index, weight in enumerate(self.weights):
            for name, value in weight.state.items():
                yield f"{index}.{name}", value
            if weight.steps:
                yield f"{index}.{STEP}", torch.tensor(float(weight.steps))

    def restore(self, state: dict[str, Tensor]) -> None:
        """Take the values of :meth:`state` over, in the layout of the weights, so that the same kernels update them."""
        for weight in self.weights:
            weight.state, weight.steps = {}, 0
        for key, value in state.items():
            index, name = key.split(".", 1)
            weight = self.weights[int(index)]
            if name == STEP:
                weight.steps = int(value)
            else:
                weight.state[name] = torch.empty_like(weight.parameter, requires_grad=False).copy_(value)


@torch.no_grad()
def step_together(optimisers: Sequence[Optimiser]) -> None:
    """Update all weights that have a gradient; the others keep their state too. The gradients are used up: they hold
    something else afterwards. All ``optimisers`` have the same configuration and learning rate."""
    weights = [weight for each in optimisers for weight in each.weights if weight.parameter.grad is not None]
    if not weights:
        return
    config, (lr,) = optimisers[0].config, {each.lr for each in optimisers}
    parameters: list[Tensor] = [weight.parameter for weight in weights]
    gradients = [gradient for each in optimisers for gradient in each.gradients()]
    if config.name == "adamw":
        _adamw(config, lr, weights, parameters, gradients)
    else:
        _sgd(config, lr, weights, parameters, gradients)


def _sgd(
    config: OptimConfig, lr: float, weights: list[Weight], parameters: list[Tensor], gradients: list[Tensor]
) -> None:
    if config.weight_decay:
        torch._foreach_add_(gradients, parameters, alpha=config.weight_decay)
    if config.momentum:
        moving = [(weight.state[MOMENTUM], g) for weight, g in zip(weights, gradients, strict=True) if weight.state]
        if moving:
            buffers = [buffer for buffer, _ in moving]
            torch._foreach_mul_(buffers, config.momentum)
            torch._foreach_add_(buffers, [gradient for _, gradient in moving])
        if len(moving) < len(weights):  # first updates
            for weight, gradient in zip(weights, gradients, strict=True):
                if not weight.state:
                    weight.state[MOMENTUM] = gradient.clone()
        buffers = [weight.state[MOMENTUM] for weight in weights]
        if config.nesterov:
            torch._foreach_add_(gradients, buffers, alpha=config.momentum)
        else:
            gradients = buffers
    torch._foreach_add_(parameters, gradients, alpha=-lr)


def _adamw(
    config: OptimConfig, lr: float, weights: list[Weight], parameters: list[Tensor], gradients: list[Tensor]
) -> None:
    beta1, beta2 = BETAS
    for weight in weights:
        if not weight.state:
            weight.state = {name: torch.zeros_like(weight.parameter) for name in (MEAN, SQUARE)}
        weight.steps += 1
    means, squares = ([weight.state[name] for weight in weights] for name in (MEAN, SQUARE))
    sizes = {steps: -lr / (1 - beta1**steps) for steps in {weight.steps for weight in weights}}
    roots = {steps: (1 - beta2**steps) ** 0.5 for steps in sizes}
    if config.weight_decay:
        torch._foreach_mul_(parameters, 1 - lr * config.weight_decay)
    torch._foreach_lerp_(means, gradients, 1 - beta1)
    torch._foreach_mul_(squares, beta2)
    torch._foreach_addcmul_(squares, gradients, gradients, 1 - beta2)
    torch._foreach_copy_(gradients, squares)  # no room for another tensor per weight is needed
    torch._foreach_sqrt_(gradients)
    torch._foreach_div_(gradients, [roots[weight.steps] for weight in weights])
    torch._foreach_add_(gradients, EPS)
    torch._foreach_addcdiv_(parameters, means, gradients, [sizes[weight.steps] for weight in weights])


def poly(config: OptimConfig, step: int, steps: int) -> float:
    """The learning rate of ``step`` (0-based) of ``steps``: (lr - min_lr) (1 - s/S)^0.9 + min_lr (Chen et al. 2017;
    released code of InfoPro for Cityscapes)."""
    return (config.lr - config.min_lr) * math.pow(1.0 - step / steps, POLY_POWER) + config.min_lr


def learning_rate(config: OptimConfig, epoch: int, epochs: int) -> float:
    """The learning rate of ``epoch`` (1-based) of ``epochs`` (released code of InfoPro, HPFF, AugLocal).

    c(e) = lr/2 (1 + cos(pi e / E)); for e <= w: c(e) (e-1)/w + warmup_lr (w+1-e)/w; so lr(1) = warmup_lr, lr(E) = 0.
    Their code for ImageNet counts e from 0 (``cosine-peak``).
    """
    if config.schedule in ("cosine", "cosine-peak"):
        base = 0.5 * config.lr * (1.0 + math.cos(math.pi * (epoch - (config.schedule == "cosine-peak")) / epochs))
    elif config.schedule == "step":
        base = config.lr * 0.1 ** sum(epoch > epochs * mark for mark in (0.5, 0.75))
    else:
        base = config.lr
    warmup = config.warmup_epochs
    if epoch > warmup:
        return base
    return base * (epoch - 1) / warmup + config.warmup_lr * (warmup + 1 - epoch) / warmup
