"""Test a checkpoint: the network, each of its early exits, and the exits together.

    python launch/evaluate.py runs/mine                                    the newest valid checkpoint of a run
    python launch/evaluate.py runs/mine --set precision.compute=fp32 --json exits.json
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

import pipeline


def main() -> int:
    return pipeline.command(_evaluate)


def _evaluate() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("source", metavar="CHECKPOINT_OR_RUN", type=Path, help="a step directory, or a run directory")
    parser.add_argument(
        "--set", metavar="KEY=VALUE", action="append", default=[], help="data.*, precision.*, runtime.device, .threads"
    )
    parser.add_argument("--json", metavar="FILE.json", type=Path, help="write the numbers")
    arguments = parser.parse_args()
    evaluation = pipeline.evaluate(arguments.source, arguments.set)
    pipeline.show_evaluation(evaluation)
    if arguments.json:
        evaluation.write_json(arguments.json)
    return 0


if __name__ == "__main__":
    sys.exit(main())
