"""Test a checkpoint: the network, each of its early exits, and the exits together.

    python launch/evaluate.py runs/mine                                    the newest valid checkpoint of a run
    localpipe evaluate runs/mine --set precision.compute=fp32 --json exits.json
"""

from __future__ import annotations

import argparse
from pathlib import Path

import pipeline


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("source", metavar="CHECKPOINT_OR_RUN", type=Path, help="a step directory, or a run directory")
    parser.add_argument(
        "--set", metavar="KEY=VALUE", action="append", default=[], help="data.*, precision.*, runtime.device, .threads"
    )
    parser.add_argument("--ema", action="store_true", help="the moving averages of all weights (train.ema)")
    parser.add_argument("--json", metavar="FILE.json", type=Path, help="write the numbers")


def run(arguments: argparse.Namespace) -> int:
    return pipeline.command(lambda: _evaluate(arguments))


def _evaluate(arguments: argparse.Namespace) -> int:
    evaluation = pipeline.evaluate(arguments.source, arguments.set, ema=arguments.ema)
    pipeline.show_evaluation(evaluation)
    if arguments.json:
        evaluation.write_json(arguments.json)
    return 0
