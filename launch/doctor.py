"""Say what this node has and what to repair before training: ``python launch/doctor.py --help``."""

from __future__ import annotations

import sys

from pipeline.cli import doctor
from pipeline.cli.main import script


def main() -> int:
    return script(doctor)


if __name__ == "__main__":
    sys.exit(main())
