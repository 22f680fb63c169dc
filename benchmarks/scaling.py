"""How the local pipeline scales: P = 2 ... 32 ranks on virtual devices, and P up to 4096 in simulation.

    python benchmarks/scaling.py [--quick] [--json FILE] [--output FILE.md] [--chart FILE.png] ...      see --help

Every rank is a process with one local module, and trains: real autograd, optimisers, messages and schedules. Only the
arithmetic is a wait (see virtual.py). The network grows with P, so images/s would not fall in a perfect pipeline. The
schedules of torch.distributed.pipelining run on the same blocks, costs and batch.
"""

from __future__ import annotations

import contextlib
import json
import statistics
import tempfile
from collections import OrderedDict
from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

from baselines import TORCH_SCHEDULES, torch_pipeline, torch_systems
from bursts import Burst, LocalPipeline, System, Turn, compete, local_systems, sections, time_steps
from ranks import Rank, available_cores
from runner import DASHED, INK, Report, Target, main, option, picture
from tables import BUSY, SPEED, Column, M, P, Row, Table, label, make_row, medians, system_name
from torch import nn
from virtual import CLASSES, METHOD, Clock, Costs, equal_costs, features, profiled_costs, register_virtual_heads
from virtual import virtual_network as network_of

from pipeline import ConfigError, Profile, explain, from_dict, register_backbone

METHODS = (("dgl", 1), ("dgl", 2))  # what the virtual heads stand for, and cascade spans
FILLED = ("GPipe", "1F1B")  # schedules of torch whose time is known in a closed form
SIMULATED = (2, 4, 8, 16, 32, 64, 256, 1024, 4096)
WIDTH = 8  # features per row: messages are small, as in a pipeline that computes much more than it sends
COLUMNS = (
    Column("system", system_name), P, M, *SPEED, Column("x one device", "ratio_to_bp", ".2f"),
    Column("optimum", "optimum", ".1f"), Column("of optimum", "of_optimum", ".3f"),
    Column("of bound", "efficiency", ".3f"), BUSY,
    Column("DGL / this", lambda row: f"{row['local_ratio']:.2f}" + " *" * ((row["host_load"] or 0) > 0.5)),
)  # fmt: skip
LEGEND = (
    "x one device: speed to backpropagation of the whole network on one device, 1 / (sum of its costs). Optimum: the "
    "same schedule and costs with free messages, simulated (ours) or by the closed form (GPipe, 1F1B with equal "
    "modules). Of bound: to 1 / max stage time. Busy: virtual compute per step / step; of many ranks the lowest and "
    "highest. DGL / this: speed of plain DGL, exact, M = 1 to this in the same round. *: the processes used more than "
    "half of this machine's cores, so the machine and not the schedule may limit the row."
)
SIMULATED_COLUMNS = (Column("schedule", "schedule"), P, SPEED[0], Column("of bound", "efficiency", ".3f"))
CURVES = {
    "dgl, exact": ("#1f6fb2", "o"), "dgl + hpff, async": ("#1b9e77", "s"), "dgl + hpff, exact": ("#66b3a1", "D"),
    "torch ZBVZeroBubble, M = 8": ("#8c6bb1", "v"), "torch GPipe, M = 8": ("#e08214", "^"),
    "torch GPipe, M = 4": ("#d9534f", "<"), "torch GPipe, M = 1": ("#7f7f7f", "x"),
}  # fmt: skip


@dataclass(frozen=True)
class Settings:
    ranks: tuple[int, ...] = option((2, 4, 8, 16, 32), "numbers of ranks to run", "P", above=1)
    unit_ms: float = option(50.0, "forward, input gradient and weight gradient of a module take one unit each", "MS")
    head: float = option(0.3, "units of one level of heads, forward and backward", "UNITS")
    profile: str = option("", "costs of every module instead, from launch/plan.py", "FILE")
    rounds: int = option(3, "interleaved rounds of every number of ranks", "N")
    simulate_to: int = option(4096, "largest number of ranks that is simulated", "P", above=1)
    batch: int = 64  # rows
    warmup: int = 4
    steps: int = 8  # timed, of a burst of the local pipeline, which fills only once
    torch_steps: int = 2  # of torch's pipelines, which fill and drain in every step
    quick: bool = False
    deadline_s: float = 900.0

    def costs(self, ranks: int) -> tuple[Costs, ...]:
        """Of every module in a pipeline of ``ranks`` ranks, as they are waited for."""
        if not self.profile:
            return equal_costs(ranks, self.unit_ms / 1e3, self.head)
        return tuple(cost.scaled(self.stretch) for cost in profiled_costs(Profile.read(Path(self.profile))))

    @property
    def stretch(self) -> float:
        """How much longer a wait is than the time in the profile: its mean forward pass takes a unit. Rates are given
        in the profile's time."""
        if not self.profile:
            return 1.0
        costs = profiled_costs(Profile.read(Path(self.profile)))
        return self.unit_ms / 1e3 / statistics.mean(cost.forward for cost in costs)


