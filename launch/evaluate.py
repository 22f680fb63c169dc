"""Test a checkpoint, its early exits, and the exits together: ``python launch/evaluate.py --help``."""

from __future__ import annotations

import sys

from pipeline.cli import evaluate
from pipeline.cli.main import script


def main() -> int:
    return script(evaluate)


if __name__ == "__main__":
    sys.exit(main())
