"""Images/s of the same network, batch, precision and cores: backpropagation in every usual way, and local learning.

    python benchmarks/throughput.py [--quick] [--json FILE] [--output FILE.md] [--chart FILE.png] ...      see --help

One process per rank, each on a core of its own with one thread (or on a GPU of its own). Systems take turns in short
bursts; a ratio is that of a burst to the bursts of backpropagation on one device before and after it.
"""

from __future__ import annotations

import math
import statistics
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import Any

import torch
from baselines import TORCH_SCHEDULES, Step, data_parallel, one_device, torch_pipeline, torch_systems
from bursts import Burst, LocalPipeline, System, Turn, compete, local_systems, sections, time_steps
from networks import block_seconds, grouped, network, normalise, random_images, split, split_twice
from ranks import Rank, RanksFailed, available_cores
from runner import DASHED, INK, PAPER, Report, Target, main, option, picture
from tables import BUSY, SPEED, Column, M, P, Row, Table, label, make_row, medians, spread, system_name
from torch import Tensor, nn

from pipeline import ConfigError, backbone_names

METHODS = ("dgl", "infopro", "predsim")
WEIGHTS = (1.0, 1.15, 1.3, 0.85)
"""Candidates for every system: how much of its time alone the last part counts, see :func:`networks.split`. Local
heads and the input gradient that the first part does not need are not in the times of blocks."""
CHECKED_STEPS = 2
TOLERANCE = 5e-3  # relative, of losses of systems that compute the same: they differ in the order of sums only
EXPECTED = {
    "BP, 2 threads": {1: 1.71}, "DDP": {1: 1.90}, "naive model parallel": {1: 0.99},
    "torch GPipe": {2: 1.35, 4: 1.57, 8: 1.82}, "torch 1F1B": {2: 1.43, 4: 1.66, 8: 1.78},
    "torch Interleaved1F1B": {2: 1.54, 4: 1.74, 8: 1.83},
    "torch InterleavedZeroBubble": {2: 1.62, 4: 1.68, 8: 1.66}, "torch ZBVZeroBubble": {2: 1.61, 4: 1.68, 8: 1.73},
}  # fmt: skip
"""Ratios to one device by M in an earlier, separate measurement: ResNet-32, batch 256, two pinned cores."""
COLUMNS = (
    Column("system", system_name), P, Column("K", lambda row: None if row["method"] == "bp" else row["modules"]), M,
    *SPEED, Column("ratio", "ratio_to_bp", ".2f"), Column("low", "ratio_low", ".2f"),
    Column("high", "ratio_high", ".2f"), Column("expected", "expected", ".2f"), Column("bound", "bound", ".1f"),
    Column("efficiency", "efficiency", ".2f"), BUSY,
    Column("MB/step", lambda row: row["bytes_per_step"] / 1e6, ".2f"),
    Column("parts", lambda row: "/".join(map(str, row["parts"]))),
)  # fmt: skip
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


@dataclass(frozen=True)
class Settings:
    model: str = option("resnet32", "backbone", choices=backbone_names())
    modules: int = option(4, "local modules", "K", above=1)
    ranks: int = option(2, "processes", "P", above=1)
    batch: int = option(128, "images per step of all ranks together", "N", above=7)
    device: str = option("cpu", "cuda: one GPU per rank", choices=("cpu", "cuda"))
    rounds: int = option(5, "interleaved rounds, in each of which all systems take turns", "N")
    steps: int = option(4, "timed steps of a burst", "N")
    methods: tuple[str, ...] = option(METHODS, "methods of local learning", choices=METHODS)
    ours_only: bool = option(False, "no baseline but BP on one device")
    warmup: int = 1
    cores: int = field(default_factory=lambda: len(available_cores()))
    quick: bool = False
    deadline_s: float = 3600.0

    @property
    def torch_micro_batches(self) -> tuple[int, ...]:
        """M of torch's pipelines."""
        return (2,) if self.quick else (2, 4, 8)


def systems(settings: Settings, ranks: int) -> list[System]:
    """Everything that is run; the first is the reference."""
    found = [System("BP, one device", "bp", "", 1, 1, burst=Bench.alone)]
    if not settings.ours_only:
        threads = min(ranks, settings.cores)
        if settings.device == "cpu" and threads > 1:
            found.append(System(f"BP, {threads} threads", "bp", "", 1, 1, burst=partial(Bench.alone, threads=threads)))
        if not settings.quick:
            found.append(System("BP, checkpointing", "bp", "", 1, 1, burst=partial(Bench.alone, checkpointing=True)))
        found.append(System("DDP", "bp", "", ranks, 1, burst=Bench.copies))
        found.append(System("naive model parallel", "bp", "GPipe", ranks, ranks, burst=Bench.pipeline))
        names = list(TORCH_SCHEDULES)[:: 2 if settings.quick else 1]
        found += torch_systems(names, ranks, settings.torch_micro_batches, Bench.pipeline)
    methods = settings.methods[:1] if settings.quick else settings.methods
    spans = [(method, span) for method in methods for span in (1, 2)]
    return found + local_systems(spans, ranks, settings.modules, settings.quick, Bench.ours)


