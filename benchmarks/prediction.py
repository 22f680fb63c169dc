"""How well launch/plan.py predicts a run, and what a placement by measured cost gains over one by number.

    python benchmarks/prediction.py [--model NAME] [--modules K] [--ranks P] [--batch N] [--rounds N] [--quick]
                                    [--json FILE] [--output FILE.md]

Every rank has a core of its own and one thread. For every method: its modules are profiled on one core while the others
rest, the plan predicts the step of both placements, and both then run. Rounds are interleaved.
"""

from __future__ import annotations

import argparse
import statistics
import sys
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any

import torch
from ours import LocalPipeline, Repeated
from ranks import Rank, RanksFailed, available_cores, run_ranks
from step_cost import CLASSES, IMAGE
from tables import (
    Row,
    at_least,
    check_targets,
    document,
    markdown,
    number,
    output_options,
    per_rank,
    provenance,
    show,
    write_json,
)
from torch import nn

from pipeline import ConfigError, LoaderData, backbone_names, build_blocks, explain, from_dict, measure

METHODS = (("dgl", 1, "exact"), ("infopro", 1, "exact"), ("infopro", 2, "exact"), ("infopro", 2, "async"))
"""(method, cascade span, schedule)."""
PLACEMENTS = ("count", "measured")
COLUMNS = (
    "method", "schedule", "placement", "modules", "predicted ms", "measured ms", "low", "high", "measured / predicted",
    "busy",
)  # fmt: skip


@dataclass(frozen=True)
class Settings:
    """One benchmark; a burst is ``warmup`` and ``steps`` timed steps."""

    model: str = "resnet32"
    modules: int = 8
    ranks: int = 2
    batch: int = 64
    rounds: int = 5
    warmup: int = 2
    steps: int = 4
    deadline_s: float = 1200.0


@dataclass(frozen=True)
class PredictedRow(Row):
    """A :class:`tables.Row` with what the plan said.

    Attributes:
        placement: ``partition.kind``. sizes: modules of every rank.
        predicted_s: seconds of a step, median of the plans of all rounds.
        ratio: measured / predicted, median over rounds.
    """

    placement: str
    sizes: tuple[int, ...]
    predicted_s: float
    ratio: float


@dataclass(frozen=True)
class Sample:
    """One plan and one run of it (rank 0)."""

    sizes: tuple[int, ...]
    predicted_s: float
    step_s: float
    work_s: tuple[float, ...]
    sent: float


def sections(settings: Settings, method: str, span: int, kind: str) -> dict[str, dict[str, Any]]:
    """The configuration without a placement."""
    return {
        "model": {"name": settings.model, "modules": settings.modules, "cuts": "even"},
        "method": {"name": method},
        "hierarchy": {"cascade_span": span},
        "patches": {"grid": span},
        "schedule": {"kind": kind},
        "data": {"name": "cifar10", "batch_size": settings.batch},
        "optim": {"schedule": "constant", "warmup_epochs": 0},
        "train": {"epochs": 1},
        "precision": {"compute": "fp32"},
        "runtime": {"device": "cpu", "threads": 1, "deadline_s": 300.0},
    }


def work(rank: Rank, settings: Settings) -> list[tuple[tuple[str, int, str, str], Sample]]:
    """All rounds on one rank; rank 0 hands back the samples."""
    runner = LocalPipeline(rank, settings.warmup, settings.steps)
    generator = torch.Generator().manual_seed(0)
    images = torch.randint(256, (settings.batch, *IMAGE), generator=generator, dtype=torch.uint8)
    labels = torch.randint(CLASSES, (settings.batch,), generator=generator)
    data = LoaderData(Repeated(runner.batches, images, labels), Repeated(1, images[:2], labels[:2]))
    found = []
    for _ in range(settings.rounds):
        for what in METHODS:
            base = sections(settings, *what)
            profile = measure(from_dict(base), settings.ranks) if rank.leader else None
            for placement in PLACEMENTS:
                plan = None
                if profile is not None:
                    plan = explain(from_dict({**base, "partition": {"kind": placement}}), settings.ranks, profile)
                sizes, predicted_s = rank.share(plan and (plan.placements[0].sizes, plan.step_s))
                torch.manual_seed(0)
                network = nn.Sequential(*build_blocks(settings.model, IMAGE[0], CLASSES).values())
                given = {**base, "partition": {"kind": "given", "stages": list(sizes)}}
                burst = runner.burst(given, data, network)
                if burst is not None:
                    sample = Sample(tuple(sizes), predicted_s, max(burst.step_s), burst.work_s, burst.sent)
                    found.append(((*what, placement), sample))
    return found


