"""Train a network by local learning, one process per stage: ``python launch/train.py --help``."""

from __future__ import annotations

import sys

from pipeline.cli import train
from pipeline.cli.main import script


def main() -> int:
    return script(train)


if __name__ == "__main__":
    sys.exit(main())
