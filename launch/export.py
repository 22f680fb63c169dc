"""Write the weights of a checkpoint as one file for the un-cut network: ``python launch/export.py --help``."""

from __future__ import annotations

import sys

from pipeline.cli import export
from pipeline.cli.main import script


def main() -> int:
    return script(export)


if __name__ == "__main__":
    sys.exit(main())
