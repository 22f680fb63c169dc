"""Both levels of a module at once: heads of one structure are groups of channels side by side, as patches are.

    separate    C  (R)  I        the cascade level first, whose gradient others may wait for; then the independent one
    together    CI (R)           half as many operations; the cascade's gradient leaves after both

The arithmetic is the same, its order is not, so the bits depend on the choice. It is part of the module's role: by the
configuration, so that no placement changes it, or with "auto" by the plan.
"""

from __future__ import annotations

from collections import OrderedDict
from dataclasses import dataclass

from torch import Tensor

from pipeline.local.methods import Level
from pipeline.models.heads import Given
from pipeline.models.patches import Autocast, PatchedHead, backward_together
from pipeline.models.spread import Gradient, whole


@dataclass(frozen=True)
class _Term:
    """Heads of one name: of which levels, and whether they are alike."""

    name: str
    levels: tuple[str, ...]
    heads: tuple[PatchedHead, ...]
    alike: bool


class BothLevels:
    """Runs the heads of all levels of a module, term by term."""

    def __init__(self, levels: OrderedDict[str, Level]) -> None:
        self._levels = dict(levels)
        self._fronts = any(level.front is not None for level in levels.values())
        self._terms = []
        for term in dict.fromkeys(term for level in levels.values() for term, _ in level.heads()):
            having = {name: head for name, level in levels.items() for other, head in level.heads() if other == term}
            heads = tuple(having.values())
            alike = len(heads) > 1 and all(head.like(heads[0]) for head in heads[1:])
            self._terms.append(_Term(term, tuple(having), heads, alike))

    def pays(self, feature: Tensor, given: Given) -> bool:
        """Whether heads of two levels are done at once on such a feature, which they then share, and no head may draw
        random numbers, which would be others. Nothing is computed."""
        heads = [head for term in self._terms for head in term.heads]
        joined = any(term.alike and term.heads[0].groups(feature, given) for term in self._terms)
        return joined and not self._fronts and all(head.takes_patches(feature.dim()) for head in heads)

    def backward(
        self, feature: Tensor, given: Given, scale: float, autocast: Autocast
    ) -> dict[str, tuple[Gradient, dict[str, Tensor]]]:
        """:meth:`pipeline.local.methods.Level.backward` of every level, by its name."""
        gradients: dict[str, Gradient | None] = dict.fromkeys(self._levels)
        losses: dict[str, dict[str, Tensor]] = {name: {} for name in self._levels}
        for term in self._terms:
            weights = [scale * self._levels[name].weights[term.name] for name in term.levels]
            before = [None if (known := gradients[name]) is None else whole(known) for name in term.levels]
            if term.alike and term.heads[0].groups(feature, given):
                found = backward_together(term.heads, feature, given, weights, before, autocast)
            else:
                found = []
                for head, weight, gradient in zip(term.heads, weights, before, strict=True):
                    found += backward_together([head], feature, given, [weight], [gradient], autocast)
            for name, (result, loss) in zip(term.levels, found, strict=True):
                gradients[name], losses[name][term.name] = result, loss
        return {name: (gradient, losses[name]) for name, gradient in gradients.items() if gradient is not None}
