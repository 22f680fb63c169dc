"""One slow stage: what it costs the others under each schedule, on virtual devices.

    python benchmarks/slow_stage.py [--ranks P] [--slow R] [--factor X] [--rounds N] [--quick] [--json FILE]

Every stage takes 4.3 units a step (F = I = W = 1 unit, heads 1.3; the last one, without a head, 3), one takes X times
as long. Under `exact` and `async` a batch passes every stage, so the slow one sets the pace for all. Under `free` each
stage goes on at its own pace: the slow one leaves batches out, those behind it train again on what they have.
"""

from __future__ import annotations

import argparse
import statistics
import sys
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any

from ours import LocalPipeline
from ranks import Rank, RanksFailed, run_ranks
from tables import (
    Row,
    at_least,
    check_targets,
    document,
    markdown,
    number,
    output_options,
    per_rank,
    positive,
    provenance,
    show,
    spread,
    write_json,
)
from torch import nn
from virtual import METHOD, Clock, batches, equal_costs, register_virtual_heads, virtual_blocks

from pipeline import ConfigError, LoaderData

KINDS = ("exact", "async", "free")
WIDTH = 16
HEAD_UNITS = 1.3


@dataclass(frozen=True)
class Settings:
    """One benchmark.

    Attributes:
        ranks: P, one local module each.
        slow: the slow rank. factor: how many times as long it takes.
        unit_ms: of a forward pass of a whole batch.
        batch: rows.
        steps: of the first stage in one burst.
        rounds: all schedules, with and without the slow stage, one after another.
    """

    ranks: int = 4
    slow: int = 1
    factor: float = 3.0
    unit_ms: float = 10.0
    batch: int = 8
    steps: int = 60
    rounds: int = 5
    deadline_s: float = 600.0


@dataclass(frozen=True)
class SlowRow(Row):
    """A :class:`tables.Row`, and what every rank did in a burst.

    Attributes:
        slowed: times as long as the others that the slow stage takes; 1 = none is slow.
        steps, reused, skipped: by rank, median over rounds.
    """

    slowed: float
    steps: tuple[float, ...]
    reused: tuple[float, ...]
    skipped: tuple[float, ...]


def work(rank: Rank, settings: Settings) -> list[tuple[str, float, dict[str, Any]]]:
    """All rounds on one rank; on rank 0 (schedule, factor, the epoch's record)."""
    clock = Clock()
    found = []
    runner = LocalPipeline(rank, 1, settings.steps - 1)
    costs = equal_costs(settings.ranks, settings.unit_ms / 1e3, HEAD_UNITS)
    slow = costs[settings.slow].scaled(settings.factor)
    for factor in (1.0, settings.factor):
        mine = slow if factor > 1 and rank.index == settings.slow else costs[rank.index]
        register_virtual_heads(mine, clock, settings.batch, f"{METHOD}{factor:g}")
    for _ in range(settings.rounds):
        for kind in KINDS:
            for factor in (1.0, settings.factor):
                stages = list(costs)
                if factor > 1:
                    stages[settings.slow] = slow
                network = nn.Sequential(*virtual_blocks(stages, clock, WIDTH, settings.batch))
                data = LoaderData(batches(settings.steps, settings.batch, WIDTH), batches(1, 2, WIDTH))
                rank.meet()
                record = runner.epoch(sections(settings, kind, f"{METHOD}{factor:g}"), data, network)
                if record is not None:
                    found.append((kind, factor, record))
    return found


def sections(settings: Settings, kind: str, method: str) -> dict[str, dict[str, Any]]:
    """The configuration: plain local learning, which is what all three schedules can do."""
    return {
        "model": {"modules": settings.ranks},
        "method": {"name": method},
        "schedule": {"kind": kind},
        "data": {"batch_size": settings.batch},
        "optim": {"schedule": "constant", "warmup_epochs": 0},
        "train": {"epochs": 1},
        "precision": {"compute": "fp32"},
        "runtime": {"device": "cpu", "threads": 1, "deadline_s": settings.deadline_s},
    }


