"""Explain a training run without starting it: ``python launch/plan.py --help``."""

from __future__ import annotations

import sys

from pipeline.cli import plan
from pipeline.cli.main import script


def main() -> int:
    return script(plan)


if __name__ == "__main__":
    sys.exit(main())
