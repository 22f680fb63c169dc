"""One slow stage: what it costs the others under each schedule, on virtual devices.

    python benchmarks/slow_stage.py [--quick] [--json FILE] [--output FILE.md] ...      see --help

Every stage takes 4.3 units a step (F = I = W = 1 unit, heads 1.3; the last one, without a head, 3), one takes X times
as long. Under `exact` and `async` a batch passes every stage, so the slow one sets the pace for all. Under `free` each
stage goes on at its own pace: the slow one leaves batches out, those behind it train again on what they have.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from bursts import LocalPipeline, System, sections
from ranks import Rank, run_ranks
from runner import Report, Target, main, option
from tables import Column, Row, Table, make_row, medians
from virtual import METHOD, Clock, equal_costs, features, register_virtual_heads, virtual_network

from pipeline import ConfigError, read_metrics

KINDS = ("exact", "async", "free")
WIDTH = 16
HEAD_UNITS = 1.3
COLUMNS = (
    Column("schedule", "schedule"),
    Column("slow stage", lambda row: f"{row['slowed']:g}x" if row["slowed"] > 1 else "none"),
    Column("rows/s", "images_per_s", ".0f"), Column("low", "low", ".0f"), Column("high", "high", ".0f"),
    Column("steps by rank", "steps", ".0f"), Column("on a batch used before", "reused", ".0f"),
    Column("batches left out", "skipped", ".0f"),
)  # fmt: skip
Records = list[dict[str, Any]]  # of rank 0: the epoch in metrics.jsonl, round by round


@dataclass(frozen=True)
class Settings:
    ranks: int = option(4, "number of stages, one local module each", "P", above=2)
    slow: int = option(1, "the slow rank", "R")
    factor: float = option(3.0, "times as long as the others that it takes", "X", above=1)
    rounds: int = option(5, "interleaved rounds", "N")
    unit_ms: float = 10.0  # of a forward pass of a whole batch
    batch: int = 8  # rows
    steps: int = 60  # of the first stage in one burst
    deadline_s: float = 600.0


def work(rank: Rank, settings: Settings) -> dict[tuple[str, float], Records]:
    """All rounds on one rank: its records by (schedule, times as long as the slow stage takes)."""
    clock = Clock(settings.batch)
    runner = LocalPipeline(rank, 1, settings.steps - 2)
    even = equal_costs(settings.ranks, settings.unit_ms / 1e3, HEAD_UNITS)
    slowed = [cost.scaled(settings.factor if stage == settings.slow else 1.0) for stage, cost in enumerate(even)]
    costs = {1.0: even, settings.factor: slowed}
    for factor, stages in costs.items():
        register_virtual_heads(stages[rank.index], clock, f"{METHOD}{factor:g}")
    data = runner.data(*features(settings.batch, WIDTH))
    found: dict[tuple[str, float], list[dict[str, Any]]] = {(kind, factor): [] for kind in KINDS for factor in costs}
    for _ in range(settings.rounds):
        for (kind, factor), records in found.items():
            network = virtual_network(costs[factor], clock, WIDTH)
            system = System("localpipe", f"{METHOD}{factor:g}", kind, settings.ranks, settings.ranks)
            rank.meet()
            folder = runner.train(sections(system, settings.batch), data, network)
            records += read_metrics(folder / "metrics.jsonl") if rank.leader else []
    return found


def row_of(settings: Settings, key: tuple[str, float], records: Records) -> Row:
    """One schedule, with or without the slow stage."""
    kind, factor = key

    def per_stage(key: str) -> list[float]:
        return medians([[stage[key] for stage in record["stages"]] for record in records])

    stage_s = (3 + HEAD_UNITS) * settings.unit_ms / 1e3 * (1.0 if kind == "free" else factor)
    # The first stage takes every batch, so its time is that of the data; at the end it waits for nobody.
    steps_s = [record["stages"][0]["wall_s"] / settings.steps for record in records]
    return make_row(
        settings.batch, steps_s, stage_s=[stage_s], method="dgl", schedule=kind, ranks=settings.ranks,
        modules=settings.ranks, bytes_per_step=sum(per_stage("bytes_sent")) / settings.steps, slowed=factor,
        busy=[busy_s / wall_s for busy_s, wall_s in zip(per_stage("busy_s"), per_stage("wall_s"), strict=True)],
        steps=per_stage("steps"), reused=per_stage("reused"), skipped=per_stage("skipped"),
    )  # fmt: skip


def measure(settings: Settings) -> Report:
    """One row per schedule, with and without the slow stage."""
    if settings.slow >= settings.ranks:
        raise ConfigError(f"--slow {settings.slow}: there are ranks 0 to {settings.ranks - 1}; choose one of them")
    found = run_ranks(work, settings.ranks, settings, deadline_s=settings.deadline_s)[0]
    rows = {key: row_of(settings, key, records) for key, records in found.items()}
    kept = {kind: rows[kind, settings.factor]["images_per_s"] / rows[kind, 1.0]["images_per_s"] for kind in KINDS}
    shares = ", ".join(f"{kind} keeps {100 * share:.0f} %" for kind, share in kept.items())
    about = (
        f"{settings.ranks} ranks of one local module; a step takes {3 + HEAD_UNITS:g} units of {settings.unit_ms:g} ms "
        f"(3 on the last rank, which has no head), on rank {settings.slow} {settings.factor:g} times that. "
        f"{settings.steps} batches of {settings.batch} rows a burst, {settings.rounds} rounds; medians. Expected: "
        f"exact and async keep 1/{settings.factor:g} of their pace, free keeps all of it. Filling the queues lets the "
        "first stages run a few batches ahead of that in so short a burst."
    )
    target = Target("pace that the first stage keeps under free", {"one slow stage": kept["free"]}, least=0.95)
    finding = f"With the slow stage, of the pace of the first stage {shares}."
    tables = [Table(COLUMNS, list(rows.values()))]
    return Report("One slow stage (virtual devices)", tables, [about], [target], [finding])


if __name__ == "__main__":
    main(__doc__, Settings, measure, quick={"ranks": 3, "slow": 1, "rounds": 1, "steps": 20, "deadline_s": 55.0})
