"""The systems of throughput.py on one rank: where everybody's network is cut, and a burst of each."""

from __future__ import annotations

import statistics
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from baselines import GPIPE, INTERLEAVED, Step, TorchSchedule, data_parallel, one_device, torch_pipeline
from bursts import Burst, time_steps
from networks import SGD, block_seconds, grouped, network, normalise, random_images, sgd, split, split_twice
from ours import LocalPipeline, Repeated
from ranks import Rank, RanksFailed
from torch import Tensor, nn

from pipeline import LoaderData

METHODS = ("dgl", "infopro", "predsim")
WEIGHTS = (1.0, 1.15, 1.3, 0.85)
"""Candidates for every system: how much of its time alone the last part counts, see :func:`networks.split`. Local
heads and the input gradient that the first part does not need are not in the times of blocks."""
CHECKED_STEPS = 2


@dataclass(frozen=True)
class Settings:
    """Of one run of this tool.

    Attributes:
        model, modules, ranks, batch: backbone, K, P, images per step of all ranks together.
        device: "cpu" or "cuda".
        rounds: in each, all systems take turns.
        warmup, steps: of a burst; only the latter are timed.
        cores: of this machine that the ranks may use.
        methods: of local learning. baselines: whether other ways than BP on one device are run.
    """

    model: str = "resnet32"
    modules: int = 4
    ranks: int = 2
    batch: int = 128
    device: str = "cpu"
    rounds: int = 5
    warmup: int = 1
    steps: int = 4
    cores: int = 1
    methods: tuple[str, ...] = METHODS
    baselines: bool = True
    quick: bool = False
    deadline_s: float = 3600.0

    @property
    def torch_micro_batches(self) -> tuple[int, ...]:
        """M of torch's pipelines."""
        return (2,) if self.quick else (2, 4, 8)

    @property
    def backend(self) -> str:
        """Of the baselines' process groups."""
        return "nccl" if self.device == "cuda" else "gloo"

    def device_of(self, rank: Rank) -> torch.device:
        """The device of a rank."""
        return torch.device("cuda", rank.index) if self.device == "cuda" else torch.device("cpu")


Cut = tuple[tuple[int, ...], ...]
"""By rank: blocks of every local module."""


@dataclass(frozen=True)
class Placement:
    """Where everybody's network is cut, by time measured here.

    Attributes:
        parts: blocks of every part of a torch pipeline, by (number of parts, M).
        cuts: of ours, by (method, cascade span, schedule).
    """

    parts: Mapping[tuple[int, int], tuple[int, ...]]
    cuts: Mapping[tuple[str, int, str], Cut]


