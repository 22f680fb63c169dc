"""What a training step holds at its peak, in MiB: backpropagation, and local learning in one process and on many ranks.

    python benchmarks/memory.py [--network NAME ...] [--method NAME ...] [--at MIB] [--quick] [--json FILE]
                                [--output FILE.md] ...                                               see --help

No device is needed: the step runs on tensors without values and without memory, and what would be alive is added up
(pipeline.step_memory, pipeline.Alive); pipelines of backpropagation are PyTorch's own schedules on such tensors.
Backpropagation is counted by torch's MemTracker too, and both must agree. Where there is a GPU, each case of one
process also trains on it for real, and torch.cuda's counter stands beside. With ``--at`` a second table: the largest
batch, and the largest images, that a step has room for in that much memory.
"""

from __future__ import annotations

import tempfile
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from functools import cache, partial
from pathlib import Path

import torch
from memory_baselines import checkpointed, counted, pipelined, plain, tracked
from networks import random_images
from rows import papers as published
from runner import Report, Target, main, option
from tables import Column, K, P, Row, Table

from pipeline import Config, LoaderData, StepMemory, load_config, step_memory, train

MIB = 2**20


@dataclass(frozen=True)
class Network:
    """How the papers train a network: K (as asked for), images of a step and their shape, classes, methods, cuts."""

    modules: int
    batch: int
    image: tuple[int, ...] = (3, 32, 32)
    classes: int = 10
    methods: tuple[str, ...] = ("DGL", "InfoPro", "PredSim")
    cuts: str = "hpff"
    fewer: tuple[int, ...] = ()  # K of more rows of InfoPro
    recipes: str = ""  # what those begin with that have its own cuts and heads for all of its rows


_OF_IMAGENET = Network(4, 128, (3, 224, 224), 1000, ("InfoPro",), fewer=(2,), recipes="imagenet-resnet101")
NETWORKS = {
    "resnet32": Network(16, 1024), "resnet110": Network(55, 1024, fewer=(2, 3, 4)),
    "resnet101": _OF_IMAGENET, "resnet152": replace(_OF_IMAGENET, recipes="imagenet-resnet152"),
    "resnext101_32x8d": replace(_OF_IMAGENET, batch=64, recipes="imagenet-resnext101"),
    "vit_b_16": Network(4, 128, (3, 224, 224), 1000, ("InfoPro",), cuts="even"),
    "resnet20": Network(3, 64, methods=("DGL",), cuts="even"),
}  # fmt: skip
FORMS = {
    "": ("", []), " + HiLo": ("-hpff", ["patches.grid=1"]), " + HPFF": ("-hpff", ["patches.at_once=1"]),
}  # fmt: skip
"""Of a method: which of its recipes, and what else."""
SCHEDULES = ("GPipe", "1F1B", "ZBVZeroBubble")
ONE = {"DGL + HPFF": {"resnet32": 0.40, "resnet110": 0.15}}
_IMAGENET = dict.fromkeys(("resnet101", "resnet152", "resnext101_32x8d", "vit_b_16"), 0.40)
BY_MEMORY = ", cut by memory"
LARGEST = {
    "DGL + HPFF": {"resnet32": 0.25, "resnet110": 0.075},
    "InfoPro + HPFF": _IMAGENET, f"InfoPro + HPFF{BY_MEMORY}": _IMAGENET,
}  # fmt: skip
"""Targets, peak to that of backpropagation in one process, written before it was measured: in one process; on the
largest of as many ranks as there are modules."""


@dataclass(frozen=True)
class Settings:
    network: tuple[str, ...] = option(("resnet32", "resnet110"), "which", "NAME", choices=tuple(NETWORKS))
    method: tuple[str, ...] = option(("DGL", "InfoPro", "PredSim"), "of those of the papers", "NAME")
    batch: int = option(0, "images of a step; default: the papers'", "N", above=-1)
    stages: int = option(4, "ranks of the pipelines of backpropagation", "P")
    micro_batches: int = option(4, "of those", "M")
    queue: int = option(1, "runtime.queue_depth: messages posted ahead", "N")
    at: int = option(0, "find what has room in so much memory", "MIB", above=-1)
    schedules: tuple[str, ...] = option(SCHEDULES, "of the pipelines of backpropagation", "NAME", choices=SCHEDULES)


