"""What local modules cost where nobody measures: FLOPs and operations, counted, at stated rates of a kind of device.

    seconds of an action = FLOPs / rate + operations x seconds of an operation

Two forms of the same work can be compared so. It is no prediction: elementwise work counts as its operations only.
"""

from __future__ import annotations

from collections import OrderedDict
from dataclasses import dataclass
from typing import Any

from pipeline.base.numerics import Numerics
from pipeline.models.backbones import Blocks
from pipeline.models.unbuilt import no_values
from pipeline.plan.alone import random_batch, random_gradients, stage_alone
from pipeline.plan.assembly import Plan
from pipeline.plan.blank import blank_modules
from pipeline.plan.counting import Tally
from pipeline.plan.module_flops import IMAGES, by_kind, counted_step
from pipeline.plan.simulate import ModuleCost
from pipeline.stage.schedule import Kind


@dataclass(frozen=True)
class Rates:
    """Of a kind of device.

    Attributes:
        flops_per_s: of matrix products and convolutions of a network of this size, on a device or a core.
        operation_s: seconds that a call takes besides its FLOPs.
        side_by_side: how much longer the products of two heads take in groups than one after the other.
    """

    flops_per_s: float
    operation_s: float
    side_by_side: float


RATES = {"cpu": Rates(5e10, 1e-5, 1.3), "cuda": Rates(1e13, 5e-6, 1.0)}
"""Parameters of this model, in orders of magnitude. CPU: of ResNet-32 in fp32 on one core with AVX-512, where both
levels together took up to 1.3 times as long as one after the other at batch 128, and no longer at batch 16. CUDA: the
usual time of a launch; heads of a few million FLOPs are far from the device's rate."""


Counts = dict[Kind, tuple[float, float]]
"""FLOPs and operations of one module by kind of action."""


def counted_costs(plan: Plan, joinable: frozenset[int], blocks: Blocks, numerics: Numerics) -> list[ModuleCost]:
    """Seconds of the actions of every local module, of both forms of its levels for those that are ``joinable``; no
    bytes. Nothing is computed.

    Args:
        plan: its placement and schedule do not matter.
        joinable: local modules whose levels may go together.
        blocks: the network, which needs no weights and stays as it is.
        numerics: of the run.

    Raises:
        Uncountable: what a module does without values fails; it may well train.
    """
    rates, parts = RATES[numerics.device.type], plan.config.schedule.micro_batches
    images = plan.rows / IMAGES

    def counted(together: frozenset[int]) -> list[Counts]:
        step = counted_step(plan.with_levels_together(together))
        return by_kind(step, blocks, numerics, lambda index: _alone(step, blocks, numerics, index))

    def seconds(counts: Counts, kind: Kind, slower: float = 1.0) -> float:
        flops, calls = counts.get(kind, (0.0, 0.0))
        times = 1 if kind is Kind.UPDATE else parts
        return slower * flops * images / rates.flops_per_s + times * calls * rates.operation_s

    costs = []
    for role, separate, together in zip(plan.modules, counted(frozenset()), counted(joinable), strict=True):
        times: dict[str, Any] = {f"{kind.name.lower()}_s": seconds(separate, kind) for kind in _TIMED}
        times["relay_s"] /= max(len(role.outgoing), 1)
        if role.index in joinable:
            times["together_s"] = seconds(together, Kind.CASCADE, rates.side_by_side)
        costs.append(ModuleCost(**times))
    return costs


_TIMED = [kind for kind in Kind if kind not in (Kind.SHARE, Kind.ADOPT)]


def _alone(step: Plan, blocks: Blocks, numerics: Numerics, index: int) -> Counts:
    """Of the second step of one module: in the first one, an optimiser and some heads still make what they keep."""
    alone = step.placed((range(index, index + 1),))
    own = OrderedDict((name, blocks[name]) for name in step.cut.modules[index])
    with no_values():
        (module,) = blank_modules(alone, own, numerics)
        batch, gradients = random_batch(alone, [module], numerics), random_gradients(alone, module, numerics)
        stage = stage_alone(alone, module, batch, gradients, Tally())
        stage.train_step(1, 0)
        stage.watch = tally = Tally()
        stage.train_step(1, 1)
    return {kind: (tally.flops[index, kind], calls) for (_, kind), calls in tally.operations.items()}