class Bench:
    """Runs the systems on one rank."""

    def __init__(self, settings: Settings, rank: Rank) -> None:
        self.settings = settings
        self.rank = rank
        self.device = settings.device_of(rank)
        if settings.device == "cuda":
            torch.cuda.set_device(self.device)
        self.images, self.labels = random_images(settings.batch, self.device)
        self.local = LocalPipeline(rank, settings.warmup, settings.steps)

    def place(self) -> Placement:
        """Find the cut of everybody: splits by measured time of the blocks; the fastest in a short run wins."""
        settings, ranks = self.settings, self.settings.ranks
        parts: dict[tuple[int, int], tuple[int, ...]] = {}
        cuts: dict[tuple[str, int, str], Cut] = {}
        whole = normalise(self.images)
        for micro_batches in (1, *settings.torch_micro_batches) if settings.baselines else ():
            seconds = self.seconds(whole[: settings.batch // micro_batches])
            for count, schedule in ((ranks, GPIPE), (2 * ranks, INTERLEAVED)):
                if schedule.fits(micro_batches, ranks):
                    parts[count, micro_batches] = self.fastest(
                        [split(seconds, count, weight) for weight in WEIGHTS],
                        lambda counts, how=(schedule, micro_batches): self.pipeline(*how, counts),
                    )
        seconds = self.seconds(whole)
        for method, span in method_spans(settings):
            for kind in ("exact", "async"):
                cuts[method, span, kind] = cuts[method, 1, "exact"] if (span, kind) == (1, "async") else self.fastest(
                    [split_twice(seconds, settings.modules, ranks, weight) for weight in WEIGHTS],
                    lambda cut, what=(method, span, kind): self.ours(*what, 1, cut),
                )
        return Placement(parts, cuts)

    def seconds(self, x: Tensor) -> list[float]:
        """Times of the blocks on ``x``, measured by rank 0."""
        return self.rank.share(block_seconds(self.fresh(), x) if self.rank.leader else [])

    def fastest(self, candidates: Sequence[Any], burst: Callable[[Any], Burst | None]) -> Any:
        """The candidate with the fastest bursts, by their median of three in turns: one burst may be lucky. A quick run
        shows that all runs, and takes the first."""
        different = [candidate for candidate in dict.fromkeys(candidates) if candidate]
        if not different:
            raise RanksFailed(
                f"--modules {self.settings.modules} --ranks {self.settings.ranks}: {self.settings.model} has too few "
                "blocks for that cut; use fewer modules"
            )
        if len(different) == 1 or self.settings.quick:
            return different[0]
        times: dict[Any, list[float]] = {candidate: [] for candidate in different}
        for candidate in different * 3:
            found = burst(candidate)
            if found is not None:
                times[candidate].append(max(found.step_s))
        return self.rank.share(
            min(different, key=lambda candidate: statistics.median(times[candidate])) if self.rank.leader else None
        )

    def data(self) -> LoaderData:
        """Our loaders: the images of a burst, and a tiny test."""
        steps = self.local.batches
        test = Repeated(1, self.images[:2], self.labels[:2])
        return LoaderData(Repeated(steps, self.images, self.labels), test, mean=(0.5,) * 3, std=(0.25,) * 3)

    def sections(self, method: str, span: int, kind: str, micro_batches: int) -> dict[str, dict[str, Any]]:
        """Our configuration, without a placement. HPFF is a cascade over two modules and 2 x 2 patches."""
        settings = self.settings
        return {
            "model": {"name": settings.model, "modules": settings.modules},
            "method": {"name": method},
            "hierarchy": {"cascade_span": span},
            "patches": {"grid": span},
            "schedule": {"kind": kind, "micro_batches": micro_batches},
            "data": {"batch_size": settings.batch},
            "optim": {"name": "sgd", "schedule": "constant", "warmup_epochs": 0, **SGD},
            "train": {"epochs": 1},
            "precision": {"compute": "fp32", "channels_last": "auto"},
            "runtime": {"device": settings.device, "threads": 1, "deadline_s": 120.0},
        }

    def ours(self, method: str, span: int, kind: str, micro_batches: int, cut: Cut) -> Burst | None:
        """A burst of the local pipeline."""
        sections = self.sections(method, span, kind, micro_batches)
        sections["partition"] = {"kind": "given", "stages": [len(modules) for modules in cut]}
        modules = grouped(self.fresh(), [blocks for modules in cut for blocks in modules])
        return self.local.burst(sections, self.data(), nn.Sequential(*(nn.Sequential(*blocks) for blocks in modules)))

    def fresh(self) -> nn.Sequential:
        """The network with its first weights."""
        return network(self.settings.model, self.device)

    def time(self, step: Step, images: Tensor, labels: Tensor, sent: float = 0.0, cores: int = 1) -> Burst:
        """A burst of a baseline on ``images``, which are normalised in every step."""
        settings = self.settings

        def whole() -> float | None:
            return step(normalise(images), labels)

        return replace(time_steps(self.rank, whole, settings.warmup, settings.steps, cores), sent=sent)

    def alone(self, checkpointing: bool, threads: int = 1) -> Burst | None:
        """One process; the other ranks wait."""
        if not self.rank.leader:
            self.rank.meet()
            return None
        with self.rank.threads(threads):
            return self.time(one_device(self.fresh(), sgd, 1, checkpointing), self.images, self.labels, cores=threads)

    def copies(self) -> Burst:
        """DDP."""
        images, labels = (batch.chunk(self.rank.count)[self.rank.index] for batch in (self.images, self.labels))
        with data_parallel(self.rank, self.fresh(), sgd, self.settings.backend) as (step, sent):
            return self.time(step, images, labels, sent)

    def pipeline(self, schedule: TorchSchedule, micro_batches: int, counts: Sequence[int]) -> Burst:
        """torch.distributed.pipelining."""
        parts, backend = grouped(self.fresh(), counts), self.settings.backend
        inputs = normalise(self.images)
        with torch_pipeline(self.rank, schedule, parts, micro_batches, inputs, sgd, backend) as (step, sent):
            return self.time(step, self.images if self.rank.leader else self.images[:0], self.labels, sent)

    def reference_losses(self) -> dict[int, list[float]]:
        """The first losses of one process that accumulates M micro-batches, by M (rank 0)."""
        if not self.rank.leader:
            return {}
        found = {}
        for micro_batches in sorted({1, self.settings.ranks, *self.settings.torch_micro_batches}):
            step = one_device(self.fresh(), sgd, micro_batches, False)
            found[micro_batches] = [step(normalise(self.images), self.labels) for _ in range(CHECKED_STEPS)]
        return found


def method_spans(settings: Settings) -> list[tuple[str, int]]:
    """Methods, each plain and with HPFF's cascade."""
    methods = settings.methods[:1] if settings.quick else settings.methods
    return [(method, span) for method in methods for span in (1, 2)]
