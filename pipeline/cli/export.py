"""Write the weights of a checkpoint as one file for the un-cut network, or as a directory that says what they are.

    python launch/export.py runs/mine --output mine.pt                     the newest valid checkpoint of a run
    localpipe export runs/mine/checkpoints/step-00000800 --output mine.safetensors --heads
    localpipe export runs/mine --output mine.pt --ema                      the averages of a run with train.ema
    localpipe export runs/mine --output mine --format hub                  config.json, model.safetensors, README.md
"""

from __future__ import annotations

import argparse
from pathlib import Path

import pipeline


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("source", metavar="CHECKPOINT_OR_RUN", type=Path, help="a step directory, or a run directory")
    parser.add_argument(
        "--output", metavar="PATH", type=Path, required=True, help="a new .pt, .pth or .safetensors; hub: a directory"
    )
    parser.add_argument("--heads", action="store_true", help="add the auxiliary heads (heads.module0. ...)")
    parser.add_argument("--ema", action="store_true", help="the moving averages of all weights (train.ema)")
    parser.add_argument("--format", choices=("pt", "safetensors", "hub"), help="default: as the name of the file says")


def run(arguments: argparse.Namespace) -> int:
    return pipeline.command(lambda: _export(arguments))


def _export(arguments: argparse.Namespace) -> int:
    heads, fmt, ema = arguments.heads, arguments.format, arguments.ema
    print(pipeline.export(arguments.source, arguments.output, heads=heads, fmt=fmt, ema=ema))
    return 0