def cut_key(system: System) -> tuple[Any, ...]:
    """Systems of one key share a cut: those of torch with as many parts and micro-batches, ours with equal work."""
    if system.method == "bp":
        return system.modules, system.micro_batches
    return system.method, system.span, system.schedule if system.span > 1 else ""


class Bench:
    """Runs the systems on one rank. ``cuts``, by :func:`cut_key`, are chosen by time measured here: blocks of every
    part of a torch pipeline; of ours, by rank, blocks of every local module."""

    def __init__(self, settings: Settings, rank: Rank) -> None:
        self.settings, self.rank, self.device = settings, rank, torch.device("cpu")
        if settings.device == "cuda":
            self.device = torch.device("cuda", rank.index)
            torch.cuda.set_device(self.device)
        self.images, self.labels = (tensor.to(self.device) for tensor in random_images(settings.batch))
        self.local = LocalPipeline(rank, settings.warmup, settings.steps)
        self.cuts: dict[tuple[Any, ...], tuple[Any, ...]] = {}
        for system in systems(settings, rank.count):
            if system.modules > 1 and cut_key(system) not in self.cuts:
                self.cuts[cut_key(system)] = self.fastest_cut(system)
        losses = {}  # the first of one process that accumulates M micro-batches, by M
        for micro_batches in {1, settings.ranks, *settings.torch_micro_batches} if rank.leader else ():
            step = one_device(self.fresh(), micro_batches)
            losses[micro_batches] = [step(normalise(self.images), self.labels) for _ in range(CHECKED_STEPS)]
        self.record = self.cuts, losses

    def fastest_cut(self, system: System) -> tuple[Any, ...]:
        """Of splits by measured time of the blocks the one with the fastest bursts, by their median of three in turns:
        one burst may be lucky. A quick run shows that all runs, and takes the first."""
        rank, images = self.rank, normalise(self.images[: self.settings.batch // system.micro_batches])
        seconds = rank.share(block_seconds(self.fresh(), images) if rank.leader else [])
        candidates: list[tuple[Any, ...]]
        if system.method == "bp":
            candidates = [split(seconds, system.modules, weight) for weight in WEIGHTS]
        else:
            candidates = [split_twice(seconds, system.modules, system.ranks, weight) for weight in WEIGHTS]
        different = [candidate for candidate in dict.fromkeys(candidates) if candidate]
        if not different:
            raise RanksFailed(f"--modules {system.modules}: too few blocks for {system.ranks} ranks; use fewer modules")
        if len(different) == 1 or self.settings.quick:
            return different[0]
        times: dict[tuple[Any, ...], list[float]] = {candidate: [] for candidate in different}
        for candidate in different * 3:
            self.cuts[cut_key(system)] = candidate
            burst = system.burst and system.burst(self, system)
            times[candidate].append(burst.step_s if burst is not None else 0.0)
        fastest: tuple[Any, ...] = rank.share(min(different, key=lambda each: statistics.median(times[each])))
        return fastest

    def ours(self, system: System) -> Burst | None:
        """The local pipeline. HPFF is a cascade over two modules and 2 x 2 patches."""
        settings, cut = self.settings, self.cuts[cut_key(system)]
        config = sections(system, settings.batch)
        config["model"]["name"] = settings.model
        config["patches"] = {"grid": system.span}
        config["partition"] = {"kind": "given", "stages": [len(modules) for modules in cut]}
        config["precision"]["channels_last"] = "auto"
        config["runtime"]["device"] = settings.device
        modules = grouped(self.fresh(), [blocks for modules in cut for blocks in modules])
        data = self.local.data(self.images, self.labels, mean=(0.5,) * 3, std=(0.25,) * 3)
        return self.local.burst(config, data, nn.Sequential(*(nn.Sequential(*blocks) for blocks in modules)))

    def fresh(self) -> nn.Sequential:
        """The network with its first weights, channels last."""
        return network(self.settings.model).to(self.device).to(memory_format=torch.channels_last)

    def time(self, step: Step, images: Tensor, labels: Tensor, sent: float = 0.0, cores: int = 1) -> Burst:
        """A burst of a baseline on ``images``, which are normalised in every step."""
        settings = self.settings
        burst = time_steps(self.rank, lambda: step(normalise(images), labels), settings.warmup, settings.steps, cores)
        return replace(burst, sent=sent)

    def alone(self, _: System, checkpointing: bool = False, threads: int = 1) -> Burst | None:
        """One process; the other ranks wait."""
        if not self.rank.leader:
            self.rank.meet()
            return None
        self.rank.pin(threads)
        step = one_device(self.fresh(), checkpointing=checkpointing)
        burst = self.time(step, self.images, self.labels, cores=threads)
        self.rank.pin()
        return burst

    def copies(self, system: System) -> Burst:
        """DDP."""
        images, labels = (batch.chunk(system.ranks)[self.rank.index] for batch in (self.images, self.labels))
        with data_parallel(self.rank, self.fresh()) as (step, sent):
            return self.time(step, images, labels, sent)

    def pipeline(self, system: System) -> Burst:
        """torch.distributed.pipelining."""
        parts = grouped(self.fresh(), self.cuts[cut_key(system)])
        with torch_pipeline(self.rank, system, parts, normalise(self.images)) as (step, sent):
            return self.time(step, self.images if self.rank.leader else self.images[:0], self.labels, sent)


def check_losses(system: System, turns: Sequence[Turn], references: Mapping[int, Sequence[float]]) -> None:
    """Refuse (RanksFailed) a baseline whose first losses are not those of one process with the same micro-batches."""
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
        settings.batch, [turn.step_s for turn in turns], medians([turn.work_s for turn in turns]), **system.row,
        ratio_to_bp=ratio, bytes_per_step=turns[0].sent, ratio_low=ratio_low, ratio_high=ratio_high,
        parts=[blocks if isinstance(blocks, int) else sum(blocks) for blocks in cut],
        expected=EXPECTED.get(system.system, {}).get(system.micro_batches) if usual else None,
    )  # fmt: skip


def targets(rows: Sequence[Row]) -> list[Target]:
    """Cores at work, and beside each the limit of its placement: what it would be if the busiest rank never waited."""
    ours = [row for row in rows if row["method"] != "bp" and row["busy"]]
    plain = [row for row in ours if "hpff" not in row["method"] and label(row).endswith("exact")]
    groups = {"async": [row for row in ours if row["schedule"] == "async"], "plain methods, exact, M = 1": plain}
    found = []
    for group, its in groups.items():
        shares = {}
        for row in its:
            share = sum(row["busy"]) / len(row["busy"])
            shares[f"{label(row)}; its placement allows {share / max(row['busy']):.3f}"] = share
        found.append(Target(f"cores at work, sum of the ranks' compute / (P x wall), {group}", shares, least=0.93))
    return found


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
        named = f": {', '.join(slower)}" if 0 < len(slower) <= len(faster) else ""
        named = f"; not than {', '.join(faster)}" if 0 < len(faster) < len(slower) else named
        text = f"{label(rival)} ({rival['ratio_to_bp']:.2f}) is faster than {len(slower)} of {len(ours)} rows of ours"
        found.append(f"{text}{named}.")
    return found


def refuse(settings: Settings) -> None:
    """Refuse options that cannot work together: a ConfigError with the option, its value and the fix."""
    gpus, whole = torch.cuda.device_count(), math.lcm(settings.ranks, *settings.torch_micro_batches)
    ranks, device, cores = settings.ranks, settings.device, settings.cores
    if device == "cuda" and gpus < ranks:
        raise ConfigError(f"--device cuda --ranks {ranks} needs one GPU per rank, found {gpus}; use fewer, or cpu")
    if device == "cpu" and ranks > cores:
        raise ConfigError(f"--ranks {ranks} on {cores} cores: every rank needs its own; use fewer, or try scaling.py")
    if settings.modules < ranks:
        raise ConfigError(f"--modules {settings.modules} is less than --ranks {ranks}; use as many or more")
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
    """Ratios to one device as bars with whiskers."""

    def group(row: Row) -> str:
        if row["method"] != "bp" or row["system"] == "DDP":
            return str(row["system"])
        return "one process" if row["ranks"] == 1 else "torch pipelines"

    title = f"{settings.model}, batch {settings.batch}, {settings.ranks} ranks ({settings.device})"
    with picture(path, title, 1.2 + 0.19 * len(rows), "outside upper right", len(COLOURS)) as axes:
        for place, row in enumerate(rows):
            value, low, high = row["ratio_to_bp"], row["ratio_low"], row["ratio_high"]
            first = group(row) not in map(group, rows[:place])
            axes.barh(place, value, 0.72, color=COLOURS[group(row)], label=group(row) if first else None)
            axes.plot([low, high], [place, place], color=INK, linewidth=0.9, marker="|", markersize=4)
            axes.text(high + 0.02, place, f"{value:.2f}", va="center", fontsize=7, color=INK, bbox=PAPER)
        axes.set_yticks(range(len(rows)), [label(row) for row in rows], fontsize=7.5)
        axes.set_ylim(len(rows) - 0.4, -0.6)
        axes.set_xlim(0, 1.1 * max(row["ratio_high"] for row in rows))
        axes.axvline(1.0, color=INK, linewidth=0.9, linestyle=DASHED)
        axes.grid(visible=False, axis="y")
        axes.set_xlabel("images/s, ratio to backpropagation on one device", fontsize=9, color=INK)


QUICK = {"model": "resnet20", "batch": 16, "rounds": 1, "steps": 2, "quick": True, "deadline_s": 120.0}

if __name__ == "__main__":
    main(__doc__, Settings, measure, QUICK, chart="the ratios to one device")
