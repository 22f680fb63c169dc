"""The updates of a rank's local modules that are due together: as many operations as for one module.

    heads of all modules --> losses_together: one tensor to the host
    backwards
    update_together:  norms of all gradients in one call --> host        finite? per module
                      clipping per module, where it is asked for         (two operations for each)
                      one optimiser step for the weights of all modules  without those that are left out
                      moving averages of the weights, where asked for
                      losses into the sums of the epoch

What an update of one module does depends on no other module, so the result does not depend on what is done together.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor

from pipeline.local.average import average_together
from pipeline.local.guard import allowed, send_losses
from pipeline.local.local_module import LocalModule
from pipeline.local.losses import close_together
from pipeline.local.optimiser import step_together

Due = Sequence[tuple[LocalModule, int]]
"""Local modules of one rank, each with the step whose batch it is to be updated with."""


def losses_together(due: Due) -> None:
    """All heads of these updates have run: their losses leave for the host before the last backward."""
    send_losses([(module.guard, step) for module, step in due])


def update_together(due: Due) -> None:
    """Clip, step with the gradients of the batch of each module's step, clear the gradients. With ``train.accumulate``
    they are added up, and a module steps with their mean once they are those of so many batches.

    Without the modules of which a loss of that batch or a gradient is not finite, where ``train.nonfinite`` is "skip".

    Raises:
        NonFiniteError: one of them is not finite and it is "stop"; nothing has been updated on a CPU.
    """
    for module, step in due:
        module.take_stashed_gradients(step)
    gradients = [module.optimiser.gradients() for module, _ in due]
    clip_norm = due[0][0].optimiser.config.clip_norm
    norms = _norms(gradients, 2.0 if clip_norm else math.inf)
    may = allowed([(module.guard, step) for module, step in due], norms, map(len, gradients))
    good = [(module, step) for (module, step), yes in zip(due, may, strict=True) if yes]
    if due[0][0].accumulation is None:
        if clip_norm:
            _clip(gradients, norms, clip_norm)
        updated = [module for module, _ in good]
        step_together([module.optimiser for module in updated])
    else:
        updated = [module for (module, _), yes in zip(due, may, strict=True) if _summed_up(module, yes)]
        _step_with_means(updated)
    close_together([(module.losses, step) for module, step in good])
    for (module, step), yes in zip(due, may, strict=True):
        if not yes:
            module.losses.skip(step)
        module.optimiser.clear()
        module.guard.mend_buffers()
    average_together([module.average for module in updated if module.average is not None])


def update_rest(modules: Sequence[LocalModule]) -> None:
    """The epoch has no more batches: update with those that are summed up, fewer than an update has."""
    left = [module for module in modules if module.accumulation is not None and module.accumulation.finish()]
    _step_with_means(left)
    for module in left:
        module.optimiser.clear()
    average_together([module.average for module in left if module.average is not None])


def _summed_up(module: LocalModule, good: bool) -> bool:
    """Whether the batch that is added, if it is ``good``, is the last one of an update."""
    return module.accumulation is not None and module.accumulation.take(good)


def _step_with_means(modules: Sequence[LocalModule]) -> None:
    """Clip and step with gradients that have been summed up."""
    clip_norm = modules[0].optimiser.config.clip_norm if modules else 0.0
    if clip_norm:
        gradients = [module.optimiser.gradients() for module in modules]
        _clip(gradients, _norms(gradients, 2.0), clip_norm)
    step_together([module.optimiser for module in modules])


def _norms(gradients: Sequence[list[Tensor]], order: float) -> Tensor:
    """Of every gradient, module by module, (n,)."""
    every = [gradient for of_module in gradients for gradient in of_module]
    return torch.stack(torch._foreach_norm(every, order)) if every else torch.empty(0)


def _clip(gradients: Sequence[list[Tensor]], norms: Tensor, largest: float) -> None:
    """Scale the gradients of each module to a norm of ``largest`` at most, as torch.nn.utils.clip_grad_norm_ does."""
    totals = [torch.linalg.vector_norm(part) for part in norms.split(list(map(len, gradients)))]
    scales = torch.clamp(largest / (torch.stack(totals) + 1e-6), max=1.0)
    for of_module, scale in zip(gradients, scales.unbind(), strict=True):
        if of_module:
            torch._foreach_mul_(of_module, scale)
