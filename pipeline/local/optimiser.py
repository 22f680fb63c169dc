"""SGD, AdamW and Muon of local modules, one call for all that are updated together, and the learning rate of an epoch.

    module 0   weights, state --+
    module 1   weights, state --+--> step_together: as many operations as for one weight
    module 2   weights, state --+    (torch._foreach_*: the operations of torch.optim's own loop, over lists)

Each module keeps the state of its own weights, as its checkpoint needs it; the arithmetic is that of
:class:`torch.optim.SGD` and :class:`torch.optim.AdamW`, on a CPU to the bit, and Muon is torch's own (see muon).

With ``optim.error_feedback`` an update that comes L steps late also makes up for the L that are still under way:

    D_s = what the optimiser makes of the gradient of batch s, known in step s + L
    theta <- theta - D_s - L (D_s - D_s-1)          the newest D stands for those that are not known yet
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor, nn

from pipeline.base.config import OptimConfig
from pipeline.local import muon

MOMENTUM, MEAN, SQUARE, STEP = "momentum_buffer", "exp_avg", "exp_avg_sq", "step"
"""Names of states, those of torch.optim."""
LAST = "last_update"
"""Name of D_s-1, for error feedback."""
BETAS, EPS = (0.9, 0.999), 1e-8
"""Of AdamW (Loshchilov and Hutter 2019, algorithm 2)."""
POLY_POWER = 0.9


@dataclass(eq=False, slots=True)
class Weight:
    """A parameter and what its optimiser keeps: tensors like it, by name, and the number of its updates (AdamW).
    ``hidden``: one of the matrices that Muon is for; ``rate``: its learning rate, to that of the module."""

    parameter: nn.Parameter
    hidden: bool = False
    rate: float = 1.0
    state: dict[str, Tensor] = field(default_factory=dict)
    steps: int = 0


class Optimiser:
    """What updates of one local module need besides gradients.

    Args:
        parameters: of the module and its heads; those that require no gradient are left out.
        config: which optimiser.
        hidden: those of ``parameters`` that are hidden matrices, which Muon is for.
        heads: those of ``parameters`` that are of heads, with ``optim.head_lr`` times the learning rate.
        lag: steps from a forward to the update of its batch (schedule `async`).

    Attributes:
        weights: in the order of ``parameters``.
        lr: the learning rate of the next update.
    """

    def __init__(
        self,
        parameters: Iterable[nn.Parameter],
        config: OptimConfig,
        hidden: Iterable[nn.Parameter] = (),
        heads: Iterable[nn.Parameter] = (),
        lag: int = 0,
    ) -> None:
        self.config = config
        matrices = {id(parameter) for parameter in hidden} if config.name == "muon" else set()
        rates = {id(parameter): config.head_lr for parameter in heads}
        self.weights = [Weight(p, id(p) in matrices, rates.get(id(p), 1.0)) for p in parameters if p.requires_grad]
        self.lr = config.lr
        self.lag = lag

    def gradients(self) -> list[Tensor]:
        """Of the weights that have one, in their order."""
        return [gradient for weight in self.weights if (gradient := weight.parameter.grad) is not None]

    def clear(self) -> None:
        """Drop all gradients."""
        for weight in self.weights:
            weight.parameter.grad = None

    def kept_bytes(self) -> int:
        """Of its state once all weights have been updated."""
        fed_back = 1 if self.lag and self.config.error_feedback else 0
        rest = (1 if self.config.momentum else 0) if self.config.name == "sgd" else 2
        return sum(weight.parameter.nbytes * (fed_back + (1 if weight.hidden else rest)) for weight in self.weights)

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
    late = [each for each in optimisers if each.lag and config.error_feedback]
    before = [_copies(each) for each in late]
    if config.head_lr == 1.0:
        _step(config, lr, weights)
    else:
        for rate in (1.0, config.head_lr):
            _step(config, lr * rate, [weight for weight in weights if weight.rate == rate])
    for optimiser, copies in zip(late, before, strict=True):
        _feed_back(optimiser, copies)


def _step(config: OptimConfig, lr: float, weights: list[Weight]) -> None:
    if config.name == "muon":
        _muon(config, lr, [weight for weight in weights if weight.hidden])
        weights = [weight for weight in weights if not weight.hidden]
    parameters: list[Tensor] = [weight.parameter for weight in weights]
    gradients = [weight.parameter.grad for weight in weights if weight.parameter.grad is not None]
    if config.name == "sgd":
        _sgd(config, lr, weights, parameters, gradients)
    elif weights:
        _adamw(config, lr, weights, parameters, gradients)


def _copies(optimiser: Optimiser) -> list[tuple[Weight, Tensor]]:
    """The weights about to be updated, with what they are before."""
    moving = [weight for weight in optimiser.weights if weight.parameter.grad is not None]
    return [(weight, weight.parameter.detach().clone()) for weight in moving]


def _feed_back(optimiser: Optimiser, before: list[tuple[Weight, Tensor]]) -> None:
    """Add the correction of updates that came late; the first one of a weight has none before it."""
    parameters: list[Tensor] = [weight.parameter for weight, _ in before]
    updates = [copy for _, copy in before]
    torch._foreach_sub_(updates, parameters)
    known = [(weight, update) for (weight, _), update in zip(before, updates, strict=True) if LAST in weight.state]
    if known:
        changes = torch._foreach_sub([update for _, update in known], [weight.state[LAST] for weight, _ in known])
        torch._foreach_add_([weight.parameter for weight, _ in known], changes, alpha=-optimiser.lag)
    for (weight, _), update in zip(before, updates, strict=True):
        weight.state[LAST] = update


def _muon(config: OptimConfig, lr: float, weights: list[Weight]) -> None:
    for weight in weights:
        weight.state.setdefault(MOMENTUM, torch.zeros_like(weight.parameter, requires_grad=False))
    gradients = [weight.parameter.grad for weight in weights if weight.parameter.grad is not None]
    muon.step(config, lr, [w.parameter for w in weights], gradients, [w.state[MOMENTUM] for w in weights])


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
