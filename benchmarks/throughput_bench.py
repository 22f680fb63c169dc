"""The systems of throughput.py, where everybody's network is cut, and a burst of each on one rank."""

from __future__ import annotations

import statistics
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from baselines import TORCH_SCHEDULES, Step, data_parallel, one_device, torch_pipeline, torch_systems
from bursts import Burst, System, time_steps
from networks import block_seconds, grouped, network, normalise, random_images, split, split_twice
from ours import LocalPipeline, local_systems, sections
from ranks import Rank, RanksFailed, available_cores
from runner import option
from torch import Tensor, nn

from pipeline import backbone_names

METHODS = ("dgl", "infopro", "predsim")
WEIGHTS = (1.0, 1.15, 1.3, 0.85)
"""Candidates for every system: how much of its time alone the last part counts, see :func:`networks.split`. Local
heads and the input gradient that the first part does not need are not in the times of blocks."""
CHECKED_STEPS = 2


@dataclass(frozen=True)
class Settings:
    """Of one run of this tool."""

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
    alone = "bp", "", 1, 1, 1
    found = [System("BP, one device", *alone, lambda bench, _: bench.alone())]
    if not settings.ours_only:
        threads = min(ranks, settings.cores)
        if settings.device == "cpu" and threads > 1:
            found.append(System(f"BP, {threads} threads", *alone, lambda bench, _: bench.alone(threads=threads)))
        if not settings.quick:
            found.append(System("BP, checkpointing", *alone, lambda bench, _: bench.alone(checkpointing=True)))
        found.append(System("DDP", "bp", "", ranks, 1, 1, Bench.copies))
        found.append(System("naive model parallel", "bp", "GPipe", ranks, ranks, 1, Bench.pipeline))
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
    """Runs the systems on one rank.

    Attributes:
        cuts: by :func:`cut_key`, chosen by time measured here: blocks of every part of a torch pipeline; of ours, by
            rank, blocks of every local module.
        losses: the first losses of one process that accumulates M micro-batches, by M (rank 0).
    """

    def __init__(self, settings: Settings, rank: Rank) -> None:
        self.settings = settings
        self.rank = rank
        self.device = torch.device("cpu")
        if settings.device == "cuda":
            self.device = torch.device("cuda", rank.index)
            torch.cuda.set_device(self.device)
        self.backend = "nccl" if settings.device == "cuda" else "gloo"
        self.images, self.labels = (tensor.to(self.device) for tensor in random_images(settings.batch))
        self.local = LocalPipeline(rank, settings.warmup, settings.steps)
        self.cuts: dict[tuple[Any, ...], tuple[Any, ...]] = {}
        for system in systems(settings, rank.count):
            if system.modules > 1 and cut_key(system) not in self.cuts:
                self.cuts[cut_key(system)] = self.fastest_cut(system)
        self.losses: dict[int, list[float]] = {}
        for micro_batches in {1, settings.ranks, *settings.torch_micro_batches} if rank.leader else ():
            step = one_device(self.fresh(), micro_batches)
            found = [step(normalise(self.images), self.labels) for _ in range(CHECKED_STEPS)]
            self.losses[micro_batches] = found

    @property
    def record(self) -> tuple[dict[tuple[Any, ...], tuple[Any, ...]], dict[int, list[float]]]:
        """Cuts and losses."""
        return self.cuts, self.losses

    def fastest_cut(self, system: System) -> tuple[Any, ...]:
        """Of splits by measured time of the blocks the one with the fastest bursts, by their median of three in turns:
        one burst may be lucky. A quick run shows that all runs, and takes the first."""
        rank, images = self.rank, normalise(self.images[: self.settings.batch // system.micro_batches])
        seconds = rank.share(block_seconds(self.fresh(), images) if rank.leader else [])
        if system.method == "bp":
            candidates = [split(seconds, system.modules, weight) for weight in WEIGHTS]
        else:
            candidates = [split_twice(seconds, system.modules, system.ranks, weight) for weight in WEIGHTS]
        different = [candidate for candidate in dict.fromkeys(candidates) if candidate]
        if not different:
            raise RanksFailed(
                f"--modules {self.settings.modules} --ranks {self.settings.ranks}: {self.settings.model} has too few "
                "blocks for that cut; use fewer modules"
            )
        if len(different) == 1 or self.settings.quick:
            return different[0]
        times: dict[tuple[Any, ...], list[float]] = {candidate: [] for candidate in different}
        for candidate in different * 3:
            self.cuts[cut_key(system)] = candidate
            burst = system.burst(self, system)
            times[candidate].append(burst.step_s if burst is not None else 0.0)
        return rank.share(min(different, key=lambda candidate: statistics.median(times[candidate])))

    def ours(self, system: System) -> Burst | None:
        """The local pipeline. HPFF is a cascade over two modules and 2 x 2 patches."""
        settings, cut = self.settings, self.cuts[cut_key(system)]
        config = sections(
            settings.modules, system.method, system.schedule, settings.batch, system.span, system.micro_batches
        )
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
        return network(self.settings.model).to(device=self.device, memory_format=torch.channels_last)

    def time(self, step: Step, images: Tensor, labels: Tensor, sent: float = 0.0, cores: int = 1) -> Burst:
        """A burst of a baseline on ``images``, which are normalised in every step."""
        settings = self.settings
        burst = time_steps(self.rank, lambda: step(normalise(images), labels), settings.warmup, settings.steps, cores)
        return replace(burst, sent=sent)

    def alone(self, checkpointing: bool = False, threads: int = 1) -> Burst | None:
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
        with data_parallel(self.rank, self.fresh(), self.backend) as (step, sent):
            return self.time(step, images, labels, sent)

    def pipeline(self, system: System) -> Burst:
        """torch.distributed.pipelining."""
        parts = grouped(self.fresh(), self.cuts[cut_key(system)])
        job = (self.rank, TORCH_SCHEDULES[system.schedule], parts, system.micro_batches, normalise(self.images))
        with torch_pipeline(*job, self.backend) as (step, sent):
            return self.time(step, self.images if self.rank.leader else self.images[:0], self.labels, sent)