def systems(settings: Settings, ranks: int) -> list[System]:
    """Everything that is run on ``ranks`` ranks; the first is the reference of all ratios: exact, M = 1, plain."""
    found = local_systems(METHODS, ranks, ranks, settings.quick, Bench.ours)
    for name in ("GPipe", "1F1B", "InterleavedZeroBubble", "ZBVZeroBubble"):
        counts = {2} if settings.quick else {1, 2, 4, 8, ranks} if name == "1F1B" else {1, 2, 4, 8}
        counts = {count for count in counts if settings.batch % count == 0}
        found += torch_systems([name], ranks, sorted(counts), Bench.torch)
    return found


class Bench:
    """The virtual device of one rank, and what runs on it."""

    def __init__(self, settings: Settings, rank: Rank) -> None:
        self.settings, self.rank, self.clock = settings, rank, Clock(settings.batch)
        self.costs = settings.costs(rank.count)
        register_virtual_heads(self.costs[rank.index], self.clock)
        self.local = LocalPipeline(rank, settings.warmup, settings.steps)
        self.batch = features(settings.batch, WIDTH)

    @property
    def record(self) -> float:
        """How much longer its waits were than asked for, as a ratio."""
        return self.clock.waited / self.clock.asked - 1

    def ours(self, system: System) -> Burst | None:
        """A burst of the local pipeline."""
        config = sections(replace(system, method=METHOD), self.settings.batch)
        return self.local.burst(config, self.local.data(*self.batch), network_of(self.costs, self.clock, WIDTH))

    def torch(self, system: System) -> Burst:
        """A burst of torch.distributed.pipelining."""
        shares = TORCH_SCHEDULES[system.schedule].parts_per_rank
        parts = [cost.scaled(1 / shares) for cost in self.costs for _ in range(shares)]
        blocks = [[block] for block in network_of(parts, self.clock, WIDTH)]
        with torch_pipeline(self.rank, system, blocks, self.batch[0]) as (step, sent):
            burst = time_steps(self.rank, lambda: step(*self.batch), 1, self.settings.torch_steps)
        return replace(burst, sent=sent)


def predict(settings: Settings, system: System) -> Any:
    """The plan of one of our systems with free messages. Registers what it needs under names of its own."""
    costs, config = settings.costs(system.ranks), sections(replace(system, method=METHOD), settings.batch)
    config["model"]["name"] = f"virtual{system.ranks}"
    with contextlib.suppress(ConfigError):  # registered by an earlier call
        register_backbone(config["model"]["name"], lambda _channels, _classes: _shapes_only(system.ranks))
    with contextlib.suppress(ConfigError):
        register_virtual_heads(costs[0], Clock(settings.batch))
    modules = [cost.as_entry() for cost in costs]
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "profile.json"
        profile = {"format": "localpipe-profile-1", "batch_size": settings.batch, "modules": modules}
        path.write_text(json.dumps(profile), encoding="utf-8")
        return explain(from_dict(config), system.ranks, Profile.read(path))


def _shapes_only(ranks: int) -> OrderedDict[str, nn.Module]:
    """A network with as many blocks as there are ranks, for images of three channels."""
    blocks: OrderedDict[str, nn.Module] = OrderedDict((f"block{index}", nn.Identity()) for index in range(ranks))
    blocks["block0"] = nn.Sequential(nn.AdaptiveAvgPool2d(1), nn.Flatten())
    blocks[f"block{ranks - 1}"] = nn.Sequential(blocks[f"block{ranks - 1}"], nn.Linear(3, CLASSES))
    return blocks


