"""Images/s of the same network, batch, precision and cores: backpropagation in every usual way, and local learning.

    python benchmarks/throughput.py [--model NAME] [--modules K] [--ranks P] [--batch N] [--device cpu|cuda]
                                    [--rounds N] [--steps N] [--methods NAME ...] [--ours-only] [--quick]
                                    [--json FILE] [--output FILE.md] [--chart FILE.png]

One process per rank, each on a core of its own with one thread (or on a GPU of its own). Systems take turns in short
bursts; a ratio is that of a burst to the bursts of backpropagation on one device before and after it.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from functools import partial
from pathlib import Path

import torch
from bursts import System, Turn, compete
from charts import bars
from ranks import RanksFailed
from runner import Report, Target, main
from tables import BUSY, SPEED, Column, M, P, Row, Table, label, make_row, medians, spread, system_name
from throughput_bench import CHECKED_STEPS, Bench, Settings, cut_key, systems

from pipeline import ConfigError

TOLERANCE = 5e-3
"""Relative difference of losses between systems that compute the same; they differ in the order of sums only."""
EXPECTED = {
    "BP, 2 threads": {1: 1.71},
    "DDP": {1: 1.90},
    "naive model parallel": {1: 0.99},
    "torch GPipe": {2: 1.35, 4: 1.57, 8: 1.82},
    "torch 1F1B": {2: 1.43, 4: 1.66, 8: 1.78},
    "torch Interleaved1F1B": {2: 1.54, 4: 1.74, 8: 1.83},
    "torch InterleavedZeroBubble": {2: 1.62, 4: 1.68, 8: 1.66},
    "torch ZBVZeroBubble": {2: 1.61, 4: 1.68, 8: 1.73},
}
"""Ratios to one device by M in an earlier, separate measurement: ResNet-32, batch 256, two pinned cores."""
COLUMNS = (
    Column("system", system_name),
    P,
    Column("K", lambda row: None if row["method"] == "bp" else row["modules"]),
    M,
    *SPEED,
    Column("ratio", "ratio_to_bp", ".2f"),
    Column("low", "ratio_low", ".2f"),
    Column("high", "ratio_high", ".2f"),
    Column("expected", "expected", ".2f"),
    Column("bound", "bound", ".1f"),
    Column("efficiency", "efficiency", ".2f"),
    BUSY,
    Column("MB/step", lambda row: row["bytes_per_step"] / 1e6, ".2f"),
    Column("parts", lambda row: "/".join(map(str, row["parts"]))),
)
LEGEND = (
    "P: ranks, K: local modules, M: micro-batches. Low and high: of all rounds. Expected: the ratio of an earlier, "
    "separate measurement of the same baselines (batch 256). Bound: batch / max stage time; efficiency: images/s / "
    "bound. Stage time and busy: ours from the recorded actions of a run, the others from the CPU time of the process, "
    "which includes its share of the messages. MB/step: sent by all ranks; ours as counted, others by tensor sizes. "
    "Parts: blocks of every part of the network (torch) or rank (ours), by time measured here: the fastest of four "
    "candidates in a short run (interleaved schedules share the cut of Interleaved1F1B, GPipe and 1F1B that of GPipe). "
    "HPFF: cascade over 2 modules, 2x2 patches. Naive model parallel is GPipe with M = 1. BatchNorm sees batch / M "
    "images, with DDP batch / P."
)
COLOURS = {"one process": "#9aa0a8", "DDP": "#5b6570", "torch pipelines": "#e08214", "localpipe": "#1f6fb2"}


def check_losses(system: System, turns: Sequence[Turn], references: Mapping[int, Sequence[float]]) -> None:
    """Refuse a baseline that does not compute what one process computes.

    Raises:
        RanksFailed: the first losses of a burst are not those of one process with the same micro-batches.
    """
    if system.method != "bp":
        return
    ranks = system.ranks if system.system == "DDP" else 1  # which have a loss each
    wanted = references[ranks if ranks > 1 else system.micro_batches]
    for turn in turns:
        steps = len(turn.losses) // ranks
        copies = [turn.losses[start : start + CHECKED_STEPS] for start in range(0, len(turn.losses), steps)]
        for expected, *seen in zip(wanted, *copies, strict=True):
            mean = sum(seen) / len(seen)
            if abs(mean - expected) > TOLERANCE * abs(expected):
                raise RanksFailed(f"{label(system.row)} has a loss of {mean:.5f} where one process has {expected:.5f}")


def row_of(settings: Settings, system: System, turns: Sequence[Turn], cut: Sequence[int | tuple[int, ...]]) -> Row:
    """One system, with four keys of its own: ``ratio_low`` and ``ratio_high`` of all rounds, ``parts`` (blocks of every
    part of a baseline, of every rank of ours), ``expected`` (the ratio known before, for the default network)."""
    ratio, ratio_low, ratio_high = spread([turn.ratio for turn in turns])
    usual = (settings.model, settings.ranks, settings.device) == ("resnet32", 2, "cpu")
    return make_row(
        **system.row,
        images=settings.batch,
        steps_s=[turn.step_s for turn in turns],
        ratio_to_bp=ratio,
        work_s=medians([turn.work_s for turn in turns]),
        bytes_per_step=turns[0].sent,
        ratio_low=ratio_low,
        ratio_high=ratio_high,
        parts=[blocks if isinstance(blocks, int) else sum(blocks) for blocks in cut],
        expected=EXPECTED.get(system.system, {}).get(system.micro_batches) if usual else None,
    )


def at_work(row: Row) -> float:
    """Share of all cores at work: the sum of the ranks' work / (ranks x wall)."""
    return sum(row["busy"]) / len(row["busy"])