# --- cases ------------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Case:
    """One configuration of ours."""

    system: str
    network: Network
    config: Config

    def on(self, ranks: int) -> tuple[StepMemory, ...]:
        """The memory of every rank."""
        return step_memory(self.config, self.network.image, self.network.classes, ranks)

    def need(self, ranks: int, batch: int, side: int) -> int:
        """Bytes of the fullest rank, with such a batch of such square images."""
        config = replace(self.config, data=replace(self.config.data, batch_size=batch))
        network = replace(self.network, image=(self.network.image[0], side, side))
        return fullest(replace(self, config=config, network=network).on(ranks)).peak


def cases_of(name: str, settings: Settings) -> Iterator[Case]:
    """BP and every method plain, with both levels, and with patches."""
    network = _network(name, settings)
    run = [f"model.name={name}", f"data.batch_size={network.batch}", f"runtime.queue_depth={settings.queue}",
           "precision.compute=fp32", "partition.kind=count"]  # fmt: skip
    yield Case("BP, counted here", network, load_config("cifar10-resnet32-bp", assignments=run))
    for method in network.methods:
        if method not in settings.method:
            continue
        for form, (recipe, more) in FORMS.items():
            of = "resnet110" if name == "resnet110" else "resnet32"
            k = {"resnet32": 16, "resnet110": 55}[of]
            cut = [f"model.modules={network.modules}", f"model.cuts={network.cuts}"]
            start = f"{network.recipes}-k{network.modules}" if network.recipes else f"cifar10-{of}-k{k}"
            recipe = f"{start}-{method.lower()}{recipe}"
            yield Case(method + form, network, load_config(recipe, assignments=[*run, *cut, *more]))
            if f"{method}{form}{BY_MEMORY}" in LARGEST and network.image[1] > 32:
                more = [*more, "model.cuts=memory"]
                yield Case(method + form + BY_MEMORY, network, load_config(recipe, assignments=[*run, *cut, *more]))
        if method == "InfoPro":
            for modules in network.fewer:
                recipe, cut = "cifar10-resnet32-k16-infopro", [f"model.modules={modules}", "model.cuts=even"]
                if network.recipes:
                    recipe, cut = f"{network.recipes}-k{modules}-infopro", []
                yield Case(f"InfoPro, K = {modules}", network, load_config(recipe, assignments=[*run, *cut]))


def _network(name: str, settings: Settings) -> Network:
    found = NETWORKS[name]
    return replace(found, batch=settings.batch) if settings.batch else found


# --- rows -------------------------------------------------------------------------------------------------------------


def baselines(name: str, settings: Settings) -> Iterator[Row]:
    """Backpropagation, with checkpointing, and the fullest rank of pipelines."""
    network, ranks, parts = _network(name, settings), settings.stages, settings.micro_batches
    about = (name, (network.batch, *network.image), network.classes)
    yield _row(name, "BP", 1, 1, tracked(plain, *about))
    yield _row(name, "BP, checkpointing", 1, 1, counted(checkpointed, *about))
    for schedule in settings.schedules:
        yield _row(name, f"torch {schedule}, M = {parts}", ranks, ranks, pipelined(schedule, parts, ranks, *about))


