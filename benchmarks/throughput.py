"""Images/s of the same network, batch, precision and cores: backpropagation in every usual way, and local learning.

    python benchmarks/throughput.py [--model NAME] [--modules K] [--ranks P] [--batch N] [--device cpu|cuda]
                                    [--rounds N] [--steps N] [--quick] [--json FILE] [--output FILE.md]
                                    [--chart FILE.png]

One process per rank, each on a core of its own with one thread (or on a GPU of its own). Systems take turns in short
bursts; a ratio is that of a burst to the bursts of backpropagation on one device before and after it.
"""

from __future__ import annotations

import argparse
import math
import sys
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from typing import Any

import torch
from baselines import GPIPE, TORCH_SCHEDULES
from bursts import Burst, System, Turn, merge, take_turns
from charts import ChartError
from ranks import Rank, RanksFailed, available_cores, run_ranks
from tables import at_least, check_targets, document, output_options, spread, write_json
from throughput_bench import CHECKED_STEPS, METHODS, Bench, Placement, Settings, method_spans
from throughput_page import EXPECTED, ThroughputRow, chart, page, show_rows

from pipeline import ConfigError, backbone_names

SCHEDULES = (("exact", 1), ("exact", 2), ("exact", 4), ("async", 1))
TOLERANCE = 5e-3
"""Relative difference of losses between systems that compute the same; they differ in the order of sums only."""


def systems(settings: Settings, placement: Placement, bench: Bench | None) -> list[System]:
    """Everything that is run; the first is the reference. ``bench`` is None where they are only named."""
    ranks = settings.ranks
    found = [System("BP, one device", "bp", "", 1, 1, 1, lambda _: bench.alone(False))]
    if settings.baselines:
        found += baselines(settings, placement, bench)
    for method, span in method_spans(settings):
        for kind, micro_batches in SCHEDULES[::3] if settings.quick else SCHEDULES:
            what = (method, span, kind, micro_batches, placement.cuts[method, span, kind])
            name = method if span == 1 else f"{method} + hpff"
            found.append(
                System(
                    "localpipe", name, kind, ranks, settings.modules, micro_batches, lambda _, w=what: bench.ours(*w)
                )
            )
    return found


def baselines(settings: Settings, placement: Placement, bench: Bench | None) -> list[System]:
    """Every other way to do backpropagation."""
    ranks, cores = settings.ranks, settings.cores
    found = []
    if settings.device == "cpu" and cores > 1:
        threads = min(ranks, cores)
        found.append(System(f"BP, {threads} threads", "bp", "", 1, 1, 1, lambda _: bench.alone(False, threads)))
    if not settings.quick:
        found.append(System("BP, checkpointing", "bp", "", 1, 1, 1, lambda _: bench.alone(True)))
    found.append(System("DDP", "bp", "", ranks, 1, 1, lambda _: bench.copies()))
    naive = placement.parts[ranks, 1]
    found.append(
        System("naive model parallel", "bp", "", ranks, ranks, 1, lambda _: bench.pipeline(GPIPE, 1, naive))
    )
    for schedule in TORCH_SCHEDULES[::2] if settings.quick else TORCH_SCHEDULES:
        for micro_batches in settings.torch_micro_batches:
            if not schedule.fits(micro_batches, ranks):
                continue
            parts = ranks * schedule.parts_per_rank
            how = (schedule, micro_batches, placement.parts[parts, micro_batches])
            name = f"torch {schedule.name}"
            found.append(
                System(name, "bp", schedule.name, ranks, parts, micro_batches, lambda _, how=how: bench.pipeline(*how))
            )
    return found


@dataclass(frozen=True)
class RankRecord:
    """What one rank hands back."""

    turns: list[tuple[int, Burst | None]]
    placement: Placement
    losses: dict[int, list[float]]


def work(rank: Rank, settings: Settings) -> RankRecord:
    """Everything, on one rank."""
    bench = Bench(settings, rank)
    placement = bench.place()
    losses = bench.reference_losses()
    return RankRecord(take_turns(rank, systems(settings, placement, bench), settings.rounds), placement, losses)


def check_losses(system: System, turns: Sequence[Turn], references: Mapping[int, Sequence[float]]) -> None:
    """Refuse a baseline that does not compute what one process computes.

    Raises:
        RanksFailed: the first losses of a burst are not those of one process with the same micro-batches.
    """
    if system.method != "bp":
        return
    wanted = references[system.ranks if system.name == "DDP" else system.micro_batches]
    for turn in turns:
        steps = len(turn.losses) // system.ranks if system.name == "DDP" else len(turn.losses)
        copies = [turn.losses[start : start + CHECKED_STEPS] for start in range(0, len(turn.losses), steps)]
        for expected, *seen in zip(wanted, *copies, strict=True):
            mean = sum(seen) / len(seen)
            if abs(mean - expected) > TOLERANCE * abs(expected):
                raise RanksFailed(f"{system.label} has a loss of {mean:.5f} where one process has {expected:.5f}")


