"""Muon for the hidden matrices of a local module: momentum whose singular values are all made about 1.

    B <- mu B + (1 - mu) G,   U = orthogonalised (1 - mu) G + mu B (Nesterov),   theta <- (1 - lr wd) theta - lr s U

(Jordan et al. 2024, https://kellerjordan.github.io/posts/muon/; :class:`torch.optim.Muon`.) s = 0.2 sqrt(max of both
sides) gives an update the size of AdamW's (Liu et al. 2025, arXiv 2502.16982), so one learning rate serves both.

    hidden     weights of linear layers, convolutions (output channels x all the rest) and attention's projections
    not        vectors, embeddings, other tensors; the first layer of the network; its last one, and that of every head
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence

import torch
from torch import Tensor, nn

from pipeline.base.config import OptimConfig

MATRICES = (nn.Linear, nn.modules.conv._ConvNd, nn.MultiheadAttention)


def hidden_matrices(
    blocks: Iterable[nn.Module], heads: Iterable[nn.Module], fronts: Iterable[nn.Module], first: bool, last: bool
) -> list[nn.Parameter]:
    """The parameters of a local module that Muon is for. Layers count in the order in which they are registered.

    Args:
        blocks: of the module.
        heads: auxiliary heads, each with a last layer of its own.
        fronts: what stands before heads: hidden as a whole.
        first, last: whether the module has the first and the last layer of the network.
    """
    trunk = [layer for block in blocks for layer in _layers(block)]
    hidden = trunk[int(first) : len(trunk) - int(last)]
    hidden += [layer for front in fronts for layer in _layers(front)]
    hidden += [layer for head in heads for layer in list(_layers(head))[:-1]]
    return [matrix for layer in hidden for matrix in _matrices(layer)]


def _layers(network: nn.Module) -> Iterator[nn.Module]:
    return (layer for layer in network.modules() if isinstance(layer, (*MATRICES, nn.Embedding)))


def _matrices(layer: nn.Module) -> Iterator[nn.Parameter]:
    if isinstance(layer, MATRICES):
        yield from (p for name, p in layer.named_parameters(recurse=False) if name.endswith("weight") and p.dim() > 1)


@torch.no_grad()
def step(
    config: OptimConfig, lr: float, parameters: Sequence[Tensor], gradients: Sequence[Tensor], momenta: Sequence[Tensor]
) -> None:
    """One step of :class:`torch.optim.Muon`, in place; tensors of more than two dimensions are taken as matrices."""
    if not parameters:
        return
    matrices = [nn.Parameter(_matrix(parameter, parameter), requires_grad=True) for parameter in parameters]
    optimiser = torch.optim.Muon(
        matrices,
        lr=lr,
        weight_decay=config.weight_decay,
        momentum=config.momentum,
        nesterov=config.nesterov,
        adjust_lr_fn="match_rms_adamw",
    )
    for matrix, parameter, gradient, momentum in zip(matrices, parameters, gradients, momenta, strict=True):
        matrix.grad = _matrix(gradient, parameter)
        optimiser.state[matrix]["momentum_buffer"] = _matrix(momentum, parameter)
    optimiser.step()


def _matrix(tensor: Tensor, parameter: Tensor) -> Tensor:
    """(rows, all the rest): what lies like ``parameter`` in memory is not copied, NHWC kernels neither."""
    rest = sorted(range(1, parameter.dim()), key=parameter.stride, reverse=True)
    return tensor.detach().permute(0, *rest).reshape(len(tensor), -1)
