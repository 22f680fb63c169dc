"""The hierarchy: which modules a cascade's gradient reaches, and therefore who sends what to whom.

A cascade head on module j with span k trains modules ``lowest .. j``, ``lowest = max(0, j - k + 1)``. Gradients that
share their lowest module travel together, so a message upstream is keyed by that module. For K = 5, k = 3:

    module        0       1       2       3       4 (classifier)
    cascade on            1       2       3                        lowest: 0, 0, 1
    messages        <-0--   <-0--   <-1--
                            <-1--

With ``variant = "deepsup"`` (DeepSup-BP) the span is K, module 0 has a cascade head too, and there are no others.

Only what a module's own cascade heads and further-travelling messages produced goes upstream: never the independent
gradient, never a message that ends here (docs/methods.md, HPFF). With k = K every key is 0: end-to-end flow.
"""

from __future__ import annotations

from dataclasses import dataclass

from pipeline.base.config import HierarchyConfig
from pipeline.local.level_weights import has_heads


@dataclass(frozen=True)
class ModulePlan:
    """The role of one local module.

    Attributes:
        index: position of the module, 0-based.
        independent: it has an independent-level head.
        cascade: it has a cascade-level head.
        final: it ends in the classifier.
        final_local, final_cascade: shares of the last module's loss that stay in it / go upstream with span k.
        own_key: lowest module that its own cascade gradient reaches; None without one.
        incoming: keys of the gradient messages from module + 1, in order of arrival.
        outgoing: keys of the gradient messages to module - 1, in order of departure.
        merged: its whole gradient is (a multiple of) the only message it sends, so one backward pass gives both.
        together: both levels run in one action, that of the cascade level; with ``levels = "auto"`` the plan of a run
            decides (see plan.level_choice), here no module does.
        reconciles: its heads work before its output is passed on, with the gradient of their loss (see sgr).
        evaluations: times the released code runs the module in one step, which moves BatchNorm as often: once in every
            cascade, and once by itself; without an independent level (its ImageNet code) only module 0 by itself.
    """

    index: int
    independent: bool
    cascade: bool
    final: bool
    final_local: float
    final_cascade: float
    own_key: int | None
    incoming: tuple[int, ...]
    outgoing: tuple[int, ...]
    merged: bool
    evaluations: int
    together: bool = False
    reconciles: bool = False

    @property
    def needs_input_gradient(self) -> bool:
        """Whether the module's input must be a differentiable leaf."""
        return bool(self.outgoing) or (self.reconciles and self.index > 0)


def plan_hierarchy(modules: int, config: HierarchyConfig) -> tuple[ModulePlan, ...]:
    """The role of each of ``modules`` local modules (weights already resolved by ``config.validate``)."""
    deep, released = config.variant == "deepsup", config.variant == "released"
    span = modules if deep else min(config.cascade_span, modules)
    first, last = 0 if deep else 1, modules - 1
    final_local, final_cascade = _final_shares(modules, span, config)
    has_cascade = [
        (first <= j < last and span > 1 and has_heads(config.cascade_weight)) or (j == last and final_cascade > 0)
        for j in range(modules)
    ]
    lowest = {j: max(0, j - span + 1) for j in range(modules) if has_cascade[j]}
    outgoing = [
        tuple(sorted({low for j, low in lowest.items() if j >= m and low < m})) for m in range(modules)
    ]
    plans = []
    for m in range(modules):
        incoming = outgoing[m + 1] if m < last else ()
        independent = m < last and has_heads(config.independent_weight) and not (released and m == 0) and not deep
        own_key = lowest.get(m)
        alone = m == 0 or has_heads(config.independent_weight)
        contributions = set(incoming) | ({own_key} if own_key is not None else set())
        plans.append(
            ModulePlan(
                index=m,
                independent=independent,
                cascade=has_cascade[m] and m < last,
                final=m == last,
                final_local=final_local if m == last else 0.0,
                final_cascade=final_cascade if m == last else 0.0,
                own_key=own_key,
                incoming=incoming,
                outgoing=outgoing[m],
                merged=not independent and len(outgoing[m]) == 1 and contributions == set(outgoing[m]),
                evaluations=max(1, alone + sum(1 for j, low in lowest.items() if low <= m <= j)),
                together=config.levels == "together" and independent and has_cascade[m],
            )
        )
    return tuple(plans)


def _final_shares(modules: int, span: int, config: HierarchyConfig) -> tuple[float, float]:
    if modules == 1:
        return 1.0, 0.0
    if config.variant == "released":
        assert isinstance(config.independent_weight, int | float) and isinstance(config.cascade_weight, int | float)
        if span == 1:
            return config.independent_weight + config.cascade_weight, 0.0
        return config.independent_weight, config.cascade_weight
    everywhere = config.final_loss == "auto" and span == modules
    return (0.0, 1.0) if span > 1 and (config.final_loss == "cascade" or everywhere) else (1.0, 0.0)


def lambda_position(modules: int, module: int, level: str, config: HierarchyConfig, requested: int) -> float:
    """Where InfoPro's weights stand between their first (0) and last (1) value at ``module``.

    Paper: the index runs over the modules that have a head of this level. Released: module / (requested K - 2).
    """
    if config.variant == "released":
        return module / (requested - 2) if requested > 2 else 0.0
    first = 1 if level == "cascade" and config.variant == "paper" else 0
    heads = modules - 1 - first
    return (module - first) / (heads - 1) if heads > 1 else 0.0