def rows_of(settings: Settings, record: RankRecord, turns: Mapping[int, Sequence[Turn]]) -> list[ThroughputRow]:
    """One row per system."""
    default = Settings()
    usual = (settings.model, settings.ranks, settings.device) == (default.model, default.ranks, default.device)
    rows = []
    for index, system in enumerate(systems(settings, record.placement, None)):
        mine = turns[index]
        check_losses(system, mine, record.losses)
        rate, low, high = spread([settings.batch / turn.step_s for turn in mine])
        ratio, ratio_low, ratio_high = spread([turn.ratio for turn in mine])
        step_s = settings.batch / rate
        work_s = tuple(spread(values)[0] for values in zip(*(turn.work_s for turn in mine), strict=True))
        bound = settings.batch / max(work_s) if work_s else None
        busy = tuple(min(1.0, seconds / step_s) for seconds in work_s)
        if system.name == "localpipe":
            span = 2 if system.method.endswith("hpff") else 1
            cut = record.placement.cuts[system.method.split()[0], span, system.schedule]
            parts = tuple(sum(modules) for modules in cut)
        else:
            parts = record.placement.parts.get((system.modules, system.micro_batches), ()) if system.modules > 1 else ()
        rows.append(
            ThroughputRow(
                system=system.name,
                method=system.method,
                schedule=system.schedule,
                ranks=system.ranks,
                modules=system.modules,
                micro_batches=system.micro_batches,
                images_per_s=rate,
                low=low,
                high=high,
                ratio_to_bp=ratio,
                bound=bound,
                efficiency=None if bound is None else rate / bound,
                busy=busy,
                bytes_per_step=mine[0].sent,
                ratio_low=ratio_low,
                ratio_high=ratio_high,
                parts=parts,
                expected=EXPECTED.get((system.name, system.micro_batches)) if usual else None,
            )
        )
    return rows


def refuse(settings: Settings) -> None:
    """Refuse options that cannot work together.

    Raises:
        ConfigError: one line with the option, its value and the fix.
    """
    gpus = torch.cuda.device_count()
    if settings.device == "cuda" and gpus < settings.ranks:
        raise ConfigError(
            f"--device cuda --ranks {settings.ranks} needs one GPU per rank, found {gpus}; use fewer ranks, or cpu"
        )
    if settings.device == "cpu" and settings.ranks > settings.cores:
        raise ConfigError(
            f"--ranks {settings.ranks} on {settings.cores} cores: every rank needs a core of its own; use fewer ranks, "
            "or scaling.py for more ranks than cores"
        )
    if settings.modules < settings.ranks:
        raise ConfigError(f"--modules {settings.modules} is less than --ranks {settings.ranks}; use as many or more")
    whole = math.lcm(settings.ranks, *settings.torch_micro_batches)
    if settings.batch % whole:
        raise ConfigError(f"--batch {settings.batch} is no multiple of {whole} (ranks, micro-batches); use one")


def measure(settings: Settings) -> tuple[dict[str, Any], list[ThroughputRow]]:
    """Everything; returns the document and its rows."""
    records = run_ranks(work, settings.ranks, settings, deadline_s=settings.deadline_s)
    rows = rows_of(settings, records[0], merge([record.turns for record in records]))
    return document(asdict(settings), [asdict(row) for row in rows], settings.device), rows


def main() -> None:
    default = Settings()
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", choices=backbone_names(), default=default.model, help="backbone")
    parser.add_argument("--modules", type=at_least(2), metavar="K", default=default.modules, help="local modules")
    parser.add_argument("--ranks", type=at_least(2), metavar="P", default=default.ranks, help="processes")
    parser.add_argument("--batch", type=at_least(8), metavar="N", default=default.batch, help="images per step")
    parser.add_argument("--device", choices=("cpu", "cuda"), default=default.device, help="cuda: one GPU per rank")
    parser.add_argument("--rounds", type=at_least(1), metavar="N", default=default.rounds, help="interleaved rounds")
    parser.add_argument("--steps", type=at_least(1), metavar="N", default=default.steps, help="timed steps of a burst")
    parser.add_argument("--methods", choices=METHODS, nargs="+", default=METHODS, help="methods of local learning")
    parser.add_argument("--ours-only", dest="baselines", action="store_false", help="no baseline but BP on one device")
    parser.add_argument("--quick", action="store_true", help="few systems, a small network: less than a minute")
    output_options(parser, chart="draw the ratios to one device")
    options = vars(parser.parse_args())
    targets = {name: options.pop(name) for name in ("json", "output", "chart")}
    settings = Settings(**{**options, "methods": tuple(options["methods"])}, cores=len(available_cores()))
    if settings.quick:
        settings = replace(settings, model="resnet20", batch=16, rounds=1, steps=2, deadline_s=120.0)
    refuse(settings)
    check_targets(**targets)
    command = " ".join(["python benchmarks/throughput.py", *sys.argv[1:]])
    result, rows = measure(settings)
    show_rows(rows)
    if targets["json"] is not None:
        write_json(targets["json"], result)
    if targets["output"] is not None:
        picture = targets["chart"].name if targets["chart"] is not None else None
        targets["output"].write_text(page(result, rows, command, picture), encoding="utf-8")
    if targets["chart"] is not None:
        chart(targets["chart"], result, rows)


if __name__ == "__main__":
    try:
        main()
    except (ConfigError, RanksFailed, ChartError) as error:
        sys.exit(f"throughput.py: {error}")
