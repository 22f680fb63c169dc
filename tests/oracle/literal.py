"""The literal definition of a local step, written from the formulas: every path of every loss is evaluated anew.

    independent level of module m:  w_I * L(head_I, f_m(sg(h_{m-1})))
    cascade level ending at j:      w_C * L(head_C, f_j(... f_low(sg(h_{low-1})))),  low = max(0, j - k + 1)
    last module:                    cross-entropy of the logits; paper: local, or the whole chain for k = K;
                                    released: w_I * (local) + w_C * (chain of k modules)

It shares the modules' parameters and the heads' own loss functions with the runtime, nothing else: not the plan, not
the schedule, not the weights, not the patch loop.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from pipeline.base.config import Config
from pipeline.local.local_module import LocalModule
from pipeline.models.heads import Given


def literal_backward(modules: list[LocalModule], config: Config, x: Tensor, labels: Tensor, image: Tensor) -> None:
    """Add the gradients of all losses to the ``.grad`` of all parameters."""
    last = len(modules) - 1
    k = min(config.hierarchy.cascade_span, len(modules))
    w_i, w_c = config.hierarchy.independent_weight, config.hierarchy.cascade_weight
    assert w_i is not None and w_c is not None
    released = config.hierarchy.variant == "released"

    for module in modules:
        for part in (*module.blocks.values(), *module.levels.values()):
            part.train()
    inputs = [x]
    for module in modules:
        inputs.append(_run(module, inputs[-1]).detach())

    def chain(low: int, high: int) -> Tensor:
        h = inputs[low].detach()
        for module in modules[low : high + 1]:
            h = _run(module, h)
        return h

    for m in range(last):
        if not (released and m == 0):
            (w_i * _level(modules, m, "independent", chain(m, m), labels, image, config)).backward()
        if m > 0 and k > 1:
            (w_c * _level(modules, m, "cascade", chain(max(0, m - k + 1), m), labels, image, config)).backward()
    if last == 0:
        F.cross_entropy(chain(0, 0), labels).backward()
    elif released:
        low = max(0, last - k + 1)
        (w_i * F.cross_entropy(chain(last, last), labels)).backward()
        (w_c * F.cross_entropy(chain(low, last), labels)).backward()
    else:
        low = 0 if k == len(modules) else last
        F.cross_entropy(chain(low, last), labels).backward()


def _run(module: LocalModule, h: Tensor) -> Tensor:
    for block in module.blocks.values():
        h = block(h)
    return h


def _level(
    modules: list[LocalModule], m: int, level: str, h: Tensor, labels: Tensor, image: Tensor, config: Config
) -> Tensor:
    released = config.hierarchy.variant == "released"
    count = len(modules)
    if released or level == "independent":
        position = m / (count - 2) if count > 2 else 0.0
    else:
        position = (m - 1) / (count - 3) if count > 3 else 0.0
    method = config.method
    if method.name in ("dgl", "greedy") or method.name.startswith("mirror"):
        weights = {"task": 1.0}
    elif method.name == "predsim":
        weights = {"similarity": method.similarity, "prediction": 1 - method.similarity}
    else:
        weights = {
            "reconstruction": method.reconstruction[0] * (1 - position) + method.reconstruction[1] * position,
            "task": method.task[0] * (1 - position) + method.task[1] * position,
        }
    if released and level == "independent":
        weights = {name: 1.0 for name in weights if name in ("task", "prediction")}
    total = h.new_zeros(())
    for name, weight in weights.items():
        heads = modules[m].levels[level].terms[name].heads
        n = config.patches.grid
        if released and name != "reconstruction":
            n = 1
        losses = []
        for i in range(n):
            for j in range(n):
                size, full = h.shape[-1] // n, image.shape[-1] // n
                patch = h[:, :, i * size : (i + 1) * size, j * size : (j + 1) * size]
                crop = image[:, :, i * full : (i + 1) * full, j * full : (j + 1) * full]
                head = heads[i * n + j] if released and n > 1 else heads[0]
                losses.append(head.loss(patch, Given(labels, crop)))
        together = torch.stack(losses)
        total = total + weight * (together.sum() if released and n > 1 else together.mean())
    return total
