"""What a training step holds at its peak, in MiB: backpropagation, and local learning in one process and on many ranks.

    python benchmarks/memory.py [--network NAME ...] [--batch N] [--quick] [--json FILE] [--output FILE.md]

No device is needed: the step runs on tensors without values and without memory, and what would be alive is added up
(pipeline.step_memory). Baselines are plain PyTorch under torch's own MemTracker, on the same kind of tensors; for
backpropagation both must agree.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial

import torch
from networks import CLASSES, IMAGE, network, sgd
from runner import Report, Target, main, option
from tables import Column, K, Row, Table
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.distributed._tools.mem_tracker import MemTracker
from torch.nn.functional import cross_entropy
from torch.utils.checkpoint import checkpoint_sequential

from pipeline import load_config, step_memory

MIB = 2**20
CUTS = {"resnet32": 16, "resnet110": 55, "resnet20": 4}  # K of the papers' tables; the last one is small
LARGEST = {"resnet32": 0.25, "resnet110": 0.075}
ONE = {"resnet32": 0.40, "resnet110": 0.15}
"""Targets for DGL + HPFF, peak to that of backpropagation: the largest of one rank per module; one process."""
METHODS = {
    "DGL": ["method.name=dgl"], "InfoPro": ["method.name=infopro", "method.head=1c2f"],
    "PredSim": ["method.name=predsim"],
}  # fmt: skip
FORMS = {
    "": [], " + HiLo": ["hierarchy.cascade_span=2"],
    " + HPFF": ["hierarchy.cascade_span=2", "patches.grid=2", "patches.at_once=1"],
}  # fmt: skip
PAPER = {  # GB of a GPU, nvidia-smi's figures (HPFF, tables 3 and 5)
    ("resnet32", "BP"): 3.37, ("resnet110", "BP"): 9.26,
    ("resnet32", "DGL + HPFF"): 2.25, ("resnet110", "DGL + HPFF"): 2.44,
    ("resnet32", "InfoPro"): 2.67, ("resnet110", "InfoPro"): 2.62,
    ("resnet32", "InfoPro + HiLo"): 3.13, ("resnet110", "InfoPro + HiLo"): 3.28,
    ("resnet32", "InfoPro + HPFF"): 2.31, ("resnet110", "InfoPro + HPFF"): 2.38,
    ("resnet32", "PredSim + HPFF"): 1.91, ("resnet110", "PredSim + HPFF"): 1.90,
}  # fmt: skip


@dataclass(frozen=True)
class Settings:
    network: tuple[str, ...] = option(("resnet32", "resnet110"), "which", "NAME", choices=tuple(CUTS))
    batch: int = option(1024, "images of a step", "N", above=1)
    stages: int = option(4, "ranks of the pipelines of backpropagation", "N")
    micro_batches: int = option(4, "of those", "N")
    queue: int = option(1, "runtime.queue_depth: messages posted ahead", "N")


def tracked(run: Callable[[nn.Sequential, Tensor, Tensor], None], name: str, rows: int, keep: slice) -> int:
    """Peak bytes of ``run(blocks, inputs, labels)`` on those blocks of a network, gradients of one step before it
    included, and of SGD with momentum."""
    with FakeTensorMode(), MemTracker() as tracker:
        every = network(name).to(memory_format=torch.channels_last)
        labels = torch.zeros(rows, dtype=torch.int64)
        x = torch.empty(rows, *IMAGE).contiguous(memory_format=torch.channels_last)
        with torch.no_grad():
            x = every[: keep.start or 0](x).detach()
        blocks = every[keep]
        optimiser = sgd(blocks.parameters())
        for _ in range(2):
            optimiser.zero_grad(set_to_none=True)
            run(blocks, x.requires_grad_(bool(keep.start)), labels)
            optimiser.step()
        peak = tracker.get_tracker_snapshot("peak")
    return int(peak[torch.device("cpu")]["Total"])


def _plain(blocks: nn.Sequential, x: Tensor, labels: Tensor) -> None:
    cross_entropy(blocks(x), labels).backward()


def _checkpointed(blocks: nn.Sequential, x: Tensor, labels: Tensor) -> None:
    parts = max(2, round(len(blocks) ** 0.5))  # the usual choice
    scores = checkpoint_sequential(blocks, parts, x.requires_grad_(), use_reentrant=False)
    cross_entropy(scores, labels).backward()


def _holding(open_graphs: int, blocks: nn.Sequential, x: Tensor, labels: Tensor) -> None:
    """A stage of a pipeline at its fullest: so many micro-batches wait for their backward."""
    for y in [blocks(x.detach().requires_grad_()) for _ in range(open_graphs)]:
        (cross_entropy(y, labels) if y.dim() == 2 else y.sum()).backward()


def baselines(name: str, settings: Settings) -> Iterator[Row]:
    """Backpropagation, with checkpointing, and the fullest rank of two pipelines whose stages have as many blocks."""
    blocks, ranks, parts = len(network(name)), settings.stages, settings.micro_batches
    everything = slice(0, blocks)
    yield _row(name, "BP", 1, 1, tracked(_plain, name, settings.batch, everything))
    yield _row(name, "BP, checkpointing", 1, 1, tracked(_checkpointed, name, settings.batch, everything))
    edges = [round(rank * blocks / ranks) for rank in range(ranks + 1)]
    for schedule in ("GPipe", "1F1B"):
        peaks = []
        for rank, (first, end) in enumerate(itertools.pairwise(edges)):
            held = parts if schedule == "GPipe" else min(ranks - rank, parts)
            rows = settings.batch // parts
            peaks.append(tracked(partial(_holding, held), name, rows, slice(first, end)))
        yield _row(name, f"torch {schedule}, M = {parts}", ranks, ranks, max(peaks))


def _row(name: str, system: str, modules: int, ranks: int, peak: int, **known: int) -> Row:
    shares = dict.fromkeys(("weights", "heads", "optimiser", "messages", "work")) | known
    return {"network": name, "system": system, "modules": modules, "ranks": ranks, "peak": peak,
            "paper_gb": PAPER.get((name, system)) if ranks == 1 else None, **shares}  # fmt: skip


def ours(name: str, settings: Settings) -> Iterator[Row]:
    """Every method, in one process and with a rank for each module."""
    cases = {"BP, here": ["model.modules=1"]}
    for method, chosen in METHODS.items():
        for form, more in FORMS.items():
            cases[method + form] = [f"model.modules={CUTS[name]}", "model.cuts=auto", *chosen, *more]
    for system, chosen in cases.items():
        run = [f"model.name={name}", f"data.batch_size={settings.batch}", f"runtime.queue_depth={settings.queue}"]
        run += ["precision.compute=fp32", "partition.kind=count", *chosen]
        config = load_config("cifar10-resnet32-bp", assignments=run)
        for ranks in (1, config.model.modules) if config.model.modules > 1 else (1,):
            found = step_memory(config, IMAGE, CLASSES, ranks)
            most = max(found, key=lambda rank: rank.peak)
            yield _row(name, system, config.model.modules, ranks, most.peak, weights=most.weights, heads=most.heads,
                       optimiser=most.optimiser, messages=most.messages, work=most.work)  # fmt: skip


def _mib(key: str, title: str) -> Column:
    return Column(title, lambda row: None if row[key] is None else row[key] / MIB, ",.0f")


COLUMNS = (
    Column("network", "network"), Column("system", "system"), K, Column("P", "ranks"),
    _mib("weights", "weights"), _mib("heads", "heads"), _mib("optimiser", "optimiser"), _mib("messages", "messages"),
    _mib("work", "work"), _mib("peak", "peak"), Column("to BP", "ratio", ".3f"), Column("paper GB", "paper_gb", ".2f"),
)  # fmt: skip


def targets(rows: Sequence[Row]) -> Iterator[Target]:
    """Of DGL + HPFF; and that both ways to count agree."""
    for text, aims, alone in (("one process", ONE, True), ("the largest of a rank per module", LARGEST, False)):
        for name, most in aims.items():
            found = [row["ratio"] for row in rows if (row["network"], row["system"]) == (name, "DGL + HPFF")
                     and (row["ranks"] == 1) == alone]  # fmt: skip
            yield Target(f"DGL + HPFF, {text}, to BP", {name: found[0]} if found else {}, most=most)
    both = {row["network"]: row["ratio"] for row in rows if row["system"] == "BP, here"}
    yield Target("backpropagation counted here to MemTracker's", both, least=0.98, most=1.02)


def measure(settings: Settings) -> Report:
    """All networks."""
    rows = [row for name in settings.network for row in itertools.chain(baselines(name, settings), ours(name, settings))]
    for row in rows:
        base = next(other for other in rows if (other["network"], other["system"]) == (row["network"], "BP"))
        row["ratio"] = row["peak"] / base["peak"]
    about = (
        f"32x32 images, batch {settings.batch}, fp32; MiB of the fullest rank at the peak of a step. Work: gradients, "
        "activations and what operations need besides; messages: slots of queues. Work space that a library gets for "
        "itself is in none of them. HPFF: patches one after another. Paper: GB as nvidia-smi shows them, of one "
        "process, with about 1 GB for the CUDA context."
    )
    return Report("Memory of a training step", [Table(COLUMNS, rows)], [about], list(targets(rows)))


if __name__ == "__main__":
    main(__doc__, Settings, measure, quick={"network": ("resnet20",), "batch": 64})