def targets(rows: Sequence[Row]) -> list[Target]:
    """Cores at work, and beside each the limit of its placement: what it would be if the busiest rank never waited."""
    ours = [row for row in rows if row["method"] != "bp" and row["busy"]]
    plain = [row for row in ours if "hpff" not in row["method"] and label(row).endswith("exact")]
    groups = {"async": [row for row in ours if row["schedule"] == "async"], "plain methods, exact, M = 1": plain}
    return [
        Target(
            f"cores at work, sum of the ranks' compute / (P x wall), {group}",
            {f"{label(row)}; its placement allows {at_work(row) / max(row['busy']):.3f}": at_work(row) for row in its},
            least=0.93,
        )
        for group, its in groups.items()
    ]


def findings(rows: Sequence[Row]) -> list[str]:
    """What the rows say, the good and the bad."""
    ranked = sorted(rows, key=lambda row: -row["ratio_to_bp"])
    ours = [row for row in ranked if row["method"] != "bp"]
    others = [row for row in ranked if row["method"] == "bp"]  # BP on one device, at least
    found = [
        f"The fastest system is {label(ranked[0])}. Fastest of ours: {label(ours[0])}, {ours[0]['ratio_to_bp']:.2f} "
        f"times one device. Fastest baseline: {label(others[0])}, {others[0]['ratio_to_bp']:.2f} times."
    ]
    rivals = [row for row in others if row["system"] in ("BP, one device", "BP, 2 threads", "DDP")]
    rivals += [row for row in others if row["system"].startswith("torch")][:1]  # the fastest of torch's pipelines
    for rival in rivals:
        slower = [label(row) for row in ours if row["ratio_to_bp"] < rival["ratio_to_bp"]]
        faster = [label(row) for row in ours if row["ratio_to_bp"] >= rival["ratio_to_bp"]]
        found.append(
            f"{label(rival)} ({rival['ratio_to_bp']:.2f}) is faster than {len(slower)} of {len(ours)} rows of ours"
            + (f": {', '.join(slower)}" if 0 < len(slower) <= len(faster) else "")
            + (f"; not than {', '.join(faster)}" if 0 < len(faster) < len(slower) else "")
            + "."
        )
    return found


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


def measure(settings: Settings) -> Report:
    """One row per system."""
    refuse(settings)
    found, records = compete(settings, systems, Bench, settings.ranks, settings.deadline_s)
    cuts, losses = records[0]
    for system, turns in found:
        check_losses(system, turns, losses)
    rows = [row_of(settings, system, turns, cuts.get(cut_key(system), ())) for system, turns in found]
    about = (
        f"{settings.model} on 32x32 images, batch {settings.batch} for all ranks together, fp32, channels last, SGD "
        f"with Nesterov momentum, the same random images in every step; {settings.ranks} ranks, one "
        f"{'core and one thread' if settings.device == 'cpu' else 'GPU'} each. {settings.rounds} interleaved rounds; a "
        f"burst is {settings.warmup} warm-up and {settings.steps} timed steps. Ratio: of a burst to the neighbouring "
        "bursts of backpropagation on one device; median, lowest and highest of all rounds. The losses of all "
        "baselines equal those of one process with the same micro-batches."
    )
    draw = partial(chart, settings=settings, rows=rows)
    return Report("Throughput", [Table(COLUMNS, rows)], [about], targets(rows), findings(rows), LEGEND, draw=draw)


def chart(path: Path, settings: Settings, rows: Sequence[Row]) -> None:
    """Ratios to one device as bars."""

    def group(row: Row) -> str:
        if row["method"] != "bp" or row["system"] == "DDP":
            return row["system"]
        return "one process" if row["ranks"] == 1 else "torch pipelines"

    entries = [(label(row), group(row), row["ratio_to_bp"], row["ratio_low"], row["ratio_high"]) for row in rows]
    title = f"{settings.model}, batch {settings.batch}, {settings.ranks} ranks ({settings.device})"
    bars(path, title, entries, COLOURS, "images/s, ratio to backpropagation on one device")


QUICK = {"model": "resnet20", "batch": 16, "rounds": 1, "steps": 2, "quick": True, "deadline_s": 120.0}

if __name__ == "__main__":
    main(__doc__, Settings, measure, QUICK, chart="the ratios to one device")
