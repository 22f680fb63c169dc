"""Runs beside each other: what each has reached, how fast, with how much memory, and in which keys they differ.

    python launch/compare.py runs/mine runs/other                          a table
    localpipe compare runs/* --output runs.png --json runs.json            and a picture, and the numbers

Exit code 0: all could be read; 1: some could not, and a line says why of each.
"""

from __future__ import annotations

import argparse
import importlib.util
from pathlib import Path

import pipeline


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("runs", metavar="RUN", type=Path, nargs="+", help="a run directory; one that still goes on too")
    parser.add_argument("--output", metavar="FILE.png", type=Path, help="draw the test against epochs and time")
    parser.add_argument("--json", metavar="FILE.json", type=Path, help="write the numbers")


def run(arguments: argparse.Namespace) -> int:
    return pipeline.command(lambda: _compare(arguments))


def _compare(arguments: argparse.Namespace) -> int:
    for path in (arguments.output, arguments.json):
        if path is not None and not path.absolute().parent.is_dir():
            raise pipeline.ConfigError(f"'{path}': there is no directory '{path.parent}'; make it, or choose another")
    if arguments.output and importlib.util.find_spec("matplotlib") is None:
        raise pipeline.ConfigError(f"--output {arguments.output} needs matplotlib; run: pip install localpipe[plot]")
    comparison = pipeline.compare(arguments.runs)
    pipeline.show_comparison(comparison)
    if arguments.json:
        comparison.write_json(arguments.json)
    if arguments.output:
        pipeline.plot_comparison(comparison, arguments.output)
    return 1 if comparison.left_out else 0
