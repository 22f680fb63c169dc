"""SGR, successive gradient reconciliation (Yang et al. 2024, arXiv 2406.05222): what the loss of a module asks of its
input is drawn towards what the loss of the module before has asked of its output, which is the same tensor.

    module m-1    h_{m-1} --> head --> L_{m-1}                u = dL_{m-1} / dh_{m-1}    travels with h_{m-1}
    module m      x = sg(h_{m-1}) --> f_m --> h_m --> L_m     v = dL_m / dx
                  trains f_m and its head by L_m + lambda R,  R = mean over rows of the squared length of v - u

u is a constant here, v a function of the weights: R is differentiated through the backward pass of f_m and of the head.
A row's u and v are those of its own loss, so R does not depend on the size of the batch or its parts. u has no part of
R. The last module has no head but the loss of the task, and an R as well.

Attention is computed by plain products: the fused kernels of PyTorch can be differentiated once only.
"""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel

from pipeline.models.losses import full


@dataclass(frozen=True)
class Reconciled:
    """
    Attributes:
        own: gradient of the output of a module, from its whole loss, times the share of the micro-batch.
        passed_on: gradient of that output from the local loss alone, for the next module.
        distance: R; None in the first module.
    """

    own: Tensor
    passed_on: Tensor
    distance: Tensor | None


def differentiable_twice() -> AbstractContextManager[None]:
    """Inside, the backward pass of what is computed can be differentiated."""
    return sdpa_kernel(SDPBackend.MATH)


def reconcile(
    loss: Tensor,
    leaf: Tensor,
    output: Tensor,
    entrance: tuple[Tensor, Tensor] | None,
    weight: float,
    share: float,
    trained: Sequence[Tensor],
) -> Reconciled:
    """Gradients of ``share * (loss + weight * R)``: those of R in the weights of the module, and all in those of the
    head, are added to ``.grad``. What else there is in the module's weights is left to the backward of ``output``.

    Args:
        loss: scalar, the mean over the rows, a function of ``leaf`` and of the weights of the head.
        leaf: (b, ...) the output of the module, detached, requires grad.
        output: the same with its graph, which stays.
        entrance: x (b, ...), a leaf of that graph, and u (b, ...); None in the first module.
        weight: lambda.
        share: of this micro-batch in the batch.
        trained: leaves that get gradients.
    """
    (slope,) = torch.autograd.grad(loss, leaf, create_graph=True)
    total, distance = loss, None
    if entrance is not None:
        x, asked = entrance
        (found,) = torch.autograd.grad(output, x, slope.to(output.dtype), create_graph=True)
        distance = len(x) * (full(found) - full(asked)).square().sum()
        total = loss + weight * distance
    torch.autograd.backward(total * share, inputs=[leaf, *trained], retain_graph=True)
    assert leaf.grad is not None
    return Reconciled(leaf.grad, slope.detach(), None if distance is None else distance.detach())
