"""Explain a training run without starting it: placement, predicted step time, bubble, memory, messages.

    python launch/plan.py --ranks 4                                     the default recipe, its modules profiled here
    python launch/plan.py --ranks 4 --schedule                          and what every rank does in a step
    localpipe plan --ranks 8 --recipe cifar10-resnet110-k32-dgl-hpff --profile mine.json --chart steps.png
"""

from __future__ import annotations

import argparse
import importlib.util
import math
import sys
from pathlib import Path

import pipeline


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--recipe", metavar="NAME", help="a recipe that ships with localpipe")
    parser.add_argument("--config", metavar="FILE.toml", type=Path, help="your own recipe; on top of --recipe if both")
    parser.add_argument("--set", metavar="KEY=VALUE", action="append", default=[], help="change one key; repeatable")
    parser.add_argument("--ranks", metavar="P", type=int, default=1, help="processes, of all replicas; default 1")
    parser.add_argument("--schedule", action="store_true", help="print what every rank does in one step")
    parser.add_argument("--profile", metavar="FILE.json", type=Path, help="use these costs, measure nothing")
    parser.add_argument("--whole", action="store_true", help="measure whole steps, however long they take")
    parser.add_argument("--save-profile", metavar="FILE.json", type=Path, help="write the costs used")
    parser.add_argument("--latency-us", metavar="US", type=float, default=0.0, help="of a message; default 0")
    parser.add_argument("--gbit", metavar="RATE", type=float, default=math.inf, help="Gbit/s of a link; default any")
    parser.add_argument("--chart", metavar="FILE.png", type=Path, help="draw two steps of the full pipeline")
    parser.add_argument("--json", metavar="FILE.json", type=Path, help="write the plan")


def run(arguments: argparse.Namespace) -> int:
    return pipeline.command(lambda: _plan(arguments))


def _plan(arguments: argparse.Namespace) -> int:
    _refuse_files(arguments)
    config = pipeline.load_config(arguments.recipe, arguments.config, arguments.set)
    profile = pipeline.Profile.read(arguments.profile) if arguments.profile else None  # None: measured here
    link = {"latency_s": arguments.latency_us * 1e-6, "bytes_per_s": arguments.gbit * 1e9 / 8}
    report = pipeline.explain(config, arguments.ranks, profile, count=True, forms=True, whole=arguments.whole, **link)
    pipeline.show_plan(report)
    if arguments.schedule:
        print(f"\n{pipeline.schedule_text(report)}")
    if arguments.save_profile:
        report.profile.write(arguments.save_profile)
    if arguments.chart:
        pipeline.plot_timeline(report.events, arguments.chart, report.first_step, title=report.lines[0])
    if arguments.json:
        report.write_json(arguments.json)
    if report.refusal:
        print(f"localpipe: {report.refusal}", file=sys.stderr)
        return 2
    return 0


def _refuse_files(arguments: argparse.Namespace) -> None:
    """What cannot be written in the end is said before anything is measured."""
    for path in (arguments.save_profile, arguments.chart, arguments.json):
        if path is not None and not path.absolute().parent.is_dir():
            raise pipeline.ConfigError(f"'{path}': there is no directory '{path.parent}'; make it, or choose another")
    if arguments.chart and importlib.util.find_spec("matplotlib") is None:
        raise pipeline.ConfigError(f"--chart {arguments.chart} needs matplotlib; run: pip install localpipe[plot]")
