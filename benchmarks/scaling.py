"""How the local pipeline scales: P = 2 ... 32 ranks on virtual devices, and P up to 4096 in simulation.

    python benchmarks/scaling.py [--ranks P ...] [--unit-ms MS] [--head UNITS] [--profile FILE] [--rounds N]
                                 [--simulate-to P] [--quick] [--json FILE] [--output FILE.md] [--chart FILE.png]

Every rank is a process with one local module, and trains: real autograd, optimisers, messages and schedules. Only the
arithmetic is a wait (see virtual.py). The network grows with P, so images/s would not fall in a perfect pipeline. The
schedules of torch.distributed.pipelining run on the same blocks, costs and batch.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import statistics
import sys
import tempfile
from collections import OrderedDict
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import torch
from baselines import GPIPE, ONE_F_ONE_B, ZBV, ZERO_BUBBLE, TorchSchedule, torch_pipeline
from bursts import Burst, System, Turn, merge, take_turns, time_steps
from charts import ChartError
from ours import LocalPipeline
from ranks import Rank, RanksFailed, available_cores, run_ranks
from scaling_page import CURVES, ScalingRow, chart, large_batches, page, show_rows
from tables import at_least, check_targets, document, output_options, positive, spread, write_json
from torch import nn
from virtual import (
    CLASSES,
    METHOD,
    Clock,
    Costs,
    batches,
    equal_costs,
    profiled_costs,
    register_virtual_heads,
    virtual_blocks,
)

from pipeline import ConfigError, LoaderData, Profile, explain, from_dict, register_backbone

LOCAL = tuple(
    (span, kind, micro_batches)
    for span in (1, 2)
    for kind, micro_batches in (("exact", 1), ("exact", 2), ("exact", 4), ("async", 1))
)
"""(cascade span, schedule, micro-batches) of our rows."""
TORCH_BY_NAME = {schedule.name: schedule for schedule in (GPIPE, ONE_F_ONE_B, ZERO_BUBBLE, ZBV)}
MICRO_BATCHES = (1, 2, 4, 8)
SIMULATED = (2, 4, 8, 16, 32, 64, 256, 1024, 4096)
PLAIN, WITH_CASCADE = "dgl", "dgl + hpff"
PROFILE_FORMAT = "localpipe-profile-1"
WIDTH = 8
"""Features per row: messages are small, as in a pipeline that computes much more than it sends."""
SGD = {"lr": 1e-3, "momentum": 0.9, "nesterov": True, "weight_decay": 1e-4}


@dataclass(frozen=True)
class Settings:
    """Of one run of this tool.

    Attributes:
        ranks: numbers of ranks.
        unit_ms: one unit of time; forward, input gradient and weight gradient of a module take one each.
        head: units of one level of heads, forward and backward.
        profile: file with the costs of every module instead; "" for equal modules.
        batch: rows of a batch.
        rounds: rounds of every number of ranks.
        warmup, steps: of a burst of the local pipeline, which fills only once.
        torch_steps: timed steps of a burst of torch's pipelines, which fill and drain in every step.
        simulate_to: largest number of ranks that is simulated.
    """

    ranks: tuple[int, ...] = (2, 4, 8, 16, 32)
    unit_ms: float = 50.0
    head: float = 0.3
    profile: str = ""
    batch: int = 64
    rounds: int = 3
    warmup: int = 4
    steps: int = 8
    torch_steps: int = 2
    simulate_to: int = 4096
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
        return self.unit_ms / 1e3 / (sum(cost.forward for cost in costs) / len(costs))


QUICK = Settings(
    ranks=(2,),
    unit_ms=20.0,
    batch=8,
    rounds=1,
    warmup=2,
    steps=4,
    torch_steps=1,
    simulate_to=64,
    quick=True,
    deadline_s=120.0,
)


def sections(settings: Settings, ranks: int, span: int, kind: str, micro_batches: int) -> dict[str, dict[str, Any]]:
    """Our configuration."""
    return {
        "model": {"modules": ranks},
        "method": {"name": METHOD},
        "hierarchy": {"cascade_span": span, "independent_weight": 1.0, "cascade_weight": 1.0},
        "schedule": {"kind": kind, "micro_batches": micro_batches},
        "data": {"batch_size": settings.batch},
        "optim": {"name": "sgd", "schedule": "constant", "warmup_epochs": 0, **SGD},
        "train": {"epochs": 1},
        "precision": {"compute": "fp32"},
        "runtime": {"device": "cpu", "threads": 1, "deadline_s": settings.deadline_s},
    }


def systems(
    settings: Settings, ranks: int, costs: Sequence[Costs], clock: Clock, runner: LocalPipeline | None
) -> list[System]:
    """Everything that is run on ``ranks`` ranks; the first is the reference of all ratios: exact, M = 1, plain.

    ``runner`` is None where they are only named and not run.
    """
    found = []
    for span, kind, micro_batches in [x for x in LOCAL if x[2] == 1] if settings.quick else LOCAL:

        def local(_rank: Rank, config: tuple[int, str, int] = (span, kind, micro_batches)) -> Burst | None:
            assert runner is not None
            network = nn.Sequential(*virtual_blocks(costs, clock, WIDTH, settings.batch))
            train = batches(runner.batches, settings.batch, WIDTH)
            data = LoaderData(train, batches(1, 2, WIDTH))
            return runner.burst(sections(settings, ranks, *config), data, network)

        name = PLAIN if span == 1 else WITH_CASCADE
        found.append(System("localpipe", name, kind, ranks, ranks, micro_batches, local))
    for schedule in TORCH_BY_NAME.values():
        counts = {*MICRO_BATCHES, ranks} if schedule is ONE_F_ONE_B else set(MICRO_BATCHES)
        counts = {2} if settings.quick else counts
        for micro_batches in sorted(counts):
            if settings.batch % micro_batches or not schedule.fits(micro_batches, ranks):
                continue

            def torch_burst(rank: Rank, schedule: TorchSchedule = schedule, count: int = micro_batches) -> Burst:
                return _torch_burst(settings, rank, costs, clock, schedule, count)

            parts = ranks * schedule.parts_per_rank
            found.append(System("torch", "bp", schedule.name, ranks, parts, micro_batches, torch_burst))
    return found


def _torch_burst(
    settings: Settings, rank: Rank, costs: Sequence[Costs], clock: Clock, schedule: TorchSchedule, micro_batches: int
) -> Burst:
    shares = schedule.parts_per_rank
    parts = [cost.scaled(1 / shares) for cost in costs for _ in range(shares)]
    blocks = [[block] for block in virtual_blocks(parts, clock, WIDTH, settings.batch)]
    data = batches(1, settings.batch, WIDTH)

    def sgd(parameters: Sequence[nn.Parameter]) -> torch.optim.Optimizer:
        return torch.optim.SGD(parameters, **SGD)

    with torch_pipeline(rank, schedule, blocks, micro_batches, data.inputs, sgd, "gloo") as (step, sent):
        burst = time_steps(rank, lambda: step(data.inputs, data.labels), 1, settings.torch_steps)
    return replace(burst, sent=sent)


def work(rank: Rank, settings: Settings) -> tuple[list[tuple[int, Burst | None]], float]:
    """All rounds on one rank, and how much longer its waits were than asked for, as a ratio."""
    clock = Clock()
    costs = settings.costs(rank.count)
    register_virtual_heads(costs[rank.index], clock, settings.batch)
    runner = LocalPipeline(rank, settings.warmup, settings.steps)
    done = take_turns(rank, systems(settings, rank.count, costs, clock, runner), settings.rounds)
    return done, clock.waited / clock.asked - 1


@dataclass(frozen=True)
class Prediction:
    """Of the simulator: seconds of a step, and of the busiest stage."""

    step_s: float
    bound_s: float
    stage_s: tuple[float, ...]


def predict(settings: Settings, ranks: int, span: int, kind: str, micro_batches: int) -> Prediction:
    """Our schedule with free messages. Registers what the simulator needs under names of its own."""
    costs = settings.costs(ranks)
    name = f"virtual{ranks}"
    with contextlib.suppress(ConfigError):  # registered by an earlier call
        register_backbone(name, lambda _channels, _classes: _shapes_only(ranks))
    with contextlib.suppress(ConfigError):
        register_virtual_heads(costs[0], Clock(), settings.batch)
    values = sections(settings, ranks, span, kind, micro_batches)
    values["model"]["name"] = name
    modules = [cost.as_entry() for cost in costs]
    entries = {"format": PROFILE_FORMAT, "batch_size": settings.batch, "modules": modules}
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "profile.json"
        path.write_text(json.dumps(entries), encoding="utf-8")
        report = explain(from_dict(values), ranks, Profile.read(path))
    return Prediction(report.step_s, report.bound_s, tuple(rank.work_s for rank in report.ranks))


def _shapes_only(ranks: int) -> OrderedDict[str, nn.Module]:
    """A network with as many blocks as there are ranks, for images of three channels."""
    blocks: OrderedDict[str, nn.Module] = OrderedDict((f"block{index}", nn.Identity()) for index in range(ranks))
    blocks["block0"] = nn.Sequential(nn.AdaptiveAvgPool2d(1), nn.Flatten())
    blocks[f"block{ranks - 1}"] = nn.Sequential(blocks[f"block{ranks - 1}"], nn.Linear(3, CLASSES))
    return blocks


def rows_of(settings: Settings, ranks: int, turns: Mapping[int, Sequence[Turn]]) -> list[ScalingRow]:
    """One row per system."""
    costs = settings.costs(ranks)
    alone_s = sum(cost.module for cost in costs)
    rows = []
    for index, system in enumerate(systems(settings, ranks, costs, Clock(), None)):
        mine = turns[index]
        rates = [settings.batch * settings.stretch / turn.step_s for turn in mine]
        rate, low, high = spread(rates)
        step_s = settings.batch * settings.stretch / rate
        host_load = optimum_s = None
        if system.name == "torch":
            stage_s = worked_s = _stage_seconds(TORCH_BY_NAME[system.schedule], costs)
            host_load = statistics.median(sum(t.work_s) / t.step_s for t in mine) / len(available_cores())
            if not settings.profile and system.schedule in (GPIPE.name, ONE_F_ONE_B.name):
                optimum_s = stage_s[0] * (system.micro_batches + ranks - 1) / system.micro_batches
        else:
            span = 1 if system.method == PLAIN else 2
            prediction = predict(settings, ranks, span, system.schedule, system.micro_batches)
            stage_s, optimum_s = prediction.stage_s, prediction.step_s
            worked_s = tuple(map(statistics.median, zip(*(turn.work_s for turn in mine), strict=True)))
        rows.append(
            ScalingRow(
                system=system.name,
                method=system.method,
                schedule=system.schedule,
                ranks=ranks,
                modules=system.modules,
                micro_batches=system.micro_batches,
                images_per_s=rate,
                low=low,
                high=high,
                ratio_to_bp=alone_s / step_s,
                bound=settings.batch * settings.stretch / max(stage_s),
                efficiency=max(stage_s) / step_s,
                busy=tuple(seconds / step_s for seconds in worked_s),
                bytes_per_step=mine[0].sent,
                optimum=None if optimum_s is None else settings.batch * settings.stretch / optimum_s,
                of_optimum=None if optimum_s is None else optimum_s / step_s,
                local_ratio=1 / statistics.median(turn.ratio for turn in mine),
                host_load=host_load,
            )
        )
    return rows


def _stage_seconds(schedule: TorchSchedule, costs: Sequence[Costs]) -> tuple[float, ...]:
    """Work of every rank: interleaved schedules cut every module into as many parts as a rank owns."""
    ranks, each = len(costs), schedule.parts_per_rank
    seconds = [0.0] * ranks
    for part in range(ranks * each):
        seconds[schedule.owner(part, ranks)] += costs[part // each].module / each
    return tuple(seconds)


def simulated(settings: Settings) -> list[dict[str, Any]]:
    """Our schedules from the simulator and GPipe by the closed form, up to ``simulate_to`` ranks."""
    entries = []
    sizes = [ranks for ranks in SIMULATED if ranks <= settings.simulate_to]
    for ranks in sizes:
        for span, kind in ((1, "exact"), (2, "exact"), (2, "async")):
            found = predict(settings, ranks, span, kind, 1)
            method = PLAIN if span == 1 else WITH_CASCADE
            entries.append((f"{method}, {kind}", ranks, found.step_s, found.bound_s))
        module_s = 3 * settings.unit_ms / 1e3
        for micro_batches in (1, 4, 8):
            name = f"torch GPipe, M = {micro_batches}"
            entries.append((name, ranks, module_s * (micro_batches + ranks - 1) / micro_batches, module_s))
    return [
        {"schedule": name, "ranks": p, "images_per_s": settings.batch / step_s, "efficiency": bound_s / step_s}
        for name, p, step_s, bound_s in sorted(entries, key=lambda entry: (list(CURVES).index(entry[0]), entry[1]))
    ]


def expected(settings: Settings) -> list[str]:
    """What must come out, from the costs alone, written down before anything is measured."""
    if settings.profile:
        return ["the simulator's optimum for this profile"]
    head = settings.head
    return [
        f"exact, M = 1, plain: one step takes 3 + {head:g} units at any P; >= 0.97 of that, and P = 16 within 3 % of "
        "P = 4",
        "async: >= 0.97 of 1 / max stage time",
        f"GPipe and 1F1B: 3 (M + P - 1) / M units; at M = P the ratio to plain DGL tends to 6 / {3 + head:g} = "
        f"{6 / (3 + head):.2f}, and it must be >= 1.3 at every M <= P",
    ]


def measure(settings: Settings) -> dict[str, Any]:
    """Everything; returns the document."""
    notes = {"expected": expected(settings)}
    rows: list[ScalingRow] = []
    overshoot = 0.0
    for ranks in settings.ranks:
        print(f"P = {ranks}", flush=True)
        values = run_ranks(work, ranks, settings, deadline_s=settings.deadline_s * settings.rounds)
        rows += rows_of(settings, ranks, merge([done for done, _ in values]))
        overshoot = max(overshoot, *(abs(late) for _, late in values))
    notes["explained"] = explained(settings, overshoot)
    notes["limits"] = [] if settings.profile else [large_batches(settings.head, settings.ranks)]
    notes["simulated"] = [] if settings.profile else simulated(settings)
    notes["overshoot"] = overshoot
    result = document({**asdict(settings), **notes}, [asdict(row) for row in rows])
    show_rows(rows)
    return result


def explained(settings: Settings, overshoot: float) -> list[str]:
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


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    default = Settings()
    parser.add_argument("--ranks", type=at_least(2), nargs="+", metavar="P", default=default.ranks, help="to run")
    parser.add_argument("--unit-ms", type=positive, metavar="MS", default=default.unit_ms, help="one unit of time")
    parser.add_argument("--head", type=positive, metavar="UNITS", default=default.head, help="units of heads")
    parser.add_argument("--profile", metavar="FILE", default="", help="costs of every module, from launch/plan.py")
    parser.add_argument("--rounds", type=at_least(1), metavar="N", default=default.rounds, help="interleaved rounds")
    parser.add_argument("--simulate-to", type=at_least(2), metavar="P", default=default.simulate_to, help="to simulate")
    parser.add_argument("--quick", action="store_true", help="two ranks, fixed settings: less than a minute")
    output_options(parser, chart="draw images/s against P")
    options = vars(parser.parse_args())
    targets = {name: options.pop(name) for name in ("json", "output", "chart")}
    settings = QUICK if options["quick"] else Settings(**{**options, "ranks": tuple(options["ranks"])})
    if settings.profile:
        settings = replace(settings, **profile_shape(settings))
    check_targets(**targets)
    command = " ".join(["python benchmarks/scaling.py", *sys.argv[1:]])
    result = measure(settings)
    rows = [ScalingRow(**row) for row in result["rows"]]
    if targets["json"] is not None:
        write_json(targets["json"], result)
    if targets["output"] is not None:
        picture = targets["chart"].name if targets["chart"] is not None else None
        targets["output"].write_text(page(result, rows, command, picture), encoding="utf-8")
    if targets["chart"] is not None:
        chart(targets["chart"], result, rows)


def profile_shape(settings: Settings) -> dict[str, Any]:
    """The number of ranks and the batch that a profile is for.

    Raises:
        ConfigError: a profile of one module, or without times of forward passes.
    """
    profile = Profile.read(Path(settings.profile))
    if len(profile.modules) < 2 or not any(module.forward_s for module in profile.modules):
        raise ConfigError(
            f"--profile {settings.profile}: {len(profile.modules)} modules; give two or more, with their forward_s"
        )
    return {"ranks": (len(profile.modules),), "batch": profile.batch_size}


if __name__ == "__main__":
    try:
        main()
    except (ConfigError, RanksFailed, ChartError) as error:
        sys.exit(f"scaling.py: {error}")
