"""What a plan says: the costs of every local module and of every rank, the predicted step, and the alternatives."""

from __future__ import annotations

import dataclasses
import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from pipeline.plan.cost_profile import Profile
from pipeline.stage.events import Event


@dataclass(frozen=True)
class PlannedModule:
    """One local module.

    Attributes:
        index, rank: which, and who owns it.
        blocks: first and last block.
        levels: its head levels.
        parameters, head_parameters: numbers of weights.
        seconds: of one whole batch by kind of action (letters of :data:`pipeline.stage.events.NAMES`); what it has not
            is left out.
        step_s: their sum, over all messages.
        memory_bytes: of a stage that owns it alone.
        bp_units: FLOPs of a step in units of one backpropagation step of the whole network; None: not counted.
        operations: that PyTorch is asked for in a step of one micro-batch, with its update and its share of what
            is done for several modules; None: not counted.
    """

    index: int
    rank: int
    blocks: str
    levels: tuple[str, ...]
    parameters: int
    head_parameters: int
    seconds: dict[str, float]
    step_s: float
    memory_bytes: int
    bp_units: float | None
    operations: float | None


@dataclass(frozen=True)
class PlannedRank:
    """One stage.

    Attributes:
        rank: which.
        modules: first and last local module.
        work_s: seconds of work for one step.
        busy: share of the time it works.
        memory_bytes: weights, optimiser, graphs, queues.
        sent_down_bytes, sent_up_bytes: of one step, to the next and to the previous rank.
        levels_together: its local modules with both levels in one action.
        averaged_bytes: sent in one step to average its modules over the replicas.
    """

    rank: int
    modules: tuple[int, int]
    work_s: float
    busy: float
    memory_bytes: int
    sent_down_bytes: int
    sent_up_bytes: int
    levels_together: tuple[int, ...]
    averaged_bytes: int = 0


@dataclass(frozen=True)
class Placement:
    """A way to place the modules on the ranks: its name (``partition.kind``), modules of every rank, seconds a step."""

    kind: str
    sizes: tuple[int, ...]
    step_s: float


@dataclass(frozen=True)
class PlannedForm:
    """A way to do the work of the heads: the configured one, or with one key changed.

    Attributes:
        at_once, levels: ``patches.at_once`` and ``hierarchy.levels``.
        patches: fewest and most patches that a head works on together, of how many; None without patches.
        together: number of local modules that do both levels together.
        configured: it is the one that is planned.
        step_s: predicted seconds of a step; None: nobody has measured it.
        operations: of a step of one micro-batch; None: not counted.
        memory_bytes: of every rank; None: nobody has measured it.
    """

    at_once: int | str
    levels: str
    patches: tuple[int, int, int] | None
    together: int
    configured: bool
    step_s: float | None
    operations: int | None
    memory_bytes: tuple[int, ...] | None


@dataclass(frozen=True)
class PlanReport:
    """What a run would look like.

    Attributes:
        lines: what is planned and what is assumed, for people.
        modules, ranks: in order.
        step_s: predicted seconds of a step once the pipeline is full.
        bound_s: work of the busiest rank; no schedule is faster.
        alone_s: work of all modules, as one rank would do it.
        batch_size: images of a step.
        placements: alternatives, the one that is planned first.
        schedules: actions of every rank for one step.
        profile: the costs that it rests on.
        events: some simulated steps of the full pipeline.
        first_step: the first of two complete steps in ``events``.
        refusal: why this cannot run on these devices, or None.
        bp_operations: of a backpropagation step of the whole network; None: not counted.
        forms: ways to do the work of the heads, the configured one first; () where there is one only, or nobody asked.
        replicas: pipelines side by side, each on its share of a batch; ``ranks`` and times are of one of them.
    """

    lines: tuple[str, ...]
    modules: tuple[PlannedModule, ...]
    ranks: tuple[PlannedRank, ...]
    step_s: float
    bound_s: float
    alone_s: float
    batch_size: int
    placements: tuple[Placement, ...]
    schedules: tuple[tuple[str, ...], ...]
    profile: Profile
    events: tuple[Event, ...]
    first_step: int
    refusal: str | None
    bp_operations: int | None
    forms: tuple[PlannedForm, ...] = ()
    replicas: int = 1

    @property
    def images_per_s(self) -> float:
        """Images that the pipeline trains in a second."""
        return self.batch_size / self.step_s

    @property
    def bubble(self) -> float:
        """Share of the time in which even the busiest rank waits."""
        return max(0.0, 1.0 - self.bound_s / self.step_s)

    def write_json(self, path: Path) -> None:
        """Write everything but the profile and the simulated events."""
        document: dict[str, Any] = {
            name: value
            for name, value in dataclasses.asdict(self).items()
            if name not in ("profile", "events", "first_step")
        }
        document |= {"images_per_s": self.images_per_s, "bubble": self.bubble}
        path.write_text(json.dumps(document, indent=1) + "\n", encoding="utf-8")
