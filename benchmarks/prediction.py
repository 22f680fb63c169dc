"""How well launch/plan.py predicts a run, and what a placement by measured cost gains over one by number.

    python benchmarks/prediction.py [--quick] [--json FILE] [--output FILE.md] ...      see --help

Every rank has a core of its own and one thread. For every method: its modules are profiled on one core while the others
rest, the plan predicts the step of both placements, and both then run. Rounds are interleaved.
"""

from __future__ import annotations

import statistics
from collections.abc import Sequence
from dataclasses import dataclass

from bursts import Burst, LocalPipeline, System, sections
from networks import network, random_images
from ranks import Rank, available_cores, run_ranks
from runner import Report, Target, main, option
from tables import BUSY, Column, Row, Table, make_row, medians, system_name

from pipeline import ConfigError, backbone_names, explain, from_dict
from pipeline import measure as profile_of

METHODS = (("dgl", 1, "exact"), ("infopro", 1, "exact"), ("infopro", 2, "exact"), ("infopro", 2, "async"))
"""(method, cascade span, schedule)."""
PLACEMENTS = ("count", "measured")
COLUMNS = (
    Column("method", "method"), Column("schedule", "schedule"), Column("placement", "placement"),
    Column("modules", lambda row: "/".join(map(str, row["sizes"]))),
    Column("predicted ms", lambda row: 1e3 * row["predicted_s"], ".0f"),
    Column("measured ms", lambda row: 1e3 * row["batch"] / row["images_per_s"], ".0f"),
    Column("low", lambda row: 1e3 * row["batch"] / row["high"], ".0f"),
    Column("high", lambda row: 1e3 * row["batch"] / row["low"], ".0f"),
    Column("measured / predicted", "ratio", ".2f"), BUSY,
)  # fmt: skip


@dataclass(frozen=True)
class Settings:
    model: str = option("resnet32", "backbone", choices=backbone_names())
    modules: int = option(8, "local modules", "K", above=1)
    ranks: int = option(2, "processes", "P", above=1)
    batch: int = option(64, "images per step", "N", above=1)
    rounds: int = option(5, "interleaved rounds", "N")
    warmup: int = 2
    steps: int = 4
    deadline_s: float = 1200.0

    @property
    def systems(self) -> list[System]:
        """What is planned and run, with both placements."""
        size = (self.ranks, self.modules)
        return [System("localpipe", method, kind, *size, span=span) for method, span, kind in METHODS]


Sample = tuple[list[int], float, Burst]
"""Of one plan and one run of it: modules of every rank, seconds of a step as predicted, and what was measured."""


def work(rank: Rank, settings: Settings) -> dict[tuple[System, str], list[Sample]]:
    """All rounds on one rank; rank 0 hands back the samples, by system and placement."""
    runner = LocalPipeline(rank, settings.warmup, settings.steps)
    data = runner.data(*random_images(settings.batch))
    keys = [(system, placement) for system in settings.systems for placement in PLACEMENTS]
    found: dict[tuple[System, str], list[Sample]] = {key: [] for key in keys}
    for _ in range(settings.rounds):
        for system in settings.systems:
            base = sections(system, settings.batch)
            base["model"] |= {"name": settings.model, "cuts": "even"}
            base["patches"] = {"grid": system.span}
            profile = profile_of(from_dict(base), settings.ranks) if rank.leader else None
            for placement in PLACEMENTS:
                plan = None
                if profile is not None:
                    plan = explain(from_dict({**base, "partition": {"kind": placement}}), settings.ranks, profile)
                sizes, predicted_s = rank.share(plan and (list(plan.placements[0].sizes), plan.step_s))
                config = {**base, "partition": {"kind": "given", "stages": sizes}}
                burst = runner.burst(config, data, network(settings.model))
                if burst is not None:
                    found[system, placement].append((sizes, predicted_s, burst))
    return found


def row_of(settings: Settings, key: tuple[System, str], samples: Sequence[Sample]) -> Row:
    """One system and placement. ``predicted_s`` and ``ratio`` (measured / predicted) are medians over all rounds,
    ``sizes`` are the modules of every rank in the last one."""
    system, placement = key
    steps_s, predicted_s = [burst.step_s for *_, burst in samples], [seconds for _, seconds, _ in samples]
    return make_row(
        settings.batch, steps_s, medians([burst.work_s for *_, burst in samples]), **system.row,
        bytes_per_step=samples[0][2].sent, placement=placement, batch=settings.batch, sizes=samples[-1][0],
        predicted_s=statistics.median(predicted_s),
        ratio=statistics.median(step_s / seconds for step_s, seconds in zip(steps_s, predicted_s, strict=True)),
    )  # fmt: skip


def measure(settings: Settings) -> Report:
    """One row for every method, schedule and placement."""
    if settings.ranks > (cores := len(available_cores())):
        raise ConfigError(f"--ranks {settings.ranks} on {cores} cores: every rank needs one of its own; use fewer")
    found = run_ranks(work, settings.ranks, settings, deadline_s=settings.deadline_s)[0]
    rows = {key: row_of(settings, key, samples) for key, samples in found.items()}
    ratios = {f"{row['method']}, {row['schedule']}, {row['placement']}": row["ratio"] for row in rows.values()}
    gains = {}
    for system in settings.systems:
        count, measured = rows[system, "count"], rows[system, "measured"]
        gains[system_name(count)] = measured["images_per_s"] / count["images_per_s"]
    about = (
        f"{settings.model}, K = {settings.modules}, {settings.ranks} ranks of one core and one thread each, batch "
        f"{settings.batch}; {settings.rounds} interleaved rounds of {settings.warmup} + {settings.steps} steps. "
        "Predicted: by the plan, from a profile taken in the same round on one core while the others rested."
    )
    targets = [
        Target("measured / predicted", ratios, 0.9, 1.1),
        Target("speed with a placement by measured cost to that with one by number", gains, least=1.0),
    ]
    return Report("Predicted and measured steps", [Table(COLUMNS, list(rows.values()))], [about], targets)


if __name__ == "__main__":
    main(__doc__, Settings, measure, quick={"batch": 8, "rounds": 1})
