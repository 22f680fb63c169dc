"""What local modules cost where nobody measures: FLOPs and operations, counted, at stated rates of a kind of device.

    seconds of an action = FLOPs / rate + operations x seconds of an operation

Two forms of the same work can be compared so. It is no prediction: elementwise work counts as its operations only.
"""

from __future__ import annotations

from dataclasses import dataclass

from pipeline.base.numerics import Numerics
from pipeline.models.backbones import Blocks
from pipeline.plan.assembly import Plan
from pipeline.plan.cost import IMAGES, Counts, count_step
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


def counted_costs(plan: Plan, joinable: frozenset[int], blocks: Blocks, numerics: Numerics) -> tuple[ModuleCost, ...]:
    """Seconds of the actions of every local module, of both forms of its levels for those that are ``joinable``; no
    bytes. Nothing is computed, but what cannot do without values.

    Args:
        plan: its placement and schedule do not matter.
        joinable: local modules whose levels may go together.
        blocks: the network, which needs no weights and stays as it is.
        numerics: of the run.
    """
    rates, parts = RATES[numerics.device.type], plan.config.schedule.micro_batches
    images = plan.config.data.batch_size / IMAGES
    separate = count_step(plan.with_levels_together(()), blocks, numerics)
    together = count_step(plan.with_levels_together(joinable), blocks, numerics)

    def seconds(counts: Counts, module: int, kind: Kind, slower: float = 1.0) -> float:
        calls = counts.operations[module, kind] * (1 if kind is Kind.UPDATE else parts)
        return slower * counts.work[module, kind] * images / rates.flops_per_s + calls * rates.operation_s

    costs = []
    for role in plan.modules:
        times = {f"{kind.name.lower()}_s": seconds(separate, role.index, kind) for kind in _TIMED}
        times["relay_s"] /= max(len(role.outgoing), 1)
        if role.index in joinable:
            times["together_s"] = seconds(together, role.index, Kind.CASCADE, rates.side_by_side)
        costs.append(ModuleCost(**times))
    return tuple(costs)


_TIMED = [kind for kind in Kind if kind not in (Kind.SHARE, Kind.ADOPT)]
