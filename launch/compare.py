"""Runs beside each other: a table and a picture: ``python launch/compare.py --help``."""

from __future__ import annotations

import sys

from pipeline.cli import compare
from pipeline.cli.main import script


def main() -> int:
    return script(compare)


if __name__ == "__main__":
    sys.exit(main())
