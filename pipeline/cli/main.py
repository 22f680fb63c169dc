"""Local learning as a pipeline: one process per stage.

    localpipe train --nproc 4 --recipe cifar10-resnet32-k16-dgl-hpff
    localpipe plan --ranks 4
    localpipe doctor --nproc 4
    localpipe COMMAND --help
"""

from __future__ import annotations

import argparse
import sys
from types import ModuleType

import pipeline
from pipeline.cli import compare, doctor, evaluate, export, plan, train

COMMANDS = (train, plan, evaluate, export, compare, doctor)
"""Each adds its arguments to a parser, and runs what has been parsed; ``words`` is all that followed its name."""


def main() -> int:
    """The console script ``localpipe``, and ``python -m pipeline``."""
    parser = _parser(sys.modules[__name__], prog="localpipe")
    parser.add_argument("--version", action="version", version=pipeline.__version__)
    commands = parser.add_subparsers(metavar="COMMAND", required=True)
    for command in COMMANDS:
        text = str(command.__doc__)
        one = commands.add_parser(
            command.__name__.rpartition(".")[2],
            help=text.partition("\n")[0],
            description=text,
            formatter_class=argparse.RawDescriptionHelpFormatter,
        )
        command.add_arguments(one)
        one.set_defaults(run=command.run, words=sys.argv[2:])
    arguments = parser.parse_args()
    code: int = arguments.run(arguments)
    return code


def script(command: ModuleType) -> int:
    """A file of launch/: one command, whose name is that of the file."""
    parser = _parser(command)
    command.add_arguments(parser)
    parser.set_defaults(words=sys.argv[1:])
    code: int = command.run(parser.parse_args())
    return code


def _parser(module: ModuleType, prog: str | None = None) -> argparse.ArgumentParser:
    return argparse.ArgumentParser(
        prog=prog, description=module.__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
