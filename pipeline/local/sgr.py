"""SGR, successive gradient reconciliation (Yang et al. 2024, arXiv 2406.05222): what the loss of a module asks of its
input is drawn towards what the loss of the module before has asked of its output, which is the same tensor.

    module m-1    h_{m-1} --> head --> L_{m-1}                u = dL_{m-1} / dh_{m-1}    travels with h_{m-1}
    module m      x = sg(h_{m-1}) --> f_m --> h_m --> L_m     v = dL_m / dx
                  trains f_m and its head by L_m + lambda R,  R = mean over rows of the squared length of v - u

u is a constant here, v a function of the weights: R is differentiated through the backward pass of f_m and of the head.
A row's u and v are those of its own loss, so R does not depend on the size of the batch or its parts. u has no part of
R. The last module has no head but the loss of the task, and an R as well; an output "aux" of the network is part of it.
Of several tensors on a boundary x is the one that heads stand on; the others have no u and no v.

Attention is computed by plain products: the fused kernels of PyTorch can be differentiated once only.
"""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel

from pipeline.base.flow import AUX, MAIN, Tensors
from pipeline.local.task import Task
from pipeline.models.losses import full


@dataclass(frozen=True)
class Reconciled:
    """
    Attributes:
        own: by name, gradients of the outputs of a module, from its whole loss, times the share of the micro-batch.
        passed_on: gradient of "x" of them from the local loss alone, for the next module.
        distance: R; None in the first module.
    """

    own: Tensors
    passed_on: Tensor
    distance: Tensor | None


def differentiable_twice() -> AbstractContextManager[None]:
    """Inside, the backward pass of what is computed can be differentiated."""
    return sdpa_kernel(SDPBackend.MATH)


def last_loss(task: Task, leaves: Tensors, target: Tensor, aux_weight: float) -> tuple[Tensor, Tensors]:
    """The loss of the task on what the network gives, "x" and where it is there "aux", and its terms by name."""
    loss = task.loss(leaves[MAIN], target)
    terms = {"final": loss.detach()}
    if AUX in leaves:
        aux = task.loss(leaves[AUX], target)
        loss, terms["final.aux"] = loss + aux_weight * aux, aux.detach()
    return loss, terms


def reconcile(
    loss: Tensor,
    leaves: Tensors,
    outputs: Tensors,
    entrance: tuple[Tensor, Tensor] | None,
    weight: float,
    share: float,
    trained: Sequence[Tensor],
) -> Reconciled:
    """Gradients of ``share * (loss + weight * R)``: those of R in the weights of the module, and all in those of the
    head, are added to ``.grad``. What else there is in the module's weights is left to the backward of ``outputs``.

    Args:
        loss: scalar, the mean over the rows, a function of ``leaves`` and of the weights of the head.
        leaves: (b, ...) the outputs of the module that have a loss, "x" first, detached, require grad.
        outputs: the same with their graph, which stays, and others.
        entrance: x (b, ...), a leaf of that graph, and u (b, ...); None in the first module.
        weight: lambda.
        share: of this micro-batch in the batch.
        trained: weights that get gradients where they require them.
    """
    slopes = torch.autograd.grad(loss, list(leaves.values()), create_graph=True)
    total, distance = loss, None
    if entrance is not None:
        x, asked = entrance
        ends = [outputs[name] for name in leaves]
        start = [slope.to(end.dtype) for slope, end in zip(slopes, ends, strict=True)]
        (found,) = torch.autograd.grad(ends, x, start, create_graph=True)
        distance = len(x) * (full(found) - full(asked)).square().sum()
        total = loss + weight * distance
    weights = [parameter for parameter in trained if parameter.requires_grad]
    torch.autograd.backward(total * share, inputs=[*leaves.values(), *weights], retain_graph=True)
    own = {name: leaf.grad for name, leaf in leaves.items() if leaf.grad is not None}
    return Reconciled(own, slopes[0].detach(), None if distance is None else distance.detach())
