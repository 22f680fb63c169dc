"""Train a network by local learning, one process per stage.

    torchrun --nproc_per_node=4 launch/train.py                                   the default recipe
    torchrun --nproc_per_node=4 -m pipeline train                                 the same, of the installed package
    localpipe train --nproc 4 --recipe cifar10-resnet32-k16-dgl-hpff              starts torchrun itself
    python launch/train.py --set model.modules=1                                  backpropagation, one process
"""

from __future__ import annotations

import argparse
import os
import sys
from pathlib import Path

import pipeline
from pipeline.cli import torchrun


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--recipe", metavar="NAME", help="a recipe that ships with localpipe (see --list-recipes)")
    parser.add_argument("--config", metavar="FILE.toml", type=Path, help="your own recipe; on top of --recipe if both")
    parser.add_argument("--set", metavar="KEY=VALUE", action="append", default=[], help="change one key; repeatable")
    parser.add_argument(
        "--nproc", metavar="N|auto", help="start torchrun with so many processes; auto: one per GPU, or per core"
    )
    parser.add_argument("--run-dir", metavar="DIR", type=Path, help="where results go; default runs/NAME-TIME")
    parser.add_argument(
        "--resume", metavar="auto|none|PATH", default="auto", help="auto: from the newest checkpoint in --run-dir"
    )
    parser.add_argument("--quiet", action="store_true", help="print only the final report")
    parser.add_argument("--trace", action="store_true", help="write trace.json (Chrome, Perfetto), trace.png")
    parser.add_argument("--list-recipes", action="store_true", help="print recipes and the papers' figures, and end")
    parser.add_argument("--list-keys", action="store_true", help="print a table of all keys (Markdown), and end")
    parser.add_argument("--print-config", action="store_true", help="print the resolved configuration and end")


def run(arguments: argparse.Namespace) -> int:
    starts = arguments.nproc is not None
    if starts:
        os.environ.pop("RANK", None)  # PyTorchJob's number of a node; each node says what it refuses
    # Whoever becomes torchrun leaves signals alone: one that was noted here would be forgotten there.
    return pipeline.command(lambda: _train(arguments, starts), trains=not starts)


def _train(arguments: argparse.Namespace, starts: bool) -> int:
    first = os.environ.get("RANK", "0") == "0"
    if arguments.list_recipes or arguments.list_keys:
        if first:
            print(pipeline.recipes_text() if arguments.list_recipes else pipeline.keys_markdown())
        return 0
    config = pipeline.load_config(arguments.recipe, arguments.config, arguments.set)
    if arguments.print_config:
        if first:
            sys.stdout.buffer.write(pipeline.to_toml(config, comments=True).encode())  # UTF-8 in any locale
        return 0
    if first:
        pipeline.refuse_missing_loggers(config)
    if starts:
        replicas = (config.parallel.replicas, config.parallel.stages)
        torchrun.become_torchrun(
            arguments.nproc, config.local_modules, ["train", *arguments.words], *replicas
        )
    pipeline.train(
        config, run_dir=arguments.run_dir, resume=arguments.resume, quiet=arguments.quiet, trace=arguments.trace
    )
    return 0