def ours(name: str, settings: Settings) -> Iterator[Row]:
    """In one process; on a rank for each module; the same in micro-batches."""
    for case in cases_of(name, settings):
        (alone,) = case.on(1)
        yield _of(name, case.system, alone.modules, 1, alone, gpu=on_gpu(case))
        if alone.modules > 1:
            yield _of(name, case.system, alone.modules, alone.modules, fullest(case.on(alone.modules)))
        if case.system in LARGEST and not case.system.endswith(BY_MEMORY):
            for parts in sorted({2, settings.micro_batches}):
                schedule = replace(case.config.schedule, micro_batches=parts)
                split = replace(case, config=replace(case.config, schedule=schedule))
                system = f"{case.system}, M = {parts}"
                yield _of(name, system, alone.modules, alone.modules, fullest(split.on(alone.modules)))


def fullest(ranks: Sequence[StepMemory]) -> StepMemory:
    """The rank that needs most."""
    return max(ranks, key=lambda rank: rank.peak)


def _of(name: str, system: str, modules: int, ranks: int, found: StepMemory, gpu: int | None = None) -> Row:
    return _row(
        name, system, modules, ranks, found.peak, weights=found.weights, heads=found.heads,
        optimiser=found.optimiser, messages=found.messages, work=found.work, gpu=gpu,
    )  # fmt: skip


def _row(name: str, system: str, modules: int, ranks: int, peak: int, **known: int | None) -> Row:
    parts = dict.fromkeys(("weights", "heads", "optimiser", "messages", "work", "gpu")) | known
    return {"network": name, "system": system, "modules": modules, "ranks": ranks, "peak": peak, **parts}


def on_gpu(case: Case, steps: int = 3) -> int | None:
    """What PyTorch's counter says after some real steps on a GPU; None without one."""
    if not torch.cuda.is_available():
        return None
    images, labels = random_images(case.config.data.batch_size, case.network.image)
    data = LoaderData([(images, labels % case.network.classes)] * steps, [(images[:2], labels[:2])])
    torch.cuda.empty_cache()
    torch.cuda.reset_peak_memory_stats()
    runtime = replace(case.config.runtime, device="cuda")
    config = replace(case.config, runtime=runtime, train=replace(case.config.train, epochs=1))
    with tempfile.TemporaryDirectory() as folder:
        train(config, data=data, run_dir=Path(folder) / "run", quiet=True)
    return torch.cuda.max_memory_allocated()


def papers() -> dict[tuple[str, str], tuple[float, str]]:
    """GB and source by network and system."""
    return {
        (network, system): (value, table["source"])
        for table in published("memory")
        for network, values in table.items()
        if network != "source"
        for system, value in values.items()
    }


# --- what has room ----------------------------------------------------------------------------------------------------