def row_of(settings: Settings, system: System, turns: Sequence[Turn]) -> Row:
    """One system, with four keys of its own: ``optimum`` (images/s of this schedule with these costs and free
    messages), ``of_optimum``, ``local_ratio`` (median speed of plain DGL, exact, M = 1 to this in the same round) and
    ``host_load`` (share of this machine's cores that was used; None for ours, which start and end in a burst)."""
    ranks, costs = system.ranks, settings.costs(system.ranks)
    images = settings.batch * settings.stretch
    step_s = statistics.median(turn.step_s for turn in turns)
    optimum_s = host_load = None
    if system.method == "bp":
        stage_s = work_s = TORCH_SCHEDULES[system.schedule].loads([cost.module for cost in costs])
        host_load = statistics.median(sum(turn.work_s) / turn.step_s for turn in turns) / len(available_cores())
        if not settings.profile and system.schedule in FILLED:
            optimum_s = stage_s[0] * (system.micro_batches + ranks - 1) / system.micro_batches
    else:
        plan = predict(settings, system)
        stage_s, optimum_s = [rank.work_s for rank in plan.ranks], plan.step_s
        work_s = medians([turn.work_s for turn in turns])
    return make_row(
        images, [turn.step_s for turn in turns], work_s, stage_s, **system.row,
        ratio_to_bp=sum(cost.module for cost in costs) / step_s, bytes_per_step=turns[0].sent,
        optimum=optimum_s and images / optimum_s, of_optimum=optimum_s and optimum_s / step_s,
        local_ratio=1 / statistics.median(turn.ratio for turn in turns), host_load=host_load,
    )  # fmt: skip


def simulated(settings: Settings) -> list[Row]:
    """Our schedules from the simulator and GPipe by the closed form, up to ``simulate_to`` ranks."""
    entries = []
    module_s = 3 * settings.unit_ms / 1e3
    for ranks in [ranks for ranks in SIMULATED if ranks <= settings.simulate_to]:
        ours = local_systems(METHODS, ranks, ranks, True, Bench.ours)
        for system in [*ours, *torch_systems(["GPipe"], ranks, (1, 4, 8), Bench.torch)]:
            curve, count = label(system.row), system.micro_batches
            if curve not in CURVES:
                continue
            step_s, bound_s = module_s * (count + ranks - 1) / count, module_s
            if system.method != "bp":
                plan = predict(settings, system)
                step_s, bound_s = plan.step_s, plan.bound_s
            rates = {"images_per_s": settings.batch / step_s, "efficiency": bound_s / step_s}
            entries.append({"schedule": curve, "ranks": ranks, **rates})
    return sorted(entries, key=lambda entry: list(CURVES).index(entry["schedule"]))


def targets(settings: Settings, rows: Sequence[Row]) -> list[Target]:
    """What must come out, from the costs alone."""
    plain = {row["ranks"]: row for row in rows if label(row) == "dgl, exact"}
    optimum = {f"P = {ranks}": row["of_optimum"] for ranks, row in plain.items()}
    reached = Target("plain DGL, exact, M = 1: share of the simulated optimum", optimum, least=0.97)
    if settings.profile:
        return [reached]
    late = {f"{system_name(row)}, P = {row['ranks']}": row["efficiency"] for row in rows if row["schedule"] == "async"}
    few = [row for row in rows if row["schedule"] in FILLED and row["micro_batches"] <= row["ranks"]]
    change = {}
    if {4, 16} <= set(plain):
        change["P = 16 to P = 4"] = plain[16]["images_per_s"] / plain[4]["images_per_s"]
    return [
        replace(reached, text=f"{reached.text}, {3 + settings.head:g} units a step at any P,"),
        Target("plain DGL, exact, M = 1: images/s do not depend on P; their ratio", change, 0.97, 1.03),
        Target("async: share of 1 / max stage time", late, least=0.97),
        Target(
            "plain DGL, exact, M = 1: speed to GPipe and 1F1B at M <= P, which take 3 (M + P - 1) / M units (at M = P "
            f"it tends to 6 / {3 + settings.head:g} = {6 / (3 + settings.head):.2f})",
            {f"{label(row)}, P = {row['ranks']}": row["local_ratio"] for row in few},
            least=1.3,
        ),
    ]


def findings(settings: Settings, rows: Sequence[Row]) -> list[str]:
    """What the rows say besides, the good and the bad."""
    cascade = [row for row in rows if label(row) == "dgl + hpff, exact"]
    reached = ", ".join(f"P = {row['ranks']}: {row['of_optimum']:.3f}" for row in cascade)
    found = [f"With HPFF's cascade, exact, M = 1, the share of the simulated optimum is {reached}."]
    sizes = sorted({row["ranks"] for row in rows})
    for ranks in sizes:
        ahead = [row for row in rows if row["ranks"] == ranks and row["method"] == "bp" and row["local_ratio"] < 1]
        faster = [f"{label(row)} ({1 / row['local_ratio']:.2f} times as fast)" for row in ahead]
        found.append(f"P = {ranks}, faster than plain DGL: {', '.join(faster) or 'none'}.")
    if not settings.profile:
        many = ", ".join(f"{3 * (ranks - 1) / settings.head:.0f} for P = {ranks}" for ranks in sizes)
        zero = ", ".join(f"{(ranks - 1) / (2 * settings.head):.0f} for P = {ranks}" for ranks in sizes)
        found.append(
            "A synchronous pipeline computes no heads, so with enough micro-batches it is faster than local learning. "
            f"By the closed forms, GPipe and 1F1B pass plain DGL at M > 3 (P - 1) / head: {many}; ZBV at M > (P - 1) / "
            f"(2 head): {zero}. On one device backpropagation needs no heads either: P devices give less than P times "
            "its speed."
        )
    return found