def measure(settings: Settings) -> list[SlowRow]:
    """One row per schedule, with and without the slow stage."""
    found = run_ranks(work, settings.ranks, settings, deadline_s=settings.deadline_s)[0]
    rows = []
    stage_s = (3 + HEAD_UNITS) * settings.unit_ms / 1e3
    for kind in KINDS:
        for factor in (1.0, settings.factor):
            records = [record for name, slowed, record in found if (name, slowed) == (kind, factor)]
            # The first stage takes every batch, so its time is that of the data; at the end it waits for nobody.
            rates = [settings.steps * settings.batch / record["stages"][0]["wall_s"] for record in records]
            rate, low, high = spread(rates)
            bound = settings.batch / stage_s / (1.0 if kind == "free" else factor)

            def per_stage(key: str, records: Sequence[dict[str, Any]] = records) -> tuple[float, ...]:
                stages = range(settings.ranks)
                return tuple(statistics.median(record["stages"][r][key] for record in records) for r in stages)

            wall = per_stage("wall_s")
            rows.append(
                SlowRow(
                    system="localpipe",
                    method="dgl",
                    schedule=kind,
                    ranks=settings.ranks,
                    modules=settings.ranks,
                    micro_batches=1,
                    images_per_s=rate,
                    low=low,
                    high=high,
                    ratio_to_bp=None,
                    bound=bound,
                    efficiency=rate / bound,
                    busy=tuple(b / w for b, w in zip(per_stage("busy_s"), wall, strict=True)),
                    bytes_per_step=sum(per_stage("bytes_sent")) / settings.steps,
                    slowed=factor,
                    steps=per_stage("steps"),
                    reused=per_stage("reused"),
                    skipped=per_stage("skipped"),
                )
            )
    return rows


COLUMNS = (
    "schedule", "slow stage", "rows/s", "low", "high", "steps by rank", "on a batch used before", "batches left out",
)  # fmt: skip


def cells(rows: Sequence[SlowRow]) -> list[list[str]]:
    """The table as text."""
    return [
        [
            row.schedule,
            f"{row.slowed:g}x" if row.slowed > 1 else "none",
            *(number(value, ".0f") for value in (row.images_per_s, row.low, row.high)),
            *(per_rank(values, ".0f") for values in (row.steps, row.reused, row.skipped)),
        ]
        for row in rows
    ]


def verdict(rows: Sequence[SlowRow]) -> str:
    """What the slow stage costs, from the rows."""
    parts = []
    for kind in KINDS:
        even, slow = (row.images_per_s for row in rows if row.schedule == kind)
        parts.append(f"{kind} keeps {100 * slow / even:.0f} %")
    return "With the slow stage, of the pace of the first stage " + ", ".join(parts) + "."


def page(result: dict[str, Any], rows: Sequence[SlowRow], command: str) -> str:
    """The result as Markdown."""
    settings = result["settings"]
    return "\n\n".join(
        [
            "# One slow stage (virtual devices)",
            provenance(result, command),
            f"{settings['ranks']} ranks of one local module; a step takes {3 + HEAD_UNITS:g} units of "
            f"{settings['unit_ms']:g} ms (3 on the last rank, which has no head), on rank "
            f"{settings['slow']} {settings['factor']:g} times that. "
            f"{settings['steps']} batches of {settings['batch']} rows a burst, {settings['rounds']} rounds; medians. "
            f"Expected: exact and async keep 1/{settings['factor']:g} of their pace, free keeps all of it. Filling the "
            "queues lets the first stages run a few batches ahead of that in so short a burst.",
            markdown(COLUMNS, cells(rows)),
            verdict(rows) + "\n",
        ]
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    default = Settings()
    parser.add_argument("--ranks", type=at_least(3), metavar="P", default=default.ranks, help="number of stages")
    parser.add_argument("--slow", type=at_least(1), metavar="R", default=default.slow, help="the slow rank")
    parser.add_argument("--factor", type=positive, metavar="X", default=default.factor, help="times as long")
    parser.add_argument("--rounds", type=at_least(1), metavar="N", default=default.rounds, help="interleaved rounds")
    parser.add_argument("--quick", action="store_true", help="one short round: less than a minute")
    output_options(parser)
    given = parser.parse_args()
    settings = Settings(ranks=given.ranks, slow=given.slow, factor=given.factor, rounds=given.rounds)
    if given.quick:
        settings = Settings(ranks=3, slow=1, factor=given.factor, rounds=1, steps=20, deadline_s=55.0)
    if settings.factor <= 1:
        raise ConfigError(f"--factor {settings.factor:g}: a slow stage takes longer than the others; use more than 1")
    check_targets(json=given.json, output=given.output)
    if settings.slow >= settings.ranks:
        raise ConfigError(f"--slow {settings.slow}: there are ranks 0 to {settings.ranks - 1}; choose one of them")
    rows = measure(settings)
    result = document(asdict(settings), [asdict(row) for row in rows])
    show("One slow stage (virtual devices)", COLUMNS, cells(rows))
    print(verdict(rows))
    if given.json is not None:
        write_json(given.json, result)
    if given.output is not None:
        command = " ".join(["python benchmarks/slow_stage.py", *sys.argv[1:]])
        given.output.write_text(page(result, rows, command), encoding="utf-8")


if __name__ == "__main__":
    try:
        main()
    except (ConfigError, RanksFailed) as error:
        sys.exit(f"slow_stage.py: {error}")