def largest(need: Callable[[int], int], limit: int, unit: int, power: int = 1) -> int:
    """The largest multiple of ``unit`` that needs no more than ``limit``; 0 if not one does. What is needed should grow
    about linearly with that number to the ``power``, and must grow."""
    known = cache(need)
    one, other = unit, 4 * unit
    for _ in range(6):
        if one == other:
            break
        slope = (known(other) - known(one)) / (other**power - one**power)
        best = other**power + (limit - known(other)) / slope
        one, other = other, max(unit, int(max(best, 0.0) ** (1 / power)) // unit * unit)
    while known(other + unit) <= limit:
        other += unit
    while other > 0 and known(other) > limit:
        other -= unit
    return other


def rooms(name: str, settings: Settings) -> Iterator[Row]:
    """The largest batch of the papers' images, and the largest square images in a batch of the papers'."""
    limit = settings.at * MIB
    for case in cases_of(name, settings):
        batch, side = case.network.batch, case.network.image[1]
        for ranks in (1, settings.stages) if case.config.model.modules >= settings.stages else (1,):
            rows = largest(partial(case.need, ranks, side=side), limit, 64)
            sides = largest(partial(case.need, ranks, batch), limit, 8, power=2)
            yield {"network": name, "system": case.system, "modules": case.config.model.modules, "ranks": ranks,
                   "batch": rows, "side": sides}  # fmt: skip


# --- report -----------------------------------------------------------------------------------------------------------


def _mib(key: str, title: str) -> Column:
    return Column(title, lambda row: None if row[key] is None else row[key] / MIB, ",.0f")


COLUMNS = (
    Column("network", "network"), Column("system", "system"), K, P,
    _mib("weights", "parameters"), _mib("heads", "heads"), _mib("optimiser", "optimiser"), _mib("messages", "queues"),
    _mib("work", "activations"), _mib("peak", "peak"), Column("to BP", "ratio", ".1%"),
    Column("paper GB", "paper_gb", ".2f"), Column("to its BP", "paper_ratio", ".1%"), Column("source", "source"),
    _mib("gpu", "GPU"),
)  # fmt: skip
ROOM = (Column("network", "network"), Column("system", "system"), K, P, Column("largest batch", "batch", ",d"),
        Column("largest side", "side", ",d"))  # fmt: skip
ABOUT = (
    "fp32; MiB of the fullest rank at the peak of a step. Activations: with gradients, the batch itself and what "
    "operations need besides; queues: slots of messages, in which a received activation is also the input of a "
    "module. Work space that a library gets for itself is in none of them. HiLo: both levels on whole maps; HPFF: with "
    "patches, one after another. M: micro-batches, 1 where nothing is said. Papers: GB of one process, as a GPU showed "
    "them, which may be with about 1 GB for CUDA itself. Networks for ImageNet have the papers' cuts and heads; of the "
    "others InfoPro's own cuts for a small K are chosen by memory, these have as many blocks each."
)


def targets(rows: Sequence[Row]) -> Iterator[Target]:
    """Of methods with HPFF; and that both ways to count agree."""
    by = {(row["network"], row["system"], row["ranks"] == 1): row["ratio"] for row in rows}
    for aims, alone, text in ((ONE, True, "one process"), (LARGEST, False, "largest of a rank per module")):
        for system, mosts in aims.items():
            for name, most in mosts.items():
                found = {each: by[name, each, alone] for each in _with_parts(system, rows) if (name, each, alone) in by}
                for each, ratio in found.items():
                    yield Target(f"{each} to BP, {text}", {name: ratio}, most=most)
    both = {name: ratio for (name, system, _), ratio in by.items() if system == "BP, counted here"}
    yield Target("backpropagation counted here to torch's MemTracker", both, least=0.98, most=1.02)


def _with_parts(system: str, rows: Sequence[Row]) -> list[str]:
    """The system, and the same in micro-batches."""
    return sorted({row["system"] for row in rows if row["system"].split(", M =")[0] == system}, key=len)


def measure(settings: Settings) -> Report:
    """All networks."""
    rows = [row for name in settings.network for make in (baselines, ours) for row in make(name, settings)]
    of_papers = papers()
    base = {row["network"]: row["peak"] for row in rows if row["system"] == "BP"}
    for row in rows:
        gb, source = of_papers.get((row["network"], row["system"]), (None, None)) if row["ranks"] == 1 else (None, None)
        row |= {"ratio": row["peak"] / base[row["network"]], "paper_gb": gb, "source": source}
        row["paper_ratio"] = gb / of_papers[row["network"], "BP"][0] if gb else None
    tables = [Table(COLUMNS, rows)]
    notes = {}
    if settings.at:
        room = [row for name in settings.network for row in rooms(name, settings)]
        tables.append(Table(ROOM, room, f"What has room in {settings.at:,} MiB"))
        notes["room"] = room
    batches = ", ".join(f"{name} {_network(name, settings).batch}" for name in settings.network)
    about = f"Images of a step: {batches}; runtime.queue_depth = {settings.queue}; {ABOUT}"
    return Report("Memory of a training step", tables, [about], list(targets(rows)), notes=notes)


if __name__ == "__main__":
    small = {"network": ("resnet20",), "method": ("DGL",), "stages": 2, "micro_batches": 2, "schedules": ("1F1B",)}
    main(__doc__, Settings, measure, quick=small)