def about(settings: Settings, overshoot: float) -> list[str]:
    """The conditions, for the page."""
    costs = (
        f"Costs of `{settings.profile}`, stretched {settings.stretch:.3g} times; rates are in its own time. "
        if settings.profile
        else f"One local module per rank: F = I = W = {settings.unit_ms:g} ms per batch of {settings.batch} rows, a "
        f"level of heads {settings.head:g} units. "
    )
    return [
        costs + f"{settings.rounds} interleaved rounds; bursts of {settings.steps} timed steps after {settings.warmup} "
        f"(ours) and of {settings.torch_steps} after 1 (torch, which fills and drains its pipeline in every step). The "
        f"waits of a process are right to {100 * overshoot:.2g} % in sum: one that ends late shortens the next.",
        "What is not virtual (Python, autograd, messages, optimisers) runs on the cores of this machine and is the "
        "difference to the optimum. Interleaved schedules cut every module in two. torch's one group per edge "
        "(TORCH_DISTRIBUTED_PIPELINE_PER_EDGE_P2P=1) was tried and makes no difference here (within 2 %); it is off.",
    ]


def profile_shape(path: str) -> dict[str, Any]:
    """The number of ranks and the batch that a profile is for; ConfigError for one that cannot be used."""
    profile = Profile.read(Path(path))
    if len(profile.modules) < 2 or not any(module.forward_s for module in profile.modules):
        raise ConfigError(f"--profile {path}: {len(profile.modules)} modules; give two or more, with their forward_s")
    return {"ranks": (len(profile.modules),), "batch": profile.batch_size}


def measure(settings: Settings) -> Report:
    """Everything."""
    shape = profile_shape(settings.profile) if settings.profile else {}
    settings = replace(settings, **shape)
    rows: list[Row] = []
    overshoot = 0.0
    for ranks in settings.ranks:
        print(f"P = {ranks}", flush=True)
        found, late = compete(settings, systems, Bench, ranks, settings.deadline_s * settings.rounds)
        rows += [row_of(settings, system, turns) for system, turns in found]
        overshoot = max(overshoot, *map(abs, late))
    tables, entries = [Table(COLUMNS, rows)], [] if settings.profile else simulated(settings)
    if entries:
        tables.append(Table(SIMULATED_COLUMNS, entries, "Simulated (ours) and by the closed form (GPipe)"))
    said = about(settings, overshoot), targets(settings, rows), findings(settings, rows), LEGEND
    notes = {**shape, "simulated": entries, "overshoot": overshoot}
    draw = partial(chart, rows=rows, entries=entries)
    return Report("Scaling on virtual devices", tables, *said, notes, draw=draw)


def chart(path: Path, rows: Sequence[Row], entries: Sequence[Row]) -> None:
    """images/s against P: points and solid lines are measured, dashed lines predicted."""
    title = "Virtual devices: one local module per rank; dashed: simulated or closed form"
    with picture(path, title, 4.8, "outside right upper") as axes:
        for curve, (colour, marker) in CURVES.items():
            measured = [(row["ranks"], row["images_per_s"]) for row in rows if label(row) == curve]
            predicted = [(entry["ranks"], entry["images_per_s"]) for entry in entries if entry["schedule"] == curve]
            if measured:
                axes.plot(*zip(*measured, strict=True), color=colour, marker=marker, markersize=5, label=curve)
            if predicted:
                name = None if measured else curve
                axes.plot(*zip(*predicted, strict=True), color=colour, linewidth=1.2, linestyle=DASHED, label=name)
        axes.set_xscale("log", base=2)
        axes.xaxis.set_major_formatter(lambda value, _: f"{value:.0f}")
        axes.set_ylim(bottom=0)
        axes.set_xlabel("ranks P; the network has P times the layers", fontsize=9, color=INK)
        axes.set_ylabel("images/s through every rank", fontsize=9, color=INK)


QUICK = {"ranks": (2,), "unit_ms": 20.0, "batch": 8, "rounds": 1, "warmup": 2, "steps": 4, "torch_steps": 1}
QUICK |= {"simulate_to": 64, "quick": True, "deadline_s": 120.0}

if __name__ == "__main__":
    main(__doc__, Settings, measure, QUICK, chart="images/s against P")
