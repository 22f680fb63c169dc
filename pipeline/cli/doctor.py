"""Say what this node has, how fast its ranks reach each other, and what to repair before training.

    localpipe doctor                                       this node, in ten lines
    localpipe doctor --nproc 4 --recipe NAME               and four ranks, with the messages of a recipe
    torchrun --nproc_per_node=4 launch/doctor.py           the same from a clone; on several nodes as for training

Exit code 0: fit to train. 1: not, and the last line says why; a rank that fails or does not answer is named.
"""

from __future__ import annotations

import argparse
import os
from pathlib import Path

import pipeline
from pipeline.cli import torchrun


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--recipe", metavar="NAME", help="send messages of the sizes of this recipe")
    parser.add_argument("--config", metavar="FILE.toml", type=Path, help="your own recipe; on top of --recipe if both")
    parser.add_argument("--set", metavar="KEY=VALUE", action="append", default=[], help="change one key; repeatable")
    parser.add_argument(
        "--nproc", metavar="N|auto", help="start torchrun with so many processes; auto: one per GPU, or per core"
    )
    parser.add_argument("--run-dir", metavar="DIR", type=Path, help="where results will go; default runs")
    parser.add_argument("--seconds", metavar="S", type=float, default=5.0, help="for all pairs of ranks; default 5")
    parser.add_argument("--json", metavar="FILE.json", type=Path, help="write findings and numbers")


def run(arguments: argparse.Namespace) -> int:
    return pipeline.command(lambda: _doctor(arguments))


def _doctor(arguments: argparse.Namespace) -> int:
    first = os.environ.get("RANK", "0") == "0"
    if not 0 < arguments.seconds <= 600:
        raise pipeline.ConfigError(f"--seconds {arguments.seconds:g}: more than 0, at most 600")
    if first and arguments.json and not arguments.json.absolute().parent.is_dir():
        raise pipeline.ConfigError(f"--json '{arguments.json}': there is no directory '{arguments.json.parent}'")
    config = pipeline.load_config(arguments.recipe, arguments.config, arguments.set)
    if arguments.nproc is not None:
        os.environ.pop("RANK", None)  # PyTorchJob's number of a node
        torchrun.become_torchrun(arguments.nproc, config.local_modules, ["doctor", *arguments.words])
    diagnosis = pipeline.diagnose(
        config,
        run_dir=arguments.run_dir,
        seconds=arguments.seconds,
        sized=bool(arguments.recipe or arguments.config),
        tell=pipeline.show_finding,
    )
    if not first:
        return 0  # rank 0 says it for all
    pipeline.show_verdict(diagnosis)
    if arguments.json:
        diagnosis.write_json(arguments.json)
    return 0 if diagnosis.fit else 1