def rows_of(settings: Settings, found: Sequence[tuple[tuple[str, int, str, str], Sample]]) -> list[PredictedRow]:
    """One row per method, schedule and placement."""
    rows = []
    for key in dict.fromkeys(key for key, _ in found):
        method, span, kind, placement = key
        mine = [sample for other, sample in found if other == key]
        step_s = statistics.median(sample.step_s for sample in mine)
        work_s = tuple(map(statistics.median, zip(*(sample.work_s for sample in mine), strict=True)))
        rows.append(
            PredictedRow(
                system="localpipe",
                method=method if span == 1 else f"{method} + hpff",
                schedule=kind,
                ranks=settings.ranks,
                modules=settings.modules,
                micro_batches=1,
                images_per_s=settings.batch / step_s,
                low=settings.batch / max(sample.step_s for sample in mine),
                high=settings.batch / min(sample.step_s for sample in mine),
                ratio_to_bp=None,
                bound=settings.batch / max(work_s),
                efficiency=max(work_s) / step_s,
                busy=tuple(seconds / step_s for seconds in work_s),
                bytes_per_step=mine[0].sent,
                placement=placement,
                sizes=mine[-1].sizes,
                predicted_s=statistics.median(sample.predicted_s for sample in mine),
                ratio=statistics.median(sample.step_s / sample.predicted_s for sample in mine),
            )
        )
    return rows


def cells(settings: Settings, rows: Sequence[PredictedRow]) -> list[list[str]]:
    """The table as text."""
    return [
        [
            row.method,
            row.schedule,
            row.placement,
            "/".join(map(str, row.sizes)),
            *(number(1e3 * seconds, ".0f") for seconds in (row.predicted_s, settings.batch / row.images_per_s)),
            *(number(1e3 * settings.batch / rate, ".0f") for rate in (row.high, row.low)),
            number(row.ratio, ".2f"),
            per_rank(row.busy, ".2f"),
        ]
        for row in rows
    ]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    default = Settings()
    parser.add_argument("--model", choices=backbone_names(), default=default.model, help="backbone")
    parser.add_argument("--modules", type=at_least(2), metavar="K", default=default.modules, help="local modules")
    parser.add_argument("--ranks", type=at_least(2), metavar="P", default=default.ranks, help="processes")
    parser.add_argument("--batch", type=at_least(2), metavar="N", default=default.batch, help="images per step")
    parser.add_argument("--rounds", type=at_least(1), metavar="N", default=default.rounds, help="interleaved rounds")
    parser.add_argument("--quick", action="store_true", help="one round at batch 8: less than a minute")
    output_options(parser)
    options = vars(parser.parse_args())
    targets = {name: options.pop(name) for name in ("json", "output")}
    check_targets(**targets)
    if options.pop("quick"):
        options |= {"batch": 8, "rounds": 1}
    settings = Settings(**options)
    if settings.ranks > (cores := len(available_cores())):
        raise ConfigError(f"--ranks {settings.ranks} on {cores} cores: every rank needs one of its own; use fewer")
    found = run_ranks(work, settings.ranks, settings, deadline_s=settings.deadline_s)[0]
    rows = rows_of(settings, found)
    result = document(asdict(settings), [asdict(row) for row in rows])
    show("predicted and measured steps", COLUMNS, cells(settings, rows))
    if targets["json"] is not None:
        write_json(targets["json"], result)
    if targets["output"] is not None:
        text = [
            "# Predicted and measured",
            provenance(result, " ".join(["python benchmarks/prediction.py", *sys.argv[1:]])),
            f"{settings.model}, K = {settings.modules}, {settings.ranks} ranks of one core and one thread each, batch "
            f"{settings.batch}; {settings.rounds} interleaved rounds of {settings.warmup} + {settings.steps} steps. "
            "Predicted: by the plan, from a profile taken in the same round on one core while the others rested. "
            "Expected: within 10 %, and a step by measured cost never slower than one by number.",
            markdown(COLUMNS, cells(settings, rows)) + "\n",
        ]
        targets["output"].write_text("\n\n".join(text), encoding="utf-8")


if __name__ == "__main__":
    try:
        main()
    except (ConfigError, RanksFailed) as error:
        sys.exit(f"prediction.py: {error}")
